"""Which rows share a batch, and how many."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

from vqa.config.arguments import ModelArguments
from vqa.config.recipe import RecipeArguments
from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes
from vqa.training.batching import (
    Lengths,
    MicroBatches,
    apply_batch_config,
    choose_batch_config,
    choose_micro_batch,
    count_tokens,
    split_batch,
)
from vqa.training.dataset import LengthSortedSampler
from vqa.training.memory import Setup, meta_model, training_peak

LENGTHS = Lengths(np.full(40, 300), np.full(40, 180), 0)


@pytest.fixture(scope="module")
def setup():
    return Setup(meta_model(ModelArguments(model=TINY), torch.float16), False, True)


def test_tokens_are_those_of_the_collated_rows(processor, rows):
    collate = Collator(processor, image_size=112, with_answer=True)
    batches = [collate([row]) for row in rows]
    lengths = count_tokens(rows, collate, oriented_sizes(all_images(rows)), show=False)
    assert lengths.tokens.tolist() == [batch["input_ids"].shape[1] for batch in batches]
    assert (lengths.patches * lengths.image_tokens).tolist() == [len(batch["pixel_values"]) for batch in batches]


def test_every_row_comes_once_and_a_steps_micro_batches_pad_little():
    lengths = np.random.default_rng(0).integers(100, 400, 1003)
    sampler = LengthSortedSampler(lengths, 16, 1, torch.tensor(0))
    order = list(sampler)
    assert sorted(order) == list(range(1003)) and len(sampler) == 1003

    def padding(rows):  # in micro-batches of 4
        batches = [rows[i : i + 4] for i in range(0, 1003, 4)]
        return sum(batch.max() * len(batch) - batch.sum() for batch in batches)

    assert padding(lengths[order]) < 0.4 * padding(lengths)  # which were drawn at random


def test_steps_are_as_mixed_as_random_ones():
    lengths = np.random.default_rng(0).integers(100, 400, 4000)
    order = list(LengthSortedSampler(lengths, 16, 1, torch.tensor(0)))
    means = lengths[order].reshape(250, 16).mean(1)
    assert means.std() == pytest.approx(lengths.std() / 4, rel=0.15)  # of 16 independent draws; 75 if rows were alike
    assert abs(np.corrcoef(range(250), means)[0, 1]) < 0.2  # neither from long to short nor back


def test_the_order_goes_by_seed_and_epoch_alone():
    epoch = torch.tensor(0)
    sampler = LengthSortedSampler(LENGTHS.tokens, 8, 1, epoch)
    first = list(sampler)
    torch.rand(3)
    assert list(sampler) == first
    epoch.fill_(1)
    assert list(sampler) != first


def way(setup, room, rows=32, rate=1e14, checkpointing=None):
    recipe = RecipeArguments("x", effective_batch_size=rows, gradient_checkpointing=checkpointing, use_cpu=True)
    fields = choose_micro_batch(setup, LENGTHS, recipe, room, rate)
    names = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing")
    return tuple(fields[name] for name in names)


@pytest.mark.slow
def test_the_batch_fits_the_memory_and_makes_the_steps_rows(setup):
    assert way(setup, 1e12) == (32, 1, False)
    for room in (2e8, 1e8, 6e7):
        size, batches, checkpointing = way(setup, room)
        assert size * batches == 32
        chosen = Setup(setup.model, False, checkpointing)
        assert training_peak(chosen, LENGTHS.batch(size)) <= room
        if size < 32:
            assert (
                training_peak(chosen, LENGTHS.batch(2 * size)) > room
                or way(setup, room, checkpointing=False)[0] == size
            )
    assert way(setup, 1e12, checkpointing=True) == (32, 1, True)
    assert way(setup, 0) == (1, 32, True)


def batch_of(collate, rows):
    return collate(rows) | {"weight": torch.arange(len(rows)).float()}


def test_a_split_batch_is_the_rows_in_parts(processor, rows):
    collate = Collator(processor, image_size=112, with_answer=True)
    rows = [row | {"scale": scale} for row, scale in zip(rows, (1.0, 0.6, 1.0, 0.8, 0.7))]
    batch = batch_of(collate, rows)
    assert split_batch(batch, 5) == [batch]
    parts = split_batch(batch, 2)
    assert [part["ids"] for part in parts] == [batch["ids"][:2], batch["ids"][2:4], batch["ids"][4:]]
    for row, part in zip((rows[:2], rows[2:4], rows[4:]), parts):
        alone = collate(row)
        assert part.keys() == batch.keys()
        assert part["answer_start"] == batch["answer_start"]
        for key in ("pixel_values", "image_grid_thw", "answer", "offered"):
            assert torch.equal(part[key], alone[key])
        width = alone["input_ids"].shape[1]  # the whole batch may be padded to more
        assert torch.equal(part["input_ids"][:, -width:], alone["input_ids"])


def micro_batches(tmp_path, **fields):
    """MicroBatches of a run on a GPU, as the args say it."""
    usual = {"auto_batch": True, "world_size": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    usual |= {"gradient_checkpointing": False, "output_dir": str(tmp_path), "device": torch.device("cuda")}
    return MicroBatches(SimpleNamespace(**usual | fields))


def test_a_batch_that_does_not_fit_goes_in_parts_to_the_same_gradients(processor, rows, tmp_path, capsys):
    collate = Collator(processor, image_size=112, with_answer=True)
    weight, unused, taken = torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(1)), []

    def train(part):
        """Backward of half the rows, then out of memory where there are more than two."""
        share = part["weight"].sum() / 10
        weight.grad = torch.full((3,), share) + (0 if weight.grad is None else weight.grad)
        if len(part["ids"]) > 2:
            raise torch.OutOfMemoryError
        taken.append(part["ids"])
        return share

    batch = batch_of(collate, rows[:4])
    parts = micro_batches(tmp_path)
    weight.grad = torch.ones(3)  # of an earlier batch of this step
    loss = parts.run(train, batch, [weight, unused], step=7)
    assert taken == [batch["ids"][:2], batch["ids"][2:]] and loss == pytest.approx(0.6)
    assert weight.grad.tolist() == pytest.approx([1.6] * 3) and unused.grad is None
    assert "out of GPU memory at step 7: continuing with 2 rows at once" in capsys.readouterr().out
    assert '"per_device_train_batch_size": 2' in (tmp_path / "batch.json").read_text()


@pytest.mark.parametrize("field", [{"world_size": 2}, {"auto_batch": False}, {"device": torch.device("cpu")}])
def test_where_no_second_try_is_possible_gradients_are_left_alone(tmp_path, field):
    weight = torch.nn.Parameter(torch.zeros(3))
    weight.grad = before = torch.ones(3)

    def train(part):
        assert weight.grad is before
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        micro_batches(tmp_path, **field).run(train, {}, [weight], step=1)


def test_gradients_are_never_copied(tmp_path, monkeypatch):
    weight = torch.nn.Parameter(torch.zeros(3))
    monkeypatch.setattr(torch.Tensor, "clone", lambda *args: pytest.fail("a tensor was copied"))

    def train(part):
        weight.grad = torch.ones(3)
        return torch.tensor(1.0)

    for _ in range(2):
        micro_batches(tmp_path).run(train, {"ids": ["a"]}, [weight], step=1)
    assert weight.grad.tolist() == [2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize("given", [None, False, True])
def test_what_the_args_leave_open_is_chosen_and_reaches_the_trainer(given, tmp_path, monkeypatch):
    """With the GPU's part played: 64 rows fit only with checkpointing, which is quicker where it is allowed."""
    recipe = RecipeArguments(str(tmp_path), effective_batch_size=64, gradient_checkpointing=given, use_cpu=True)
    recipe.fp16 = True  # a CPU would be refused
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("vqa.training.batching.available_memory", lambda: 2e8)
    monkeypatch.setattr("vqa.training.batching.measured_rate", lambda setup: 1e15)
    fields = choose_batch_config(recipe, ModelArguments(model=TINY), LENGTHS, encodes_images=False)
    apply_batch_config(recipe, fields)
    wanted = given is not False
    assert recipe.gradient_checkpointing == recipe.activation_checkpointing == wanted
    assert recipe.per_device_train_batch_size * recipe.gradient_accumulation_steps == 64
    assert recipe.activation_checkpointing_kwargs["use_reentrant"] is False
    recipe.resume_from_checkpoint = "checkpoint-1"
    monkeypatch.setattr("vqa.training.batching.available_memory", lambda: 1e12)
    assert choose_batch_config(recipe, ModelArguments(model=TINY), LENGTHS, encodes_images=False) == fields
    monkeypatch.setattr(RecipeArguments, "world_size", 2)  # the next session has two GPUs
    fields = choose_batch_config(recipe, ModelArguments(model=TINY), LENGTHS, encodes_images=False)
    assert fields["per_device_train_batch_size"] * fields["gradient_accumulation_steps"] == 32
    recipe.most_rows_at_once = 4
    fields = choose_batch_config(recipe, ModelArguments(model=TINY), LENGTHS, encodes_images=False)
    assert (fields["per_device_train_batch_size"], fields["gradient_accumulation_steps"]) == (4, 8)
