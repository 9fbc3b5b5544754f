"""Rows -> a padded batch whose labels cover only the assistant's answer. The code is in `vqa/data/collator.py`.

from collator import Collator
collate = Collator(processor, image_size=384, with_answer=True)
"""

from vqa.data.collator import IGNORE, Collator

__all__ = ["IGNORE", "Collator"]
