"""Measure one contestant of compare.py in its own process: training and prediction speed, and memory.

    python benchmarks/contestants.py ours PLAN.json

A contestant gets a plan (see compare.py) and writes one JSON line per measurement. All contestants train the same rows
with the same rank, optimiser and effective batch. They differ in how the rows go through the model.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from clock import ON_GPU, Clock, adapted, arithmetic, limit_memory, measured, peak, timed, write_line
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig, Trainer
from transformers import TrainingArguments as PlainArguments

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere

from vqa.config.arguments import DataArguments, ModelArguments  # noqa: E402
from vqa.config.recipe import RecipeArguments  # noqa: E402
from vqa.core.dtypes import model_dtype  # noqa: E402
from vqa.core.io import read_json  # noqa: E402
from vqa.data.collator import Collator  # noqa: E402
from vqa.data.images import all_images, oriented_sizes  # noqa: E402
from vqa.data.prompt import LETTERS, build_messages, letter_ids, render_chat  # noqa: E402
from vqa.data.rows import read_rows  # noqa: E402
from vqa.inference.scoring import permutation_probs, score_rows  # noqa: E402
from vqa.modeling.feature_store import open_feature_store  # noqa: E402
from vqa.modeling.loading import add_adapter, load_base, load_processor  # noqa: E402
from vqa.modeling.positions import PositionCollator  # noqa: E402
from vqa.training.batching import apply_batch_config, choose_batch_config, count_tokens  # noqa: E402
from vqa.training.callbacks import EMACallback, SWACallback  # noqa: E402
from vqa.training.dataset import SetEpochCallback, TrainDataset  # noqa: E402
from vqa.training.trainer import FoldTrainer  # noqa: E402

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Most notebooks give PEFT these bare names, which also match the MLPs of the vision tower.
LANGUAGE_MODEL = rf".*language_model.*\.({'|'.join(NAMES)})"
ADAPTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "task_type": "CAUSAL_LM"}
MOST_STEPS = 500


def main() -> None:
    plan = read_json(sys.argv[2])
    if plan["cap_gib"]:
        limit_memory(plan["cap_gib"])
    rows = read_rows(plan["csv"], with_answer=True)
    for line in CONTESTANTS[sys.argv[1]](plan, rows):
        shape = {"model": plan["name"], "image_size": plan["image_size"], "contestant": sys.argv[1]}
        shape |= {"bare_names": True} if plan["bare_names"] else {}
        write_line(shape | line, plan["output"])


def plain_trainer(plan: dict, rows: list[dict]) -> Iterator[dict]:
    """A plain Trainer + PEFT, with `prepare_model_for_kbit_training`; predicts with `generate`, one row at a time.

    With micro-batch 1 it is the notebook recipe: the vision tower is in the graph, and all positions get logits.
    """
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model = prepare_model_for_kbit_training(load_as_usual(plan, torch.float16))
    model = get_peft_model(model, LoraConfig(target_modules=targets(plan), **ADAPTER))
    processor = processor_as_usual(plan)

    def trainer(effective: int, micro: int) -> Trainer:
        args = PlainArguments(**usual_arguments(plan, effective, micro), fp16=ON_GPU, remove_unused_columns=False)
        return Trainer(model, args, UsualCollator(processor), rows)

    yield from trained(plan, trainer)
    if plan["bare_names"] or not plan["predict_batches"]:
        return
    model.gradient_checkpointing_disable()
    yield {"answers_per_second": generated(model.eval(), processor, rows), "how": "generate, batch 1"}


def trl(plan: dict, rows: list[dict]) -> Iterator[dict]:
    """TRL's SFTTrainer on prompt and completion. In bf16, because its first QLoRA step fails in fp16."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    processor, text = processor_as_usual(plan), {"role": Value("string"), "content": Value("string")}
    turns = [build_messages(row)[0]["content"][1]["text"] for row in rows]
    table = {
        "prompt": [[{"role": "user", "content": turn}] for turn in turns],
        "completion": [[{"role": "assistant", "content": LETTERS[row["answer"]]}] for row in rows],
        "images": [row["images"] for row in rows],
    }
    features = Features({"prompt": List(text), "completion": List(text), "images": List(ImageFeature())})
    dataset = Dataset.from_dict(table, features=features)
    model, adapter = load_as_usual(plan, torch.bfloat16), LoraConfig(target_modules=targets(plan), **ADAPTER)

    def trainer(effective: int, micro: int) -> Trainer:
        nonlocal model, adapter
        args = SFTConfig(**usual_arguments(plan, effective, micro), bf16=ON_GPU, max_length=None)
        sft_trainer = SFTTrainer(model, args, None, dataset, processing_class=processor, peft_config=adapter)
        model, adapter = sft_trainer.model, None
        return sft_trainer

    yield from trained(plan, trainer)


def ours(plan: dict, rows: list[dict]) -> Iterator[dict]:
    """This project, as in train_fold.py and predict.py, with stored vision features unless the plan disables them."""
    own = Ours(plan, rows, plan["image_size"])
    if plan["stored"]:
        yield {"images_encoded_per_second": round(1 / own.seconds_an_image, 2)}
    for effective in plan["effective"] + plan["larger"]:
        yield own.trained(effective)
    yield from own.answered()


def sizes(plan: dict, rows: list[dict]) -> Iterator[dict]:
    """The memory of this project at several image sizes, with 1 and with 32 rows per step."""
    base = None
    for size in plan["sizes"]:
        own = Ours(plan, rows[:32], size, base)
        for effective in (1, 32):
            yield {"image_size": size} | own.trained(effective)
        base = own.base


class Ours:
    """The steps of train_fold.py and predict.py around a base model that is loaded once."""

    def __init__(self, plan: dict, rows: list[dict], size: int, base: torch.nn.Module | None = None):
        self.plan, self.rows = plan, rows
        self.model_args = ModelArguments(model=plan["model"], load_in_4bit=ON_GPU)
        self.dtype = model_dtype(fp16=ON_GPU)
        processor = load_processor(plan["model"])
        self.base = base or load_base(plan["model"], ON_GPU, self.dtype)
        self.collate, self.prompts = Collator(processor, size, with_answer=True), Collator(processor, size)
        self.ids = letter_ids(processor)
        data = DataArguments(image_size=size, vision_cache_dir=plan["cache"], vision_cache=plan["stored"])
        open_feature_store(self.base, processor, data, [rows[: len(rows) // 2]], show=False)  # warm-up
        start = time.perf_counter()
        features = open_feature_store(self.base, processor, data, [rows], show=False)
        self.seconds_an_image = (time.perf_counter() - start) / (len(rows) - len(rows) // 2)
        self.collate.features = self.prompts.features = features
        self.lengths = count_tokens(rows, self.collate, oriented_sizes(all_images(rows)), show=False)

    def adapted(self, dropout: float) -> torch.nn.Module:
        return add_adapter(self.base, ADAPTER["r"], ADAPTER["lora_alpha"], dropout)

    def trained(self, effective: int) -> dict:
        model = self.adapted(ADAPTER["lora_dropout"])
        usual = usual_arguments(self.plan, effective, effective) | {"gradient_checkpointing": None}
        recipe = RecipeArguments(**usual, eval_strategy="no", fp16=ON_GPU)
        fields = choose_batch_config(recipe, self.model_args, self.lengths, not self.plan["stored"])
        apply_batch_config(recipe, fields)
        epochs = max(1, 8 * effective // len(self.rows))  # one long epoch, so that no step includes an epoch's end
        train_rows, averages = TrainDataset(self.rows * epochs, True, 42), [EMACallback(), SWACallback()]
        trainer = FoldTrainer(
            model,
            recipe,
            data_collator=PositionCollator(self.collate, model),
            train_dataset=train_rows,
            eval_dataset=[],
            callbacks=[SetEpochCallback(train_rows), *averages],
            weight_averages=averages,
            letter_ids=self.ids,
            prompts=self.prompts,
            lengths=np.tile(self.lengths.tokens, epochs),
        )
        line = train_and_measure(trainer, effective, recipe.per_device_train_batch_size, self.plan)
        line |= {"stored": self.plan["stored"], "checkpointing": bool(recipe.gradient_checkpointing)}
        self.base = model.unload()
        tokens, text = float(self.lengths.tokens.mean()), self.base.config.get_text_config()
        needed, done = (arithmetic(text, tokens, ADAPTER["r"], again) for again in (False, line["checkpointing"]))
        return line | {
            "tokens": round(tokens, 1),
            "tflop_per_row": round(needed / 1e12, 6),
            "tflop_with_recomputation": round(done / 1e12, 6),
        }

    def answered(self) -> Iterator[dict]:
        model, count, workers = self.adapted(0.0), self.plan["predict_rows"], self.plan["workers"]
        chosen = (self.rows * (count // len(self.rows) + 1))[:count]
        rotations = [{**row, "permutations": [[(i + k) % 4 for i in range(4)] for k in range(4)]} for row in chosen]
        for size in self.plan["predict_batches"]:
            for how, score, rows in (
                ("letters", score_rows, chosen),
                ("letters, four orders", permutation_probs, rotations),
            ):
                label = f"{how}, batch {size}" + ("" if self.plan["stored"] else ", images encoded")
                try:
                    score(model, rows[: 2 * size], self.prompts, self.ids, size)
                    seconds = timed(partial(score, model, rows, self.prompts, self.ids, size, workers=workers))
                except torch.OutOfMemoryError:
                    yield {"failed": "out of memory", "how": label}
                    continue
                yield {"answers_per_second": round(count / seconds, 2), "how": label, "peak_gib": peak()}
        self.base = model.unload()


CONTESTANTS: dict[str, Callable] = {"plain": plain_trainer, "trl": trl, "ours": ours, "sizes": sizes}


def targets(plan: dict) -> list[str] | str:
    """The layers with an adapter: those of the language model only, unless the plan asks for PEFT's bare names."""
    return NAMES if plan["bare_names"] else LANGUAGE_MODEL


def load_as_usual(plan: dict, dtype: torch.dtype) -> torch.nn.Module:
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    how = (
        {"dtype": dtype, "device_map": {"": 0}, "quantization_config": quantised}
        if ON_GPU
        else {"dtype": torch.float32}
    )
    return AutoModelForImageTextToText.from_pretrained(plan["model"], **how)


def processor_as_usual(plan: dict):
    return AutoProcessor.from_pretrained(plan["model"], min_pixels=28 * 28, max_pixels=plan["image_size"] ** 2)


def usual_arguments(plan: dict, effective: int, micro: int) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(dir=plan["folder"]),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": effective // micro,
        "max_steps": MOST_STEPS,
        "learning_rate": 2e-4,
        "gradient_checkpointing": True,
        "dataloader_num_workers": plan["workers"],
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not ON_GPU,
    }


class UsualCollator:
    """Runs chat, image and answer through the processor. Labels are the answer's letter and the end of the turn."""

    def __init__(self, processor):
        self.processor = processor

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        chats = [build_messages(row) for row in rows]
        texts = [render_chat(self.processor, chat, LETTERS[row["answer"]]) for chat, row in zip(chats, rows)]
        images = [Image.open(row["images"][0]).convert("RGB") for row in rows]
        batch = self.processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
        labels = torch.full_like(batch["input_ids"], -100)
        labels[:, -3:-1] = batch["input_ids"][:, -3:-1]
        return dict(batch) | {"labels": labels}


def generated(model: torch.nn.Module, processor, rows: list[dict]) -> float:
    def answer(row: dict) -> str:
        text = render_chat(processor, build_messages(row))
        inputs = processor(text=[text], images=[Image.open(row["images"][0]).convert("RGB")], return_tensors="pt")
        inputs = inputs.to(model.device)
        with torch.inference_mode(), torch.autocast(model.device.type, torch.float16, enabled=ON_GPU):
            tokens = model.generate(**inputs, max_new_tokens=2, do_sample=False, use_cache=True)
        return processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])

    answer(rows[0])
    few = rows[:16]
    return round(len(few) / timed(lambda: [answer(row) for row in few]), 2)


def trained(plan: dict, make: Callable[[int, int], Trainer]) -> Iterator[dict]:
    """Try the plan's micro-batches that divide the effective batch, from the largest down until they become slower.

    With micro-batch 1 the speed does not depend on the step's size, so it is measured with the smallest step only.
    """
    for effective in plan["effective"]:
        best, smallest = 0.0, effective == min(plan["effective"])
        for micro in sorted((size for size in plan["micro"] if effective % size == 0), reverse=True):
            if micro == 1 and not smallest:
                continue
            line = train_and_measure(make(effective, micro), effective, micro, plan)
            yield line
            slower, best = line.get("rows_per_second", best) < best, max(best, line.get("rows_per_second", 0))
            if slower and not smallest:
                break


def train_and_measure(trainer: Trainer, effective: int, micro: int, plan: dict) -> dict:
    clock, proof = Clock(plan["steps"], plan["seconds"]), adapted(trainer.model)
    trainer.add_callback(clock)
    return {"effective": effective, "micro": micro} | measured(trainer.train, clock, effective) | proof


if __name__ == "__main__":
    main()
