"""EMA and SWA of the trainable weights as TrainerCallbacks. The code is in `vqa/training/callbacks.py`.

from callbacks import EMACallback, SWACallback
trainer = Trainer(..., callbacks=[EMACallback(decay=0.99), SWACallback(start=0.5)])
"""

from vqa.training.callbacks import EMACallback, SWACallback, WeightAverage

__all__ = ["EMACallback", "SWACallback", "WeightAverage"]
