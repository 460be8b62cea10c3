"""One thing to be found in a long context: among many numbered pictures, or among many lines of text.

Length (pictures or lines) and depth (0: the first, 1: the last) can be given, to sweep them. Thoughts say the whole straw,
so that the words just written are what is looked up.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from ..drawing import paper
from ..families import Question
from ..scenes import COLOURS, SHAPES
from ..views import Album, View
from .place import free_box, in_split, ink_tint, level_of, other, pick, print_in_corner, show, thing, tint

SIDE = 84  # pixels a side of each picture: 9 visual tokens
NUMBER_SIZE = 16
CORNERS = ("top left", "top right", "bottom left", "bottom right")
VARIANTS = ("pictures", "lines")
STRAWS = (5, 5)  # others that are asked for by name and by number
LONGEST = {"pictures": 60, "lines": 130}  # about 1,000 tokens either way
SHORTEST = 4  # two colours by two shapes
RARE = 13  # names that occur once in a long hay, besides those four: being rare says little about being meant
NAMES = tuple(f"{colour} {shape}" for colour in COLOURS for shape in SHAPES)


@dataclass(frozen=True)
class Level:
    """How hard it is: the share of the LONGEST context that is used at most."""

    share: float


LEVELS = {"first": Level(0.1), "second": Level(0.25), "third": Level(0.5), "full": Level(1.0)}


@dataclass(frozen=True)
class _Hay:
    """Names and numbers in order; the needle's name and number occur once."""

    names: tuple[str, ...]
    numbers: tuple[int, ...]
    at: int


def draw(
    seed: int,
    split: str = "train",
    level: str = "full",
    *,
    length: int | None = None,
    depth: float | None = None,
    variant: str | None = None,
    straws: tuple[int, int] = STRAWS,
    first: int = 1,
) -> tuple[Album, list[Question]]:
    """A long context, two questions on the same needle and up to `straws` (by name, by number) on others; the same
    arguments give the same.

    Without `length` it is uniform from SHORTEST to what the level allows, without `depth` the needle is anywhere,
    without `variant` ("pictures" or "lines") the seed chooses. Pictures are numbered from `first`. Lines of text stand
    before the question, after one small picture that has nothing to do with it; their questions have no target boxes.
    Raises ValueError for an unknown split, level or variant, a length outside SHORTEST..LONGEST or a depth outside 0..1.

    Example: ``draw(7, "report", "full", length=100, depth=0.5, variant="lines")``.
    """
    limits = level_of(LEVELS, level, split)
    rng = random.Random(f"needle/{seed}/{split}/{level}/{length}/{depth}")
    chosen = rng.choice(VARIANTS)
    variant = variant or chosen
    if variant not in VARIANTS:
        raise ValueError(f"variant is {variant!r}; choose one of {', '.join(VARIANTS)}")
    longest = LONGEST[variant]
    if length is None:
        length = rng.randint(SHORTEST, max(SHORTEST, int(longest * limits.share)))
    if not SHORTEST <= length <= longest:
        raise ValueError(f"length is {length}; choose {SHORTEST} to {longest} for {variant}")
    if depth is None:
        depth = rng.random()
    if not 0 <= depth <= 1:
        raise ValueError(f"depth is {depth}; choose 0 (the first) to 1 (the last)")
    at = min(length - 1, int(depth * length))
    hay = in_split(split, lambda: _lay_out(rng, variant, length, at, first), lambda hay: f"{hay.names}{hay.numbers}")
    if variant == "pictures":
        views = tuple(_picture(rng, name, str(k)) for name, k in zip(hay.names, hay.numbers, strict=True))
        return Album(views, seed), _ask_pictures(rng, hay, views, straws)
    view = _picture(rng, pick(rng, [name for name in NAMES if name != hay.names[at]]), "")
    return Album((view,), seed), _ask_lines(rng, hay, view, straws)


def _lay_out(rng: random.Random, variant: str, length: int, at: int, first: int) -> _Hay:
    """The needle among near misses, so that no guess from the names alone is better than one in four.

    With the needle go one thing of its colour, one of its shape and one that has neither but shares with those two: each
    of the four is as much like the others as the needle is. In a long hay RARE other names occur once as well, the rest
    several times.
    """
    needle = pick(rng, NAMES)
    colour, shape = needle.split()
    colour2, shape2 = other(rng, COLOURS, colour), other(rng, SHAPES, shape)
    square = [f"{colour} {shape2}", f"{colour2} {shape}", f"{colour2} {shape2}"]
    rest = [name for name in NAMES if name != needle and name not in square]
    rng.shuffle(rest)
    rare, common = rest[:RARE], rest[RARE:]
    others = square + rare[: length - SHORTEST]
    others += [pick(rng, common) for _ in range(length - 1 - len(others))]
    rng.shuffle(others)
    names = (*others[:at], needle, *others[at:])
    if variant == "pictures":
        return _Hay(names, tuple(range(first, first + length)), at)
    own = rng.randint(10, 99)
    free = [number for number in range(10, 100) if number != own]
    numbers = [pick(rng, free) for _ in others]
    return _Hay(names, (*numbers[:at], own, *numbers[at:]), at)


def _picture(rng: random.Random, name: str, number: str) -> View:
    """One shape, and the number of the picture in a corner if there is one."""
    colour, shape = name.split()
    prints, taken = [], []
    if number:
        line, box = print_in_corner(number, NUMBER_SIZE, pick(rng, CORNERS), SIDE, SIDE)
        prints, taken = [line], [box]
    box = None
    while box is None:
        box = free_box(rng, rng.randint(24, 42), SIDE, SIDE, taken)
    things = [(thing(colour, shape, box, SIDE, SIDE), tint(rng, colour))]
    return show(paper(SIDE, SIDE, rng), things, prints, ink_tint(rng))


# ---- questions


def _ask_pictures(rng: random.Random, hay: _Hay, views: Sequence[View], straws: tuple[int, int]) -> list[Question]:
    asked = []
    for k, key, by_number in _straws(rng, hay, straws, "picture", "thing in picture"):
        name, number, view = hay.names[k], hay.numbers[k], views[k]
        box = (view.objects[0].box,)
        if by_number:
            text = rng.choice(("what is in picture {}?", "which thing is in picture {}?", "name the thing in picture {}."))
            thought = f"picture {number} {name}, so {name}"
            asked.append(Question("needle", text.format(number), thought, name, box, key, view.size))
        else:
            text = rng.choice(("in which picture is the {}?", "which picture has the {}?", "find the picture with the {}."))
            thought = f"{name} picture {number}, so picture {number}"
            asked.append(Question("needle", text.format(name), thought, f"picture {number}", box, key, view.size))
    return asked


def _ask_lines(rng: random.Random, hay: _Hay, view: View, straws: tuple[int, int]) -> list[Question]:
    lines = " ".join(f"{name} {number}." for name, number in zip(hay.names, hay.numbers, strict=True))
    asked = []
    for k, key, by_number in _straws(rng, hay, straws, "number", "thing in line"):
        name, number = hay.names[k], str(hay.numbers[k])
        if by_number:
            texts = ("what has the number {}?", "which thing has the number {}?", "name the thing with the number {}.")
            text, thought, answer = rng.choice(texts).format(number), f"{number} {name}", name
        else:
            text = rng.choice(("what number has the {}?", "which number has the {}?", "find the number of the {}."))
            text, thought, answer = text.format(name), f"{name} {number}", number
        asked.append(Question("needle", f"{lines} {text}", f"{thought}, so {answer}", answer, (), key, view.size))
    return asked


def _straws(
    rng: random.Random, hay: _Hay, straws: tuple[int, int], number: str, thing: str
) -> list[tuple[int, str, bool]]:
    """(place in the hay, chance_key, whether it is asked for by its number, not by its name): the needle both ways, then
    others both ways where that is clear. `number` and `thing` say in the needle's chance_key what is wanted.
    """
    asked = [(hay.at, f"needle {number}", False), (hay.at, f"needle {thing}", True)]
    for by_number, values, n in ((False, hay.names, straws[0]), (True, hay.numbers, straws[1])):
        counts = Counter(values)
        clear = [k for k, value in enumerate(values) if k != hay.at and counts[value] == 1]
        asked += [(k, "hay", by_number) for k in rng.sample(clear, min(n, len(clear)))]
    return asked
