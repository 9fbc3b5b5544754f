"""Tiny random models of every family pass the same tests: labels, training, prediction, fp16."""

import ast
import json
import pickle
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, TINY
from tiny_families import TEXT, make_family
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForImageTextToText, Qwen2ForCausalLM

from vqa.config.arguments import DataArguments
from vqa.core.compat import LoraLayer
from vqa.core.dtypes import half_autocast
from vqa.core.errors import UserError
from vqa.data.collator import IGNORE, Collator
from vqa.data.images import all_images, oriented_sizes
from vqa.data.prompt import LETTERS, letter_ids
from vqa.inference.scoring import NON_MODEL_KEYS, answer_logits, normalize, permutation_probs, score_rows
from vqa.modeling.families import FAMILIES, GENERIC, family_of, fp32_vision_layers, language_model, vision_tower
from vqa.modeling.feature_store import open_feature_store
from vqa.modeling.loading import add_adapter, load_base, load_processor
from vqa.modeling.positions import PositionCollator
from vqa.modeling.vision import VISION_KEYS, encode_images, guard_fp16
from vqa.training.batching import split_batch


@pytest.fixture(scope="module", params=[*sorted(FAMILIES), "llava_onevision"])
def folder(request, processor, tmp_path_factory) -> str:
    """A model folder of each family; Qwen2.5-VL's is the embedded one. LLaVA-OneVision has no file of its own."""
    return make_family(request.param, processor, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def loaded(folder):
    processor = load_processor(folder)
    return load_base(folder, load_in_4bit=False, dtype=torch.float32).eval(), processor, letter_ids(processor)


def vision_inputs(batch: dict) -> dict:
    return {name: batch[name] for name in VISION_KEYS if name in batch}


def on_pixels(batch: dict) -> dict:
    return {key: value for key, value in batch.items() if key not in NON_MODEL_KEYS}


def test_labels_cover_the_letter_and_the_end_of_the_turn(loaded, rows):
    _, processor, _ = loaded
    batch = Collator(processor, 140, with_answer=True)(rows[:3])
    for row, ids, labels in zip(rows, batch["input_ids"], batch["labels"]):
        letter, end = processor.tokenizer.convert_ids_to_tokens(ids[labels != IGNORE])
        assert letter.strip("▁") == LETTERS[row["answer"]]
        assert end in ("<|im_end|>", "<end_of_turn>", "<end_of_utterance>")


def test_the_prompt_is_a_prefix_of_the_training_text_with_one_beginning_and_no_thoughts(loaded, rows):
    _, processor, ids = loaded
    prompts, texts = (Collator(processor, 140, with_answer=answer)(rows[:1]) for answer in (False, True))
    length = texts["answer_start"]
    assert torch.equal(prompts["input_ids"][0], texts["input_ids"][0, :length])
    assert texts["input_ids"][0, length] == ids[rows[0]["answer"]]
    start = processor.tokenizer.bos_token_id
    assert start is None or prompts["input_ids"][0].tolist().count(start) == 1
    assert "<think>\n\n</think>" in (text := processor.decode(prompts["input_ids"][0])) or "<think>" not in text


def test_an_images_tokens_are_counted_before_it_is_decoded_and_fit_the_pixel_budget(loaded, rows):
    model, processor, _ = loaded
    collate = Collator(processor, 140)
    batch = collate(rows[:3])
    tokens = (batch["input_ids"] == model.config.image_token_id).sum(1)
    sizes = oriented_sizes(all_images(rows[:3]))
    counted = collate.images.tokens(collate.images.size(*size) for size in sizes.values())
    if collate.images.resized_here:
        assert tokens.tolist() == counted
        patch = processor.image_processor.patch_size
        assert (batch["image_grid_thw"].prod(1) * patch**2 <= 140**2).all()
    else:  # their counts include what marks tiles and images
        assert all(have <= count <= 1.6 * have + 4 for have, count in zip(tokens.tolist(), counted))
        tiny, large = (Collator(processor, size)(rows[:3])["pixel_values"].numel() for size in (60, 140))
        assert tiny < large or not collate.images.options


def test_ready_features_give_the_logits_of_pixels(loaded, rows):
    """Against the model's own forward, which encodes the images itself; rows of several sizes in one batch."""
    model, processor, _ = loaded
    batch = Collator(processor, 140)(rows[:4])
    assert "image_grid_thw" not in batch or len(batch["image_grid_thw"].unique(dim=0)) > 1
    with torch.no_grad():
        wanted = model(**on_pixels(batch)).logits
        encoded = encode_images(model, batch)
        got = model(**on_pixels(encoded)).logits
        negative = model(**on_pixels(batch | {"pixel_values": -batch["pixel_values"]})).logits
    assert (negative - wanted)[:, -1].abs().max() > 1e-4, "the image matters"
    assert "pixel_values" not in encoded and torch.equal(got, wanted)


def test_stored_features_give_what_pixels_give(loaded, rows, tmp_path):
    """Every tensor of the batch, the loss to 1e-5 and the probabilities to 1e-6; also for text that spells tokens."""
    model, processor, ids = loaded
    rows = [{**row, "permutation": [2, 0, 1, 3]} for row in rows[:8]]
    rows[1] = {**rows[1], "question": "Is <|image_pad|> or <|vision_end|> red?", "scale": 1.3}
    data = DataArguments(image_size=140, vision_cache_dir=str(tmp_path))
    store = open_feature_store(model, processor, data, [rows], show=False)
    if not Collator(processor, 140).images.resized_here:
        assert store is None, "such images are encoded in every epoch"
        return
    pixels, stored = (Collator(processor, 140, with_answer=True, features=f)(rows) for f in (None, store))
    assert len(pixels["image_grid_thw"].unique(dim=0)) > 1
    assert pixels.keys() - stored.keys() == {"pixel_values"} and stored.keys() - pixels.keys() == {"image_features"}
    for key in pixels.keys() & stored.keys() - {"ids", "answer_start", "num_images"}:
        assert torch.equal(pixels[key], stored[key]) and pixels[key].dtype == stored[key].dtype, key
    labels = pixels["labels"][:, -3:]
    with torch.no_grad():
        logits = [answer_logits(model, batch, keep=4)[:, :-1].transpose(1, 2) for batch in (pixels, stored)]
    losses = [cross_entropy(values, labels, ignore_index=IGNORE) for values in logits]
    assert abs(losses[0] - losses[1]) < 1e-5
    scores = [score_rows(model, rows, Collator(processor, 140, features=f), ids, 3) for f in (None, store)]
    assert np.abs(scores[0] - scores[1]).max() < 1e-6


def test_the_adapter_is_in_the_language_model_alone_is_pefts_and_learns(folder, rows):
    """The fused layers against PEFT's own forward pass, then five steps."""
    processor = load_processor(folder)
    base = load_base(folder, load_in_4bit=False, dtype=torch.float32)
    decoder = language_model(base)
    linear = {name for name, m in decoder.named_modules() if isinstance(m, torch.nn.Linear)}
    model = add_adapter(base, 4, 8, 0.0).train()
    adapted = {name.split(".lora_")[0] for name, parameter in decoder.named_parameters() if parameter.requires_grad}
    assert adapted == linear
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(linear)
    batch = Collator(processor, 140, with_answer=True)(rows[:4])
    inputs = on_pixels(encode_images(model, batch)) | {"labels": batch["labels"]}

    def loss_and_gradients():
        model.zero_grad()
        loss = model(**inputs).loss
        loss.backward()
        return loss.item(), [parameter.grad.clone() for parameter in trained]

    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.05)
    fused, gradients = loss_and_gradients()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and "forward" in vars(m)]
    assert len(layers) == len(linear)
    ours = [layer.__dict__.pop("forward") for layer in layers]
    plain, expected = loss_and_gradients()
    assert fused == pytest.approx(plain, abs=1e-5)
    for gradient, wanted in zip(gradients, expected):
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())
    assert not any(p.grad is not None for p in vision_tower(base).parameters())

    for layer, forward in zip(layers, ours):
        layer.forward = forward
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    losses = []
    for _ in range(5):
        losses.append(loss_and_gradients()[0])
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]


def test_with_lora_vision_the_loss_reaches_the_vision_tower_and_nothing_is_stored(folder, rows, tmp_path):
    processor, base = load_processor(folder), load_base(folder, load_in_4bit=False, dtype=torch.float32)
    model = add_adapter(base, 4, 8, 0.0, vision=True).train()
    data = DataArguments(image_size=140, vision_cache_dir=str(tmp_path))
    assert open_feature_store(model, processor, data, [rows[:2]], show=False) is None
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        torch.nn.init.normal_(parameter, std=0.05)
    answer_logits(model, Collator(processor, 140, with_answer=True)(rows[:2]), keep=3).square().sum().backward()
    of_tower = [parameter for parameter in vision_tower(base).parameters() if parameter.requires_grad]
    moved = sum(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in of_tower)
    assert 0.6 * len(of_tower) < moved, "a pooling head that the model does not use may stay"


def test_members_of_three_families_train_predict_and_make_one_submission(trained, script, processor, tmp_path):
    """Each predicts as it validated. The trained fold is one of Qwen2.5-VL; Qwen3.5 resumes to the same bytes."""
    test, columns = pd.read_csv(trained / "data" / "test.csv"), ["p_a", "p_b", "p_c", "p_d"]
    folds = [trained / "checkpoints" / "fold0"]
    for kind in ("qwen3_5", "internvl"):
        folder, fold = make_family(kind, processor, tmp_path / kind), tmp_path / f"{kind}_run" / "fold0"
        args = [trained / "args" / "fold0.json", "--model", folder, "--output_dir", fold, "--learning_rate", "1e-2"]
        code, _, error = script("train_fold", *args)
        assert code == 0, error
        folds.append(fold)
    resumed = tmp_path / "resumed"
    shutil.copytree(folds[1] / "checkpoint-2", resumed / "checkpoint-2")
    args = [trained / "args" / "fold0.json", "--model", tmp_path / "qwen3_5", "--learning_rate", "1e-2"]
    args += ["--output_dir", resumed, "--resume_from_checkpoint", resumed / "checkpoint-2"]
    code, _, error = script("train_fold", *args)
    assert code == 0, error
    for name in ("adapter_model.safetensors", "ema.safetensors"):
        assert (resumed / "checkpoint-4" / name).read_bytes() == (folds[1] / "checkpoint-4" / name).read_bytes(), name
    files = []
    for fold in folds:
        best = json.loads((fold / "metrics.json").read_text())["best"]
        oof = pd.read_csv(fold / ("" if best == "raw" else best) / "oof.csv")
        outputs = tmp_path / "outputs" / fold.parent.name
        code, _, error = script("predict", fold, "--output_dir", outputs, "--num_permutations", "2")
        assert code == 0, error
        plain = pd.read_csv(outputs / "plain" / "fold0.csv").set_index("id").loc[oof["id"]]
        assert np.abs(plain[columns].to_numpy() - oof[columns].to_numpy()).max() < 1e-6
        files.append(outputs / "fold0.csv")
    code, out, error = script("ensemble", *files, "--method", "mean", "--output", tmp_path / "submission.csv")
    assert code == 0, error
    submission = pd.read_csv(tmp_path / "submission.csv").set_index("id").loc[test["id"]]["answer"]
    mean = np.mean([pd.read_csv(file).set_index("id").loc[test["id"]][columns] for file in files], axis=0)
    assert submission.tolist() == [LETTERS[i] for i in mean.argmax(1)] and len(set(submission)) > 1


def overflowing(folder: str, batch: dict) -> torch.nn.Module:
    """A model in float32 whose layers to guard write values beyond 65,504; every weight fits float16."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    written = []
    with torch.no_grad():
        for name, parameter in vision_tower(model).named_parameters():
            if name.endswith("norm2.weight") and folder != TINY:  # so that small weights suffice
                parameter.mul_(100)
        for layer in fp32_vision_layers(model)[0]:
            hook = layer.register_forward_hook(lambda layer, args, output: written.append(output.abs().max()))
            model.get_image_features(**vision_inputs(batch))
            hook.remove()
            layer.weight.mul_(2e5 / written[-1])
            layer.bias.zero_()
    return model.half().float()


def features(model, batch: dict) -> torch.Tensor:
    with torch.no_grad(), half_autocast(model):
        pooled = model.get_image_features(**vision_inputs(batch)).pooler_output
    return torch.cat(list(pooled))


def test_in_fp16_the_vision_tower_is_finite_and_right_or_the_family_is_refused(folder, rows):
    batch = Collator(load_processor(folder), 140)(rows[:2])
    plain = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    if reason := family_of(plain).bf16_only:
        with pytest.raises(UserError, match=f"cannot compute in fp16: {reason}.*bf16"):
            load_base(folder, load_in_4bit=False, dtype=torch.float16)
        return
    exact = overflowing(folder, batch)
    wanted, half = features(exact, batch), exact.half()
    assert all(parameter.isfinite().all() for parameter in half.parameters())
    guarded, _ = fp32_vision_layers(half)
    assert features(half, batch).isfinite().all() == (not guarded), "without the guard it overflows"
    got = features(guard_fp16(half), batch).float()
    assert got.isfinite().all()
    assert (got - wanted).norm() / wanted.norm() < 0.01


def test_features_that_are_not_finite_name_their_rows(folder, rows):
    processor = load_processor(folder)
    model = load_base(folder, load_in_4bit=False, dtype=torch.float32)
    batch = Collator(processor, 140)(rows[:3])
    patches = batch["image_grid_thw"].prod(1) if "image_grid_thw" in batch else torch.tensor(batch["pixel_rows"])
    batch["pixel_values"][int(patches[0]) : int(patches[0] + patches[1])] = float("inf")
    with pytest.raises(UserError, match=f"features of .*{rows[1]['id']}.* are not finite") as error:
        encode_images(model, batch)
    assert batch["pixel_values"].ndim == 5 or rows[0]["id"] not in str(error.value)


def test_a_batch_that_is_split_is_the_batches_of_its_rows(loaded, rows):
    """Up to padding: images keep their tiles and rows. Used where GPU memory has run out."""
    model, processor, ids = loaded
    collate = PositionCollator(Collator(processor, 140, with_answer=True), model)
    rows = [rows[0], rows[1] | {"images": rows[1]["images"] + rows[3]["images"]}, rows[2]]
    with torch.no_grad():
        whole = answer_logits(model, collate(rows))
        parts = [answer_logits(model, part) for part in split_batch(collate(rows), 2)]
    assert [len(part) for part in parts] == [2, 1] and (torch.cat(parts) - whole).abs().max() < 1e-4


def test_scores_are_the_same_in_any_batch(loaded, rows):
    model, processor, ids = loaded
    collate = Collator(processor, 140)
    one, many = (score_rows(model, rows[:6], collate, ids, size) for size in (1, 6))
    assert np.abs(one - many).max() < 1e-5


def test_positions_that_come_with_the_batch_are_those_that_the_model_computes(loaded, rows):
    model, processor, _ = loaded
    mixed = [rows[0], rows[1] | {"images": []}, rows[2] | {"images": rows[2]["images"] + rows[3]["images"]}]
    collate = PositionCollator(Collator(processor, 140), model)
    given, seen = collate(mixed), []
    assert ("positions" in given) == hasattr(model.model, "get_rope_index")
    own = {key: value for key, value in given.items() if key != "positions"}
    hook = language_model(model).register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs.get("position_ids")), with_kwargs=True
    )
    with torch.no_grad(), hook:
        logits = [answer_logits(model, batch) for batch in (given, own)]
    assert torch.equal(*logits)
    assert "positions" not in given or (torch.equal(*seen) and len(seen[0].unique()) > 20)
    assert len(pickle.dumps(collate.base)) < 20_000  # it takes no weights to a worker process


def test_scoring_reads_nothing_back_from_the_gpu_for_positions(loaded, rows, monkeypatch):
    model, processor, ids = loaded
    if hasattr(model.model, "get_rope_index"):
        monkeypatch.setattr(model.model, "get_rope_index", lambda *args, **kwargs: pytest.fail("asked"))
    permuted = [{**row, "permutations": [[0, 1, 2, 3], [1, 2, 3, 0]]} for row in rows[:2]]
    assert len(score_rows(model, rows[:3], Collator(processor, 140), ids, 2)) == 3
    assert len(permutation_probs(model, permuted, Collator(processor, 140), ids, 2)) == 2


def test_rows_with_several_images_and_with_none_score_as_they_do_alone(loaded, rows):
    model, processor, ids = loaded
    mixed = [rows[0], rows[1] | {"images": []}, rows[2] | {"images": rows[2]["images"] + rows[3]["images"]}]
    collate = Collator(processor, 140)
    one, many = (score_rows(model, mixed, collate, ids, size) for size in (1, 3))
    assert np.abs(one - many).max() < 1e-5


def test_permutations_that_share_a_prefix_have_the_probabilities_that_they_have_alone(loaded, rows):
    model, processor, ids = loaded
    collate = Collator(processor, 140)
    permutations = [[0, 1, 2, 3], [1, 2, 3, 0], [3, 2, 1, 0]]
    permuted = [{**row, "permutations": permutations} for row in rows[:4]]
    probs = permutation_probs(model, permuted, collate, ids, batch_size=3)
    for row, values in zip(rows, map(normalize, probs)):
        alone = score_rows(model, [{**row, "permutation": p} for p in permutations], collate, ids, batch_size=2)
        assert np.abs(values - alone).max() < 1e-5 and np.ptp(alone, axis=0).max() > 1e-5


def test_a_model_of_an_unlisted_type_has_the_usual_names_or_is_refused_in_one_line(model):
    text_only = Qwen2ForCausalLM(AutoConfig.for_model("qwen2", **TEXT))
    text_only.config.model_type = "foo_vl"
    listed, config = model.config.model_type, model.config
    config.model_type = "foo_vl"
    try:
        assert family_of(model) is GENERIC and fp32_vision_layers(model) == ([], [])
        assert vision_tower(model) is model.model.visual and language_model(model) is model.model.language_model
        with pytest.raises(
            UserError, match="type 'foo_vl' are not supported: the vision tower was not found"
        ) as error:
            vision_tower(text_only)
    finally:
        config.model_type = listed
    assert all(name in str(error.value) for name in FAMILIES) and "\n" not in str(error.value)


def test_no_module_but_the_families_own_names_a_model_type():
    wrong = []
    for path in (ROOT / "vqa").rglob("*.py"):
        constants = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        if path.parent.name != "families" and FAMILIES.keys() & {
            value for value in constants if isinstance(value, str)
        }:
            wrong.append(path)
    assert not wrong
