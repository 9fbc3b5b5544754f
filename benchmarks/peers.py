"""Measure the trainers that people use instead, with the rows of compare.py: ms-swift or Unsloth.

    python benchmarks/peers.py ms-swift MODEL_FOLDER --output outputs/compare/compare.jsonl
    python benchmarks/peers.py unsloth MODEL_FOLDER --effective 32 --micro 32 16

Each needs packages of its own, so each has its own environment: Unsloth 2026.10.9 accepts transformers up to 5.17, TRL
up to 1.15 and datasets below 5; ms-swift 4.6 accepts transformers below 5.20, PEFT below 0.21 and TRL below 1. Each
trains at its own recommended settings for QLoRA in bf16, with the same rows, image size and rank as the other
contestants, with adapters on the language model only and the vision tower frozen. `adapted`, `trainable_vision` and
`linear_4bit` in each line prove it. `--check` prints the shapes of one collated batch and ends; it needs no GPU.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # so that the script runs from anywhere
if "unsloth" in sys.argv[1:2]:
    import unsloth  # it patches transformers, which must not be imported before it

import torch  # noqa: E402
from clock import GIB, ON_GPU, Clock, adapted, limit_memory, measured, write_line  # noqa: E402
from compare import write_rows  # noqa: E402
from transformers.trainer_callback import CallbackHandler  # noqa: E402

from vqa.data.prompt import LETTERS, build_messages  # noqa: E402
from vqa.data.rows import read_rows  # noqa: E402

ADAPTER = {"r": 16, "lora_alpha": 32}
LOGGED = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def main() -> None:
    args = parse_args()
    if args.cap_gib:
        limit_memory(args.cap_gib)
        report_limit(args.cap_gib)
    with tempfile.TemporaryDirectory() as temporary:
        args.folder = Path(temporary)
        rows = read_rows(write_rows(args.folder / "rows", args.rows), with_answer=True)
        peer = PEERS[args.peer](args, rows * (-(-32 * 40 // len(rows))))  # one long epoch
        if args.check:
            print(json.dumps(shapes(peer.batch(args.micro[0]))))
            return
        packages = {name: version(name) for name in (args.peer, *LOGGED)}
        shape = {"model": Path(args.model).name, "image_size": args.image_size, "contestant": args.peer}
        for line in measure(peer, args):
            write_line(shape | line | {"packages": packages}, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=list(PEERS))
    parser.add_argument("model", type=os.path.abspath, help="model folder, as random_model.py writes it")
    parser.add_argument("--effective", type=int, nargs="+", default=[4, 32], help="rows per step (default: 4 32)")
    parser.add_argument("--micro", type=int, nargs="+", default=[32, 16, 8, 4], help="(default: 32 16 8 4)")
    parser.add_argument("--image_size", type=int, default=384, help="(default: 384)")
    parser.add_argument("--rows", type=int, default=128, help="rows, each with its own image (default: 128)")
    parser.add_argument("--steps", type=int, default=5, help="minimum of optimiser steps (default: 5)")
    parser.add_argument("--seconds", type=float, default=6, help="and of seconds after the first (default: 6)")
    parser.add_argument("--workers", type=int, default=2, help="processes that decode images (default: 2)")
    parser.add_argument("--cap_gib", type=float, default=14.5, help="GPU memory (default: 14.5, as on a T4)")
    parser.add_argument("--output", help="file to which the JSON lines are appended")
    parser.add_argument("--check", action="store_true", help="only print the shapes of one batch")
    return parser.parse_args()


def report_limit(gib: float) -> None:
    """Let torch report a GPU of `gib` GiB: Unsloth sizes its pieces of work by the free memory."""
    if not ON_GPU:
        return
    real, most = torch.cuda.mem_get_info, int(gib * GIB)

    def mem_get_info(*args, **kwargs):
        free = min(real(*args, **kwargs)[0], most - torch.cuda.memory_reserved())
        return max(0, free), most

    torch.cuda.mem_get_info = torch.cuda.memory.mem_get_info = mem_get_info


def measure(peer, args: argparse.Namespace) -> Iterator[dict]:
    """The micro-batches that divide each effective batch, from the largest down until they become slower."""
    for effective in args.effective:
        best = 0.0
        for micro in sorted((size for size in args.micro if effective % size == 0), reverse=True):
            watch = Watch(Clock(args.steps, args.seconds))
            line = measured(partial(peer.train, effective, micro), watch.clock, effective)
            yield {"effective": effective, "micro": micro} | line | watch.proof
            rate = line.get("rows_per_second", 0.0)
            if rate < best:
                break
            best = max(best, rate)


class Watch:
    """Adds a clock to the next trainer that is made, whoever makes it, and notes what it trains."""

    original = CallbackHandler.__init__

    def __init__(self, clock: Clock):
        self.clock, self.proof = clock, {}

        def with_clock(handler, callbacks, model, *args, **kwargs):
            Watch.original(handler, [*callbacks, clock], model, *args, **kwargs)
            self.proof.update(adapted(model))

        CallbackHandler.__init__ = with_clock


def usual_arguments(args: argparse.Namespace, effective: int, micro: int) -> dict:
    return {
        "output_dir": tempfile.mkdtemp(dir=args.folder),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": effective // micro,
        "max_steps": 500,
        "learning_rate": 2e-4,
        "dataloader_num_workers": args.workers,
        "save_strategy": "no",
        "bf16": ON_GPU,
    } | ({} if ON_GPU else {"use_cpu": True})


def question(row: dict) -> str:
    return build_messages(row)[0]["content"][1]["text"]


class Swift:
    """`swift sft` with bitsandbytes' 4 bits, adapters on all linear layers of the language model, SDPA."""

    def __init__(self, args: argparse.Namespace, rows: list[dict]):
        os.environ |= {"MAX_PIXELS": str(args.image_size**2), "MIN_PIXELS": str(28 * 28)}
        self.args, self.data = args, args.folder / "rows.jsonl"
        with self.data.open("w", encoding="utf-8") as file:
            for row in rows:
                turns = ["<image>" + question(row), LETTERS[row["answer"]]]
                chat = [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns)]
                file.write(json.dumps({"messages": chat, "images": row["images"]}, ensure_ascii=False) + "\n")

    def settings(self, effective: int, micro: int):
        from swift import SftArguments

        quantised = {
            "quant_method": "bnb",
            "quant_bits": 4,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        return SftArguments(
            **usual_arguments(self.args, effective, micro),
            **(quantised if ON_GPU else {}),
            model=self.args.model,
            model_type="qwen2_5_vl",
            template="qwen2_5_vl",
            use_hf=True,
            check_model=False,
            dataset=[str(self.data)],
            split_dataset_ratio=0,
            tuner_type="lora",
            target_modules=["all-linear"],
            lora_rank=ADAPTER["r"],
            lora_alpha=ADAPTER["lora_alpha"],
            lora_dropout=0.05,
            freeze_vit=True,
            freeze_aligner=True,
            torch_dtype="bfloat16" if ON_GPU else "float32",
            attn_impl="sdpa",
            max_length=2048,
            gradient_checkpointing=True,
            report_to=["none"],
            eval_strategy="no",
            add_version=False,
            logging_steps=1000,
        )

    def train(self, effective: int, micro: int) -> None:
        from swift import sft_main

        sft_main(self.settings(effective, micro))

    def batch(self, rows: int) -> dict:
        from swift.pipelines import SwiftSft

        sft = SwiftSft(self.settings(rows, rows))
        dataset = sft._prepare_dataset()[0]
        return sft.template.data_collator([dataset[i] for i in range(rows)])


class Unsloth:
    """As in its notebook for Qwen2.5-VL: FastVisionModel, its collator, no dropout, TRL's trainer, 8-bit AdamW."""

    def __init__(self, args: argparse.Namespace, rows: list[dict]):
        self.args, how = args, {} if ON_GPU else {"dtype": torch.float32, "load_in_16bit": True}
        model, self.processor = unsloth.FastVisionModel.from_pretrained(
            args.model,
            max_seq_length=2048,
            load_in_4bit=ON_GPU,
            use_gradient_checkpointing="unsloth",
            local_files_only=True,
            **how,
        )
        limit_pixels(self.processor.image_processor, args.image_size**2)
        self.model = unsloth.FastVisionModel.get_peft_model(
            model,
            finetune_vision_layers=False,
            finetune_language_layers=True,
            finetune_attention_modules=True,
            finetune_mlp_modules=True,
            lora_dropout=0,
            bias="none",
            use_gradient_checkpointing="unsloth",
            **ADAPTER,
        )
        unsloth.FastVisionModel.for_training(self.model)
        self.chats = [{"messages": self.chat(row)} for row in rows]
        self.collate = unsloth.UnslothVisionDataCollator(
            self.model,
            self.processor,
            resize="max",  # leaves the size to the processor
            train_on_responses_only=True,
            instruction_part="<|im_start|>user\n",
            response_part="<|im_start|>assistant\n",
        )

    def chat(self, row: dict) -> list[dict]:
        image = {"type": "image", "image": str(row["images"][0])}
        turns = [image, {"type": "text", "text": question(row)}], [{"type": "text", "text": LETTERS[row["answer"]]}]
        return [{"role": role, "content": turn} for role, turn in zip(("user", "assistant"), turns)]

    def train(self, effective: int, micro: int) -> None:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        config = SFTConfig(
            **usual_arguments(self.args, effective, micro),
            report_to="none",
            optim="adamw_8bit" if ON_GPU else "adamw_torch",
            weight_decay=0.001,
            warmup_steps=5,
            remove_unused_columns=False,
            dataset_text_field="",
            dataset_kwargs={"skip_prepare_dataset": True},
            max_length=2048,
            logging_steps=1000,
        )
        how = {"processing_class": self.processor, "data_collator": self.collate, "args": config}
        try:
            trainer = SFTTrainer(model=self.model, train_dataset=self.chats, **how)
        except TypeError:  # where its patch of TRL, which accepts a list, is not in force
            self.collate.formatting_func = lambda example: self.chats[example["index"]]
            table = Dataset.from_dict({"index": list(range(len(self.chats)))})
            trainer = SFTTrainer(model=self.model, train_dataset=table, **how)
        trainer.train()

    def batch(self, rows: int) -> dict:
        return self.collate(self.chats[:rows])


def limit_pixels(processor, pixels: int) -> None:
    """Images of at most `pixels` pixels, by whichever name this transformers reads."""
    size = {"shortest_edge": 28 * 28, "longest_edge": pixels}
    processor.size = size if isinstance(processor.size, dict) else type(processor.size)(**size)


PEERS: dict[str, Callable] = {"ms-swift": Swift, "unsloth": Unsloth}


def shapes(batch: dict) -> dict:
    """Shapes of a batch's tensors, and how many of its tokens are trained."""
    found = {name: list(value.shape) for name, value in dict(batch).items() if hasattr(value, "shape")}
    return found | {"labelled": (batch["labels"] != -100).sum(-1).tolist()}


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # Unsloth's and ms-swift's threads would keep the process
