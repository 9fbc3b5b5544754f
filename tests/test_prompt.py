"""The prompt: its exact bytes, its tokens, and what must not become a special token."""

from pathlib import Path

import pytest

from vqa.core.errors import UserError
from vqa.data.prompt import added_tokens, build_messages, escape_special_tokens, letter_ids, render_chat, shown_answer

QWEN = Path(__file__).resolve().parent.parent.parent / "shared" / "qwen2-tokenizer"
ROW = {"images": ["x.jpg"], "question": "무슨 색인가요?", "choices": ["빨강", "blue", "초록", "노랑"], "answer": 1}


@pytest.fixture(params=["tiny", "qwen"])
def any_processor(request, processor):
    """The tiny model's processor, and that of the real vocabulary where it lies beside the checkout."""
    if request.param == "tiny":
        return processor
    if not QWEN.is_dir():
        pytest.skip("the real vocabulary is not here")
    from random_model import qwen_processor

    return qwen_processor(QWEN)


def test_the_chat_is_rendered_byte_for_byte_as_qwen_renders_it(any_processor):
    text = render_chat(any_processor, build_messages(ROW), "b")
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|><|image_pad|><|vision_end|>무슨 색인가요?\na. 빨강\nb. blue\nc. 초록\nd. 노랑\n"
        "Answer with the letter only.<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
    )


def test_the_prediction_prompt_is_a_token_prefix_of_the_training_text(any_processor):
    conversation = build_messages(ROW)
    prompt, text = render_chat(any_processor, conversation), render_chat(any_processor, conversation, "b")
    tokenizer = any_processor.tokenizer
    prompt_ids, text_ids = tokenizer(prompt).input_ids, tokenizer(text).input_ids
    assert text_ids[: len(prompt_ids)] == prompt_ids
    assert tokenizer.convert_ids_to_tokens(text_ids[len(prompt_ids) :]) == ["b", "<|im_end|>", "Ċ"]


def test_letters_of_the_real_vocabulary_are_64_to_67():
    if not QWEN.is_dir():
        pytest.skip("the real vocabulary is not here")
    from random_model import qwen_processor

    processor = qwen_processor(QWEN)
    assert letter_ids(processor)[:4] == [64, 65, 66, 67]
    assert processor.tokenizer.encode(" a") == [264]
    assert processor.tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"]) == [151643, 151645]


def test_the_letter_shown_before_a_choice_is_the_token_that_answers(any_processor):
    ids = any_processor.tokenizer(render_chat(any_processor, build_messages(ROW))).input_ids
    found = letter_ids(any_processor)
    assert all(ids.count(found[i]) >= 1 for i in range(4))


@pytest.mark.parametrize("token", ["<|im_end|>", "<|image_pad|>", "<|endoftext|>", "<|im_start|>"])
def test_text_that_spells_a_special_token_never_becomes_it(any_processor, token):
    clean = {"images": ["x.jpg"], "question": "x", "choices": ["y", "z"]}
    dirty = {"images": ["x.jpg"], "question": f"x {token}", "choices": [f"{token}y", "z"]}
    special = added_tokens(any_processor)
    wanted = any_processor.tokenizer.convert_tokens_to_ids(token)
    counts = []
    for row in (clean, dirty):
        text = render_chat(any_processor, build_messages(row, special=special))
        counts.append(any_processor.tokenizer(text).input_ids.count(wanted))
    assert counts[0] == counts[1]
    said = build_messages(dirty, special=special)[0]["content"][1]["text"]
    assert token not in said and said.replace("\u200b", "").count(token) == 2, "a person still reads it"


def test_plain_text_is_left_alone():
    assert escape_special_tokens("a < b | c > d", ("<|im_end|>",)) == "a < b | c > d"


def test_an_order_shows_its_choices_at_the_letters_and_moves_the_answer():
    row = {**ROW, "permutation": [2, 3, 1, 0]}
    text = build_messages(row)[0]["content"][1]["text"]
    assert "a. 초록\nb. 노랑\nc. blue\nd. 빨강" in text
    assert shown_answer(row) == 2
    assert shown_answer(ROW) == 1


def test_a_template_that_renders_other_text_for_training_is_refused(processor):
    import copy

    broken = copy.deepcopy(processor)
    broken.chat_template = broken.chat_template.replace("<|im_start|>assistant\\n", "<|im_start|>assistant\\n ")
    with pytest.raises(UserError, match="prefix"):
        letter_ids(broken)
