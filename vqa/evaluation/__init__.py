"""How good predictions are, and how to combine them. It works on probabilities in memory or in files, not on models.

metrics: accuracy and log-loss with intervals. significance: paired tests. labels: the answers of a CSV. oof:
out-of-fold predictions. ensembling: ensembles and the choice among them. stacking:
weights of models by maximum likelihood. experiment_log: a row for every run.

May import `core`, `config` and `data`.
"""
