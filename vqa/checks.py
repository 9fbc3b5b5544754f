"""What has to hold before a GPU hour is spent. Training itself makes the cheap checks; doctor.py makes all of them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from peft import PeftModel

from collator import IGNORE, Collator
from vqa.errors import UserError, first_few
from vqa.families import vision_tower
from vqa.files import read_json
from vqa.folds import image_groups
from vqa.prompt import LETTERS, letter_ids, messages, render, shown_answer
from vqa.vision import base_model


def check_before_training(model: PeftModel, collate: Collator, train_rows: list[dict], valid_rows: list[dict]) -> None:
    """Stop with a UserError that lists what is wrong with the prompt, the labels, the adapter or the split.

    `collate` is the collator of training rows (`with_answer=True`).
    """
    letter_ids(collate.processor)
    problems = label_problems(collate, train_rows[:1]) + adapter_problems(model)
    if problems := problems + split_problems(train_rows, valid_rows):
        raise UserError("; ".join(problems))


def supervised_texts(collate: Collator, rows: list[dict]) -> list[str]:
    """What the labels of each row cover, decoded: `b<|im_end|>`."""
    labels = collate(rows)["labels"]
    return [collate.processor.tokenizer.decode(row[row != IGNORE]) for row in labels]


def label_problems(collate: Collator, rows: list[dict]) -> list[str]:
    """One line for each row whose labels are not exactly its right letter and the end of the turn."""
    problems = []
    for row, text in zip(rows, supervised_texts(collate, rows)):
        conversation, letter = messages(row, {"type": "image"}), LETTERS[shown_answer(row)]
        prompt = render(collate.processor, conversation)
        wanted = render(collate.processor, conversation, letter)[len(prompt) :].rstrip()
        if text != wanted:
            problems.append(
                f"the labels of {row['id']} cover {text!r} and not {wanted!r}; use the chat template and the "
                "tokenizer that came with the model"
            )
    return problems


def adapter_targets(model: PeftModel) -> dict[str, int]:
    """The layers that carry an adapter: their own name -> how many there are."""
    return dict(Counter(name.rpartition(".")[2] for name in model.base_model.targeted_module_names))


def adapter_problems(model: PeftModel) -> list[str]:
    """Whether the adapter, or anything else that is trained, lies in the vision tower, or there is none at all."""
    if not any(p.requires_grad for p in model.parameters()):
        return ["nothing of the model is trained: no layer's name fits LORA_TARGETS in vqa/model.py"]
    trained = [name for name, p in vision_tower(base_model(model)).named_parameters() if p.requires_grad]
    if not trained:
        return []
    remedy = "let LORA_TARGETS in vqa/model.py name the language model's layers only"
    return [f"{len(trained)} parameters of the vision tower are trained ({first_few(trained)}); {remedy}"]


def split_problems(train_rows: list[dict], valid_rows: list[dict]) -> list[str]:
    """Whether a row, or the very bytes of an image, stand on both sides."""
    remedy = "make the folds anew: `python make_folds.py ARGS.json --again`"
    problems = []
    if both := sorted({row["id"] for row in train_rows} & {row["id"] for row in valid_rows}):
        problems.append(f"{len(both)} validation rows are training rows too ({first_few(both)}); {remedy}")
    elif pairs := shared_images(valid_rows, train_rows):
        named = [f"{a} and {b}" for a, b in pairs]
        problems.append(f"{len(pairs)} validation rows show an image of a training row ({first_few(named)}); {remedy}")
    return problems


def shared_images(rows: list[dict], others: list[dict]) -> list[tuple[str, str]]:
    """(id, id of one of the others) for each of `rows` whose image is byte for byte that of one of the others."""
    holder = dict(zip(image_groups([row["image"] for row in others]), (row["id"] for row in others)))
    groups = image_groups([row["image"] for row in rows])
    return [(row["id"], holder[group]) for row, group in zip(rows, groups) if group in holder]


def images_across_folds(rows: list[dict], folds: Sequence[int]) -> list[list[str]]:
    """Ids of the rows that show one image and stand in different folds, a list an image."""
    ids, seen = defaultdict(list), defaultdict(set)
    for row, group, fold in zip(rows, image_groups([row["image"] for row in rows]), folds):
        ids[group].append(row["id"])
        seen[group].add(fold)
    return [ids[group] for group in ids if len(seen[group]) > 1]


def missing_weights(model: str) -> list[str]:
    """Files of weights that a model folder lacks, as half a download does. Empty for a name on the model hub."""
    folder = Path(model)
    if not folder.is_dir():
        return []
    index = folder / "model.safetensors.index.json"
    wanted = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    return [name for name in wanted if not (folder / name).is_file()]
