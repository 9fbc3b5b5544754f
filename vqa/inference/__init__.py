"""One forward pass to choice probabilities: scoring, test-time augmentation, the predictor behind `predict.py`.

Training validates through this package too. May import every package above, not `training` or `reports`.
"""
