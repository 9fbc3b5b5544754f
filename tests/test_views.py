"""Views really differ, are mapped back, and are averaged as they should be."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vqa.config.arguments import DataArguments
from vqa.data.collator import Collator
from vqa.inference.scoring import choice_probs
from vqa.inference.tta import ViewPredictions, choice_permutations, group_by_image, make_views, stack_views
from vqa.inference.view_cache import CachedView
from vqa.modeling.feature_store import open_feature_store


def test_scales_change_the_grid_that_the_model_sees(processor, rows, capsys):
    collate = Collator(processor, 140)
    plain, smaller, larger = make_views(rows, collate, [0.9, 1.0, 1.1])
    assert (plain.name, smaller.name, larger.name) == ("plain", "scale 0.9", "scale 1.1")
    for view in (smaller, larger):
        seen, before = collate(view.changed_rows())["image_grid_thw"], collate([rows[i] for i in view.changed])
        assert (seen != before["image_grid_thw"]).any(1).all()
        assert len(view.changed) == len(rows)
    assert "scale 0.9: 24 of 24 rows get another grid" in capsys.readouterr().out


def test_a_scale_that_changes_no_grid_gives_no_view(processor, rows, tmp_path, capsys):
    Image.new("RGB", (56, 56)).save(tmp_path / "smallest.png")  # four tokens, the fewest there are
    smallest = {**rows[0], "images": [str(tmp_path / "smallest.png")]}
    assert [view.name for view in make_views([smallest], Collator(processor, 140), [0.9, 1.0])] == ["plain"]
    assert "0 of 1 rows get another grid" in capsys.readouterr().out
    views = make_views([smallest, rows[0]], Collator(processor, 140), [0.9, 1.0])
    assert [view.changed for view in views] == [[0, 1], [1]]


def test_scales_that_give_the_same_grid_are_one_view(processor, rows):
    names = [view.name for view in make_views(rows, Collator(processor, 140), [0.9, 0.901, 1.4, 1.0])]
    assert names == ["plain", "scale 0.9", "scale 1.4"]


@pytest.mark.parametrize("permutation_set", ["cyclic", "latin"])
@pytest.mark.parametrize("count", range(2, 11))
def test_every_choice_is_once_at_every_letter(permutation_set, count):
    permutations = choice_permutations(count, permutation_set)
    assert permutations[0] == list(range(count)), "the CSV's order is the first"
    assert all(sorted(permutation) == list(range(count)) for permutation in permutations)
    assert len(permutations) == count
    assert all(len({permutation[i] for permutation in permutations}) == count for i in range(count))


@pytest.mark.parametrize("count", [2, 4, 6, 8, 10])
def test_in_a_latin_set_of_an_even_count_every_choice_follows_every_other_once(count):
    pairs = [pair for permutation in choice_permutations(count, "latin") for pair in zip(permutation, permutation[1:])]
    assert sorted(pairs) == [(a, b) for a in range(count) for b in range(count) if a != b]


def test_a_row_of_two_choices_has_two_permutations(processor, rows):
    short = [{**rows[0], "choices": ["x", "y"]}, rows[1]]
    views = make_views(short, Collator(processor, 140), num_permutations=4)
    assert [view.changed for view in views] == [[0, 1], [0, 1], [1], [1]]
    assert [view.rows[0]["permutation"] for view in views[1:]] == [[1, 0], [0, 1], [1, 0]]


def test_paraphrases_replace_the_question_of_the_rows_that_have_them(processor, rows, capsys):
    asked = [rows[0], {**rows[1], "paraphrases": ["이건 뭔가요?", "뭐죠?"]}, {**rows[2], "paraphrases": ["what?"]}]
    views = make_views(asked, Collator(processor, 140), num_permutations=2, num_paraphrases=4)
    assert [(view.name, view.changed) for view in views[2:]] == [("paraphrase 1", [1, 2]), ("paraphrase 2", [1])]
    assert [[row["question"] for row in view.changed_rows()] for view in views[2:]] == [
        ["이건 뭔가요?", "what?"],
        ["뭐죠?"],
    ]
    assert [len(together) for together in group_by_image(views)] == [2, 1, 1], (
        "only permutations share the prompt before the choices"
    )
    texts = processor.tokenizer.batch_decode(Collator(processor, 140)(views[2].changed_rows())["input_ids"])
    assert "이건 뭔가요?" in texts[0] and rows[1]["question"] not in texts[0]
    assert "paraphrase 3: 0 of 3 questions have one" in capsys.readouterr().out


def test_permutations_of_one_image_are_grouped(processor, rows):
    views = make_views(rows, Collator(processor, 140), [0.8, 1.0, 1.4], 3, "latin", flip=True)
    assert [[view.name for view in views] for views in group_by_image(views)] == [
        ["plain", "latin 1", "latin 2"],
        ["scale 0.8"],
        ["scale 1.4"],
        ["flip"],
    ]
    views = make_views(rows, Collator(processor, 140), num_permutations=2, flip=True)
    assert [len(together) for together in group_by_image(views)] == [2, 1]


class Letters(torch.nn.Module):
    """A stand-in for the model that gives a row's letters the logits which `liking` makes of the texts beside them."""

    def __init__(self, processor, ids, liking):
        super().__init__()
        self.processor, self.ids, self.liking, self.unused = processor, ids, liking, torch.nn.Parameter(torch.zeros(1))

    def forward(self, input_ids, logits_to_keep, **inputs):
        logits = torch.zeros(len(input_ids), 1, len(self.processor.tokenizer))
        for i, tokens in enumerate(input_ids):
            text = self.processor.tokenizer.decode(tokens)
            shown = [line[3:] for line in text.splitlines() if line[1:3] == ". "]
            logits[i, 0, self.ids[: len(shown)]] = torch.tensor(self.liking(shown), dtype=torch.float32)
        return type("Output", (), {"logits": logits})


def predictions_of(processor, ids, views, liking):
    collate = Collator(processor, 140)
    model = Letters(processor, ids, liking)

    def blind(rows):
        return {key: value for key, value in collate(rows).items() if key != "pixel_values"}

    return stack_views(
        views, [CachedView(choice_probs(model, view.changed_rows(), blind, ids, 8), 1.0) for view in views]
    )


@pytest.mark.parametrize("permutation_set", ["cyclic", "latin"])
def test_permutations_change_nothing_for_a_model_without_position_bias(processor, ids, rows, permutation_set):
    views = make_views(rows[:6], Collator(processor, 140), num_permutations=4, permutation_set=permutation_set)
    predictions = predictions_of(
        processor, ids, views, lambda shown: [len(text) % 5 + text.count("e") for text in shown]
    )
    assert np.ptp(predictions.probabilities[0, :, :4]) > 0.1
    assert np.abs(predictions.probabilities - predictions.probabilities[0]).max() < 1e-12
    assert np.abs(predictions.mean() - predictions.probabilities[0]).max() < 1e-12


@pytest.mark.parametrize("permutation_set", ["cyclic", "latin"])
def test_all_permutations_together_cancel_a_position_bias(processor, ids, rows, permutation_set):
    rows = [rows[0], {**rows[1], "choices": rows[1]["choices"][:3]}]
    views = make_views(rows, Collator(processor, 140), num_permutations=4, permutation_set=permutation_set)
    predictions = predictions_of(processor, ids, views, lambda shown: [2.0, 0.0, 1.0, -1.0][: len(shown)])
    assert predictions.probabilities[0].argmax(1).tolist() == [0, 0]
    assert predictions.mean()[0, :4] == pytest.approx(np.full(4, 1 / 4)) and predictions.mean()[
        1, :3
    ] == pytest.approx(1 / 3)


def test_a_flipped_image_is_mirrored_and_never_taken_for_the_other(model, processor, rows, tmp_path):
    with Image.open(rows[0]["images"][0]) as image:
        ImageOps.mirror(image).save(tmp_path / "mirrored.png")
    mirrored, flipped = {**rows[0], "images": [str(tmp_path / "mirrored.png")]}, {**rows[0], "flip": True}
    seen, wanted, before = (Collator(processor, 112)([row])["pixel_values"] for row in (flipped, mirrored, rows[0]))
    assert torch.equal(seen, wanted) and not torch.equal(seen, before)
    data = DataArguments(image_size=112, vision_cache_dir=str(tmp_path / "cache"))
    store = open_feature_store(model, processor, data, [[rows[0]], [flipped], [mirrored]], show=False)
    plain, turned, wanted = (store.read([row])[0] for row in (rows[0], flipped, mirrored))
    assert torch.allclose(turned, wanted, atol=1e-5) and (turned - plain).abs().max() > 1e-2
    again = open_feature_store(model, processor, data, [[rows[0]]], show=False)
    assert again.holds([rows[0]]) and not again.holds([flipped]) or torch.equal(again.read([flipped])[0], turned)


def test_rows_that_mention_a_side_are_not_flipped_and_counted(processor, rows, capsys):
    plain = {**rows[0], "question": "What is it?", "choices": ["bright", "leftover", "x"]}
    said = [{**plain, "question": question} for question in ("On the LEFT?", "오른쪽은 무엇인가요?", "What is it?")]
    said += [{**plain, "choices": ["x", "왼쪽 위"]}, {**plain, "images": []}]
    *_, view = make_views(said, Collator(processor, 140), flip=True)
    assert (view.name, view.changed) == ("flip", [2])
    output = capsys.readouterr().out
    assert "3 of 5 rows mention left or right" in output and output.count("\n") == 1


@pytest.fixture
def predictions():
    """Three views of two rows; the second row isn't in the last one, and is surer of itself in the plain one."""
    first = [[0.5, 0.4, 0.1], [0.2, 0.6, 0.2], [0.3, 0.3, 0.4]]
    second = [[0.9, 0.1, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    shown = np.array([[True, True], [True, True], [True, False]])
    return ViewPredictions(["plain", "x", "y"], np.stack([first, second], axis=1), shown, np.ones(3))


def test_a_view_that_does_not_show_a_row_does_not_count_for_it(predictions):
    assert predictions.mean() == pytest.approx(np.array([[1 / 3, 1.3 / 3, 0.7 / 3], [0.7, 0.3, 0.0]]))
    assert predictions.mean([0, 2]) == pytest.approx(np.array([[0.4, 0.35, 0.25], [0.9, 0.1, 0.0]]))


def test_the_gate_leaves_sure_rows_to_the_plain_view(predictions):
    assert predictions.margins() == pytest.approx([0.1, 0.8])
    assert predictions.below_gate(0.8000001).tolist() == [True, True] and predictions.below_gate(0.5).tolist() == [
        True,
        False,
    ]
    assert predictions.mean(gate=0.5) == pytest.approx(np.array([[1 / 3, 1.3 / 3, 0.7 / 3], [0.9, 0.1, 0.0]]))
    assert predictions.used([0, 1, 2], 0.5).sum(1).tolist() == [2, 1, 1]
    assert (predictions.mean(gate=0.0) == predictions.probabilities[0]).all()
