"""Rows -> a padded batch whose labels cover the assistant's answer and nothing else.

collate = Collator(processor, image_size=384)                      # prompts, for scoring
collate = Collator(processor, image_size=384, with_answer=True)    # prompts and answers, for training
"""

import torch
from qwen_vl_utils import process_vision_info

from vqa.config.arguments import INSTRUCTION
from vqa.data.images import resized_image_item
from vqa.data.prompt import LETTERS, added_tokens, build_messages, render_chat, shown_answer, shown_target

IGNORE = -100  # the label that torch's cross-entropy leaves out


PADDING = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


class Collator:
    """Turn rows into one batch of tensors, padded on the left so that every answer ends at the same column.

    Args:
        processor: the model's `AutoProcessor`.
        image_size: pixel budget, the side of a square with as many pixels; the aspect of the image is kept.
        instruction: the last line of the user's turn.
        with_answer: append the answer and label it. Otherwise the text ends where the model has to write.
        features: a `FeatureStore`. Where it holds every image of a batch, none is decoded, and the batch has
            `image_features` (1 + deepstack layers, image tokens of all rows, hidden) in place of `pixel_values`.

    A row is a dict with `image` (path, or None for one that is asked by its text alone), `question`, `choices` and,
    with answers, `answer` (index of the right choice); `order` (the choice shown at each letter), `scale` and `flip`
    (of the image) and `target` (how likely each choice is to be right, for soft labels) are optional. Rows are not
    changed.

    The batch holds every key that the processor returns (`input_ids`, `attention_mask`, `mm_token_type_ids`,
    `pixel_values`, `image_grid_thw`), and
        ids: the rows' ids, for messages that name a row;
        offered: bool (rows, 10), which letters the row offers;
    and with answers
        labels: int64 (rows, tokens), the token id at the answer's letter and at the end of the turn, -100 elsewhere;
        answer_start: int, the column of the answer's letter, the first that has a label;
        answer: int64 (rows,), the position of the right letter;
        target: float32 (rows, 10), how likely each letter is to be right, where a row has soft labels.

        <|im_start|> system ... <|im_end|> ... <|im_start|> assistant \\n   b   <|im_end|>   \\n
            -100      -100        -100             -100       -100   -100   66    151645    -100
    """

    def __init__(
        self, processor, image_size: int, instruction: str = INSTRUCTION, with_answer: bool = False, features=None
    ):
        self.processor = processor
        self.image_size = image_size
        self.instruction = instruction
        self.with_answer = with_answer
        self.features = features
        self.special = added_tokens(processor)

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        stored = self.features is not None and self.features.holds(rows)
        conversations = [self.conversation(row, decode=not stored) for row in rows]
        prompts = [render_chat(self.processor, conversation) for conversation in conversations]
        texts = prompts
        if self.with_answer:
            letters = [LETTERS[shown_answer(row)] for row in rows]
            texts = [render_chat(self.processor, c, letter) for c, letter in zip(conversations, letters)]

        batch = self.with_features(texts, rows) if stored else self.with_pixels(texts, conversations)
        batch["ids"] = [row["id"] for row in rows]
        batch["offered"] = torch.tensor([[i < len(row["choices"]) for i in range(len(LETTERS))] for row in rows])
        if self.with_answer:
            batch["labels"] = self.labels(batch["input_ids"], prompts, texts)
            batch["answer_start"] = int((batch["labels"][0] != IGNORE).nonzero()[0])  # the same in every row
            batch["answer"] = torch.tensor([shown_answer(row) for row in rows])
            if any("target" in row for row in rows):
                batch["target"] = torch.tensor([shown_target(row) for row in rows], dtype=torch.float32)
        return batch

    def with_pixels(self, texts: list[str], conversations: list[list[dict]]) -> dict[str, torch.Tensor]:
        """What the processor makes of the texts and the decoded images."""
        images, _ = process_vision_info(conversations, image_patch_size=self.processor.image_processor.patch_size)
        # The images already have their final size: a second resize would blur them and could change the grid.
        return dict(self.processor(text=texts, images=images, do_resize=False, **PADDING))

    def with_features(self, texts: list[str], rows: list[dict]) -> dict[str, torch.Tensor]:
        """The same without pixels: each text's one image token, repeated as often as the image's grid asks for.

        The processor itself expands no text without images; a text holds no other image token (`vqa.prompt.plain`).
        """
        features, grids = self.features.read(rows)
        token, merge = self.processor.image_token, self.processor.image_processor.merge_size
        counts = (grids.prod(1) // merge**2).tolist()
        batch = self.processor.tokenizer(
            [text.replace(token, token * count) for text, count in zip(texts, counts)], **PADDING
        )
        kinds = (batch["input_ids"] == self.processor.image_token_id).long()
        return dict(batch) | {"mm_token_type_ids": kinds, "image_grid_thw": grids, "image_features": features}

    def conversation(self, row: dict, decode: bool = True) -> list[dict]:
        """The row's chat messages; with `decode` they hold the image and the size that it is to be given."""
        image = {"type": "image"}
        if row["image"] is None:
            image = None
        elif decode:
            image |= resized_image_item(row, self.image_size, self.processor.image_processor.patch_size)
        return build_messages(row, image, self.instruction, self.special)

    def labels(self, input_ids: torch.Tensor, prompts: list[str], texts: list[str]) -> torch.Tensor:
        """Labels by construction: what follows the prompt is the letter, the end of the turn, and white space.

        Nothing is searched for, so a question that contains the answer, or the word "assistant", changes nothing.
        """
        labels = torch.full_like(input_ids, IGNORE)
        for i, (prompt, text) in enumerate(zip(prompts, texts)):
            tail = self.processor.tokenizer(text[len(prompt) :]).input_ids
            start = input_ids.shape[1] - len(tail)
            if input_ids[i, start:].tolist() != tail:
                raise ValueError(
                    f"the answer {text[len(prompt) :]!r} is not tokenised on its own as it is in the chat"
                )
            labels[i, start : start + 2] = input_ids[i, start : start + 2]
        return labels
