"""Short hays of text alone, on which looking something up by its name or its number is learnt; `needle` has the long ones."""

from __future__ import annotations

import random

from ..families import Question
from ..views import Album
from . import needle

LONGEST = 13
STRAWS = (1, 10)  # by name, by number: to find a name from its number is the harder


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """4 to 13 lines at every level, and up to 13 questions, most of them by number; the same arguments always give the same.

    Raises ValueError for an unknown split or level, as `needle.draw` does.
    """
    length = random.Random(f"lines/{seed}/{split}/{level}").randint(needle.SHORTEST, LONGEST)
    return needle.draw(seed, split, level, length=length, variant="lines", straws=STRAWS)
