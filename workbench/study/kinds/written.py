"""What the kinds with printed text share: levels, tints, filled boxes, free places."""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np

from ..drawing import blend
from ..scenes import SPLITS, clear_of_zone_lines
from ..views import Box
from .place import clear

LEVELS = ("first", "second", "third", "full")


def start(kind: str, seed: int, split: str, level: str) -> random.Random:
    """The random numbers from which everything in one picture follows. ValueError for an unknown split or level."""
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}; choose one of {', '.join(LEVELS)}")
    return random.Random(f"{kind}/{seed}/{split}/{level}")


def varied(rng: random.Random, colour: tuple[int, int, int]) -> list[int]:
    """The colour with each channel up to 10 off, as coloured shapes have it."""
    return [min(255, max(0, channel + rng.randint(-10, 10))) for channel in colour]


def dark_ink(rng: random.Random) -> list[int]:
    """A nearly black tint for print."""
    return [rng.randint(15, 59) for _ in range(3)]


def fill(canvas: np.ndarray, x0: int, y0: int, x1: int, y1: int, colour: list[int]) -> None:
    """Paints a box of whole pixels of the canvas (height, 3 * width) in place."""
    canvas[y0:y1, 3 * x0 : 3 * x1] = np.array(colour * (x1 - x0), dtype=np.uint8)


def fill_round(canvas: np.ndarray, x: int, y: int, width: int, height: int, radius: int, colour: list[int]) -> None:
    """Paints a box with round corners (radius 0: none) and a darker rim of one pixel in place."""
    cover, shaded = _round_ink(width, height, radius)
    blend(canvas, x, y, cover, shaded, colour)


@lru_cache(maxsize=512)
def _round_ink(width: int, height: int, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and shaded coverage, float32 (height, 3 * width)."""
    u = np.abs(np.arange(width) + 0.5 - width / 2) - (width / 2 - radius)
    v = np.abs(np.arange(height) + 0.5 - height / 2) - (height / 2 - radius)
    u, v = u[None, :], v[:, None]
    distance = np.hypot(np.maximum(u, 0), np.maximum(v, 0)) + np.minimum(np.maximum(u, v), 0) - radius
    cover, rim = np.clip(0.5 - distance, 0, 1), np.clip(distance + 1.5, 0, 1)
    shaded = cover * (1 - 0.3 * rim)
    return np.repeat(cover.astype(np.float32), 3, 1), np.repeat(shaded.astype(np.float32), 3, 1)


def free_box(rng: random.Random, side: int, width: int, height: int, taken: list[Box]) -> Box | None:
    """A side x side box clear of `taken` and of the lines between zones; None if 30 tries find none."""
    for _ in range(30):
        x, y = rng.randint(2, width - side - 2), rng.randint(2, height - side - 2)
        if not clear_of_zone_lines(x + side / 2, y + side / 2, width, height):
            continue
        box = (float(x), float(y), float(x + side), float(y + side))
        if clear(box, taken):
            return box
    return None
