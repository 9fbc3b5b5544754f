"""What the folds of one process share: the base model, its processor, its fingerprints and the stored features."""

import gc
from concurrent.futures import Future, ThreadPoolExecutor
from functools import cached_property
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from transformers import enable_full_determinism, set_seed

from vqa.config.arguments import DataArguments, ModelArguments, adapter_options
from vqa.config.recipe import RecipeArguments
from vqa.core.dtypes import model_dtype
from vqa.core.hashing import checkpoint_fingerprint, parameter_fingerprint
from vqa.data.prompt import letter_ids
from vqa.data.rows import Row
from vqa.modeling.feature_store import FeatureStore, open_feature_store
from vqa.modeling.loading import add_adapter, load_base, load_processor, start_from
from vqa.modeling.suffix_score import add_score_head
from vqa.modeling.vision import is_vision_frozen


class SharedBase:
    """Lends the frozen base model to one fold after another, each with a fresh adapter.

    A fold trained here has the same bytes as one trained in a process of its own: the adapter is drawn right after
    seeding, and removing it leaves the base as it was loaded.
    """

    def __init__(self, model_args: ModelArguments, recipe: RecipeArguments):
        self.model_args = model_args
        self.dtype = model_dtype(recipe.fp16, recipe.bf16)
        self.base: Any = None  # a PreTrainedModel
        self.adapted: Any = None  # a PeftModel
        self.stores: dict[tuple, FeatureStore | None] = {}
        self.base_fingerprint: Future[str] | None = None

    @cached_property
    def processor(self):
        return load_processor(self.model_args.model, self.model_args.trust_remote_code)

    @cached_property
    def letter_ids(self) -> list[int]:
        """The token id of each letter."""
        return letter_ids(self.processor)

    @cached_property
    def files_fingerprint(self) -> str:
        return checkpoint_fingerprint(self.model_args.model)

    def add_adapter(self, args: ModelArguments, recipe: RecipeArguments) -> PeftModel:
        """The base with a fresh adapter, or that of init_adapter, and with the head of `score` suffix.

        What is random is drawn by the recipe's seed.
        """
        # The first also chooses the deterministic kernels.
        (enable_full_determinism if recipe.full_determinism else set_seed)(recipe.seed)
        if self.base is None:
            self.base = load_base(args.model, args.load_in_4bit, self.dtype, args.trust_remote_code)
            set_seed(recipe.seed)  # whatever loading has drawn
        self.adapted = add_adapter(self.base, **adapter_options(args))
        if args.score == "suffix":
            add_score_head(self.adapted)
        if args.init_adapter:
            start_from(self.adapted, args.init_adapter)
        if self.base_fingerprint is None and PartialState().is_main_process:  # seconds, beside what comes next
            self.base_fingerprint = ThreadPoolExecutor(1).submit(parameter_fingerprint, self.adapted, trained=False)
        return self.adapted

    def remove_adapter(self) -> None:
        """Take the adapter away after a fold, and free what its Trainer held."""
        if self.adapted is not None:
            self.base = self.adapted.unload()
            self.base.gradient_checkpointing_disable()  # PEFT prepares the model for it if it finds it on
        self.adapted = None
        gc.collect()  # a Trainer refers to itself
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def features(self, data: DataArguments, rows: list[Row], show: bool) -> FeatureStore | None:
        """The store with the image features of `rows`, opened once for the folds that have the same settings."""
        if not is_vision_frozen(self.adapted):
            return None
        key = (data.vision_cache, data.vision_cache_dir, data.vision_cache_gb, data.image_size)
        if key not in self.stores:
            self.stores[key] = open_feature_store(self.adapted, self.processor, data, [rows], show)
        elif store := self.stores[key]:
            store.add(self.adapted, rows, show)
        return self.stores[key]

    def fingerprints(self) -> dict[str, str]:
        """SHA-256 of the base as loaded and of the fresh adapter, and a fingerprint of the base's files.

        To call before training, on the main process only. The base is hashed once, in a thread that `add_adapter`
        starts: FrozenWeightsCheck makes sure that no fold changes it.
        """
        assert self.base_fingerprint is not None, "add_adapter comes first"
        return {
            "base": self.base_fingerprint.result(),
            "files": self.files_fingerprint,
            "initial_adapter": parameter_fingerprint(self.adapted, trained=True),
        }
