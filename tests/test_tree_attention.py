"""Suffixes that share a prefix in one sequence, against separate rows through transformers' own forward pass."""

import pytest
import torch
from tiny_families import make_family

from vqa.core.errors import UserError
from vqa.data.collator import Collator
from vqa.inference.scoring import answer_logits
from vqa.modeling.families import FAMILIES
from vqa.modeling.loading import add_adapter, load_base, load_processor
from vqa.modeling.tree_attention import check_tree_attention, pack_suffixes, tree_hidden_states, tree_logits

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
    model = add_adapter(load_base(folder, load_in_4bit=False, dtype=torch.float32), 4, 8, 0.0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model, load_processor(folder)


@pytest.mark.parametrize("with_images", [True, False])
def test_a_suffix_has_the_logits_that_it_has_alone(loaded, rows, with_images):
    """At its last token, after a forward pass of transformers over the prompt and this suffix."""
    model, processor = loaded
    rows, collate = ragged(rows), Collator(processor, 140)
    rows = rows if with_images else [{**row, "images": []} for row in rows]
    batch = packed(collate, rows)
    with torch.no_grad():
        logits = tree_logits(model, batch, batch["suffix_end"])
        hidden = tree_hidden_states(model, batch, batch["suffix_end"])
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
