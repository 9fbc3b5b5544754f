"""Suffixes that share a prefix in one sequence, against separate rows through transformers' own forward pass."""

import itertools
import re

import pytest
import torch
from conftest import TINY
from tiny_families import make_family
from torch.distributions import Categorical, kl_divergence

from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes
from vqa.data.prompt import letter_ids
from vqa.inference.scoring import NON_MODEL_KEYS, answer_logits
from vqa.modeling.families import FAMILIES
from vqa.modeling.loading import add_adapter, load_base, load_processor
from vqa.modeling.tree_attention import (
    TreeCollator,
    check_tree_attention,
    pack_suffixes,
    tree_logits,
)
from vqa.modeling.vision import encode_images
from vqa.training.batching import count_tokens, split_batch
from vqa.training.dataset import TrainDataset, rotations
from vqa.training.loss import answer_loss, permutation_loss

ABLE = sorted(kind for kind, family in FAMILIES.items() if family.tree_attention)
CONTINUATIONS = (["two", "a big red circle"], ["0", "three", "left of the square"], ["yes"])


def packed(collate: Collator, rows: list[dict]) -> dict:
    """Each row's prompt as a prefix, followed by its CONTINUATIONS."""
    tokenizer, batch = collate.processor.tokenizer, collate(rows)
    suffixes = [tokenizer(texts, add_special_tokens=False).input_ids for texts in CONTINUATIONS]
    lengths = batch["attention_mask"].sum(1).tolist()
    return pack_suffixes(batch, lengths, suffixes, tokenizer.pad_token_id)


def ragged(rows: list[dict]) -> list[dict]:
    """Rows of different lengths; the second has no image."""
    short, text, long = rows[:3]
    return [short, {**text, "images": []}, {**long, "question": long["question"] * 3}]


@pytest.fixture(scope="module", params=ABLE)
def loaded(request, processor, tmp_path_factory):
    folder = make_family(request.param, processor, tmp_path_factory.mktemp(request.param))
    return with_adapter(folder), load_processor(folder)


@pytest.fixture(scope="module")
def adapted():
    return with_adapter(TINY)


def with_adapter(folder: str):
    """The model with an adapter that changes its outputs."""
    model = add_adapter(load_base(folder, load_in_4bit=False, dtype=torch.float32), 4, 8, 0.0)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


@pytest.mark.parametrize("with_images", [True, False])
def test_a_suffix_has_the_logits_that_it_has_alone(loaded, rows, with_images):
    """At its last token, after a forward pass of transformers over the prompt and this suffix."""
    model, processor = loaded
    rows, collate = ragged(rows), Collator(processor, 140)
    rows = rows if with_images else [{**row, "images": []} for row in rows]
    batch = packed(collate, rows)
    with torch.no_grad():
        logits = tree_logits(model, batch, batch["suffix_end"])
        hidden = tree_logits(model, batch, batch["suffix_end"], hidden=True)
        torch.testing.assert_close(model.get_output_embeddings()(hidden), logits)
        for i, (row, texts) in enumerate(zip(rows, CONTINUATIONS)):
            assert (batch["suffix_end"][i] >= 0).sum() == len(texts)
            for k, text in enumerate(texts):
                alone = collate([row])
                suffix = processor.tokenizer([text], add_special_tokens=False, return_tensors="pt").input_ids
                for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
                    if name in alone:
                        fill = {"input_ids": suffix, "attention_mask": torch.ones_like(suffix)}
                        more = fill.get(name, torch.zeros_like(suffix))
                        alone[name] = torch.cat([alone[name], more], dim=1)
                torch.testing.assert_close(logits[i, k], answer_logits(model, alone)[0, -1], rtol=1e-5, atol=1e-5)


def test_other_attention_rules_are_refused_before_loading(processor, tmp_path):
    for kind in sorted(FAMILIES.keys() - ABLE):
        folder = make_family(kind, processor, tmp_path / kind)
        with pytest.raises(UserError, match=f"permutations_per_step: the attention of .*{kind}.* cannot keep"):
            check_tree_attention(folder, "permutations_per_step")


def with_permutations(rows: list[dict]) -> list[dict]:
    """Rows of four, three and two choices, two of them equal; the second has no image, the last a soft label."""
    rows = [
        {**row, "choices": row["choices"][:count], "answer": row["answer"] % count, "permutations": permutations}
        for row, count, permutations in zip(
            ragged(rows) + rows[3:4],
            (4, 3, 2, 4),
            (rotations([2, 0, 3, 1], 4), rotations([1, 0, 2], 4), rotations([1, 0], 4), [[3, 0, 2, 1]]),
        )
    ]
    rows[2]["choices"] = ["same", "same"]
    return rows


def separate_views(row: dict) -> list[dict]:
    return [{**row, "permutation": permutation} for permutation in row["permutations"]]


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def assert_close(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert all(gradient.any() for gradient in wanted.values())
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-5, atol=1e-5 * wanted[name].abs().max().item())


def tree_loss(model, batch: dict, kind: str, ids: list[int], weight: float = 0.0) -> torch.Tensor:
    logits = tree_logits(model, batch, batch["read"].flatten(1)).unflatten(1, batch["read"].shape[1:])
    return permutation_loss(logits, batch, torch.tensor(ids), kind, weight)


def test_gradients_are_those_of_the_mean_of_separate_rows(loaded, rows):
    """With and without checkpointing, for the loss over tokens: transformers' own, where a batch has one row."""
    model, processor = loaded
    rows, collate, ids = with_permutations(rows), Collator(processor, 140, with_answer=True), letter_ids(processor)
    model.train()
    means = []
    for row in rows:
        batches = map(collate, ([view] for view in separate_views(row)))
        encoded = [encode_images(model, b) if row["images"] else b for b in batches]
        inputs = [{key: b[key] for key in b if key == "labels" or key not in NON_MODEL_KEYS} for b in encoded]
        means.append(torch.stack([model(**one).loss for one in inputs]).mean())
    wanted, batch = gradients(model, torch.stack(means).mean()), TreeCollator(collate)(rows)
    for checkpointing in (False, True):
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
        losses = tree_loss(model, batch, "token", ids)
        torch.testing.assert_close(losses, torch.stack(means), rtol=1e-5, atol=1e-5)
        assert_close(gradients(model, losses.mean()), wanted)
    model.get_base_model().gradient_checkpointing_disable()


def test_soft_labels_and_the_consistency_term_are_those_of_separate_passes(adapted, processor, rows, ids):
    """The term by torch.distributions, over the choices' probabilities of separate rows, mapped back."""
    rows, collate = with_permutations(rows), Collator(processor, 140, with_answer=True)
    rows[0]["target"] = [0.1, 0.2, 0.3, 0.4]
    got = tree_loss(adapted, TreeCollator(collate)(rows), "letter", ids, weight=0.7)
    wanted = []
    for row in rows:
        batches = [collate([view]) for view in separate_views(row)]
        logits = [answer_logits(adapted, batch, keep=4)[:, :-1] for batch in batches]
        losses = [answer_loss(x, batch, torch.tensor(ids), "letter") for x, batch in zip(logits, batches)]
        choices = [x[0, 0, ids][: len(row["choices"])] for x in logits]
        mapped = [x[torch.tensor(p).argsort()] for x, p in zip(choices, row["permutations"])]
        pairs = [Categorical(logits=x) for x in mapped]
        terms = [kl_divergence(p, q) for p, q in itertools.permutations(pairs, 2)]
        term = torch.stack(terms).mean() if terms else torch.tensor(0.0)
        wanted.append(torch.cat(losses).mean() + 0.7 * term)
        assert not terms or row["choices"] == ["same", "same"] or term > 1e-6
    torch.testing.assert_close(got, torch.stack(wanted), rtol=1e-5, atol=1e-6)
    assert_close(gradients(adapted, got.mean()), gradients(adapted, sum(wanted) / len(wanted)))


def test_a_batch_that_is_split_has_the_losses_of_all(adapted, processor, rows, ids):
    batch = TreeCollator(Collator(processor, 140, with_answer=True))(with_permutations(rows))
    parts = split_batch(batch, 3)
    with torch.no_grad():
        losses = torch.cat([tree_loss(adapted, part, "token", ids) for part in parts])
        torch.testing.assert_close(losses, tree_loss(adapted, batch, "token", ids))
    assert len(parts) == 2


def test_tokens_that_permutations_share_count_once(processor, rows):
    """With the two tokens after each answer's letter, which the batch leaves out."""
    collate = Collator(processor, 140, with_answer=True)
    rows = [{**row, "permutations": rotations([0, 1, 2, 3], 3)} for row in rows[:4]]
    lengths = count_tokens(rows, collate, oriented_sizes(all_images(rows)), False, permutations=3)
    batch = TreeCollator(collate)(rows)
    assert ((batch["segment"] >= 0).sum(1) + 3 * 2).tolist() == lengths.tokens.tolist()
    assert lengths.batch(2).permutations == 3


def test_a_row_keeps_its_draw_and_gets_its_rotations(rows):
    one, four = (TrainDataset(rows, True, 42, count)[5] for count in (1, 4))
    permutations = four.pop("permutations")
    assert one == four and permutations[0] == one["permutation"]
    assert [sorted(letters) for letters in zip(*permutations)] == [[0, 1, 2, 3]] * 4


def test_the_trainer_takes_permutations_and_counts_rows(make_trainer, ids):
    """A step's loss is the mean over its rows, whatever the number of micro-batches."""
    trainer = make_trainer(permutations_per_step=4, max_steps=1, effective_batch_size=8, per_device_train_batch_size=2)
    trainer.data_collator = TreeCollator(trainer.data_collator)
    trainer.train_dataset.num_permutations = 4
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    with torch.no_grad():
        fresh = tree_loss(trainer.model.eval(), batch, "token", ids).mean().item()
    assert trainer.train().training_loss == pytest.approx(fresh, abs=1e-5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--permutations_per_step", "0"], "permutations_per_step is 0. Set it to 1 or more."),
        (["--permutations_per_step", "2", "--shuffle_choices", "false"], "but shuffle_choices is false"),
        (["--permutations_per_step", "2", "--score", "suffix"], "score suffix does not depend on the order"),
        (["--consistency_weight", "0.1"], "Set permutations_per_step to 2 or more."),
        (["--permutations_per_step", "2"], "the attention of .*qwen3_5.* cannot keep"),
    ],
)
def test_permutations_that_do_not_work_are_refused_before_the_rows_are_read(
    script, processor, tmp_path, flags, message
):
    folder = make_family("qwen3_5", processor, tmp_path / "base")
    code, _, error = script(
        "train_fold", "--model", folder, "--train_csv", "none.csv", "--output_dir", tmp_path, *flags
    )
    assert code == 2 and re.search(message, error) and "Traceback" not in error
