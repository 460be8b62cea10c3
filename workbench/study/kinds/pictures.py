"""Hays of pictures on which looking up pictures is learnt: at every level short ones mostly, and now and then the longest."""

from __future__ import annotations

import random

from ..families import Question
from ..views import Album
from . import needle

STRAWS = (5, 5)  # by name, by number


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """4 to 60 pictures, 4 to 8 as often as 30 to 60, and up to 12 questions; the same arguments always give the same.

    They are numbered from anywhere, as if cut out of the longest hay: counted from one, a number would say a place.
    Raises ValueError for an unknown split or level, as `needle.draw` does.
    """
    rng = random.Random(f"pictures/{seed}/{split}/{level}")
    longest = needle.LONGEST["pictures"]
    length = round(needle.SHORTEST * (longest / needle.SHORTEST) ** rng.random())
    first = rng.randint(1, longest + 1 - length)
    return needle.draw(seed, split, level, length=length, variant="pictures", straws=STRAWS, first=first)
