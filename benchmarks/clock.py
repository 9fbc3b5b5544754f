"""What every contestant of a benchmark is measured with: a clock for training steps, a limit of memory, JSON lines.

It needs torch and transformers alone, in any version: the trainers of peers.py run with others than this project.
"""

import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

GIB = 2**30
ON_GPU = torch.cuda.is_available()
PROFILED = 2  # steps
ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")  # the profiler's categories of what a GPU does


def limit_memory(gib: float) -> None:
    """Let this process have at most `gib` GiB of the GPU, if there is one."""
    if ON_GPU:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total)


def write_line(line: dict, output: str | Path | None) -> None:
    """Print a measurement as one line of JSON, and append it to the file `output`, if any."""
    text = json.dumps(line)
    print(text, flush=True)
    if output:
        with open(output, "a", encoding="utf-8") as file:
            file.write(text + "\n")


class Clock(TrainerCallback):
    """Times training steps, then profiles two of them, and ends the training.

    It times `steps` steps or more, until `seconds` have passed since the first one.
    """

    def __init__(self, steps: int, seconds: float):
        self.least, self.seconds = steps, seconds
        self.ends: list[float] = []
        self.left = PROFILED if ON_GPU else 0
        self.kernels: list[tuple[float, float]] = []
        self.profiler: profile | None = None

    def on_step_end(self, args, state, control, **kwargs):
        if ON_GPU:
            torch.cuda.synchronize()
        if self.profiler:
            self.left -= 1
            if self.left == 0:
                self.profiler.stop()
                self.kernels, self.profiler = kernels(self.profiler), None
                control.should_training_stop = True
            return
        self.ends.append(time.perf_counter())
        if len(self.ends) >= self.least and self.ends[-1] - self.ends[0] >= self.seconds:
            if self.left:
                self.profiler = profile(activities=[ProfilerActivity.CUDA])
                self.profiler.start()
            else:
                control.should_training_stop = True

    def times(self) -> list[float]:
        """Seconds of each step without the first."""
        return [b - a for a, b in zip(self.ends, self.ends[1:])]


def kernels(profiler: profile) -> list[tuple[float, float]]:
    """Start and end, in seconds, of everything that the GPU did while the profiler ran."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return device_intervals(json.loads(path.read_text())["traceEvents"])


def device_intervals(events: list[dict]) -> list[tuple[float, float]]:
    """Start and end, in seconds, of the kernels, copies and fills among the events of a Chrome trace."""
    found = [event for event in events if event.get("cat") in ON_DEVICE]
    return [(event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6) for event in found]


def busy_seconds(intervals: list[tuple[float, float]]) -> float:
    """Seconds that the intervals cover; where several overlap, they count once."""
    total, covered = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, covered))
        covered = max(covered, end)
    return total


def measured(train: Callable[[], object], clock: Clock, effective: int) -> dict:
    """Rows per second of the median step, kernel time of a row, peak memory that torch allocated.

    `train` runs a training that `clock` ends, with `effective` rows per step. `kernel_ms_per_row`: milliseconds that
    the GPU works.
    """
    with fresh_memory():
        try:
            train()
        except torch.OutOfMemoryError:
            return {"failed": "out of memory"}
    times = clock.times()
    line = {"rows_per_second": round(effective / statistics.median(times), 2), "peak_gib": peak()}
    line |= {"steps": len(clock.ends), "slowest": round(effective / max(times), 2)}
    line |= {"fastest": round(effective / min(times), 2)}
    if clock.kernels:
        rows = PROFILED * effective
        line["kernel_ms_per_row"] = round(1000 * busy_seconds(clock.kernels) / rows, 3)
        line["kernels_per_step"] = len(clock.kernels) // PROFILED
        line["matrix_tflops"] = round(matrix_rate() / 1e12, 1)
    return line


def arithmetic(text, tokens: float, rank: int, checkpointing: bool) -> int:
    """Operations to train one row of `tokens` tokens: those of the language model's layers, adapters and attention.

    Frozen weights have a forward product and a backward one, adapters one more for their own gradients, and attention
    two forward and four backward; checkpointing repeats the forward ones. The head and the vision tower do not count.

    Args:
        text: the config of the language model, with Qwen's seven linear layers.
        rank: of the adapters.
    """
    hidden, inner, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    queries, keys = heads * size, text.num_key_value_heads * size
    shapes = [(hidden, queries), (hidden, keys), (hidden, keys), (queries, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = sum(wide * high for wide, high in shapes)
    adapters = rank * sum(wide + high for wide, high in shapes)
    products = tokens * (weights * (2 + checkpointing) + adapters * (3 + checkpointing))
    attention = tokens**2 * queries * (2 + 4 + 2 * checkpointing)
    return int(2 * text.num_hidden_layers * (products + attention))


@contextmanager
def fresh_memory() -> Iterator[None]:
    gc.collect()
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield


def peak(digits: int = 2) -> float | None:
    return round(torch.cuda.max_memory_allocated() / GIB, digits) if ON_GPU else None


def timed(work: Callable) -> float:
    with fresh_memory():
        start = time.perf_counter()
        work()
        if ON_GPU:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def matrix_rate(size: int = 8192) -> float:
    """Operations per second of this GPU for a large fp16 matrix product."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.float16) for _ in range(2))
    timed(lambda: [a @ b for _ in range(3)])
    return 2 * size**3 * 20 / timed(lambda: [a @ b for _ in range(20)])


def adapted(model: torch.nn.Module) -> dict:
    """What was trained: it proves that every contestant trains the same layers over the same 4-bit weights."""
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return {
        "adapted": len({name.split(".lora_")[0] for name in trained}),
        "trainable_vision": sum("visual" in name for name in trained),
        "linear_4bit": sum(
            type(module).__name__ == "Linear4bit" and not hasattr(module, "base_layer") for module in model.modules()
        ),
    }
