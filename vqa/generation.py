"""What transformers' own `generate` writes for a row, to hold against the letter that is read from the logits."""

from collections.abc import Sequence

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from collator import Collator
from vqa.precision import half_autocast
from vqa.scoring import MODEL_KEYS_LEFT_OUT


@torch.inference_mode()
def generated(model: torch.nn.Module, rows: Sequence[dict], collate: Collator, batch_size: int) -> list[str]:
    """The text of two tokens, by greedy search from the pixels, for each row: room for a letter and the turn's end."""
    device, texts = next(model.parameters()).device, []
    for batch in DataLoader(list(rows), batch_size, collate_fn=collate):
        inputs = {key: value for key, value in batch.items() if key not in MODEL_KEYS_LEFT_OUT}
        with half_autocast(model):
            tokens = model.generate(
                **send_to_device(inputs, device),
                max_new_tokens=2,
                do_sample=False,
                repetition_penalty=1.0,  # the model folder's own settings may sample and penalise
                temperature=None,
                top_p=None,
                top_k=None,
            )
        texts += collate.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [text.strip() for text in texts]
