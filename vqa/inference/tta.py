"""Test-time augmentation: the views of each row whose probabilities are averaged."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import median

import numpy as np
from accelerate import PartialState

from vqa.data.collator import Collator
from vqa.data.images import image_tokens, oriented_sizes, target_size

PERMUTATION_SETS = {"cyclic": "rotation", "latin": "latin"}  # and what their views are called


SIDES = re.compile(r"\b(left|right)(most)?\b|왼쪽|왼편|오른쪽|오른편|좌측|우측|좌우", re.IGNORECASE)


@dataclass(frozen=True)
class View:
    """Rows seen in one way. `changed` are those that it really shows otherwise than the views before it do."""

    name: str
    rows: list[dict]
    changed: list[int]

    def changed_rows(self) -> list[dict]:
        return [self.rows[i] for i in self.changed]

    def only(self, wanted: np.ndarray) -> "View":
        """The same view of fewer rows: those that are `wanted`, bool (rows,)."""
        return replace(self, changed=[i for i in self.changed if wanted[i]])


@dataclass(frozen=True)
class ViewPredictions:
    """Probabilities of rows in views, float64 (views, rows, letters), and which rows each view shows (views, rows).

    The first view is the plain one, which shows every row.
    """

    names: list[str]
    probabilities: np.ndarray
    shown: np.ndarray

    def mean(self, views: Sequence[int] | None = None, gate: float | None = None) -> np.ndarray:
        """Mean (rows, letters) over `views`, all by default. A view that does not show a row does not count for it.

        With a `gate`, the plain view alone answers rows whose margin in it is not below.
        """
        views = list(range(len(self.names))) if views is None else list(views)
        asked = self.asked(views, gate)
        return (self.probabilities[views] * asked[..., None]).sum(0) / asked.sum(0)[:, None]

    def asked(self, views: Sequence[int], gate: float | None = None) -> np.ndarray:
        """Which rows each of `views` is asked for, bool (views, rows)."""
        plain = np.array(views)[:, None] == 0
        return self.shown[list(views)] & (plain | self.unsure(gate))

    def unsure(self, gate: float | None) -> np.ndarray:
        """Rows, bool (rows,), whose first and second letter in the plain view are less than `gate` apart."""
        return self.margins() < (np.inf if gate is None else gate)

    def margins(self) -> np.ndarray:
        """Probability of the first letter over the second one's in the plain view (rows,)."""
        second, first = np.sort(self.probabilities[0])[:, -2:].T
        return first - second


def stack_views(views: Sequence[View], probabilities: Sequence[np.ndarray]) -> ViewPredictions:
    """Answers out of each view's probabilities of the rows that it changes (changed, letters)."""
    rows, letters = len(views[0].rows), probabilities[0].shape[1]
    values, shown = np.zeros((len(views), rows, letters)), np.zeros((len(views), rows), dtype=bool)
    for i, (view, own) in enumerate(zip(views, probabilities)):
        values[i, view.changed], shown[i, view.changed] = own, True
    return ViewPredictions([view.name for view in views], values, shown)


def make_views(
    rows: list[dict],
    collate: Collator,
    scales: Iterable[float] = (1.0,),
    num_permutations: int = 1,
    permutation_set: str = "cyclic",
    num_paraphrases: int = 1,
    flip: bool = False,
) -> list[View]:
    """The plain view, one per further order of the choices, wording of the question, and scale, and one mirrored.

    Additive, not every scale with every order: each view costs one pass, and each changes one thing. With `orders` 4,
    every one of four choices stands once at every letter. A scale that leaves an image's grid as an earlier view has
    it gives no new view of that row; how many it does change is printed, and where it is none, the view is left out.
    """
    views = [View("plain", rows, list(range(len(rows))))]
    views += [_ordered(rows, number, permutation_set) for number in range(1, num_permutations)]
    views += [_reworded(rows, number) for number in range(1, num_paraphrases)]
    views += _scaled(rows, scales, collate)
    views += [_flipped(rows)] if flip else []
    return [view for view in views if view.changed]


def group_by_image(views: Sequence[View]) -> list[list[View]]:
    """The views in their order, those together that differ in the choices' order alone."""
    shown = groupby(views, lambda view: [view.rows[0].get(key) for key in ("paraphrase", "scale", "flip")])
    return [list(same) for _, same in shown]


def rows_with_permutations(views: Sequence[View], changed: Sequence[int]) -> list[dict]:
    """The rows at `changed`, each with the places of those `views` that change it, and the `orders` that they show."""
    sets, rows = [set(view.changed) for view in views], []
    for i in changed:
        own, row = [v for v, of in enumerate(sets) if i in of], views[0].rows[i]
        plain = list(range(len(row["choices"])))
        rows.append({**row, "permutations": [views[v].rows[i].get("permutation", plain) for v in own], "views": own})
    return rows


def choice_permutations(count: int, permutation_set: str) -> list[list[int]]:
    """`count` orders of `count` choices, the CSV's own first; each lists the choice that stands at each letter.

    In both sets every choice stands once at every letter. "cyclic" are the rotations. "latin" is Williams' design
    (1949): with an even count every choice also follows every other one once, so that no neighbour is favoured.
    """
    first = list(range(count))
    if permutation_set == "latin":  # 0, 1, -1, 2, -2, ...: every difference between neighbours occurs once
        first = [(k + 1) // 2 if k % 2 else -(k // 2) % count for k in range(count)]
    name = {choice: i for i, choice in enumerate(first)}
    return [[name[(choice + shift) % count] for choice in first] for shift in range(count)]


def _ordered(rows: list[dict], number: int, permutation_set: str) -> View:
    """The choices in the order of that number. A row with no more choices than `number` has had all its orders."""
    changed = [i for i, row in enumerate(rows) if number < len(row["choices"])]
    orders = {count: choice_permutations(count, permutation_set) for count in {len(row["choices"]) for row in rows}}
    viewed = [{**row, "permutation": orders[n][number % n]} for row in rows for n in [len(row["choices"])]]
    return View(f"{PERMUTATION_SETS[permutation_set]} {number}", viewed, changed)


def _reworded(rows: list[dict], number: int) -> View:
    """Each question in its wording of that number: of the row's `paraphrases` the first, for 1."""
    others = [row.get("paraphrases", []) for row in rows]
    changed = [i for i, own in enumerate(others) if number <= len(own)]
    PartialState().print(f"wording {number}: another one for {len(changed)} of {len(rows)} questions")
    viewed = [
        {**row, "question": [row["question"], *own][min(number, len(own))], "paraphrase": number}
        for row, own in zip(rows, others)
    ]
    return View(f"wording {number}", viewed, changed)


def _flipped(rows: list[dict]) -> View:
    """Every image mirrored, but for rows that mention a side."""
    sided = [bool(SIDES.search("\n".join([row["question"], *row["choices"]]))) for row in rows]
    PartialState().print(
        f"flip: mirrors the text in images, and left and right; {sum(sided)} of {len(rows)} rows mention left or "
        "right (왼쪽, 오른쪽) and are not flipped"
    )
    changed = [i for i, row in enumerate(rows) if row["image"] and not sided[i]]
    return View("flip", [{**row, "flip": True} for row in rows], changed)


def _scaled(rows: list[dict], scales: Iterable[float], collate: Collator) -> list[View]:
    """A view per scale other than 1, of the rows that it gives a grid which they have not had yet."""
    patch = collate.processor.image_processor.patch_size
    sizes = oriented_sizes(row["image"] for row in rows if row["image"])
    if not sizes:
        return []
    views, seen = [], {path: {target_size(*size, collate.image_size, 1.0, patch)} for path, size in sizes.items()}
    plain = median(image_tokens(*grid, patch) for grids in seen.values() for grid in grids)
    for scale in dict.fromkeys(scale for scale in scales if scale != 1.0):
        grids = {path: target_size(*size, collate.image_size, scale, patch) for path, size in sizes.items()}
        changed = [i for i, row in enumerate(rows) if row["image"] and grids[row["image"]] not in seen[row["image"]]]
        for path, grid in grids.items():
            seen[path].add(grid)
        tokens = median(image_tokens(*grid, patch) for grid in grids.values())
        PartialState().print(
            f"scale {scale}: another grid for {len(changed)} of {len(rows)} rows, {plain:.0f} -> {tokens:.0f} tokens"
        )
        views.append(View(f"scale {scale}", [{**row, "scale": scale} for row in rows], changed))
    return views
