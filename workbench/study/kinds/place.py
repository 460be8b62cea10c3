"""What the kinds share: finding room for shapes, showing them on paper, and sorting contents into splits.

A box is (x0, y0, x1, y1) in picture pixels. Contents are laid out with plain arithmetic and drawn only once their
split is the asked one, so that train, choose and report never share a content.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from PIL import Image

from ..drawing import blend, print_text, shape_ink, text_extents
from ..scenes import GAP, PALETTE, SPLITS, Obj, clear_of_zone_lines, in_reading_order, split_of_content, zone_of
from ..views import Box, View

T = TypeVar("T")
Print = tuple[str, int, int, int]  # text, pen x, pen y, font size


def level_of(levels: Mapping[str, T], name: str, split: str) -> T:
    """The level of that name. Raises ValueError for an unknown level or split."""
    if name not in levels:
        raise ValueError(f"level is {name!r}; choose one of {', '.join(levels)}")
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    return levels[name]


def in_split(split: str, lay_out: Callable[[], T | None], content: Callable[[T], str]) -> T:
    """The first layout that came out (is not None) and whose content belongs to the split."""
    for _ in range(20_000):
        laid = lay_out()
        if laid is not None and split_of_content(content(laid)) == split:
            return laid
    raise ValueError(f"20000 layouts held none for split {split!r}; allow more objects or larger pictures")


def pick(rng: random.Random, values: Sequence[T]) -> T:
    """`rng.choice`, several times as fast; layouts are thrown away by the dozen."""
    return values[int(rng.random() * len(values))]


def other(rng: random.Random, values: Sequence[str], than: str) -> str:
    return pick(rng, [v for v in values if v != than])


def clear(box: Box, taken: Iterable[Box]) -> bool:
    """True if the box keeps GAP pixels from all others."""
    x0, y0, x1, y1 = box
    return all(x1 + GAP <= a or c + GAP <= x0 or y1 + GAP <= b or d + GAP <= y0 for a, b, c, d in taken)


def in_one_zone(box: Box, width: int, height: int) -> bool:
    """True if the centre is well off the lines between the nine zones, so that its zone is no coin toss."""
    return clear_of_zone_lines((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, width, height)


def free_box(rng: random.Random, side: int, width: int, height: int, taken: Sequence[Box]) -> Box | None:
    """A side x side box at half-pixel positions, clear of `taken` and inside one zone; None if none was found."""
    for _ in range(30):
        x = 2 + int(rng.random() * (2 * (width - side) - 7)) / 2
        y = 2 + int(rng.random() * (2 * (height - side) - 7)) / 2
        box = (x, y, x + side, y + side)
        if in_one_zone(box, width, height) and clear(box, taken):
            return box
    return None


def thing(colour: str, shape: str, box: Box, width: int, height: int) -> Obj:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return Obj(colour, shape, box, zone_of(x, y, width, height))


def print_at(text: str, size: int, left: int, top: int) -> tuple[Print, Box]:
    """The line whose ink has its top left corner there, and the box of that ink."""
    x0, y0, x1, y1 = text_extents(text, size)
    return (text, int(left - x0), int(top - y0), size), (left, top, left + x1 - x0, top + y1 - y0)


def print_in_corner(text: str, size: int, corner: str, width: int, height: int) -> tuple[Print, Box]:
    """The line 3 pixels off a corner such as "top left"."""
    x0, y0, x1, y1 = text_extents(text, size)
    left = 3 if "left" in corner else int(width - 3 - (x1 - x0))
    return print_at(text, size, left, 3 if "top" in corner else int(height - 3 - (y1 - y0)))


def tint(rng: random.Random, colour: str) -> list[int]:
    """A colour of the palette, slightly off."""
    return [min(255, max(0, c + int(rng.random() * 21) - 10)) for c in PALETTE[colour]]


def ink_tint(rng: random.Random) -> list[int]:
    """A dark tone for print."""
    return [15 + int(rng.random() * 45) for _ in range(3)]


def show(
    ground: np.ndarray,
    things: Iterable[tuple[Obj, list[int]]],
    prints: Iterable[Print] = (),
    dark: Sequence[int] = (30, 30, 30),
) -> View:
    """Shapes, each with its tint, and printed lines on a copy of the ground (height, 3 * width); objects in reading order."""
    canvas, objects, glyphs = ground.copy(), [], []
    for o, colour in things:
        x0, y0, x1, _ = o.box
        ink, shaded = shape_ink(o.shape, int(x1 - x0), int(2 * x0) % 2, int(2 * y0) % 2)
        blend(canvas, int(x0), int(y0), ink, shaded, colour)
        objects.append(o)
    for text, x, y, size in prints:
        glyphs += print_text(canvas, x, y, text, size, list(dark))
    return View(Image.fromarray(canvas.reshape(len(canvas), -1, 3)), in_reading_order(objects), tuple(glyphs))
