"""Rows -> a padded batch whose labels cover only the assistant's answer.

collate = Collator(processor, image_size=384)                      # prompts, for scoring
collate = Collator(processor, image_size=384, with_answer=True)    # prompts and answers, for training
batch = collate(rows)                                              # rows of `vqa.data.rows.read_rows`
"""

import re
from collections.abc import Sequence

import torch
from qwen_vl_utils import process_vision_info

from vqa.config.arguments import INSTRUCTION
from vqa.data.images import image_item, shown_images
from vqa.data.prompt import added_tokens, build_messages, render_chat, shown_answer, shown_target
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
        optional: permutation (choice shown at each letter), scale and flip (of the images), target (soft label).

    Output keys:
        what the processor returns: input_ids, attention_mask, mm_token_type_ids and, of all images one after another,
        pixel_values and image_grid_thw (no such keys where no row has an image);
        ids: the rows' ids, for error messages;
        num_images: the number of images of each row, ints;
        offered: bool (rows, letters), the letters that the row offers;
    and with answers:
        labels: int64 (rows, tokens), the token id at the answer's letter and the end of the turn, IGNORE elsewhere;
        answer_start: int, the column of the answer's letter, the same in every row;
        answer: int64 (rows,), index of the right letter;
        target: float32 (rows, letters), probability of each letter, if a row has a soft label.

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

    def __call__(self, rows: Sequence[Row]) -> dict:
        """The batch; the rows are not changed."""
        use_features = self.features is not None and self.features.holds(rows) and any(row["images"] for row in rows)
        conversations = [self.conversation(row, decode=not use_features) for row in rows]
        prompts = [render_chat(self.processor, conversation) for conversation in conversations]
        texts = prompts
        if self.with_answer:
            letters = [LETTERS[shown_answer(row)] for row in rows]
            texts = [render_chat(self.processor, c, letter) for c, letter in zip(conversations, letters)]

        batch = self.with_features(texts, rows) if use_features else self.with_pixels(texts, conversations)
        batch["ids"] = [row["id"] for row in rows]
        batch["num_images"] = [len(row["images"]) for row in rows]
        batch["offered"] = torch.tensor([[i < len(row["choices"]) for i in range(len(LETTERS))] for row in rows])
        if self.with_answer:
            batch["labels"] = self.labels(batch["input_ids"], prompts, texts)
            batch["answer_start"] = int((batch["labels"][0] != IGNORE).nonzero()[0])
            batch["answer"] = torch.tensor([shown_answer(row) for row in rows])
            if any("target" in row for row in rows):
                batch["target"] = torch.tensor([shown_target(row) for row in rows], dtype=torch.float32)
        return batch

    def conversation(self, row: Row, decode: bool = True) -> list[dict]:
        """The row's chat messages without the answer; with `decode`, they hold the images and their target sizes."""
        patch = self.processor.image_processor.patch_size
        items = [image_item(shown, self.image_size, patch) for shown in shown_images(row)] if decode else None
        return build_messages(row, items, self.instruction, self.special)

    def with_pixels(self, texts: list[str], conversations: list[list[dict]]) -> dict:
        """The processor's output for texts and decoded images."""
        images, _ = process_vision_info(conversations, image_patch_size=self.processor.image_processor.patch_size)
        # The images already have their final size: a second resize would blur them and could change the grid.
        return dict(self.processor(text=texts, images=images, do_resize=False, **PADDING))

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

    def labels(self, input_ids: torch.Tensor, prompts: list[str], texts: list[str]) -> torch.Tensor:
        """Labels by construction: the prompt is followed by the letter, the end of the turn and white space.

        Nothing is searched for, so a question that contains the answer or the word "assistant" changes nothing.
        """
        labels = torch.full_like(input_ids, IGNORE)
        for i, (prompt, text) in enumerate(zip(prompts, texts)):
            answer = text[len(prompt) :]
            answer_ids = self.processor.tokenizer(answer).input_ids
            start = input_ids.shape[1] - len(answer_ids)
            if input_ids[i, start:].tolist() != answer_ids:
                raise ValueError(f"the answer {answer!r} has other tokens alone than at the end of the chat")
            labels[i, start : start + 2] = input_ids[i, start : start + 2]
        return labels
