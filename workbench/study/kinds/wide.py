"""Strips ten times as long as they are wide, lying or standing, with things in a row: what is next, last, third."""

from __future__ import annotations

import random
from dataclasses import dataclass

from ..drawing import paper
from ..families import Question, hundredths, numbered
from ..scenes import COLOURS, SHAPES, Obj, has_distractors, is_unique
from ..views import Album
from .place import in_split, level_of, other, pick, show, thing, tint

LEAST_GAP = 6  # pixels along the strip
ORDINALS = ("first", "second", "third", "fourth")
ENDS = {True: ("left", "right"), False: ("top", "bottom")}  # by whether the strip lies


@dataclass(frozen=True)
class Level:
    """How hard it is; pairs are inclusive ranges, `short` and `side` in pixels, the strip is `ratio` times as long."""

    ratio: int = 10
    short: tuple[int, int] = (56, 84)
    things: tuple[int, int] = (3, 7)
    side: tuple[int, int] = (20, 46)


LEVELS = {
    "first": Level(ratio=4, things=(3, 3), side=(28, 46)),
    "second": Level(ratio=6, things=(3, 4), side=(24, 46)),
    "third": Level(ratio=8, things=(3, 6)),
    "full": Level(),
}


@dataclass(frozen=True)
class _Strip:
    width: int
    height: int
    row: tuple[Obj, ...]  # from left to right or from top to bottom

    @property
    def lies(self) -> bool:
        return self.width > self.height


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """One strip and four or five questions; the same arguments always give the same.

    Raises ValueError for an unknown split or level.
    """
    limits = level_of(LEVELS, level, split)
    rng = random.Random(f"wide/{seed}/{split}/{level}")
    strip = in_split(split, lambda: _lay_out(rng, limits), _content)
    view = show(paper(strip.width, strip.height, rng), [(o, tint(rng, o.colour)) for o in strip.row])
    return Album((view,), seed), [*_next_to(rng, strip, 2), *_at_end(rng, strip, 1), *_in_order(rng, strip, 2)]


def _content(strip: _Strip) -> str:
    """Names in their order; where exactly they stand does not make another content."""
    return f"{'lying' if strip.lies else 'standing'} " + ";".join(o.name for o in strip.row)


def _lay_out(rng: random.Random, level: Level) -> _Strip | None:
    """A row with one thing that is unique and shares its colour and its shape; None if it came out too long."""
    short = rng.randint(*level.short)
    length, lies = level.ratio * short, rng.random() < 0.5
    colour, shape = pick(rng, COLOURS), pick(rng, SHAPES)
    pairs = [(colour, shape), (colour, other(rng, SHAPES, shape)), (other(rng, COLOURS, colour), shape)]
    wanted = rng.randint(*level.things)
    while len(pairs) < wanted:
        c, s = pick(rng, COLOURS), pick(rng, SHAPES)
        c, s = pick(rng, ((colour, s), (c, shape), (c, s)))
        if (c, s) != (colour, shape):
            pairs.append((c, s))
    rng.shuffle(pairs)
    sides = [rng.randint(level.side[0], min(level.side[1], short - 8)) for _ in pairs]
    spare = length - sum(sides) - LEAST_GAP * (len(pairs) + 1)
    if spare < 0:
        return None
    cuts = sorted(int(rng.random() * (spare + 1)) for _ in pairs)
    width, height = (length, short) if lies else (short, length)
    row, start = [], 0
    for k, ((c, s), side) in enumerate(zip(pairs, sides, strict=True)):
        along = start + LEAST_GAP * (k + 1) + cuts[k]
        across = 2 + int(rng.random() * (2 * (short - side) - 7)) / 2
        x, y = (float(along), across) if lies else (across, float(along))
        row.append(thing(c, s, (x, y, x + side, y + side), width, height))
        start += side
    return _Strip(width, height, tuple(row))


# ---- questions


def _next_to(rng: random.Random, strip: _Strip, n: int) -> list[Question]:
    """The neighbour on one side of a thing that only colour and shape together single out; rarely there is none."""
    cases = []
    for k, o in enumerate(strip.row):
        if is_unique(o, strip.row) and has_distractors(o, strip.row):
            cases += [(k, -1), (k, 1)]
    asked = []
    while cases and len(asked) < n:
        k, way = pick(rng, cases)
        cases.remove((k, way))
        there = 0 <= k + way < len(strip.row)
        if not there and rng.random() < 0.6:
            continue
        names = {(True, -1): "left of", (True, 1): "right of", (False, -1): "above", (False, 1): "below"}
        text = rng.choice(("what is {} the {}?", "which thing is {} the {}?", "what is just {} the {}?"))
        text = text.format(names[strip.lies, way], strip.row[k].name)
        answer = strip.row[k + way].name if there else "nothing"
        targets = (strip.row[k + way], strip.row[k]) if there else (strip.row[k],)
        upto = min(max(k, k + way), len(strip.row) - 1)
        thought = _row(strip, upto, k + way) if there else f"{_row(strip, upto)}, so nothing"
        asked.append(_question(strip, text, thought, answer, targets, "next"))
    return asked


def _at_end(rng: random.Random, strip: _Strip, n: int) -> list[Question]:
    asked = []
    for at in rng.sample((0, -1), n):
        text = rng.choice(("what is at the {} end?", "name the thing at the {} end.", "which thing is at the {} end?"))
        o = strip.row[at]
        asked.append(_question(strip, text.format(ENDS[strip.lies][at]), "", o.name, (o,), "end"))
    return asked


def _in_order(rng: random.Random, strip: _Strip, n: int) -> list[Question]:
    """The second, third or fourth thing from one end; the thought numbers the things up to it, or all."""
    asked = []
    cases = [(end, k) for end in (0, 1) for k in range(1, min(4, len(strip.row)))]
    for end, k in rng.sample(cases, n):
        text = rng.choice(("what is {} from the {}?", "which thing is {} from the {}?", "name the {} thing from the {}."))
        at = len(strip.row) - 1 - k if end else k
        o, upto = strip.row[at], len(strip.row) - 1 if end else k
        text = text.format(ORDINALS[k], ENDS[strip.lies][end])
        asked.append(_question(strip, text, _row(strip, upto, at), o.name, (o,), "order"))
    return asked


def _row(strip: _Strip, upto: int, chosen: int | None = None) -> str:
    """ "1 red star 08, 2 blue star 31, so 1 red star": the things up to one place, how far along the strip each stands in
    hundredths of its length, and the chosen one.
    """
    axis, length = (0, strip.width) if strip.lies else (1, strip.height)
    row = numbered(f"{o.name} {hundredths(o.centre[axis], length)}" for o in strip.row[: upto + 1])
    return row if chosen is None else f"{row}, so {chosen + 1} {strip.row[chosen].name}"


def _question(strip: _Strip, text: str, thought: str, answer: str, targets: tuple[Obj, ...], about: str) -> Question:
    boxes = tuple(o.box for o in targets)
    return Question("wide", text, thought, answer, boxes, f"wide {about}", (strip.width, strip.height))
