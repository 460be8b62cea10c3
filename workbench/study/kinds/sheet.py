"""Sheets full of small print, for the eye alone: most of what was misread was the smallest print, which is rare elsewhere."""

from __future__ import annotations

import random
from itertools import product

from PIL import Image

from ..drawing import paper, print_text, text_extents
from ..eye import CELL
from ..families import Question
from ..scenes import split_of_content
from ..views import Album, Box, View
from .place import clear
from .window import LABELS
from .words import a_word
from .written import dark_ink, start

SIDES = (84, 224)  # pixels
FONTS = (12, 17)  # ink of 9 to 12 pixels: two or three characters fall into one visual token
MOST = 14  # texts on a sheet


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """One picture with numbers of 1 to 6 digits, words and labels wherever there is room, at every level, and no question.

    The same arguments always give the same. Words belong to the split, as those of `words` do. Raises ValueError for an
    unknown split or level.
    """
    rng = start("sheet", seed, split, level)
    width, height = rng.randint(*SIDES), rng.randint(*SIDES)
    canvas, glyphs = paper(width, height, rng), []
    taken: list[Box] = []
    cells: set[tuple[int, int]] = set()
    for _ in range(4 * MOST):
        text, size, spacing = a_text(rng, split), rng.randint(*FONTS), rng.randint(1, 2)
        x0, y0, x1, y1 = text_extents(text, size, spacing)
        if x1 - x0 > width - 6:
            continue
        x, y = rng.randint(3 - x0, width - 3 - x1), rng.randint(3 - y0, height - 3 - y1)
        x0, y0, x1, y1 = x + x0, y + y0, x + x1, y + y1
        box = (float(x0), float(y0), float(x1), float(y1))
        own = set(product(range(x0 // CELL, x1 // CELL + 1), range(y0 // CELL, y1 // CELL + 1)))
        if clear(box, taken) and not own & cells:  # a visual token never holds two texts: its characters have one order
            taken.append(box)
            cells |= own
            glyphs += print_text(canvas, x, y, text, size, dark_ink(rng), spacing)
        if len(taken) == MOST:
            break
    return Album((View(Image.fromarray(canvas.reshape(height, width, 3)), glyphs=tuple(glyphs)),), seed), []


def a_text(rng: random.Random, split: str) -> str:
    """A number three times in five, else a word in capitals or the label of a button."""
    kind = rng.random()
    if kind < 0.6:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 6)))
    if kind < 0.85:
        while split_of_content(word := a_word(rng, 3, 6)) != split:
            pass
        return word.upper()
    return rng.choice(LABELS)
