"""Hays of pictures, up to two fifths of the longest, on which looking up pictures is learnt; `needle` has the long ones."""

from __future__ import annotations

import random

from ..families import Question
from ..views import Album
from . import needle

LONGEST = 24
STRAWS = (5, 5)  # by name, by number


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """4 to 24 pictures at every level, and up to 12 questions; the same arguments always give the same.

    They are numbered from anywhere, as if cut out of the longest hay: counted from one, a number would say a place.
    Raises ValueError for an unknown split or level, as `needle.draw` does.
    """
    rng = random.Random(f"pictures/{seed}/{split}/{level}")
    length = rng.randint(needle.SHORTEST, LONGEST)
    first = rng.randint(1, needle.LONGEST["pictures"] + 1 - length)
    return needle.draw(seed, split, level, length=length, variant="pictures", straws=STRAWS, first=first)
