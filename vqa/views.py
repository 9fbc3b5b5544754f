"""Test-time augmentation: the views of each row whose probabilities are averaged."""

from dataclasses import dataclass
from statistics import median

import numpy as np

from collator import Collator
from vqa.images import target_size, upright_size


@dataclass
class View:
    """Rows seen in one way. `changed` are those that it really shows otherwise than the plain view does."""

    name: str
    rows: list[dict]
    changed: list[int]

    def changed_rows(self) -> list[dict]:
        return [self.rows[i] for i in self.changed]

    def spread(self, probabilities: np.ndarray) -> np.ndarray:
        """Probabilities of the changed rows (changed, letters) as those of all rows (rows, letters), others 0."""
        spread = np.zeros((len(self.rows), probabilities.shape[1]))
        spread[self.changed] = probabilities
        return spread


def make_views(rows: list[dict], scales: list[float], orders: int, collate: Collator) -> list[View]:
    """The plain view, one per scale other than 1, and one per rotation of the choices: `len(scales) + orders - 1`.

    Additive, not every scale with every order: each view costs one pass, and each changes one thing. With `orders` 4,
    every one of four choices stands once at every letter. A scale that leaves an image's grid as it is gives no new
    view of that row; how many it does change is printed, and where it is none, the view is left out.
    """
    views = [View("plain", rows, list(range(len(rows))))]
    for scale in dict.fromkeys(scale for scale in scales if scale != 1.0):
        views += [view for view in [_scaled(rows, scale, collate)] if view.changed]
    for shift in range(1, orders):
        views += [view for view in [_rotated(rows, shift)] if view.changed]
    return views


def _scaled(rows: list[dict], scale: float, collate: Collator) -> View:
    viewed = [{**row, "scale": scale} for row in rows]
    sizes = [upright_size(row["image"]) for row in rows]
    patch = collate.processor.image_processor.patch_size
    plain, scaled = ([target_size(*size, collate.image_size, s, patch) for size in sizes] for s in (1.0, scale))
    changed = [i for i in range(len(rows)) if plain[i] != scaled[i]]
    tokens = [round(median(w * h for w, h in grid) / (2 * patch) ** 2) for grid in (plain, scaled)]
    print(f"scale {scale}: another grid for {len(changed)} of {len(rows)} images, {tokens[0]} -> {tokens[1]} tokens")
    return View(f"scale {scale}", viewed, changed)


def _rotated(rows: list[dict], shift: int) -> View:
    """Choice `i + shift` at letter `i`. A row with no more than `shift` choices has had all its rotations."""
    viewed, changed = [], []
    for i, row in enumerate(rows):
        count = len(row["choices"])
        viewed.append({**row, "order": [(j + shift) % count for j in range(count)]})
        changed += [i] if shift < count else []
    return View(f"rotation {shift}", viewed, changed)
