"""The Trainer of a fold and what surrounds it: averages, checkpoints, batch sizes, memory estimates, checks, search.

May import every package but `reports`.
"""
