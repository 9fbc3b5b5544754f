"""Batched windows give the features that transformers' loop gives."""

import torch
from conftest import TINY
from transformers import AutoModelForImageTextToText

from vqa.data.collator import Collator
from vqa.modeling.families.qwen2_5_vl import _batched_forward


def test_the_vision_tower_gives_the_same_features_on_ragged_grids(model, processor, rows):
    original = AutoModelForImageTextToText.from_pretrained(TINY, dtype=torch.float32).eval()
    patched = [block.attn.forward.__func__ for block in model.model.visual.blocks]
    assert patched == [_batched_forward] * len(patched), "otherwise this would compare transformers with itself"
    scales = [0.7, 1.0, 1.0, 1.6, 2.1, 3.0]  # up to several windows, some of them cut
    batch = Collator(processor, 140)([{**row, "scale": scale} for row, scale in zip(rows, scales)])
    assert len(batch["image_grid_thw"].unique(dim=0)) > 3
    with torch.no_grad():
        ours, theirs = (
            torch.cat(part.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output)
            for part in (model, original)
        )
    assert torch.equal(ours, theirs)
