"""The model in memory that predicts: it loads a checkpoint, scores views, and compares them with `generate`."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState

from vqa.core.distributed import distributed_map, run_on_main_and_broadcast
from vqa.data.collator import Collator
from vqa.data.images import shown_images
from vqa.data.prompt import LETTERS, letter_ids
from vqa.data.rows import Row
from vqa.inference.checkpoints import Checkpoint
from vqa.inference.jobs import Job
from vqa.inference.scoring import choice_probs, first_generated, permutation_probs
from vqa.inference.tta import View, ViewPredictions, group_by_image, rows_with_permutations, stack_views
from vqa.inference.view_cache import CachedView, ViewCache
from vqa.modeling.feature_store import FeatureStore, open_feature_store
from vqa.modeling.loading import load_adapter, load_base, load_processor
from vqa.modeling.suffix_score import COLLATORS, load_score_head
from vqa.modeling.vision import is_vision_frozen


class Predictor:
    """The base model with one checkpoint's adapter at a time. It is loaded when the first row is scored.

    Args:
        first: a checkpoint with the base model and the prompt settings that all checkpoints share.
        batch_size: rows that a GPU scores at once (default: as in validation).
        workers: processes that decode images.
    """

    def __init__(self, first: Checkpoint, batch_size: int | None = None, workers: int = 0):
        processor = load_processor(first.model.model, first.model.trust_remote_code)
        self.first, self.batch_size, self.workers = first, batch_size or first.batch_size, workers
        self.is_suffix = first.model.score == "suffix"  # of choices, whose order does not matter
        self.letter_ids = letter_ids(processor)
        self.collate = COLLATORS[first.model.score](processor, first.data.image_size, first.data.instruction)
        self.collate_pixels = Collator(processor, first.data.image_size, first.data.instruction)
        self.model: torch.nn.Module | None = None
        self.features: FeatureStore | None = None
        self.adapters: list[Path] = []  # in the order of loading; the last one is active

    def load(self, checkpoint: Checkpoint) -> torch.nn.Module:
        """The model with the checkpoint's weights; rows are collated at the checkpoint's image size from now on."""
        data, processor = replace(self.first.data, image_size=checkpoint.data.image_size), self.collate.processor
        is_first = self.model is None
        if self.model is None:
            args = self.first.model
            self.model = load_base(args.model, args.load_in_4bit, self.first.dtype, args.trust_remote_code)
        if is_first or data.image_size != self.collate.image_size:
            self.collate, self.collate_pixels = (
                kind(processor, data.image_size, data.instruction) for kind in (type(self.collate), Collator)
            )
            self.features = open_feature_store(self.model, processor, data, [])
        if checkpoint.adapter and self.adapters[-1:] != [checkpoint.adapter]:
            # PEFT allows no dot in a name.
            self.model = load_adapter(self.model, checkpoint.adapter, f"run{len(self.adapters)}")
            if self.is_suffix:
                load_score_head(self.model, checkpoint.adapter)
            self.adapters.append(checkpoint.adapter)
        self.collate.features = self.features if is_vision_frozen(self.model) else None
        return self.model

    def predict(self, job: Job) -> ViewPredictions:
        """The job's rows in all of its views, and with a gate in as many as each row needs.

        Finished views are cached. Out of fold the gate is only applied later, so that other gates can be compared.
        """
        views: list[View] = []
        scored: list[CachedView] = []
        gate = None if job.oof else job.gate
        groups = group_by_image(job.views) if gate is None else [job.views[:1], *group_by_image(job.views[1:])]
        for group in groups:
            if gate is not None and scored:
                unsure = stack_views(views[:1], scored[:1]).below_gate(gate)
                group = [view.only(unsure) for view in group]
            views += group
            scored += self._cached_scores(job, group)
        return stack_views(views, scored)

    def _cached_scores(self, job: Job, views: list[View]) -> list[CachedView]:
        """The scores of `views`, which show the same images: from the cache, or computed and then cached."""
        cache = ViewCache(job.path, job.model)
        cached = run_on_main_and_broadcast(lambda: [cache.read(view.changed_rows()) for view in views])
        missing = [view for view, scores in zip(views, cached) if scores is None]
        start = time.time()
        probs = self.score_views(job.checkpoint, missing) if missing else []
        seconds = (time.time() - start) / max(1, len(missing))
        computed = [CachedView(values, seconds) for values in probs]
        if PartialState().is_main_process:
            for view, scores in zip(missing, computed):
                cache.write(view.changed_rows(), scores)
        remaining = iter(computed)
        return [scores or next(remaining) for scores in cached]

    def score_views(self, checkpoint: Checkpoint, views: list[View]) -> list[np.ndarray]:
        """Choice probabilities (changed, letters) for each of `views`, which show the same images.

        The rows are split across the processes.
        """
        model, rows = self.load(checkpoint), views[0].rows
        changed = sorted({i for view in views for i in view.changed})
        is_main = PartialState().is_main_process
        if self.features and self.collate.features:
            self.features.add(model, [rows[i] for i in changed], is_main)
        label = f"{checkpoint.name}, {' + '.join(view.name for view in views)}" if is_main else None
        # Rows with crops are as many times longer, and take as many times the memory.
        longer = max(len(shown_images(rows[i])) // max(1, len(rows[i]["images"])) for i in changed)
        batch_size = min(self.batch_size, checkpoint.batch_size) if checkpoint.image_size else self.batch_size
        fixed = self.collate, self.letter_ids, max(1, batch_size // max(1, longer))
        options: dict[str, Any] = {"label": label, "workers": self.workers}
        if len(views) == 1:
            rows = [rows[i] for i in changed]
            return [distributed_map(rows, lambda own: choice_probs(model, own, *fixed, **options))]

        def score(own: list[Row]) -> np.ndarray:
            """(rows, views, letters), 0 where a view does not change a row."""
            values = np.zeros((len(own), len(views), len(LETTERS)))
            for row, into, probs in zip(own, values, permutation_probs(model, own, *fixed, **options)):
                into[row["views"]] = probs
            return values

        values = distributed_map(rows_with_permutations(views, changed), score)
        position = {i: k for k, i in enumerate(changed)}
        return [values[[position[i] for i in view.changed], v] for v, view in enumerate(views)]

    def compare_with_generate(self, job: Job, predictions: ViewPredictions, rows: int) -> dict[str, int] | None:
        """How many of `rows` rows, drawn by seed, `generate` begins to answer with the plain view's letter.

        What it would write after the letter, such as the text of the choice, does not matter. None if none are drawn.
        """
        with_image = [i for i, row in enumerate(job.rows) if row["images"]]
        drawn = np.random.default_rng(0).permutation(with_image)[:rows].tolist()
        if not drawn:
            return None
        model = self.load(job.checkpoint)
        first = first_generated(model, [job.rows[i] for i in drawn], self.collate_pixels, self.batch_size)
        best = predictions.probabilities[0][drawn].argmax(1)
        agreeing = sum(token == self.letter_ids[letter] for token, letter in zip(first, best))
        return {"rows": len(drawn), "agreeing": agreeing}
