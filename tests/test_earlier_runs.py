"""What a run takes from earlier runs and other files: a teacher, an adapter to start from, further rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import TINY, write_csv
from safetensors.torch import load_file

from vqa.config.arguments import DataArguments, ModelArguments
from vqa.config.parser import parse_arguments
from vqa.core.errors import UserError
from vqa.data.rows import read_rows
from vqa.data.splits import repeated_rows, split_rows
from vqa.modeling.tree_attention import TreeCollator
from vqa.training.earlier_runs import check_init_adapter, read_split


@pytest.fixture
def folds(trained, tmp_path):
    """Copies of two finished folds, to be changed."""
    ignore = shutil.ignore_patterns("checkpoint-*")
    return [
        shutil.copytree(trained / "checkpoints" / f"fold{k}", tmp_path / f"fold{k}", ignore=ignore) for k in (0, 1)
    ]


def data_of(trained, teacher, **fields):
    return DataArguments(train_csv=str(trained / "data" / "train.csv"), teacher=list(map(str, teacher)), **fields)


def oof(folder, weights=None):
    """Probabilities by id, of a fold's best weights if they are not named."""
    weights = weights or json.loads((folder / "metrics.json").read_text())["best"]
    return pd.read_csv(folder / ("" if weights == "raw" else weights) / "oof.csv", index_col="id").filter(like="p_")


def test_soft_labels_mix_the_label_with_probabilities_of_the_fold_that_was_not_trained_on_the_row(trained, folds):
    train, valid = read_split(data_of(trained, folds, fold=0, teacher_weight=0.25), seed=42)
    plain, plain_valid = read_split(DataArguments(train_csv=str(trained / "data" / "train.csv"), fold=0), seed=42)
    assert valid == plain_valid and len(train) == 12
    teacher = oof(folds[1])  # fold 1 was validated on the rows that fold 0 trains on
    assert sorted(row["id"] for row in train) == sorted(teacher.index)
    for row, before in zip(train, plain):
        wanted = 0.25 * teacher.loc[row["id"]].to_numpy() + 0.75 * np.eye(4)[row["answer"]]
        assert row["target"] == pytest.approx(wanted) and {**row, "target": None} == {**before, "target": None}


def test_several_teachers_are_averaged_and_the_untrained_base_may_be_one(trained, folds, tmp_path):
    every = pd.concat([pd.read_csv(fold / "oof.csv") for fold in folds])
    every.to_csv(tmp_path / "base.csv", index=False)
    (tmp_path / "base.json").write_text(json.dumps({"weights": "base", "adapter": None}))
    train, _ = read_split(data_of(trained, [*folds, tmp_path / "base.csv"], fold=0, teacher_weight=1.0), seed=42)
    base = every.set_index("id").filter(like="p_")
    for row in train:
        wanted = (oof(folds[1]).loc[row["id"]] + base.loc[row["id"]]) / 2
        assert row["target"] == pytest.approx(wanted.to_numpy())
    with pytest.raises(UserError, match="training rows have 1 to 2 teachers. Give all folds of each"):
        read_split(data_of(trained, [tmp_path / "base.csv", folds[1]], fold=None), seed=42)


def change(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def in_sample(folds, tmp_path):
    for weights in ("", "ema", "swa"):
        shutil.copy(folds[1] / weights / "oof.csv", folds[0] / weights / "oof.csv")
    return folds


def other_folds(folds, tmp_path):
    """The teacher's folds file was made again after its training."""
    args = json.loads((folds[1] / "args.json").read_text())
    table = pd.read_csv(Path(args["train_csv"]).with_name("folds.csv"))
    table.assign(fold=np.roll(table["fold"], 1)).to_csv(tmp_path / "again.csv", index=False)
    change(folds[1] / "args.json", folds_csv=str(tmp_path / "again.csv"))
    return folds


def without_args(folds, tmp_path):
    return [shutil.copy(folds[1] / "oof.csv", tmp_path / "somewhere.csv")]


def all_rows(folds, tmp_path):
    (folds[1] / "oof.csv").unlink()
    change(folds[1] / "metrics.json", best="raw")
    return folds


def exchanged(folds, tmp_path):
    table = pd.read_csv(folds[1] / "oof.csv")
    table.assign(id=table["id"][::-1].to_numpy()).to_csv(folds[1] / "oof.csv", index=False, float_format="%.17g")
    change(folds[1] / "metrics.json", best="raw")
    return folds


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (in_sample, "rows are not of fold 0, so its model was trained on them"),
        (other_folds, "rows are not of fold 1, so its model was trained on them"),
        (without_args, "nothing beside .* says which rows its model was trained on"),
        (all_rows, "has no out-of-fold file, because it was trained on every row"),
        (exchanged, "ids were exchanged or the answers changed"),
        (lambda folds, _: folds[:1], "12 training rows have no out-of-fold probabilities: .*Give all folds"),
        (lambda folds, _: ["nowhere"], "nowhere"),
    ],
)
def test_a_teacher_that_may_have_been_trained_on_a_row_is_refused(trained, folds, tmp_path, break_it, message):
    with pytest.raises(UserError, match=message) as error:
        read_split(data_of(trained, break_it(folds, tmp_path), fold=0), seed=42)
    assert "\n" not in str(error.value)


def test_rows_of_further_files_keep_their_weight_and_never_share_a_validation_image(contest, tmp_path, capsys):
    """Ids are those of train.csv, and each file has two images of its first fold."""
    table = pd.read_csv(contest / "train.csv", dtype=str)
    write_csv(tmp_path / "folds.csv", [[i, str(n % 3)] for n, i in enumerate(table["id"])], ["id", "fold"])
    for name in ("one", "two"):
        extra = tmp_path / name / "train.csv"
        write_csv(extra, table.iloc[:6].values.tolist(), list(table.columns))
        shutil.copytree(contest / "pictures", tmp_path / name / "pictures")
        for n in range(1, 6):
            if n != 3:
                with open(tmp_path / name / "pictures" / f"{n}.jpg", "ab") as file:
                    file.write(name.encode())  # other bytes
    data = DataArguments(train_csv=str(contest / "train.csv"), folds_csv=str(tmp_path / "folds.csv"), fold=0)
    rows = read_rows(data.train_csv, with_answer=True)
    plain, _ = split_rows(rows, data, seed=42)
    data.extra_csv, data.extra_weight = [str(tmp_path / name / "train.csv") for name in ("one", "two")], 0.25
    train, valid = split_rows(rows, data, seed=42)
    assert train[: len(plain)] == plain and not any("weight" in row for row in plain + valid)
    ids = [f"extra{k} {table['id'][n]}" for k in (1, 2) for n in (1, 2, 4, 5)]
    assert [(row["id"], row["weight"]) for row in train[len(plain) :]] == [(name, 0.25) for name in ids]
    assert train[-1]["images"] == [str(tmp_path / "two" / "pictures" / "5.jpg")]
    assert capsys.readouterr().out.count("4 of 6 rows become training rows (weight 0.25); 2 are left out") == 2
    text_only = [{**row, "images": []} for row in valid[:2]]
    assert repeated_rows(text_only + train, [{**valid[0], "images": []}]) == [valid[0]["id"]]
    data.extra_weight = 1.0
    assert not any("weight" in row for row in split_rows(rows, data, seed=42)[0])


def test_a_row_counts_by_its_weight_in_the_loss_of_a_step(make_trainer):
    trainer = make_trainer(per_device_train_batch_size=4, loss="letter")
    weights = [0.25, 1.0, 2.0]
    for row, weight in zip(trainer.train_dataset.rows, weights):
        row["weight"] = weight
    try:
        rows = [{**trainer.train_dataset.rows[i]} for i in range(4)]
        batches, count = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, torch.device("cpu"))
        assert int(count) == 4 and batches[0]["weight"].tolist() == [*weights, 1.0]
        with torch.no_grad():
            alone = [float(trainer.compute_loss(trainer.model.eval(), trainer.data_collator([row]))) for row in rows]
            together = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=count)
        assert TreeCollator(trainer.data_collator)([{**rows[0], "permutations": [[1, 0, 2, 3]]}])["weight"] == 0.25
        assert float(together) == pytest.approx(np.dot(alone, [*weights, 1.0]) / 4, abs=1e-5)
    finally:
        for row in trainer.train_dataset.rows:
            row.pop("weight", None)


def test_a_second_stage_starts_from_the_first_ones_adapter_and_resumes_with_no_other(trained, folds, script, tmp_path):
    """With a learning rate of 0 the adapter at the end is the one at the start."""
    flags = ["--init_adapter", folds[0], "--learning_rate", "0", "--max_steps", "1", "--eval_steps", "1"]
    flags += ["--ema_decay", "0", "--swa_start", "null", "--save_steps", "1", "--output_dir", tmp_path / "second"]
    code, _, error = script("train_fold", trained / "args" / "fold0.json", *flags)
    assert code == 0, error
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (folds[0], tmp_path / "second"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    fresh = load_file(folds[1] / "adapter_model.safetensors")
    assert not all(torch.equal(first[name], fresh[name]) for name in first)
    shutil.copy(folds[0] / "ema" / "adapter_model.safetensors", folds[0])
    resume = ["--resume_from_checkpoint", "auto"]
    code, _, error = script("train_fold", trained / "args" / "fold0.json", *flags, *resume)
    assert (code, error.count("\n")) == (2, 1) and "contains a run with a different init_adapter" in error


def test_an_adapter_that_may_know_validation_rows_or_does_not_fit_is_refused(trained, folds, tmp_path):
    _, valid = read_split(DataArguments(train_csv=str(trained / "data" / "train.csv"), fold=0), seed=42)

    def check(folder=folds[0], rows=valid, **fields):
        check_init_adapter(ModelArguments(model=TINY, init_adapter=str(folder), **fields), rows)

    check()
    check(folds[0] / "ema")
    with pytest.raises(UserError, match="fold1 was trained on the images of 12 validation rows"):
        check(folds[1])
    check(folds[1], rows=[])  # a run on all rows validates on none
    chain = shutil.copytree(folds[0], tmp_path / "chain")
    change(chain / "args.json", init_adapter=str(folds[1]))
    with pytest.raises(UserError, match="fold1 was trained on the images of 12 validation rows"):
        check(chain)
    with pytest.raises(UserError, match="has r 16 and not 8. Set the LoRA fields as in that run"):
        check(lora_rank=8)
    with pytest.raises(UserError, match="has use_rslora False and not True"):
        check(lora_options={"use_rslora": True})
    with pytest.raises(UserError, match="holds no adapter"):
        check(tmp_path / "nowhere")
    with pytest.raises(UserError, match="works with score letter"):
        check(score="suffix")
    metrics = json.loads((folds[0] / "metrics.json").read_text())
    change(folds[0] / "metrics.json", fingerprints=metrics["fingerprints"] | {"files": "0" * 16})
    with pytest.raises(UserError, match="was trained on other base weights"):
        check()
    shutil.copytree(folds[1], tmp_path / "bare" / "adapter")
    for name in ("args.json", "metrics.json"):
        (tmp_path / "bare" / "adapter" / name).unlink()
    with pytest.raises(UserError, match="no args.json beside .* says on which rows it was trained"):
        check(tmp_path / "bare" / "adapter")


def test_lists_are_read_from_flags_and_null_unsets_them():
    demo = ["args/demo/fold0.json", "--extra_csv", "a.csv", "b.csv", "--teacher", "x", "--teacher_weight", "0.3"]
    _, data, _, config = parse_arguments(demo, "")
    assert (data.extra_csv, data.teacher, data.teacher_weight) == (["a.csv", "b.csv"], ["x"], 0.3)
    assert config["extra_csv"] == ["a.csv", "b.csv"]
    assert parse_arguments([*demo, "--extra_csv", "null"], "")[1].extra_csv is None
    with pytest.raises(UserError, match="teacher_weight is 1.5. Set it from 0 to 1"):
        parse_arguments([*demo, "--teacher_weight", "1.5"], "")
