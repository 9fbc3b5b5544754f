"""Soft labels: annotators' answers read, shown with the choices, and what the loss makes of them."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HEADER, write_csv
from scipy.stats import entropy
from torch.nn.functional import cross_entropy

from vqa.core.errors import UserError
from vqa.data.prompt import LETTERS
from vqa.data.rows import read_rows
from vqa.evaluation.labels import Labels

CHOICES = ["r1", "x.jpg", "q?", "one", "two", "three", ""]
ANNOTATED = [*HEADER[:-1], "answer1", "answer2", "answer3"]


def read_one(tmp_path, *cells, header=ANNOTATED):
    return read_rows(write_csv(tmp_path / "t.csv", [[*CHOICES, *cells]], header), with_answer=True)[0]


@pytest.mark.parametrize(
    ("cells", "answer", "shares"),
    [
        (["b", "c", "b"], 1, [0, 2 / 3, 1 / 3]),
        (["C", "", " b "], 2, [0, 1 / 2, 1 / 2]),  # a tie: the first annotator's
        (["a", "b", "b"], 1, [1 / 3, 2 / 3, 0]),
        (["", "", "c"], 2, [0, 0, 1]),
    ],
)
def test_the_answer_is_the_majoritys_and_of_a_tie_the_one_chosen_first(tmp_path, cells, answer, shares):
    row = read_one(tmp_path, *cells)
    assert row["answer"] == answer and row["annotators"] == pytest.approx(shares)
    labels = Labels(tmp_path / "t.csv")
    assert list(labels.answers(["r1"])) == [answer] and labels.soft_labels(["r1"])[0, :3] == pytest.approx(shares)


def test_a_single_answer_stands_beside_its_annotators_and_for_those_that_are_missing(tmp_path):
    header = [*ANNOTATED, "answer"]
    assert read_one(tmp_path, "b", "b", "c", "a", header=header)["answer"] == 0
    assert read_one(tmp_path, "b", "b", "c", "a", header=header)["annotators"] == pytest.approx([0, 2 / 3, 1 / 3])
    assert read_one(tmp_path, "", "", "", "a", header=header)["annotators"] == [1, 0, 0]
    assert read_one(tmp_path, "b", "c", "c", "", header=header)["answer"] == 2


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        (["a", "d", "a"], "row 1 .id r1., answer2: answer 'd' is not offered"),
        (["a", "one", "a"], "answer2: answer 'one' is not offered"),
        (["", " ", ""], "1 row without an answer in answer1 or answer2 or answer3: r1"),
    ],
)
def test_an_annotator_who_answers_nothing_that_is_offered_is_named(tmp_path, cells, message):
    with pytest.raises(UserError, match=message):
        read_one(tmp_path, *cells)


def targets(count: int, offered: int = 4) -> np.ndarray:
    return np.random.default_rng(0).dirichlet(np.ones(offered), count)


@pytest.fixture
def soft(rows):
    """Three rows with soft labels; the second offers three choices, and the third is shown in another order."""
    soft = [{**row, "target": list(target)} for row, target in zip(rows, targets(3))]
    soft[1] |= {"choices": soft[1]["choices"][:3], "answer": 1, "target": [0.5, 0.2, 0.3]}
    soft[2]["permutation"] = [2, 0, 3, 1]
    return soft


@pytest.fixture
def losses(make_trainer):
    """(our losses, logits at the letter (rows, vocabulary), logits at the end of the turn) of rows, one by one."""

    def of(rows: list[dict], loss: str):
        trainer = make_trainer(loss=loss)
        with torch.no_grad():  # untouched, the tiny model is so sure of the turn's end that its loss is nothing
            trainer.model.get_input_embeddings().weight += torch.randn(192, generator=torch.manual_seed(0)) * 0.1
        found = []
        for row in rows:
            batch = trainer.data_collator([row])
            value, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
            assert value.requires_grad and value.isfinite()
            found.append((float(value.detach()), *outputs["logits"][0, :2].detach()))
        together = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
        assert float(together.detach()) == pytest.approx(np.mean([value for value, *_ in found]), abs=1e-5)
        return found

    return of


def as_shown(row: dict) -> torch.Tensor:
    """By hand: what stands at each letter is as likely as that choice."""
    return torch.tensor([row["target"][choice] for choice in row.get("permutation", range(len(row["choices"])))])


def test_the_letter_loss_is_torchs_with_probabilities_over_the_letters_offered(losses, soft, ids):
    for row, (value, at_letter, _) in zip(soft, losses(soft, "letter")):
        offered = at_letter[ids[: len(row["choices"])]]
        assert value == pytest.approx(float(cross_entropy(offered, as_shown(row))), abs=1e-6)


def test_the_token_loss_is_torchs_with_probabilities_over_the_vocabulary(losses, soft, ids, processor):
    end = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for row, (value, at_letter, at_end) in zip(soft, losses(soft, "token")):
        wanted = torch.zeros_like(at_letter)
        for letter, share in zip(ids, as_shown(row)):
            wanted[letter] = share
        oracle = cross_entropy(at_letter, wanted) + cross_entropy(at_end, torch.tensor(end))
        assert value == pytest.approx(float(oracle) / 2, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["letter", "token"])
def test_where_all_annotators_agree_the_loss_is_the_hard_one(losses, soft, loss):
    hard = [{name: cell for name, cell in row.items() if name != "target"} for row in soft]
    agreed = [{**row, "target": [float(i == row["answer"]) for i in range(len(row["choices"]))]} for row in soft]
    mixed = [agreed[0], *hard[1:]]  # a row without soft labels among others that have them
    values = [[value for value, *_ in losses(these, loss)] for these in (hard, agreed, mixed)]
    assert values[1] == pytest.approx(values[0], abs=1e-6) and values[2] == pytest.approx(values[0], abs=1e-6)


def test_training_takes_the_annotators_and_validation_scores_against_them(trained, script, tmp_path):
    """Three annotators, of whom the last two often disagree with the first."""
    table = pd.read_csv(trained / "data" / "train.csv", dtype=str)
    draw = np.random.default_rng(0)
    for name in ("answer1", "answer2", "answer3"):
        table[name] = table["answer"] if name == "answer1" else draw.choice(list("abcd"), len(table))
    table = table.drop(columns="answer")
    csv = write_csv(trained / "data" / "annotated.csv", table.values.tolist(), list(table.columns))
    rows = read_rows(csv, with_answer=True)
    flags = ["--train_csv", csv, "--folds_csv", trained / "data" / "folds.csv", "--save_strategy", "no"]
    flags += [
        "--ema_decay",
        "0",
        "--swa_start",
        "null",
        "--max_steps",
        "1",
        "--eval_steps",
        "1",
        "--warmup_steps",
        "0",
    ]
    outputs = {}
    for soft in ("true", "false"):
        code, _, error = script(
            "train_fold", trained / "args/fold0.json", *flags, "--soft_labels", soft, "--output_dir", tmp_path / soft
        )
        assert code == 0, error
        outputs[soft] = (tmp_path / soft / "adapter_model.safetensors").read_bytes()
    assert outputs["true"] != outputs["false"]

    oof = pd.read_csv(tmp_path / "true" / "oof.csv").set_index("id")
    shares = pd.DataFrame({row["id"]: row["annotators"] for row in rows}).T.loc[oof.index].to_numpy()
    columns = ["p_a", "p_b", "p_c", "p_d"]
    crossed = entropy(shares, axis=1) + entropy(shares, oof[columns].to_numpy(), axis=1)  # KL plus entropy
    noted = json.loads((tmp_path / "true" / "metrics.json").read_text())["weights"]["raw"]
    assert noted["annotator_log_loss"] == pytest.approx(crossed.mean())
    majority = {row["id"]: LETTERS[row["answer"]] for row in rows}
    assert noted["accuracy"] == pytest.approx(np.mean([majority[i] == a for i, a in zip(oof.index, oof["answer"])]))

    files = [tmp_path / name / "oof.csv" for name in ("false", "true")]
    code, said, error = script("ensemble", "--compare", *files, "--labels", csv)
    assert code == 0 and f"{files[1]}: cross-entropy to the annotators {crossed.mean():.4f}" in said, error


def test_soft_labels_without_annotators_are_refused(trained, script, tmp_path):
    code, _, error = script(
        "train_fold", trained / "args" / "fold0.json", "--soft_labels", "true", "--output_dir", tmp_path
    )
    assert (code, error.count("\n")) == (2, 1) and "has no columns answer1, answer2" in error
