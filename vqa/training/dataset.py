"""The training rows as a Dataset, and the sampler that sorts each optimiser step by length."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from transformers import TrainerCallback


class TrainDataset(torch.utils.data.Dataset):
    """Training rows; each asks its question in one of its wordings and, with `shuffle`, shows its choices in an order
    that are drawn from seed, row and epoch alone.
    """

    def __init__(self, rows: list[dict], shuffle: bool, seed: int):
        self.rows, self.shuffle, self.seed = rows, shuffle, seed
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that outlive an epoch

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        row = dict(self.rows[index])
        draw = random.Random(f"{self.seed} {row['id']} {int(self.epoch)}")
        if self.shuffle:
            row["permutation"] = list(range(len(row["choices"])))
            draw.shuffle(row["permutation"])
        if row.get("paraphrases"):
            row["question"] = draw.choice([row["question"], *row["paraphrases"]])
        return row


class SetEpochCallback(TrainerCallback):
    """Tells the training rows which epoch it is: accelerate tells only the sampler."""

    def __init__(self, rows: TrainDataset):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.epoch.fill_(int(state.epoch or 0))


class LengthSortedSampler(torch.utils.data.Sampler):
    """An epoch's rows at random, drawn by seed and epoch alone, those of each optimiser step from short to long.

    So the step's micro-batches pad little, and its gradient is that of any random step. Steps of like rows would pad
    less, but rows of like length are rows of like questions, and the model learns worse from them (EXPERIMENTS.md).

    Args: `lengths`, tokens of each row; `rows`, of an optimiser step on all processes; `epoch`, int64 (), which is
    told from outside: accelerate does not reach the sampler of several processes that go on from a checkpoint.
    """

    def __init__(self, lengths: np.ndarray, rows: int, seed: int, epoch: torch.Tensor):
        self.lengths, self.rows, self.seed, self.epoch = lengths.tolist(), rows, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + int(self.epoch))
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        for start in range(0, len(order), self.rows):
            yield from sorted(order[start : start + self.rows], key=self.lengths.__getitem__)
