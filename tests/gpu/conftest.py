"""What the GPU tests share: small models, a drawn contest, and runs of the scripts.

    python -m pytest -q tests/gpu                            # or make test-gpu
    python -m pytest -q tests/gpu --shapes QWEN_FOLDER       # with the memory estimate of the 3B shape
    GPU_TESTS_DEVICE=cpu python -m pytest -q tests/gpu       # to debug the tests that need no 4 bits on a CPU

QWEN_FOLDER holds Qwen2.5-VL's `config_3B.json` and, beside it, `vocab.json`, `merges.txt` and `added_tokens.json`.

Starting a script takes longer than training the tiny model. So most tests call a script's main() in this process, and
the command lines that need their own process start with the session and run beside the other tests.
"""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY, draw_contest

DEVICE = os.environ.get("GPU_TESTS_DEVICE", "cuda")
HAS_CUDA = torch.cuda.is_available()
NUM_GPUS = torch.cuda.device_count()
IN_4BIT = DEVICE == "cuda"  # bitsandbytes' 4 bits are for CUDA only
FP16 = {"fp16": True} if DEVICE == "cuda" else {}  # the Trainer has no fp16 on a CPU
COMMAND_SECONDS = 400

ROWS, FOLDS = 93, 3  # 62 training rows and 31 validation rows a fold: neither fills the batches
BASE_ARGS = FP16 | {
    "model": TINY,
    "load_in_4bit": IN_4BIT,
    "fold": 0,
    "image_size": 112,
    "loss": "letter",
    "lora_dropout": 0.0,
    "learning_rate": 3e-3,
    "max_steps": 20,
    "effective_batch_size": 16,
    "ema_decay": 0.9,
    "swa_start": 0.5,
    "eval_strategy": "no",
    "save_strategy": "steps",
    "save_steps": 20,
    "logging_steps": 1,
    "disable_tqdm": True,
}
SMALL_TEXT = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
}
SMALL_VISION = {
    "depth": 4,
    "hidden_size": 320,
    "intermediate_size": 860,  # like the real one's 3420, not a multiple of 8
    "num_heads": 4,
    "out_hidden_size": 512,
    "fullatt_block_indexes": [1, 3],
    "window_size": 112,
}


def pytest_addoption(parser):
    parser.addoption("--shapes", help="folder of Qwen2.5-VL's config_3B.json and vocabulary, for the memory estimate")
    parser.addoption("--vocabulary", help="folder of Qwen2's vocabulary, for the shapes of other models")


@pytest.hookimpl(trylast=True)  # after tests/conftest.py has sorted the files, and after `-m`
def pytest_collection_modifyitems(items):
    """Skip the tests where there is no GPU, but not where torch cannot use the one there is.

    The tests that wait for a command line come last, so that it runs beside the others.
    """
    here = Path(__file__).parent
    items.sort(key=lambda item: "one_process" in item.fixturenames or "two_processes" in item.fixturenames)
    no_gpu = DEVICE == "cuda" and not HAS_CUDA
    for item in (item for item in items if here in item.path.parents):
        if no_gpu and shutil.which("nvidia-smi"):
            raise pytest.UsageError("torch.cuda.is_available() is False on a machine with nvidia-smi: fix torch first")
        if no_gpu:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU: torch.cuda.is_available() is False"))


@pytest.fixture(scope="session", autouse=True)
def one_gpu() -> Iterator[None]:
    """This process uses one GPU, as under CUDA_VISIBLE_DEVICES=0; scripts refuse to leave the other ones idle."""
    with pytest.MonkeyPatch.context() as patch:
        if NUM_GPUS > 1:
            patch.setattr("torch.cuda.device_count", lambda: 1)
        yield


@pytest.fixture(scope="session")
def small(processor, tmp_path_factory) -> str:
    """A folder of random weights in Qwen2.5-VL's architecture, with the tiny model's processor."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    folder = tmp_path_factory.mktemp("small")
    token = processor.tokenizer.convert_tokens_to_ids
    tokens = {f"{kind}_token_id": token(f"<|{kind}_pad|>") for kind in ("image", "video")}
    tokens |= {f"vision_{edge}_token_id": token(f"<|vision_{edge}|>") for edge in ("start", "end")}
    text = SMALL_TEXT | {"vocab_size": len(processor.tokenizer), "pad_token_id": token("<|endoftext|>")}
    config = AutoConfig.for_model("qwen2_5_vl", text_config=text, vision_config=SMALL_VISION, **tokens)
    torch.manual_seed(0)
    AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["tiny", "small"])
def folder(request) -> str:
    """The embedded model, which is trained, and a wider one of random weights."""
    return TINY if request.param == "tiny" else request.getfixturevalue("small")


@pytest.fixture(scope="session")
def job(tmp_path_factory) -> Path:
    """The folder of a drawn contest with its folds file, and args.json: 20 steps of the tiny model."""
    folder = tmp_path_factory.mktemp("job")
    draw_contest(folder / "data", ROWS)
    names = {"train_csv": "data/train.csv", "test_csv": "data/test.csv", "vision_cache_dir": "vision_cache"}
    args = BASE_ARGS | {name: str(folder / path) for name, path in names.items()}
    (folder / "args.json").write_text(json.dumps(args))
    call("make_folds", folder / "args.json", "--folds", FOLDS)
    return folder


def call(script: str, *words) -> None:
    """Run a script's main() in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
        importlib.import_module(script).main()


class Commands:
    """Command lines that run one after another in their own processes, beside the tests."""

    def __init__(self, log: Path, *commands: list, **environment: str):
        self.log, self.start = log, time.time()
        lines = [" ".join(map(str, command)) for command in commands]
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                ["bash", "-exc", "\n".join(lines)],
                cwd=ROOT,
                env=ENVIRONMENT | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> str:
        """What they printed, once all have ended well."""
        self.process.wait(timeout=max(1.0, self.start + COMMAND_SECONDS - time.time()))
        output = self.log.read_text()
        assert self.process.returncode == 0, output[-6000:]
        return output

    def stop(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, 15)
            self.process.wait()


PYTHON = sys.executable
# Two runs are compared by their weights, so rounding must stay rounding: at the learning rate of args.json it grows,
# and with AdamW's usual epsilon a weight whose gradient is rounding noise moves as far as any other.
GENTLE = ["--max_steps", 12, "--learning_rate", 1e-4, "--adam_epsilon", 1e-3]
LAUNCH = [PYTHON, "-m", "accelerate.commands.launch", "--config_file", "args/accelerate/two_gpus.yaml"]


@pytest.fixture(scope="session", autouse=True)
def background(request) -> Iterator[dict[str, Commands]]:
    """The commands that the collected tests wait for, by name; started before the first test."""
    needed = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    skipped = DEVICE == "cuda" and not HAS_CUDA
    started = {}
    if not skipped and "one_process" in needed:
        job = request.getfixturevalue("job")
        run, predictions = job / "runs" / "one", job / "outputs"
        started["one_process"] = Commands(
            job / "one_process.log",
            [PYTHON, "train_fold.py", job / "args.json", "--output_dir", run, *GENTLE],
            [PYTHON, "predict.py", run, "--num_permutations", 2, "--output_dir", predictions],
            CUDA_VISIBLE_DEVICES="0",
        )
    if not skipped and "two_processes" in needed and NUM_GPUS > 1:
        job = request.getfixturevalue("job")
        run, predictions = job / "runs" / "two", job / "outputs_of_two"
        train = ["train_fold.py", job / "args.json", "--output_dir", run, *GENTLE]
        started["two_processes"] = Commands(
            job / "two_processes.log",
            [*LAUNCH, *train],
            [*LAUNCH, "predict.py", run, "--num_permutations", 2, "--output_dir", predictions],
        )
    yield started
    for commands in started.values():
        commands.stop()


@pytest.fixture(scope="session")
def one_process(background, job) -> Path:
    """The folder of the fold that train_fold.py trained in its own process; predict.py wrote to outputs/."""
    background["one_process"].wait()
    return job / "runs" / "one"


@pytest.fixture(scope="session")
def two_processes(background, job) -> Path:
    """The folder of the fold that two GPUs trained by `accelerate launch`; predict.py wrote to outputs_of_two/."""
    background["two_processes"].wait()
    return job / "runs" / "two"
