"""Rows -> a padded batch whose labels cover only the assistant's answer.

collate = Collator(processor, image_size=384)                      # prompts, for scoring
collate = Collator(processor, image_size=384, with_answer=True)    # prompts and answers, for training
batch = collate(rows)                                              # rows of `vqa.data.rows.read_rows`
"""

import re
from collections.abc import Sequence
from functools import cached_property

import torch
from qwen_vl_utils import process_vision_info

from vqa.config.arguments import INSTRUCTION
from vqa.data.image_inputs import ImageInputs
from vqa.data.images import shown_images
from vqa.data.prompt import added_tokens, answer_ids, build_messages, render_chat, shown_answer, shown_target
from vqa.data.rows import LETTERS, Row

IGNORE = -100  # the label that torch's cross-entropy ignores
PADDING = {"padding": True, "padding_side": "left", "return_tensors": "pt"}


class Collator:
    """Turn rows into one batch of tensors, padded on the left so that all answers end at the same column.

    Args:
        processor: the model's `AutoProcessor`.
        image_size: pixel budget: an image is resized to at most `image_size ** 2` pixels, aspect ratio kept.
        instruction: the last line of the user's turn.
        with_answer: append the answer and label it. Otherwise the text ends where the model writes its answer.
        features: a `FeatureStore`. If it has every image of a batch, no image is decoded, and the batch has
            `image_features` (1 + deepstack layers, image tokens of all rows, hidden) instead of `pixel_values`.

    Input keys of a row (`vqa.data.rows.Row`):
        id, question, choices; images: paths, none for a prompt without an image;
        answer: index of the right choice (only needed with answers);
        optional: permutation (choice shown at each letter), scale, flip and crops (of the images), target (soft
        label), weight (of the loss).

    Output keys:
        what the processor returns: input_ids, attention_mask, mm_token_type_ids and, of all images one after another,
        pixel_values and image_grid_thw (no such keys where no row has an image). A processor that resizes by its own
        rule has other keys, and `pixel_rows`: the number of entries of pixel_values that belong to each row, ints;
        ids: the rows' ids, for error messages;
        num_images: the number of images of each row, its crops included, ints;
        offered: bool (rows, letters), the letters that the row offers;
    and with answers:
        labels: int64 (rows, tokens), the token id at the answer's letter and the end of the turn, IGNORE elsewhere;
        answer_start: int, the column of the answer's letter, the same in every row;
        answer: int64 (rows,), index of the right letter;
        target: float32 (rows, letters), probability of each letter, if a row has a soft label;
        weight: float32 (rows,), if a row has a weight.

    Example: the labels of a row whose answer is b, in Qwen's vocabulary.

        input   <|image_pad|> ... only.  <|im_end|>  \\n    <|im_start|>  assistant  \\n    b    <|im_end|>  \\n
        labels  -100              -100   -100        -100  -100          -100       -100  65   151645      -100
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
        self.images = ImageInputs(processor, image_size)

    def __call__(self, rows: Sequence[Row]) -> dict:
        """The batch; the rows are not changed."""
        letters = [LETTERS[shown_answer(row)] if self.with_answer else None for row in rows]
        batch = self.encode(rows, letters)
        if self.with_answer:
            batch["labels"] = self.labels(batch["input_ids"], rows)
            batch["answer_start"] = int((batch["labels"][0] != IGNORE).nonzero()[0])
            batch |= right_answers(rows)
        return batch

    def encode(self, rows: Sequence[Row], answers: Sequence[str | None]) -> dict:
        """The batch of the rows' chats, each up to its answer in `answers`, without labels."""
        use_features = self.features is not None and self.features.holds(rows) and any(row["images"] for row in rows)
        conversations = [self.conversation(row, decode=not use_features) for row in rows]
        texts = [render_chat(self.processor, c, answer) for c, answer in zip(conversations, answers)]

        batch = self.with_features(texts, rows) if use_features else self.with_pixels(texts, conversations)
        batch["ids"] = [row["id"] for row in rows]
        batch["num_images"] = [len(shown_images(row)) for row in rows]
        batch["offered"] = torch.tensor([[i < len(row["choices"]) for i in range(len(LETTERS))] for row in rows])
        return batch

    def conversation(self, row: Row, decode: bool = True) -> list[dict]:
        """The row's chat messages without the answer; with `decode`, they hold the images."""
        items = [self.images.item(shown) for shown in shown_images(row)] if decode else None
        return build_messages(row, items, self.instruction, self.special)

    def chat_text(self, row: Row) -> str:
        """The row's chat with an answer, each image one token: its tokens are those of training."""
        return render_chat(self.processor, self.conversation(row, decode=False), LETTERS[0])

    def with_pixels(self, texts: list[str], conversations: list[list[dict]]) -> dict:
        """The processor's output for texts and decoded images."""
        if self.images.resized_here:
            images, _ = process_vision_info(conversations, image_patch_size=self.images.patch)
            # The images already have their final size: a second resize would blur them and could change the grid.
            return dict(self.processor(text=texts, images=images, do_resize=False, **PADDING))
        of_rows = [[item["image"] for item in c[0]["content"] if item["type"] == "image"] for c in conversations]
        images = of_rows if any(of_rows) else None
        batch = dict(self.processor(text=texts, images=images, **self.images.options, **PADDING))
        if images:
            batch["pixel_rows"] = self.pixel_rows(batch, list(map(len, of_rows)))
        return batch

    def pixel_rows(self, batch: dict, num_images: list[int]) -> list[int]:
        """How many entries of `pixel_values` each row has: one, or one for each image, or one for each tile."""
        entries = len(batch["pixel_values"])
        if "pixel_attention_mask" in batch:  # (rows, tiles, channels, height, width), padded
            return [1] * len(num_images)
        if entries == sum(num_images):
            return num_images
        tokens = (batch["input_ids"] == self.processor.image_token_id).sum(1)
        return (tokens * entries // tokens.sum()).tolist()

    def with_features(self, texts: list[str], rows: Sequence[Row]) -> dict:
        """The same batch from stored features. Each image token is repeated here, once per token of the image's grid.

        The processor does this only with images. No text has another image token: `escape_special_tokens` breaks it.
        """
        features, grids = self.features.read(rows)
        token, merge = self.processor.image_token, self.processor.image_processor.merge_size
        counts = iter((grids.prod(1) // merge**2).tolist())
        texts = [re.sub(re.escape(token), lambda _: token * next(counts), text) for text in texts]
        batch = self.processor.tokenizer(texts, **PADDING)
        kinds = (batch["input_ids"] == self.processor.image_token_id).long()
        return dict(batch) | {"mm_token_type_ids": kinds, "image_grid_thw": grids, "image_features": features}

    def labels(self, input_ids: torch.Tensor, rows: Sequence[Row]) -> torch.Tensor:
        """Labels by construction: a row ends with the letter, the end of the turn and what the template adds to it.

        Nothing is searched for, so a question that contains the answer or the word "assistant" changes nothing.
        """
        labels = torch.full_like(input_ids, IGNORE)
        for row, ids, row_labels in zip(rows, input_ids, labels):
            answer = self.answers[shown_answer(row)]
            if ids[-len(answer) :].tolist() != answer:
                raise ValueError(
                    f"{row['id']}: the chat does not end with {self.processor.tokenizer.decode(answer)!r}"
                )
            row_labels[-len(answer) :][:2] = ids[-len(answer) :][:2]
        return labels

    @cached_property
    def answers(self) -> list[list[int]]:
        return answer_ids(self.processor)


def right_answers(rows: Sequence[Row]) -> dict:
    """`answer`, and `target` and `weight` if a row has one: see the Collator's output keys."""
    answers = {"answer": torch.tensor([shown_answer(row) for row in rows])}
    if any("target" in row for row in rows):
        answers["target"] = torch.tensor([shown_target(row) for row in rows], dtype=torch.float32)
    if any("weight" in row for row in rows):
        answers["weight"] = torch.tensor([row.get("weight", 1.0) for row in rows])
    return answers
