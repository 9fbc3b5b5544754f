"""From the contest's files to a batch of tensors, and from probabilities to prediction and submission files.

No model is loaded or run here. May import `core` and `config`.
"""
