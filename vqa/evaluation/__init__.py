"""What a score is worth: metrics with intervals, paired tests, out-of-fold predictions, ensembles, the experiment log.

It works on probabilities in memory or in files, never on a model. May import `core`, `config` and `data`.
"""
