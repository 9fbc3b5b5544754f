"""From a checkpoint and rows to prediction files.

scoring: choice probabilities by one forward pass; training validates with it too. tta, view_cache, tta_report:
test-time augmentation and what it gains. checkpoints, jobs, predictor: what predict.py does.

May import every package above, not `training` or `reports`.
"""
