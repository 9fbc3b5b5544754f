"""One run, which is one fold to train: its arguments and rows, whether its folder is finished, and its metrics."""

from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path

from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.parser import non_default_fields, parse_arguments
from vqa.config.recipe import RecipeArguments
from vqa.config.same_run import changed_fields
from vqa.core.errors import UserError, preview
from vqa.core.io import hash_files, read_json, write_json
from vqa.data.predictions import join
from vqa.data.rows import Row
from vqa.data.splits import rows_fingerprint
from vqa.evaluation.experiment_log import log_run
from vqa.evaluation.labels import Labels
from vqa.evaluation.metrics import score_with_interval
from vqa.evaluation.oof import weights_folder
from vqa.evaluation.reference import Reference, model_warning
from vqa.modeling.loading import ADAPTER_FILES
from vqa.training.checkpointing import checkpoint_to_resume
from vqa.training.earlier_runs import check_init_adapter, read_split

# Fields that the runs of one command have in common, since they share the loaded base model.
SHARED_FIELDS = ("model", "load_in_4bit", "trust_remote_code", "fp16", "bf16", "use_cpu", "full_determinism")


@dataclass
class FoldRun:
    """The arguments of one fold and its rows. `config` is an args file that repeats the run."""

    model_args: ModelArguments
    data: DataArguments
    recipe: RecipeArguments
    config: dict
    train_rows: list[Row] = field(default_factory=list)
    valid_rows: list[Row] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        return Path(self.recipe.output_dir)

    def read_rows(self) -> tuple[list[Row], list[Row]]:
        """(training rows, validation rows), read from train_csv."""
        train_rows, valid_rows = read_split(self.data, self.recipe.seed)
        if self.model_args.init_adapter:
            check_init_adapter(self.model_args, valid_rows)
        return train_rows, valid_rows

    def rows_fingerprint(self) -> str:
        return rows_fingerprint(self.train_rows, self.valid_rows)

    def init_adapter_hashes(self) -> list[str] | None:
        """The hashes of the files of init_adapter; None without it."""
        folder = self.model_args.init_adapter
        return hash_files([f"{folder}/{name}" for name in ADAPTER_FILES]) if folder else None

    def is_finished(self) -> bool:
        """Whether the folder has this very run, complete. Raises UserError where it has another one."""
        if not (self.folder / "args.json").is_file():
            return False
        before = read_json(self.folder / "args.json")
        changed = changed_fields(before, self.config)
        length = "max_steps" if self.recipe.max_steps > 0 else "num_train_epochs"
        if longer := changed == [length] and 0 < before.get(length, 0) < self.config[length]:
            changed = []
        if not changed and (self.folder / "rows.json").is_file():
            rows = read_json(self.folder / "rows.json")  # an older release's has no version: it hashed image paths
            same_rows = "version" not in rows or rows["fingerprint"] == self.rows_fingerprint()
            changed = [] if same_rows else ["split or other rows"]
            changed += ["init_adapter"] if rows.get("init_adapter") != self.init_adapter_hashes() else []
        if changed:
            raise UserError(
                f"{self.folder} already contains a run with a different {preview(changed)}. Resume it with its "
                "original settings, choose another --output_dir, or delete the folder."
            )
        if not self.recipe.resume_from_checkpoint:
            raise UserError(
                f"{self.folder} already contains this run. Add --resume_from_checkpoint auto to continue it, choose "
                "another --output_dir, or delete the folder."
            )
        if longer:
            self._check_continues_longer(length, before[length])
        return not longer and (self.folder / "metrics.json").is_file()

    def _check_continues_longer(self, length: str, before: float) -> None:
        """Print what it means that the field `length` was `before`. Raises UserError without a checkpoint."""
        rows = self.recipe.effective_batch_size
        checkpoint = checkpoint_to_resume(self.recipe.resume_from_checkpoint, self.folder, rows)
        if checkpoint is None:
            raise UserError(f"{self.folder} has no checkpoint to continue from. Delete the folder to train again.")
        print(
            f"{self.folder}: continues from {Path(checkpoint).name}, with {length} {self.config[length]:g} instead of "
            f"{before:g}. The learning rate follows the longer schedule from here on, so it may rise again, and the "
            "result is not that of one long run. For that, delete the folder first."
        )

    def write_config(self) -> None:
        """Write what `is_finished` compares with. A fold that is trained for longer is unfinished again."""
        (self.folder / "metrics.json").unlink(missing_ok=True)
        write_json(self.folder / "args.json", self.config)
        start = {"init_adapter": hashes} if (hashes := self.init_adapter_hashes()) else {}
        write_json(self.folder / "rows.json", {"version": 2, "fingerprint": self.rows_fingerprint(), **start})

    def write_metrics(self, metrics: dict) -> str | None:
        """Add the run to the experiment log and write metrics.json, the last file: it marks the fold as complete.

        Returns a warning if the best weights are not better than what sees no image.
        """
        from vqa.evaluation.text_only_baseline import text_only_accuracy  # takes a second to import

        text_only = text_only_accuracy(self.train_rows, self.valid_rows)
        metrics["run"], warning = log_training(self.folder, metrics, self.config, text_only)
        write_json(self.folder / "metrics.json", metrics)
        return warning


def parse_runs(argv: list[str], description: str) -> list[FoldRun]:
    """The runs of `[ARGS.json ...] [--field value ...]`, one for each args file; the flags hold for all of them.

    Raises UserError where they cannot share a process.
    """
    files = list(takewhile(lambda word: not word.startswith("-"), argv))
    flags = argv[len(files) :]
    runs = [FoldRun(*parse_arguments([*file, *flags], description)) for file in ([f] for f in files)]
    runs = runs or [FoldRun(*parse_arguments(flags, description))]
    for file, run in zip(files[1:], runs[1:]):
        differing = [name for name in SHARED_FIELDS if run.config.get(name) != runs[0].config.get(name)]
        if differing:
            raise UserError(
                f"{files[0]} and {file} differ in {preview(differing)}, but the args files of one command share the "
                "loaded base model. Train them by separate commands."
            )
        if run.recipe.resume_from_checkpoint not in (None, "auto"):
            raise UserError("resume_from_checkpoint names one checkpoint for several args files. Use auto.")
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise UserError("several args files have the same output_dir. Leave out --output_dir: each has its own.")
    for run in runs:
        run.config |= {"resume_from_checkpoint": None, "max_hours": None}  # of this session, not of the run
    return runs


def log_training(folder: Path, metrics: dict, config: dict, text_only: float | None) -> tuple[str, str | None]:
    """Add a run to the experiment log; returns (its id there, a warning about the best weights or None).

    The scores of each set of weights get their number of rows, the interval of their accuracy, and the accuracy of
    chance and of the text alone.
    """
    labels, oof = Labels(config["train_csv"], config.get("columns"), config.get("answer_form")), {}
    warning = None
    for name, scores in metrics["weights"].items():
        ids, (probabilities,) = join([weights_folder(folder, name) / "oof.csv"])
        oof[name] = ids, probabilities
        answers, clusters = labels.answers(ids), labels.clusters(ids)
        scores |= score_with_interval(probabilities, answers, clusters) | {"text_only": text_only}
        if name == metrics["best"]:
            reference = Reference(scores["chance"], text_only)
            warning = model_warning(folder, probabilities, answers, reference, clusters)
    run_id = log_run(
        "training",
        folder,
        non_default_fields(config),
        metrics["seconds"],
        metrics["fingerprints"]["rows"],
        metrics["weights"].get(metrics["best"]),
        config["train_csv"],
        oof.get(metrics["best"]),
    )
    return run_id, warning
