"""EMA and SWA of the trainable weights, as TrainerCallbacks.

    ema = EMACallback(decay=0.99)
    swa = SWACallback(start=0.5)
    Trainer(..., callbacks=[ema, swa])
    with ema.applied(model):     # the model holds the average here, its own weights again afterwards
        ...

Only the trainable parameters are averaged, by name and in float32: eight bytes a parameter of the adapter for both,
while the base model, in 4 bits or not, is never copied. A 16-bit average would not move: its steps round to nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from vqa.core.distributed import full_tensor, shard_like


class WeightAverage(TrainerCallback):
    """A running average of the trainable weights; what kind of average it is, is the subclass's `weight`.

    The average is written into every checkpoint (`<name>.safetensors`) and read back when a run resumes.
    """

    name: str

    def __init__(self):
        self.average: dict[str, torch.Tensor] = {}
        self.updates = 0

    def weight(self) -> float:
        """Share of the current weights in the next average, given the number of updates so far; 1 copies them."""
        raise NotImplementedError

    def is_due(self, args, state) -> bool:
        """Whether the optimiser step that just ended is one to average."""
        return True

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """average += weight * (current - average), for each trainable parameter."""
        weight = self.weight()
        for name, parameter in trainable_parameters(model):
            if name not in self.average:
                self.average[name] = parameter.detach().float().clone()
            else:
                self.average[name].lerp_(parameter.detach().float(), weight)
        self.updates += 1

    @contextmanager
    def average_parameters(self, model: torch.nn.Module) -> Iterator[None]:
        """Within the block `model` holds the average. Swapped tensor by tensor: no second copy of the adapter."""
        self._swap(model)
        try:
            yield
        finally:
            self._swap(model)

    @torch.no_grad()
    def _swap(self, model: torch.nn.Module) -> None:
        for name, parameter in trainable_parameters(model):
            held = parameter.detach().float().clone()
            parameter.copy_(self.average[name])
            self.average[name] = held

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step:  # a resumed run
            tensors = load_file(Path(args.resume_from_checkpoint, self.file_name))
            self.updates = int(tensors.pop("updates"))
            parameters = dict(trainable_parameters(model))
            self.average = {name: shard_like(parameters[name], tensor) for name, tensor in tensors.items()}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        # A step that the fp16 loss scaler skipped changed nothing, so it does not count.
        if not getattr(optimizer, "step_was_skipped", False) and self.is_due(args, state):
            self.update(model)

    def on_save(self, args, state, control, **kwargs):
        average = {name: full_tensor(tensor) for name, tensor in self.average.items()}
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")  # there already: the Trainer made it
            save_file(average | {"updates": torch.tensor(self.updates)}, folder / self.file_name)

    @property
    def file_name(self) -> str:
        """The average's file in a checkpoint folder."""
        return f"{self.name}.safetensors"


class EMACallback(WeightAverage):
    """Exponential moving average, `decay` a step, warmed up: min(decay, (1 + n) / (10 + n)) after n updates.

    The first update copies the weights. A cold start would keep the initial adapter in the average (its B is zero, so
    the adapter would be shrunk), and a high decay would not leave it within a short run. Warm-up as in TensorFlow's
    ExponentialMovingAverage.
    """

    name = "ema"

    def __init__(self, decay: float = 0.99):
        super().__init__()
        self.decay = decay

    def weight(self) -> float:
        return 1.0 - min(self.decay, (1 + self.updates) / (10 + self.updates))


class SWACallback(WeightAverage):
    """Stochastic weight averaging (Izmailov et al., 2018): the equal mean of the weights of every `every`-th step.

    `start`, below 1, is the share of the run after which it begins; from 1 on, the first step that is averaged.
    """

    name = "swa"

    def __init__(self, start: float = 0.5, every: int = 1):
        super().__init__()
        self.start, self.every = start, every

    def weight(self) -> float:
        return 1.0 / (self.updates + 1)

    def is_due(self, args, state) -> bool:
        since = state.global_step - swa_start_step(self.start, state.max_steps)
        return since >= 0 and since % self.every == 0


def swa_start_step(start: float, steps: int) -> int:
    """The first step that is averaged, counted from 1: `start` itself, or the one after that share of `steps`."""
    return int(start) if start >= 1 else int(start * steps) + 1


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what is trained, named as in the bare model whatever wraps it."""
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]
