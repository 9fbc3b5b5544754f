"""Checks before training. train_fold.py runs the cheap ones, doctor.py all of them."""

from collections import Counter

from peft import PeftModel

from vqa.config.arguments import ModelArguments
from vqa.core.compat import adapted_module_names
from vqa.core.errors import UserError, preview
from vqa.data.collator import IGNORE, Collator
from vqa.data.prompt import build_messages, letter_ids, render_chat, shown_answer
from vqa.data.rows import LETTERS, Row
from vqa.data.splits import split_problems
from vqa.modeling.families import vision_tower
from vqa.modeling.suffix_score import SuffixCollator
from vqa.modeling.tree_attention import check_tree_attention
from vqa.modeling.vision import unwrap_base_model


def check_attention(args: ModelArguments, permutations_per_step: int) -> None:
    """Raise UserError where a field needs suffixes that share a prefix, and the model cannot keep them apart."""
    needed = {"score suffix": args.score == "suffix", "permutations_per_step": permutations_per_step > 1}
    for field in (field for field, is_needed in needed.items() if is_needed):
        check_tree_attention(args.model, field, args.trust_remote_code)


def check_before_training(
    model: PeftModel, collate: Collator, train_rows: list[Row], valid_rows: list[Row], lora_vision: bool = False
) -> None:
    """Stop with a UserError that lists what is wrong with the prompt, the labels, the adapter or the split.

    `collate` is the collator of training rows (`with_answer=True`).
    """
    letter_ids(collate.processor)
    problems = label_problems(collate, train_rows[:1]) + adapter_problems(model, lora_vision)
    if problems := problems + split_problems(train_rows, valid_rows):
        raise UserError("; ".join(problems))


def supervised_texts(collate: Collator, rows: list[Row]) -> list[str]:
    """The text that the labels of each row cover, such as `b<|im_end|>`."""
    labels = collate(rows)["labels"]
    return [collate.processor.tokenizer.decode(row[row != IGNORE]) for row in labels]


def label_problems(collate: Collator, rows: list[Row]) -> list[str]:
    """One line for each row whose labels do not cover exactly the right letter and the end of the turn."""
    problems: list[str] = []
    if isinstance(collate, SuffixCollator):  # its rows have no labels
        return problems
    for row, text in zip(rows, supervised_texts(collate, rows)):
        conversation, letter = build_messages(row), LETTERS[shown_answer(row)]
        prompt = render_chat(collate.processor, conversation)
        wanted = render_chat(collate.processor, conversation, letter)[len(prompt) :].strip()
        if text.strip() != wanted:
            problems.append(
                f"the labels of {row['id']} cover {text!r} and not {wanted!r}. Use the chat template and the "
                "tokenizer that came with the model."
            )
    return problems


def adapter_targets(model: PeftModel) -> dict[str, int]:
    """The layers with an adapter: last part of the name -> number of layers."""
    return dict(Counter(name.rpartition(".")[2] for name in adapted_module_names(model)))


def adapter_problems(model: PeftModel, lora_vision: bool = False) -> list[str]:
    """One line if nothing is trained, or if a trained parameter is in the vision tower without `lora_vision`."""
    if not any(p.requires_grad for p in unwrap_base_model(model).parameters()):
        return ["nothing of the model is trained: no layer's name matches `lora_targets` (vqa/modeling/families)"]
    trained = [name for name, p in vision_tower(unwrap_base_model(model)).named_parameters() if p.requires_grad]
    if lora_vision or not trained:
        return []
    remedy = "let `lora_targets` of its family (vqa/modeling/families) match the language model's layers only"
    return [f"{len(trained)} parameters of the vision tower are trained ({preview(trained)}); {remedy}"]
