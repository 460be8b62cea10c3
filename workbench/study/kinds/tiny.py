"""Large pictures with one tiny target among shapes three times its side: clear at native size, a blot when shrunk.

At half its side the target is 5 to 7 pixels across, at a quarter about 3. Shrinking averages, it does not erase: a reader
taught on shrunk targets and told where to look still tells most shapes apart (5 nearest neighbours of 4000: 100% at half,
97% at a quarter; digits 92% and 59%). So a fall at smaller sizes shows what a model can use that learnt at native size.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from PIL import Image

from ..drawing import paper, text_extents
from ..families import Question
from ..scenes import COLOURS, SHAPES, Obj, content_key
from ..views import Album, Box, View
from .place import Print, clear, free_box, in_split, ink_tint, level_of, other, pick, print_at, show, thing, tint

MEDIUM = (30, 46)  # side of the distractors
LARGEST = 504  # pixels a side


@dataclass(frozen=True)
class Level:
    """How hard it is; pairs are inclusive ranges in pixels, `others` the number of distractors."""

    size: tuple[int, int] = (336, LARGEST)
    side: tuple[int, int] = (10, 14)
    others: tuple[int, int] = (2, 4)
    font: tuple[int, int] = (10, 13)


LEVELS = {
    "first": Level(size=(112, 140), side=(13, 14), others=(2, 2), font=(12, 13)),
    "second": Level(size=(140, 224), side=(12, 14), others=(2, 3), font=(11, 13)),
    "third": Level(size=(224, 336), side=(11, 14)),
    "full": Level(),
}


@dataclass(frozen=True)
class _Page:
    width: int
    height: int
    target: Obj
    others: tuple[Obj, ...]
    number: Print | None


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """One large picture and two or three questions, the target's name first; the same arguments always give the same.

    Raises ValueError for an unknown split or level.
    """
    limits = level_of(LEVELS, level, split)
    rng = random.Random(f"tiny/{seed}/{split}/{level}")
    page = in_split(split, lambda: _lay_out(rng, limits), _content)
    things = [(o, tint(rng, o.colour)) for o in (page.target, *page.others)]
    prints = [page.number] if page.number else []
    view = show(paper(page.width, page.height, rng), things, prints, ink_tint(rng))
    o, size = page.target, view.size
    text = rng.choice(("name the smallest shape.", "what is the smallest shape?", "what is the tiny shape?"))
    asked = [Question("tiny", text, "", o.name, (o.box,), "tiny name", size)]
    words = ("which shape has the smallest thing?", "what shape is the smallest thing?", "what shape is the tiny thing?")
    text = rng.choice(words)
    asked.append(Question("tiny", text, "", o.shape, (o.box,), "tiny shape", size))
    if page.number:
        text = rng.choice(("what number is written?", "read the tiny number.", "what is the tiny number?"))
        boxes = tuple(box for _, box in view.glyphs)
        asked.append(Question("tiny", text, "", page.number[0], boxes, "tiny number", size))
    return Album((view,), seed), asked


def shrunk(album: Album, factor: float) -> Album:
    """The album with its pictures resized (antialiased) to `factor` times their sides, boxes with them.

    What an encoder of fixed, smaller size would be given. Raises ValueError unless 0 < factor <= 1.
    """
    if not 0 < factor <= 1:
        raise ValueError(f"factor is {factor}; choose one above 0 and at most 1")
    return replace(album, views=tuple(_shrunk(view, factor) for view in album.views))


def _shrunk(view: View, factor: float) -> View:
    width, height = (max(1, round(side * factor)) for side in view.size)
    across, down = width / view.size[0], height / view.size[1]

    def scaled(box: Box) -> Box:
        return box[0] * across, box[1] * down, box[2] * across, box[3] * down

    image = view.image.resize((width, height), Image.Resampling.LANCZOS)
    objects = tuple(replace(o, box=scaled(o.box)) for o in view.objects)
    return View(image, objects, tuple((character, scaled(box)) for character, box in view.glyphs))


def _content(page: _Page) -> str:
    return content_key((page.target, *page.others), page.number[0] if page.number else "") + "|" + page.target.name


def _lay_out(rng: random.Random, level: Level) -> _Page | None:
    """The target, one of its colour, one of its shape and more; None if the room ran out."""
    width, height = rng.randint(*level.size), rng.randint(*level.size)
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    pairs = [(colour, other(rng, SHAPES, shape)), (other(rng, COLOURS, colour), shape)]
    wanted = rng.randint(*level.others)
    while len(pairs) < wanted:
        extra = (pick(rng, COLOURS), pick(rng, SHAPES))
        if extra != (colour, shape):
            pairs.append(extra)
    taken: list[Box] = []
    placed = []
    for side, (c, s) in [(rng.randint(*MEDIUM), pair) for pair in pairs] + [(rng.randint(*level.side), (colour, shape))]:
        box = free_box(rng, side, width, height, taken)
        if box is None:
            return None
        taken.append(box)
        placed.append(thing(c, s, box, width, height))
    number = None
    if rng.random() < 0.6:
        number = _number(rng, level, width, height, taken)
        if number is None:
            return None
    return _Page(width, height, placed[-1], tuple(placed[:-1]), number)


def _number(rng: random.Random, level: Level, width: int, height: int, taken: list[Box]) -> Print | None:
    """A printed number of two digits somewhere free."""
    text, size = str(rng.randint(10, 99)), rng.randint(*level.font)
    x0, y0, x1, y1 = text_extents(text, size)
    for _ in range(30):
        left, top = rng.randint(2, int(width - 2 - (x1 - x0))), rng.randint(2, int(height - 2 - (y1 - y0)))
        line, box = print_at(text, size, left, top)
        if clear(box, taken):
            return line
    return None
