"""TrainerCallbacks: EMA and SWA of the trainable weights, readable log lines, and the check of the frozen base.

    ema = EMACallback(decay=0.99)
    swa = SWACallback(start=0.5)
    Trainer(..., callbacks=[ema, swa])
    with ema.average_parameters(model):     # the model holds the average here, its own weights again afterwards
        ...

Only the trainable parameters are averaged, by name and in float32: eight bytes a parameter of the adapter for both,
while the base model, in 4 bits or not, is never copied. A 16-bit average would not move: its steps round to nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback

from vqa.core.compat import foreach_lerp_
from vqa.modeling.vision import unwrap_base_model


class WeightAverage(TrainerCallback):
    """A running average of the trainable weights; a subclass's `weight` makes it an EMA or an SWA.

    Steps that the fp16 loss scaler skipped changed nothing and do not count: `steps` are those that were taken, as
    the learning rate's schedule counts them. The average is written into every checkpoint (`<name>.safetensors`) and
    read back when a run resumes.
    """

    name: str

    def __init__(self) -> None:
        self.average: dict[str, torch.Tensor] = {}
        self.trained: dict[str, torch.nn.Parameter] = {}  # found in the first update: there are thousands of modules
        self.steps = self.updates = 0

    def weight(self) -> float:
        """Share of the current weights in the next average, given the number of updates so far; 1 copies them."""
        raise NotImplementedError

    def is_due(self, max_steps: int) -> bool:
        """Whether the step that was just taken, number `self.steps` of at most `max_steps`, is averaged."""
        return True

    @torch.no_grad()
    def update(self, model: torch.nn.Module) -> None:
        """average += weight * (current - average), for each trainable parameter."""
        self.trained = self.trained or dict(trainable_parameters(model))
        current = {name: parameter.detach().float() for name, parameter in self.trained.items()}
        if self.average:
            averages = [self.average[name] for name in current]
            foreach_lerp_(averages, list(current.values()), self.weight())  # as in torch.optim.swa_utils
        else:
            self.average = {name: tensor.clone() for name, tensor in current.items()}
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
            own = parameter.detach().float().clone()
            parameter.copy_(self.average[name])
            self.average[name] = own

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step:  # a resumed run
            tensors = load_file(Path(args.resume_from_checkpoint, self.file_name))
            self.updates = int(tensors.pop("updates"))
            # Earlier releases counted the Trainer's steps.
            self.steps = int(tensors.pop("steps", state.global_step))
            parameters = dict(trainable_parameters(model))
            self.average = {name: tensor.to(parameters[name].device) for name, tensor in tensors.items()}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if not getattr(optimizer, "step_was_skipped", False):
            self.steps += 1
            if self.is_due(state.max_steps):
                self.update(model)

    def on_save(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")  # the Trainer made it just before
            counts = {"updates": torch.tensor(self.updates), "steps": torch.tensor(self.steps)}
            save_file(self.average | counts, folder / self.file_name)

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

    def is_due(self, max_steps: int) -> bool:
        since = self.steps - swa_start_step(self.start, max_steps)
        return since >= 0 and since % self.every == 0


def swa_start_step(start: float, steps: int) -> int:
    """The first step that is averaged, counted from 1: `start` itself, or the one after that share of `steps`."""
    return int(start) if start >= 1 else int(start * steps) + 1


def trainable_parameters(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """(name, parameter) of what is trained, named as in the bare model whatever wraps it."""
    return [(name.removeprefix("module."), p) for name, p in model.named_parameters() if p.requires_grad]


class FrozenWeightsCheck(TrainerCallback):
    """Fails a run that changed a weight which is not trained.

    Compares the sum of each tensor's bytes before and after training. That takes milliseconds on a GPU and finds any
    update of a tensor by an optimiser; only a change that keeps the sum, such as two swapped bytes, goes unnoticed.
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.before = byte_sums(model)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        after = byte_sums(model)
        if changed := [name for name, total in self.before.items() if after[name] != total]:
            raise RuntimeError(f"training changed {len(changed)} frozen weights of the base model, first {changed[0]}")


def byte_sums(model: torch.nn.Module) -> dict[str, int]:
    """Name -> sum of its bytes, of each parameter that is not trained."""
    frozen = {name.removeprefix("module."): p for name, p in model.named_parameters() if not p.requires_grad}
    sums = [p.detach().flatten().view(torch.uint8).sum() for p in frozen.values()]
    return dict(zip(frozen, torch.stack(sums).tolist())) if sums else {}


class NoInputGradients(TrainerCallback):
    """Keeps transformers from computing gradients of the token embeddings' output, which nothing uses.

    It asks for them with any gradient checkpointing, but only the reentrant kind needs them. With them, the layers
    below the first adapter would run again and have a backward pass (`lora_first_layer`).
    """

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if args.gradient_checkpointing and not args.gradient_checkpointing_kwargs["use_reentrant"]:
            unwrap_base_model(model).disable_input_require_grads()


class EarlyStoppingCallback(TrainerCallback):
    """Stops the run after `patience` validations in a row in which no weights beat the best score so far.

    Unlike transformers' callback of this name, it counts the scores of EMA and SWA too, and it counts from the log,
    which a checkpoint keeps: a resumed run stops where an uninterrupted one does.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        control.should_training_stop |= self.validations_since_best(args, state) >= self.patience

    on_evaluate = on_train_begin

    def validations_since_best(self, args, state) -> int:
        """Validations after that with the best score of any weights; 0 where the last one has it."""
        names = [f"eval_{weights}{args.metric_for_best_model}" for weights in ("", "ema_", "swa_")]
        sign = 1 if args.greater_is_better else -1
        scores = [[sign * logs[name] for name in names if name in logs] for logs in state.log_history]
        merits = [max(values) for values in scores if values]
        return len(merits) - 1 - merits.index(max(merits)) if merits else 0


class LogCallback(TrainerCallback):
    """Prints each log of the Trainer as one line.

    fold0  step 25/69  loss 0.812  lr 1.9e-04
    fold0  step 69/69  accuracy 0.714  log_loss 0.752  ema_accuracy 0.721  ema_log_loss 0.744
    """

    def on_log(self, args, state, control, logs=None, **kwargs):
        scores = {key.removeprefix("eval_"): value for key, value in logs.items() if key.startswith("eval_")}
        parts = [f"{name} {value:.3f}" for name, value in scores.items()]
        if "loss" in logs:
            parts = [f"loss {logs['loss']:.3g}", f"lr {logs['learning_rate']:.2g}"]
            if logs.get("skipped_steps"):
                parts.append(f"skipped steps {logs['skipped_steps']}")
        if parts and state.is_world_process_zero:  # the Trainer's last log, of its speed, has neither
            place = f"{Path(args.output_dir).name}  step {state.global_step}/{state.max_steps}"
            tqdm.write("  ".join([place, *parts]))  # above the progress bar, if there is one


class ProgressBar(ProgressCallback):
    """The Trainer's progress bar without its dicts of logs: LogCallback prints those."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass
