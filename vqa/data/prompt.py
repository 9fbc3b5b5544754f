"""The one prompt: training, validation, prediction and every augmentation build their messages here.

<|im_start|>user
<|vision_start|><|image_pad|><|vision_end|>What colour is the circle?
a. red
b. blue
Answer with the letter only.<|im_end|>
<|im_start|>assistant
b<|im_end|>
"""

from collections.abc import Sequence

from vqa.config.arguments import INSTRUCTION
from vqa.core.errors import UserError
from vqa.data.images import shown_images
from vqa.data.rows import LETTERS, Row


def build_messages(
    row: Row, images: Sequence[dict] | None = None, instruction: str = INSTRUCTION, special: tuple[str, ...] = ()
) -> list[dict]:
    """Chat messages of a row, without the answer: its images in order, then the text.

    `images` are the items of the user's turn, `{"type": "image", ...}` for each of the row's images; by default they
    have no pixels.
    `row["permutation"]`, if set, lists the choice shown at each letter: in `[2, 0, 1]` the third choice is a.
    `special` are the tokenizer's added tokens: where a question or choice spells one, it is kept as ordinary text.
    """
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, shown_choices(row))]
    text = escape_special_tokens("\n".join([row["question"], *lines]), special) + f"\n{instruction}"
    return _user_turn(row, images, text)


def build_question(row: Row, images: Sequence[dict] | None = None, special: tuple[str, ...] = ()) -> list[dict]:
    """Chat messages of a row as `build_messages`, but of the question alone: the answer is the text of a choice."""
    return _user_turn(row, images, escape_special_tokens(row["question"], special))


def _user_turn(row: Row, images: Sequence[dict] | None, text: str) -> list[dict]:
    items = [{"type": "image"} for _ in shown_images(row)] if images is None else images
    return [{"role": "user", "content": [*items, {"type": "text", "text": text}]}]


def shown_choices(row: Row) -> list[str]:
    """The texts of the choices in the order shown."""
    return [row["choices"][choice] for choice in row.get("permutation") or range(len(row["choices"]))]


def escape_special_tokens(text: str, special: tuple[str, ...]) -> str:
    """`text` with a zero-width space after the first character of every special token that it spells.

    People read the same text, and the tokenizer sees ordinary characters. Otherwise a choice that spells `<|im_end|>`
    would end the turn, and `<|image_pad|>` would count as an image.
    """
    for token in special:
        text = text.replace(token, f"{token[0]}\u200b{token[1:]}")
    return text


def added_tokens(processor) -> tuple[str, ...]:
    """Every string that the tokenizer encodes as one added token, longest first."""
    return tuple(sorted(processor.tokenizer.get_added_vocab(), key=len, reverse=True))


def shown_answer(row: Row) -> int:
    """Index of the letter at which the right choice is shown: its own, unless the row has a `permutation`."""
    return list(row["permutation"]).index(row["answer"]) if row.get("permutation") else row["answer"]


def shown_target(row: Row) -> list[float]:
    """Probability of each letter of LETTERS, in the order shown: the row's `target`, or 1 for its answer."""
    target = row.get("target") or [float(i == row["answer"]) for i in range(len(row["choices"]))]
    shown = [target[choice] for choice in row.get("permutation") or range(len(target))]
    return shown + [0.0] * (len(LETTERS) - len(shown))


def render_chat(processor, conversation: list[dict], answer: str | None = None) -> str:
    """The chat as text. Without `answer` it ends where the model writes; with it, at the end of the answer's turn.

    Several images are numbered as the model's template does it, where it can: `Picture 1: ` in Qwen's.
    """
    several = sum(item["type"] == "image" for item in conversation[0]["content"]) > 1
    options = {"add_vision_id": True} if several else {}
    turn = [] if answer is None else [{"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    text = processor.apply_chat_template(
        conversation + turn, tokenize=False, add_generation_prompt=answer is None, **options
    )
    start = processor.tokenizer.bos_token
    if start and text.startswith(start) and processor.tokenizer("").input_ids:  # the tokenizer adds it, too
        text = text.removeprefix(start)
    return text


def letter_ids(processor) -> list[int]:
    """Token id of each letter of LETTERS where the model writes it. Raises UserError as `answer_ids` does."""
    return [ids[0] for ids in answer_ids(processor)]


def answer_ids(processor) -> list[list[int]]:
    """For each letter of LETTERS the token ids of the rest of the chat: the letter, the end of the turn, white space.

    A tokenizer that marks the start of a word, as SentencePiece does, may give a letter's token a blank in front.
    Raises UserError where a letter or the end of the turn is not one token of its own, and where the prediction prompt
    is not a prefix, token for token, of the training text.
    """
    tokenizer = processor.tokenizer
    conversation = build_messages({"question": "?", "choices": list(LETTERS)}, [{"type": "image"}])
    prompt = render_chat(processor, conversation)
    prompt_ids = tokenizer(prompt).input_ids
    ends, found = {*added_tokens(processor), *tokenizer.all_special_tokens}, []
    for letter in LETTERS:
        text = render_chat(processor, conversation, letter)
        ids = tokenizer(text).input_ids
        prefixed = text.startswith(prompt) and text[len(prompt) :].lstrip().startswith(letter)
        if not prefixed or ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"the chat template of {tokenizer.name_or_path} does not render the prediction prompt as a prefix of "
                f"the training text (letter {letter!r}). Use the template that came with the model."
            )
        tail = ids[len(prompt_ids) :]
        if len(tail) < 2 or tokenizer.decode(tail[:1]).strip() != letter or tokenizer.decode(tail[1:2]) not in ends:
            raise UserError(
                f"the tokenizer of {tokenizer.name_or_path} does not write {letter!r} and the end of the turn as one "
                f"token each (it gives {tail}). Use the tokenizer that came with the model."
            )
        found.append(tail)
    if len({ids[0] for ids in found}) != len(LETTERS) or len({tuple(ids[1:]) for ids in found}) > 1:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} gives two letters the same token, or ends their turns "
            f"differently: {found}. Use another model."
        )
    return found
