"""The arguments of model and data, as dataclasses that import in no time. The reason for a value is in its `help`."""

from dataclasses import dataclass, field
from pathlib import Path

INSTRUCTION = "Answer with the letter only."


def arg(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    model: str | None = arg(None, "Folder of the base model, or its name where a model hub is reachable.")
    load_in_4bit: bool = arg(
        False, "Hold the base model in 4 bits (nf4, double quantisation): the 7B then fits a 16 GB GPU. CUDA only."
    )
    lora_rank: int = arg(16, "Rank of the adapter: 16 is ample for a contest of some thousand rows.")
    lora_alpha: int = arg(32, "Scale of the adapter; the usual choice is twice the rank.")
    lora_dropout: float = arg(0.05, "Dropout before the adapter: a few thousand rows are soon learned by heart.")
    trust_remote_code: bool = arg(False, "Run code that comes with the model. No Qwen model needs it.")


@dataclass
class DataArguments:
    train_csv: str = arg("data/train.csv", "Training rows: id,path,question,a,b,...,answer.")
    test_csv: str = arg("data/test.csv", "Rows to predict: id,path,question,a,b,...")
    image_root: str | None = arg(None, "Folder that `path` is relative to; the CSV's own folder if not given.")
    folds_csv: str | None = arg(None, "The folds file; `folds.csv` beside train_csv if not given.")
    fold: int | None = arg(0, "The fold to validate on; null trains on every row and validates on none.")
    max_train_rows: int | None = arg(None, "Train on so many rows only, drawn by seed: 200 for a quick try.")
    image_size: int = arg(
        384, "Pixel budget: an image is shrunk to at most image_size squared pixels, aspect kept; 784 pixels a token."
    )
    instruction: str = arg(INSTRUCTION, "Last line of the question; prediction uses what training used.")
    shuffle_choices: bool = arg(
        True, "Show the choices in another order every epoch, so that the position of the answer is not learned."
    )
    soft_labels: bool = arg(
        False,
        "Train on how the annotators' answers (columns answer1, answer2, ...) are spread over the choices instead of "
        "on the one answer: worth a try where they often disagree.",
    )
    pseudo_csv: str | None = arg(
        None,
        "A prediction file of test_csv, whose surest rows become further training rows with its probabilities as soft "
        "labels. Give each fold its own fold's (outputs/fold0.csv); with an ensemble's (ensemble.py --probabilities) "
        "validation flatters, since other members of it were trained on the rows that this fold validates on.",
    )
    pseudo_min_confidence: float = arg(0.9, "Least probability of the likeliest choice for a row to be taken.")
    vision_cache: bool = arg(
        True, "Compute the vision tower's features once an image and size, and keep them on disk for all runs."
    )
    vision_cache_dir: str = arg(
        "checkpoints/vision_cache",
        "Where they are kept. A fast disk is best; the folder may be removed whenever nothing runs.",
    )
    vision_cache_gb: float = arg(
        10.0, "Most that the folder may take, in GB; a 3B needs 0.8 MB an image at 384 px. Beyond, nothing is stored."
    )


def folds_file(data: DataArguments) -> Path:
    return folds_path(data.folds_csv, data.train_csv)


INSTRUCTION = "Answer with the letter only."


def folds_path(folds_csv: str | None, train_csv: str | Path) -> Path:
    """The folds file that an args file names, or the one beside its training CSV."""
    return Path(folds_csv) if folds_csv else Path(train_csv).with_name("folds.csv")
