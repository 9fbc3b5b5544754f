"""The training rows as a Dataset, and the sampler that sorts the rows of each optimiser step by length."""

import random
from collections.abc import Iterator

import numpy as np
import torch
from transformers import TrainerCallback

from vqa.data.rows import Row


class TrainDataset(torch.utils.data.Dataset):
    """Training rows, augmented by draws from seed, row id and epoch alone.

    Each epoch draws one of a row's question and paraphrases, with `shuffle` a permutation of its choices, and whether
    its `crops` are shown: the model learns both forms, and prediction can choose the longer one for unsure rows.
    With more than one of `num_permutations`, a row has `permutations`: the one drawn and its next rotations.
    """

    def __init__(self, rows: list[Row], shuffle: bool, seed: int, num_permutations: int = 1):
        self.rows, self.shuffle, self.seed, self.num_permutations = rows, shuffle, seed, num_permutations
        self.epoch = torch.zeros((), dtype=torch.int64)  # workers that outlive an epoch need it in shared memory

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        row = self.rows[index].copy()
        draw = random.Random(f"{self.seed} {row['id']} {int(self.epoch)}")
        if self.shuffle:
            row["permutation"] = list(range(len(row["choices"])))
            draw.shuffle(row["permutation"])
            if self.num_permutations > 1:
                row["permutations"] = rotations(row["permutation"], self.num_permutations)
        if row.get("paraphrases"):
            row["question"] = draw.choice([row["question"], *row["paraphrases"]])
        if row.get("crops") and draw.random() < 0.5:
            row["crops"] = []
        return row


def rotations(permutation: list[int], count: int) -> list[list[int]]:
    """The first `count` rotations of a permutation, or all of them. In all of them a choice has each letter once."""
    return [permutation[start:] + permutation[:start] for start in range(min(count, len(permutation)))]


class SetEpochCallback(TrainerCallback):
    """Sets the epoch of the training rows: accelerate sets only the sampler's."""

    def __init__(self, rows: TrainDataset):
        self.rows = rows

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.rows.epoch.fill_(int(state.epoch or 0))


class LengthSortedSampler(torch.utils.data.Sampler):
    """An epoch's rows in random order, drawn by seed and epoch alone; the rows of a step are sorted by length.

    So the micro-batches of a step need little padding, and the step's gradient is that of random rows. Sorting the
    whole epoch would pad less, but rows of similar length have similar questions, and the model learns worse from
    them (EXPERIMENTS.md).

    Args:
        lengths: tokens of each row.
        rows: number of rows of an optimiser step on all processes.
        seed: of the draws.
        epoch: int64 (), set from outside: accelerate does not reach the sampler of several processes that resume.
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
