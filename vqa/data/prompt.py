"""The one prompt: training, validation, prediction and every augmentation build their messages here.

<|im_start|>user
<|vision_start|><|image_pad|><|vision_end|>What colour is the circle?
a. red
b. blue
Answer with the letter only.<|im_end|>
<|im_start|>assistant
b<|im_end|>
"""

from vqa.config.arguments import INSTRUCTION
from vqa.core.errors import UserError

LETTERS = "abcdefghij"


def build_messages(
    row: dict, image: dict | None, instruction: str = INSTRUCTION, special: tuple[str, ...] = ()
) -> list[dict]:
    """Chat messages of a row, without the answer.

    `image` is the image item of the user turn (`{"type": "image", ...}`), or None for a row that is asked by its text
    alone. `row["permutation"]`, where given, lists which
    choice stands at each letter: `[2, 0, 1]` shows the third choice at letter a. `special` are the tokenizer's added
    tokens: wherever a question or choice spells one, it is broken up so that it stays text.
    """
    order = row.get("permutation") or range(len(row["choices"]))
    lines = [row["question"]]
    lines += [f"{letter}. {row['choices'][choice]}" for letter, choice in zip(LETTERS, order)]
    text = escape_special_tokens("\n".join(lines), special) + f"\n{instruction}"
    said = {"type": "text", "text": text}
    return [{"role": "user", "content": [said] if image is None else [image, said]}]


def escape_special_tokens(text: str, special: tuple[str, ...]) -> str:
    """`text` in which no special token can be recognised: a zero-width space after its first character.

    A person reads the same text and the tokenizer sees ordinary characters; without this a choice that spells
    `<|im_end|>` would end the turn, and `<|image_pad|>` would be counted as an image.
    """
    for token in special:
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def added_tokens(processor) -> tuple[str, ...]:
    """Every string that the tokenizer would turn into one added token, longest first."""
    return tuple(sorted(processor.tokenizer.get_added_vocab(), key=len, reverse=True))


def shown_answer(row: dict) -> int:
    """Position at which the right choice is shown: its own, unless the row has an `order`."""
    return list(row["permutation"]).index(row["answer"]) if row.get("permutation") else row["answer"]


def shown_target(row: dict) -> list[float]:
    """Probability of each of the ten letters, as the row shows its choices: its `target`, or 1 for its answer."""
    target = row.get("target") or [float(i == row["answer"]) for i in range(len(row["choices"]))]
    shown = [target[choice] for choice in row.get("permutation") or range(len(target))]
    return shown + [0.0] * (len(LETTERS) - len(shown))


def render_chat(processor, conversation: list[dict], answer: str | None = None) -> str:
    """The chat as text. Without `answer` it ends where the model has to write; with it, it goes on to the end."""
    if answer is None:
        return processor.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    turn = {"role": "assistant", "content": [{"type": "text", "text": answer}]}
    return processor.apply_chat_template(conversation + [turn], tokenize=False, add_generation_prompt=False)


def letter_ids(processor) -> list[int]:
    """Token id of each letter as it stands after `assistant\\n`, `len(LETTERS)` of them, checked to be one token each.

    Raises UserError where the tokenizer splits a letter or the template is not one that this software can train:
    the prediction prompt must be a prefix, token for token, of the training text.
    """
    tokenizer = processor.tokenizer
    conversation = build_messages({"question": "?", "choices": list(LETTERS)}, {"type": "image"})
    prompt = render_chat(processor, conversation)
    prompt_ids = tokenizer(prompt).input_ids
    found = []
    for letter in LETTERS:
        text = render_chat(processor, conversation, letter)
        ids = tokenizer(text).input_ids
        if not text.startswith(prompt + letter) or ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} does not render the prediction prompt as a prefix of "
                f"the training text (letter {letter!r}); use the template that came with the model"
            )
        tail = ids[len(prompt_ids) :]
        if (
            len(tail) < 2
            or tokenizer.decode(tail[:1]) != letter
            or tokenizer.decode(tail[1:2]) not in added_tokens(processor)
        ):
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} does not write {letter!r} and the end of the turn as one "
                f"token each (it gives {tail}); use the tokenizer that came with the model"
            )
        found.append(tail[0])
    if len(set(found)) != len(LETTERS):
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} gives two letters the same token: {found}")
    return found
