"""Test-time augmentation (TTA): the views of each row whose probabilities are averaged."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median

import numpy as np
from accelerate import PartialState

from vqa.data.collator import Collator
from vqa.data.images import all_images, oriented_sizes, with_crops
from vqa.data.rows import Row
from vqa.evaluation.metrics import margins
from vqa.inference.scoring import normalize
from vqa.inference.view_cache import CachedView

PERMUTATION_SETS = {"cyclic": "rotation", "latin": "latin"}  # -> the name of a view
SIDES = re.compile(r"\b(left|right)(most)?\b|왼쪽|왼편|오른쪽|오른편|좌측|우측|좌우", re.IGNORECASE)


@dataclass(frozen=True)
class View:
    """All rows, shown in one way. `changed`: indices of the rows that differ from every earlier view of them."""

    name: str
    rows: list[Row]
    changed: list[int]

    def changed_rows(self) -> list[Row]:
        return [self.rows[i] for i in self.changed]

    def only(self, selected: np.ndarray) -> "View":
        """The same view of fewer rows, by a mask, bool (rows,)."""
        return replace(self, changed=[i for i in self.changed if selected[i]])


@dataclass(frozen=True)
class ViewPredictions:
    """What a model predicts in each view.

    probabilities: float64 (views, rows, letters). shown: bool (views, rows), the rows that a view has; the first view
    is the plain one, which has all. seconds: float64 (views,). letter_mass: mean probability that the plain view puts
    on the offered letters.
    """

    names: list[str]
    probabilities: np.ndarray
    shown: np.ndarray
    seconds: np.ndarray
    letter_mass: float = 1.0

    def mean(self, views: Sequence[int] | None = None, gate: float | None = None) -> np.ndarray:
        """Mean (rows, letters) over `views` (default: all) and, of these, over the views that have the row.

        With a `gate`, rows whose margin is not below it are answered by the plain view alone.
        """
        views = list(range(len(self.names)) if views is None else views)
        used = self.used(views, gate)
        return (self.probabilities[views] * used[..., None]).sum(0) / used.sum(0)[:, None]

    def used(self, views: Sequence[int], gate: float | None = None) -> np.ndarray:
        """Whether each of `views` counts for a row, bool (views, rows)."""
        plain = np.array(views)[:, None] == 0
        return self.shown[list(views)] & (plain | self.below_gate(gate))

    def below_gate(self, gate: float | None) -> np.ndarray:
        """Rows, bool (rows,), whose margin is below the gate; all of them if there is none."""
        return self.margins() < (np.inf if gate is None else gate)

    def margins(self) -> np.ndarray:
        """Probability of the likeliest letter minus that of the second, in the plain view (rows,)."""
        return margins(self.probabilities[0])


def stack_views(views: Sequence[View], scored: Sequence[CachedView]) -> ViewPredictions:
    """The predictions in `views`, given each view's probabilities of its changed rows (changed, letters)."""
    rows, letters = len(views[0].rows), scored[0].probs.shape[1]
    values, shown = np.zeros((len(views), rows, letters)), np.zeros((len(views), rows), dtype=bool)
    for i, (view, (probs, _)) in enumerate(zip(views, scored)):
        values[i, view.changed], shown[i, view.changed] = normalize(probs), True
    seconds = np.array([view.seconds for view in scored])
    return ViewPredictions([view.name for view in views], values, shown, seconds, float(scored[0].probs.sum(1).mean()))


def make_views(
    rows: list[Row],
    collate: Collator,
    scales: Iterable[float] = (),
    num_permutations: int = 1,
    permutation_set: str = "cyclic",
    num_paraphrases: int = 1,
    flip: bool = False,
    crops: bool = False,
) -> list[View]:
    """The plain view, one for each further permutation, paraphrase and scale, the mirrored one, and one with crops.

    Every view changes one thing: scales are not combined with permutations. With `num_permutations` 4, each of four
    choices is once at every letter. A scale that leaves an image's grid of tokens as it was in an earlier view adds
    nothing for that row. The number of rows that a view changes is printed, and a view that changes none is left out.
    """
    views = [View("plain", rows, list(range(len(rows))))]
    views += [_permuted(rows, number, permutation_set) for number in range(1, num_permutations)]
    views += [_paraphrased(rows, number) for number in range(1, num_paraphrases)]
    views += _scaled(rows, scales, collate)
    views += [_flipped(rows)] if flip else []
    views += [_cropped(rows, collate)] if crops else []
    return [view for view in views if view.changed]


def group_by_image(views: Sequence[View]) -> list[list[View]]:
    """The views in their order, grouped so that those of a group differ in the permutation only."""
    groups = groupby(views, lambda view: [view.rows[0].get(key) for key in ("paraphrase", "scale", "flip", "crops")])
    return [list(group) for _, group in groups]


def rows_with_permutations(views: Sequence[View], changed: Sequence[int]) -> list[Row]:
    """The rows at `changed`, with the indices of the `views` that change each, and these views' `permutations`."""
    sets, rows = [set(view.changed) for view in views], []
    for i in changed:
        own, row = [v for v, indices in enumerate(sets) if i in indices], views[0].rows[i]
        plain = list(range(len(row["choices"])))
        permutations = [views[v].rows[i].get("permutation", plain) for v in own]
        rows.append(row | Row(permutations=permutations, views=own))
    return rows


def choice_permutations(count: int, permutation_set: str) -> list[list[int]]:
    """`count` permutations of `count` choices, the CSV's order first; each lists the choice at every letter.

    In both sets every choice is once at every letter. "cyclic" are the rotations. "latin" is Williams' design (1949):
    with an even count every choice also follows every other one once, so no pair of neighbours is favoured.
    """
    first = list(range(count))
    if permutation_set == "latin":  # 0, 1, -1, 2, -2, ...: every difference between neighbours occurs once
        first = [(k + 1) // 2 if k % 2 else -(k // 2) % count for k in range(count)]
    position = {choice: i for i, choice in enumerate(first)}
    return [[position[(choice + shift) % count] for choice in first] for shift in range(count)]


def _permuted(rows: list[Row], number: int, permutation_set: str) -> View:
    """The choices in permutation `number`. A row with n choices has n permutations."""
    counts = [len(row["choices"]) for row in rows]
    permutations = {count: choice_permutations(count, permutation_set) for count in set(counts)}
    permuted = [row | Row(permutation=permutations[n][number % n]) for row, n in zip(rows, counts)]
    changed = [i for i, count in enumerate(counts) if number < count]
    return View(f"{PERMUTATION_SETS[permutation_set]} {number}", permuted, changed)


def _paraphrased(rows: list[Row], number: int) -> View:
    """Each question in its paraphrase `number`, counted from 1, if it has so many."""
    paraphrases = [row.get("paraphrases", []) for row in rows]
    changed = [i for i, own in enumerate(paraphrases) if number <= len(own)]
    PartialState().print(f"paraphrase {number}: {len(changed)} of {len(rows)} questions have one")
    paraphrased = [
        row | Row(question=own[number - 1] if number <= len(own) else row["question"], paraphrase=number)
        for row, own in zip(rows, paraphrases)
    ]
    return View(f"paraphrase {number}", paraphrased, changed)


def _flipped(rows: list[Row]) -> View:
    """All images mirrored, except in rows that mention a side."""
    sided = [bool(SIDES.search("\n".join([row["question"], *row["choices"]]))) for row in rows]
    PartialState().print(
        f"flip: text in images is mirrored too; {sum(sided)} of {len(rows)} rows mention left or right (왼쪽, 오른쪽) "
        "and are not flipped"
    )
    changed = [i for i, row in enumerate(rows) if row["images"] and not sided[i]]
    return View("flip", [row | Row(flip=True) for row in rows], changed)


def _cropped(rows: list[Row], collate: Collator) -> View:
    """Each image that the pixel budget shrinks, followed by its parts."""
    cropped = with_crops(rows, collate.image_size)
    changed = [i for i, row in enumerate(cropped) if row["crops"]]
    PartialState().print(
        f"crops: {len(changed)} of {len(rows)} rows have an image with more pixels than image size "
        f"{collate.image_size} shows"
    )
    return View("crops", cropped, changed)


def _scaled(rows: list[Row], scales: Iterable[float], collate: Collator) -> list[View]:
    """A view for each scale other than 1, of the rows to which it gives a new grid of tokens."""
    sizes = oriented_sizes(all_images(rows))
    if not sizes:
        return []
    views, seen = [], {path: {collate.images.size(*size)} for path, size in sizes.items()}
    plain = median(collate.images.tokens(grid for grids in seen.values() for grid in grids))
    for scale in dict.fromkeys(scale for scale in scales if scale != 1.0):
        grids = {path: collate.images.size(*size, scale) for path, size in sizes.items()}
        changed = [i for i, row in enumerate(rows) if any(grids[path] not in seen[path] for path in row["images"])]
        for path, grid in grids.items():
            seen[path].add(grid)
        tokens = median(collate.images.tokens(grids.values()))
        PartialState().print(
            f"scale {scale}: {len(changed)} of {len(rows)} rows get another grid, {plain:.0f} -> {tokens:.0f} tokens"
        )
        views.append(View(f"scale {scale}", [row | Row(scale=scale) for row in rows], changed))
    return views
