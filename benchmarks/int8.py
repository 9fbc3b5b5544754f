"""Is 8-bit integer arithmetic faster than 4-bit weights when rows are scored, and what does it cost in accuracy?

    python benchmarks/int8.py                                         # error on the demo's model; no GPU needed
    python benchmarks/int8.py --model MODEL_FOLDER --rows 64 --output int8.jsonl       # and kernel time, on a GPU

Weights have one scale per output channel, activations one per token; products are int8 with int32 sums
(`torch._int_mm`). Quantising and rescaling use the kernels of bitsandbytes. Random weights have no outliers in their
activations, which real ones have: the time carries over, the error does not.
"""

import argparse
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bitsandbytes.functional import int8_linear_matmul, int8_mm_dequant, int8_vectorwise_quant
from clock import ON_GPU, busy_seconds, kernels, limit_memory, matrix_rate, write_line
from compare import TINY, write_rows
from contestants import Ours
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vqa.core.compat import dequantized_weight, is_4bit
from vqa.data.rows import read_rows
from vqa.inference.scoring import score_rows
from vqa.modeling.families import language_model

DEMO = TINY.parent.parent / "data" / "demo" / "train.csv"


def main() -> None:
    args = parse_args()
    limit_memory(args.cap_gib)
    with tempfile.TemporaryDirectory() as temporary:
        plan = {"model": str(args.model), "stored": True, "cache": temporary, "folder": temporary}
        rows = read_rows(
            DEMO if args.model == TINY else write_rows(Path(temporary, "rows"), args.rows), with_answer=True
        )
        own = Ours(plan, rows[: args.rows], 126 if args.model == TINY else 384)
        if ON_GPU:
            for line in layer_times(own, args.batch):
                write_line(line, args.output)
        lines, probs = [], {}
        for name in ("as loaded", "16 bits", "int8"):  # as loaded: 4 bits on a GPU
            replace_layers(own.base, {"16 bits": plain_layer, "int8": Int8Linear}.get(name))
            lines.append({"weights": name} | score(own, args.batch, probs, name))
        for line in lines:
            write_line(
                {"model": args.model.name} | line | errors(probs[line["weights"]], probs["16 bits"]), args.output
            )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="model folder (default: the tiny model)")
    parser.add_argument("--rows", type=int, default=64, help="rows to score (default: 64)")
    parser.add_argument("--batch", type=int, default=32, help="rows at once (default: 32)")
    parser.add_argument("--cap_gib", type=float, default=14.5, help="GPU memory (default: 14.5, as on a T4)")
    parser.add_argument("--output", help="file to which the JSON lines are appended")
    return parser.parse_args()


class Int8Linear(nn.Module):
    """A linear layer with int8 weights, one scale per output channel, and int8 activations, one scale per token."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.weight, self.scales, _ = int8_vectorwise_quant(dequantized_weight(layer).half())
        self.bias, self.in_features = layer.bias, layer.in_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, x.shape[-1]).half()
        rounded, scales, _ = int8_vectorwise_quant(tokens)
        y = int8_mm_dequant(int8_linear_matmul(rounded, self.weight), scales, self.scales)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1).to(x.dtype)


def plain_layer(layer: nn.Linear) -> nn.Linear:
    """The same layer with its weight in the dtype that it computes in."""
    weight = dequantized_weight(layer)
    plain = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight.clone(), requires_grad=False)
    plain.bias = layer.bias
    return plain


def replace_layers(model: nn.Module, make) -> None:
    """Replace every linear layer of the language model by `make(layer)`; None leaves them."""
    for parent in list(language_model(model).modules()) if make else []:
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear or is_4bit(layer):
                setattr(parent, name, make(layer))


def score(own: Ours, batch: int, probs: dict[str, np.ndarray], name: str) -> dict:
    work = partial(score_rows, own.base.eval(), own.rows, own.prompts, own.ids, batch)
    probs[name] = work()
    if not ON_GPU:
        return {}
    milliseconds, count = device_time(work)
    return {"kernel_ms_per_row": round(milliseconds / len(own.rows), 3), "kernels": count}


def errors(probs: np.ndarray, reference: np.ndarray) -> dict:
    """The distance of probabilities from those with 16-bit weights (float32 on a CPU)."""
    same = (probs.argmax(1) == reference.argmax(1)).mean()
    found = {"largest": np.abs(probs - reference).max(), "mean": np.abs(probs - reference)[reference > 0].mean()}
    return {f"{name}_error": round(float(value), 5) for name, value in found.items()} | {"same_letter": round(same, 4)}


def layer_times(own: Ours, batch: int):
    """Kernel time of each shape of linear layer with the tokens of a scoring batch."""
    tokens = batch * int(own.lengths.tokens.mean())
    rate, seen = matrix_rate(), set()
    for layer in language_model(own.base).modules():
        if not is_4bit(layer) or (shape := (layer.in_features, layer.out_features)) in seen:
            continue
        seen.add(shape)
        x = torch.randn(tokens, shape[0], device="cuda", dtype=torch.float16)
        line = {"layer": f"{shape[0]} x {shape[1]}", "tokens": tokens}
        line["ideal_ms"] = round(2e3 * tokens * shape[0] * shape[1] / rate, 3)
        for name, module in {"4 bits": layer, "16 bits": plain_layer(layer), "int8": Int8Linear(layer)}.items():
            line[f"{name}, ms"] = round(device_time(partial(repeated, module, x))[0] / 10, 3)
        product = partial(products, int8_vectorwise_quant(x)[0], Int8Linear(layer).weight.t())
        line["int8 product alone, ms"] = round(device_time(product)[0] / 10, 3)
        yield line


@torch.inference_mode()
def repeated(module: nn.Module, x: torch.Tensor) -> None:
    for _ in range(10):
        module(x)


def products(a: torch.Tensor, b: torch.Tensor) -> None:
    for _ in range(10):
        torch._int_mm(a, b)


def device_time(work) -> tuple[float, int]:
    """Milliseconds that the GPU works for `work()`, after a first run, and the number of kernels."""
    work()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize()
    found = kernels(profiler)
    return 1000 * busy_seconds(found), len(found)


if __name__ == "__main__":
    main()
