"""A score for each choice as the assistant's answer: a linear layer reads the hidden state at its last token.

    system turn, images, question | red | dark blue | green      one sequence, see vqa/modeling/tree_attention.py

No choice has a letter, and none sees another one, so the scores do not depend on the order of the choices. Models such
as transformers' AutoModelForMultipleChoice score choices in this way, with a copy of the question for each.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import nn

from vqa.core.compat import unwrap_parallel
from vqa.core.errors import UserError
from vqa.data.collator import Collator, right_answers
from vqa.data.images import shown_images
from vqa.data.prompt import build_question, escape_special_tokens, render_chat, shown_choices
from vqa.data.rows import LETTERS, Row
from vqa.modeling.loading import DOES_NOT_FIT
from vqa.modeling.tree_attention import pack_suffixes, tree_logits
from vqa.modeling.vision import unwrap_base_model

HEAD_FILE = "score_head.safetensors"  # beside the adapter's files, which stay as PEFT reads them


class SuffixCollator(Collator):
    """Rows -> a batch of `pack_suffixes`: the prefix of a row is its question, the suffixes are its choices.

    Args and output keys are those of the Collator, without labels and answer_start. The instruction is not used. In
    place of suffix_end:
        choice_end: int64 (rows, most choices), the column of the last token of each choice as shown, -1 where a row
            has fewer. The suffixes themselves are sorted, so that not even rounding depends on the order shown.
    """

    def __call__(self, rows: Sequence[Row]) -> dict:
        batch = self.encode(rows, [None] * len(rows))
        lengths = batch["attention_mask"].sum(1).tolist()
        choices = [self.choice_ids(row) for row in rows]
        batch = pack_suffixes(batch, lengths, list(map(sorted, choices)), self.processor.tokenizer.pad_token_id)
        batch["choice_end"] = batch.pop("suffix_end")
        for ends, ids in zip(batch["choice_end"], choices):
            ends[: len(ids)] = ends[[sorted(ids).index(choice) for choice in ids]]
        return batch | right_answers(rows) if self.with_answer else batch

    def conversation(self, row: Row, decode: bool = True) -> list[dict]:
        items = [self.images.item(shown) for shown in shown_images(row)] if decode else None
        return build_question(row, items, self.special)

    def choice_ids(self, row: Row) -> list[list[int]]:
        """The token ids of each choice. Space around it is left out: it could merge with that of the template."""
        texts = [escape_special_tokens(choice.strip(), self.special) for choice in shown_choices(row)]
        return self.processor.tokenizer(texts, add_special_tokens=False).input_ids

    def chat_text(self, row: Row) -> str:
        """The question and all choices. Line breaks keep the choices' tokens apart: at most one more for each."""
        return "\n".join([render_chat(self.processor, self.conversation(row, decode=False)), *row["choices"]])


COLLATORS = {"letter": Collator, "suffix": SuffixCollator}  # by the field `score`


def suffix_scores(model: nn.Module, batch: dict) -> torch.Tensor:
    """Scores of a SuffixCollator's batch, float32 (rows, letters), as shown; -inf where a row offers no choice."""
    ends = batch["choice_end"]
    hidden = tree_logits(model, batch, ends, hidden=True)
    with torch.autocast(hidden.device.type, enabled=False):
        scores = unwrap_parallel(model).score_head(hidden)[..., 0]
    scores = scores.masked_fill(ends < 0, float("-inf"))
    return nn.functional.pad(scores, (0, len(LETTERS) - scores.shape[1]), value=float("-inf"))


def add_score_head(model: PeftModel) -> nn.Linear:
    """Give the model a `score_head`, trained and float32 as the adapter.

    Its weight begins at zero: all choices are equally likely, and no random preference has to be unlearned. It has no
    bias, which would add the same number to every choice.
    """
    base = unwrap_base_model(model)
    size = base.config.get_text_config().hidden_size
    model.score_head = nn.Linear(size, 1, bias=False, device=base.device, dtype=torch.float32)
    nn.init.zeros_(model.score_head.weight)
    return model.score_head


def save_score_head(model: PeftModel, folder: str | Path) -> None:
    save_file(model.score_head.state_dict(), Path(folder, HEAD_FILE))


def load_score_head(model: PeftModel, folder: str | Path) -> None:
    """Read the head in `folder` into the model, which gets one if it has none. Raises UserError for another size."""
    head = model.score_head if hasattr(model, "score_head") else add_score_head(model)
    try:
        head.load_state_dict(load_file(Path(folder, HEAD_FILE)))
    except RuntimeError as error:
        raise UserError(f"{folder}: {HEAD_FILE} {DOES_NOT_FIT} ({str(error)[:200]})") from None
