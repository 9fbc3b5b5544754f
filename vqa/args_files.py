"""Args files: one flat JSON object, which may extend another.

    {"extends": "3b.json", "fold": 1}        # args/fold1.json: the file 3b.json beside it, and what differs

`extends` keeps fold files from drifting apart: what folds share stands in one file. Their fields are those of the
dataclasses below and of `vqa.arguments.RecipeArguments`, which is apart since transformers takes seconds to import.
"""

import dataclasses
import difflib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

from vqa.errors import UserError
from vqa.files import read_json
from vqa.folds import folds_path
from vqa.prompt import INSTRUCTION


def setting(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    model: str | None = setting(None, "Folder of the base model, or its name where a model hub is reachable.")
    load_in_4bit: bool = setting(
        False, "Hold the base model in 4 bits (nf4, double quantisation): the 7B then fits a 16 GB GPU. CUDA only."
    )
    lora_rank: int = setting(16, "Rank of the adapter: 16 is ample for a contest of some thousand rows.")
    lora_alpha: int = setting(32, "Scale of the adapter; the usual choice is twice the rank.")
    lora_dropout: float = setting(0.05, "Dropout before the adapter: a few thousand rows are soon learned by heart.")
    trust_remote_code: bool = setting(False, "Run code that comes with the model. No Qwen model needs it.")


@dataclass
class DataArguments:
    train_csv: str = setting("data/train.csv", "Training rows: id,path,question,a,b,...,answer.")
    test_csv: str = setting("data/test.csv", "Rows to predict: id,path,question,a,b,...")
    image_root: str | None = setting(None, "Folder that `path` is relative to; the CSV's own folder if not given.")
    folds_csv: str | None = setting(None, "The folds file; `folds.csv` beside train_csv if not given.")
    fold: int | None = setting(0, "The fold to validate on; null trains on every row and validates on none.")
    max_train_rows: int | None = setting(None, "Train on so many rows only, drawn by seed: 200 for a quick try.")
    image_size: int = setting(
        384, "Pixel budget: an image is shrunk to at most image_size squared pixels, aspect kept; 784 pixels a token."
    )
    instruction: str = setting(INSTRUCTION, "Last line of the question; prediction uses what training used.")
    shuffle_choices: bool = setting(
        True, "Show the choices in another order every epoch, so that the position of the answer is not learned."
    )
    soft_labels: bool = setting(
        False,
        "Train on how the annotators' answers (columns answer1, answer2, ...) are spread over the choices instead of "
        "on the one answer: worth a try where they often disagree.",
    )
    pseudo_csv: str | None = setting(
        None,
        "A prediction file of test_csv, whose surest rows become further training rows with its probabilities as soft "
        "labels. Give each fold its own fold's (outputs/fold0.csv); with an ensemble's (ensemble.py --probabilities) "
        "validation flatters, since other members of it were trained on the rows that this fold validates on.",
    )
    pseudo_min_confidence: float = setting(0.9, "Least probability of the likeliest choice for a row to be taken.")
    vision_cache: bool = setting(
        True, "Compute the vision tower's features once an image and size, and keep them on disk for all runs."
    )
    vision_cache_dir: str = setting(
        "checkpoints/vision_cache",
        "Where they are kept. A fast disk is best; the folder may be removed whenever nothing runs.",
    )
    vision_cache_gb: float = setting(
        10.0, "Most that the folder may take, in GB; a 3B needs 0.8 MB an image at 384 px. Beyond, nothing is stored."
    )


def read_args_file(path: str | Path, known: Collection[str] | None = None, extended_by: tuple[Path, ...] = ()) -> dict:
    """The values of an args file, those of the file that it `extends` included. Its own come first.

    Raises UserError where a field is none of the `known` ones, if they are given.
    """
    values = read_json(path)
    if not isinstance(values, dict):
        raise UserError(f'{path}: an args file is one JSON object, such as {{"fold": 0}}')
    base = values.pop("extends", None)
    for key in values:
        if known and key not in known:
            refuse_unknown(key, path, known)
    if base is None:
        return values
    chain = (*extended_by, Path(path).resolve())
    if (Path(path).parent / base).resolve() in chain:
        raise UserError(f"{path}: extends itself, by way of {base}; name the file that holds what the folds share")
    return read_args_file(Path(path).parent / base, known, chain) | values


def folds_file(data: DataArguments) -> Path:
    return folds_path(data.folds_csv, data.train_csv)


def refuse_unknown(key: str, place: str | Path, known: Collection[str]):
    near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "see `python train_fold.py --help`"
    raise UserError(f"{place}: unknown field {key!r}; {hint}")


def section(kind: type, values: dict):
    """One dataclass out of an args file's values; whatever belongs to another is left out."""
    return kind(**{f.name: values[f.name] for f in dataclasses.fields(kind) if f.init and f.name in values})
