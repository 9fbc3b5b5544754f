"""Would CUDA graphs or torch.compile make training faster? A pilot on some decoder layers, forward and backward.

    python benchmarks/graphs.py --model MODEL_FOLDER --batches 4 8 32 --tokens 270 --output graphs.jsonl

The layers have their 4-bit weights and fused LoRA, as in training. Three forms are timed: eager; a CUDA graph for each
of the forward and the backward pass (`torch.cuda.make_graphed_callables`), as one would capture it for each bucket of
lengths; and `torch.compile`. A graph only removes the wait for the host: kernel time says what is left on a slow GPU.
"""

import argparse
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from clock import ON_GPU, write_line
from compare import write_rows
from contestants import ADAPTER, Ours
from int8 import device_time
from torch import nn

from vqa.core.errors import UserError, run_main
from vqa.data.rows import read_rows
from vqa.modeling.families import language_model

REPEATS = 20


def main() -> None:
    args = parse_args()
    if not ON_GPU:
        raise UserError("benchmarks/graphs.py needs a GPU: a CUDA graph runs on nothing else.")
    with tempfile.TemporaryDirectory() as temporary:
        plan = {"model": str(args.model), "stored": True, "cache": temporary, "folder": temporary}
        own = Ours(plan, read_rows(write_rows(Path(temporary, "rows"), 8), with_answer=True), 384)
        model = own.adapted(ADAPTER["lora_dropout"]).train()
        for batch in args.batches:
            inputs = example(model, own, batch, args.tokens)
            line = {"model": args.model.name, "layers": args.layers, "batch": batch, "tokens": args.tokens}
            for how in ("eager", "graph", "compile"):
                try:
                    line |= {f"{how}, {name}": value for name, value in measure(how, model, inputs, args).items()}
                except Exception as error:  # a form that does not work is a result too
                    line[f"{how}, failed"] = f"{type(error).__name__}: {error}"[:300]
                torch.cuda.empty_cache()
            write_line(line, args.output)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="model folder")
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 8, 32], help="rows at once (default: 4 8 32)")
    parser.add_argument("--tokens", type=int, default=270, help="of each row (default: 270)")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers (default: 4)")
    parser.add_argument("--output", help="file to which the JSON lines are appended")
    return parser.parse_args()


def example(model: nn.Module, own: Ours, batch: int, tokens: int) -> dict:
    """What the model gives its first decoder layer for `batch` rows of `tokens` tokens."""
    found = {}

    def note(layer, args, kwargs):
        found.update(args=args, kwargs=kwargs)

    hook = language_model(own.base).layers[0].register_forward_pre_hook(note, with_kwargs=True)
    ids = torch.randint(100, 50000, (batch, tokens), device="cuda")
    mask = torch.ones_like(ids)
    mask[::2, : tokens // 10] = 0  # left padding, so that there is a mask as in training
    with torch.no_grad(), torch.autocast("cuda", torch.float16):
        model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
    hook.remove()
    return found


class Layers(nn.Module):
    """Some decoder layers as a function of the hidden states alone."""

    def __init__(self, layers: list[nn.Module], kwargs: dict):
        super().__init__()
        self.layers, self.kwargs = nn.ModuleList(layers), kwargs

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cuda", torch.float16, cache_enabled=False):
            for layer in self.layers:
                hidden = layer(hidden, **self.kwargs)
        return hidden


def measure(how: str, model: nn.Module, inputs: dict, args: argparse.Namespace) -> dict:
    """Wall and kernel milliseconds of forward and backward, seconds to start, and the norm of the gradient."""
    hidden = inputs["args"][0] if inputs["args"] else inputs["kwargs"]["hidden_states"]
    hidden = hidden.detach().clone().requires_grad_()
    kwargs = {name: value for name, value in inputs["kwargs"].items() if name != "hidden_states"}
    layers: nn.Module = Layers(list(language_model(model.get_base_model()).layers[: args.layers]), kwargs).train()
    start = time.perf_counter()
    if how == "graph":
        layers = torch.cuda.make_graphed_callables(layers, (hidden.detach().clone().requires_grad_(),))
    elif how == "compile":
        layers = torch.compile(layers, dynamic=False)
    torch.manual_seed(0)
    gradient = torch.randn_like(hidden)
    work = partial(repeated, layers, hidden, gradient)
    work(2)
    torch.cuda.synchronize()
    seconds_to_start = time.perf_counter() - start
    start = time.perf_counter()
    work(REPEATS)
    torch.cuda.synchronize()
    wall = (time.perf_counter() - start) / REPEATS
    kernel, count = device_time(partial(work, 3))
    return {
        "wall_ms": round(1000 * wall, 2),
        "kernel_ms": round(kernel / 3, 2),
        "kernels": count // 3,
        "start_s": round(seconds_to_start, 1),
        "gradient_norm": round(hidden.grad.float().norm().item(), 4),
    }


def repeated(layers: nn.Module, hidden: torch.Tensor, gradient: torch.Tensor, times: int) -> None:
    for _ in range(times):
        hidden.grad = None
        layers(hidden).backward(gradient)


if __name__ == "__main__":
    run_main(main)
