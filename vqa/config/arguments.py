"""The arguments of model and data, without slow imports. The reason for a default is in its `help`."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from vqa.core.errors import UserError
from vqa.core.io import is_writable

INSTRUCTION = "Answer with the letter only."


def arg(default, text: str):
    return field(default=default, metadata={"help": text})


@dataclass
class ModelArguments:
    model: str = arg(None, "Folder of the base model, or its name on a model hub.")
    load_in_4bit: bool = arg(
        False, "Load the base model in 4 bits (nf4, double quantisation), so that a 7B fits a 16 GB GPU. CUDA only."
    )
    lora_rank: int = arg(16, "Rank of the LoRA adapter: 16 is enough for a few thousand rows.")
    lora_alpha: int = arg(32, "Scale of the adapter: usually twice the rank.")
    lora_dropout: float = arg(0.05, "Dropout before the adapter: a few thousand rows are soon memorised.")
    lora_first_layer: int = arg(
        0, "First decoder layer with an adapter. Layers below it need no backward pass: faster."
    )
    lora_vision: bool = arg(
        False,
        "Adapt the vision tower and its projector, too. Its features then change in training: they are not stored, "
        "and every step is slower.",
    )
    lora_options: dict | str | None = arg(
        None, 'Further options of PEFT\'s LoraConfig, such as {"use_rslora": true}. On the command line, as JSON.'
    )
    score: str = arg(
        "letter",
        "letter: the probability of each choice's letter after a prompt that lists the choices; suffix: a trained "
        "linear layer scores the text of each choice as the answer, so their order cannot matter. Try suffix for a "
        "member of an ensemble. It does not use loss and instruction.",
    )
    init_adapter: str | None = arg(
        None,
        "Folder of an earlier run's adapter to start from, such as checkpoints/stage1/fold0; null: a new one. That "
        "run must have the same LoRA settings, and no validation row in its training rows: use its same fold.",
    )
    trust_remote_code: bool = arg(False, "Run code from the model's folder. No Qwen model needs it.")


@dataclass
class DataArguments:
    train_csv: str = arg("data/train.csv", "Training rows: id,path,question,a,b,...,answer.")
    test_csv: str = arg("data/test.csv", "Rows to predict: id,path,question,a,b,...")
    image_root: str | None = arg(None, "Folder that `path` is relative to; the CSV's own folder if not given.")
    columns: dict | str | None = arg(
        None,
        'Which column is which, where the names do not say: {"id": "...", "path": "...", "question": "...", '
        '"choices": ["...", "..."], "answer": "..."}. On the command line, as JSON.',
    )
    answer_form: str | None = arg(
        None,
        "How the answers are written, where they can be read in two ways: letter, number_from_0, number_from_1, text.",
    )
    folds_csv: str | None = arg(
        None, "The folds file; if not given, folds.csv beside train_csv, or in outputs/folds/ if that is read-only."
    )
    fold: int | None = arg(0, "The fold to validate on; null: train on all rows and validate on none.")
    max_train_rows: int | None = arg(None, "Train on only this many rows, drawn by seed: 200 for a quick try.")
    max_valid_rows: int | None = arg(
        None,
        "Validate on only this many rows of the fold, drawn by seed. Its out-of-fold file is then incomplete.",
    )
    image_size: int = arg(
        384, "Pixel budget: images are resized to at most image_size squared pixels, aspect kept; 784 pixels a token."
    )
    crops: bool = arg(
        False,
        "In half of the epochs, drawn for each row, show each image that image_size shrinks once more, in 2 x 2 parts "
        "enlarged to image_size. Then `predict.py --crops` shows unsure rows in a form that the model knows. It takes "
        "five times the image tokens and stored features. Off: nothing measured here says that it helps.",
    )
    instruction: str = arg(INSTRUCTION, "Last line of the prompt; prediction uses the one of training.")
    shuffle_choices: bool = arg(
        True, "Shuffle the choices of each row every epoch, so that the model does not learn the answer's position."
    )
    soft_labels: bool = arg(
        False,
        "Train on the distribution of the annotators' answers (columns answer1, answer2, ...) instead of one answer: "
        "worth a try where annotators often disagree.",
    )
    pseudo_csv: str | None = arg(
        None,
        "A prediction file of test_csv. Its most confident rows become training rows, with its probabilities as soft "
        "labels. Give each fold the file of that fold (outputs/fold0.csv). With an ensemble's file (ensemble.py "
        "--probabilities) validation is too optimistic: other members were trained on this fold's validation rows.",
    )
    pseudo_min_confidence: float = arg(0.9, "Minimum probability of the likeliest choice to use a row of pseudo_csv.")
    extra_csv: list[str] | None = arg(
        None,
        "Further files of training rows, in the form of train_csv; image paths are relative to each file's folder. No "
        "row of them is validated on, and rows with the image of a validation row are left out. Worth a try where "
        "train_csv is small, best followed by a run on train_csv alone that starts from it (init_adapter).",
    )
    extra_weight: float = arg(
        1.0, "Weight of the loss of each row of extra_csv; a row of train_csv has 1. Below 1 where they differ much."
    )
    teacher: list[str] | None = arg(
        None,
        "Finished folds of another run (checkpoints/7b/fold0 ...) or out-of-fold files. Training rows get soft "
        "labels: teacher_weight times the probabilities of the fold that was not trained on the row, plus the rest of "
        "the label. The other folds were trained on this fold's validation rows, so the validation score is slightly "
        "too optimistic; rows of test_csv are not affected. Off: nothing measured here says that it helps.",
    )
    teacher_weight: float = arg(0.5, "Share of the teacher in the soft labels, from 0 to 1; the label has the rest.")
    vision_cache: bool = arg(
        True, "Compute the vision tower's features once per image and size, and store them on disk for all runs."
    )
    vision_cache_dir: str = arg(
        "checkpoints/vision_cache",
        "Folder of the stored features, best on a fast disk. You can delete it when nothing is running.",
    )
    vision_cache_gb: float = arg(
        10.0, "Size limit of that folder in GB; a 3B needs 0.8 MB an image at 384 px. Above it, nothing is stored."
    )


def adapter_options(args: ModelArguments) -> dict:
    """The keyword arguments of `vqa.modeling.loading.add_adapter`."""
    options = args.lora_options or {}
    if isinstance(options, str):
        try:
            options = json.loads(options)
        except ValueError as error:
            raise UserError(f"lora_options: not valid JSON ({error}).") from None
    if not isinstance(options, dict):
        raise UserError('lora_options: write an object of names and values, such as {"use_rslora": true}.')
    chosen = {"rank": args.lora_rank, "alpha": args.lora_alpha, "dropout": args.lora_dropout}
    return chosen | {"first_layer": args.lora_first_layer, "vision": args.lora_vision, "options": options}


def reader_options(data: DataArguments) -> dict:
    """The keyword arguments of `vqa.data.rows.read_contest` and `Labels` that say how to read the contest's files."""
    return {"columns": data.columns, "answer_form": data.answer_form}


def folds_file(data: DataArguments) -> Path:
    return folds_path(data.folds_csv, data.train_csv)


def folds_path(folds_csv: str | None, train_csv: str | Path) -> Path:
    """`folds_csv`; if None, folds.csv beside the training CSV, or a file in outputs/folds/ if that is read-only."""
    if folds_csv:
        return Path(folds_csv)
    beside = Path(train_csv).with_name("folds.csv")
    if beside.exists() or is_writable(beside.parent):
        return beside
    return Path("outputs", "folds", f"{beside.absolute().parent.name}.csv")
