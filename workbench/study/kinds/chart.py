"""Bar charts: the largest and the smallest bar, the value of one, how much larger one is than another."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..drawing import paper, print_text, text_extents
from ..families import Question
from ..scenes import COLOURS, PALETTE, split_of_content
from ..views import Album, Box, Glyph, View
from .written import dark_ink, fill, start, varied


@dataclass(frozen=True)
class Bar:
    """One bar; its box stands on the axis and is `value` units high."""

    colour: str
    value: int
    box: Box

    @property
    def name(self) -> str:
        return f"{self.colour} {self.value}"


@dataclass(frozen=True)
class _Plan:
    """The axes in whole pixels: x of the upright one, y of the other, and where values lie above it."""

    width: int
    height: int
    left: int
    right: int
    base: int
    unit: int
    top: int  # the highest grid line
    font: int

    def y(self, value: int) -> int:
        return self.base - value * self.unit


# sides of the picture in pixels, number of bars, largest value
_LEVELS = {
    "first": ((112, 140), (2, 2), 5),
    "second": ((112, 168), (2, 3), 9),
    "third": ((112, 196), (2, 4), 9),
    "full": ((112, 224), (2, 5), 9),
}


def bar_key(colours: list[str], values: list[int]) -> str:
    """What a chart shows, from left to right: the text whose hash decides the split."""
    return ";".join(f"{colour} {value}" for colour, value in zip(colours, values, strict=True))


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """A chart of 2 to 5 bars with whole values 1 to 9, and up to six questions on it.

    The same arguments always give the same. No two splits show the same colours with the same values in the same
    order. An extreme is asked for only where one bar alone has it.
    """
    rng = start("chart", seed, split, level)
    sides, bars, largest = _LEVELS[level]
    while True:
        n = rng.randint(*bars)
        colours, values = rng.sample(COLOURS, n), [rng.randint(1, largest) for _ in range(n)]
        if split_of_content(bar_key(colours, values)) == split:
            break
    plan = _plan(rng, rng.randint(*sides), rng.randint(*sides), max(values))
    drawn = _bars(rng, plan, colours, values)
    canvas, glyphs = _draw(rng, plan, drawn)
    view = View(Image.fromarray(canvas.reshape(plan.height, plan.width, 3)), glyphs=tuple(glyphs))
    return Album((view,), seed), _questions(rng, drawn, view.size)


def _plan(rng: random.Random, width: int, height: int, highest: int) -> _Plan:
    top = rng.randint(highest, 9)
    font = rng.randint(10, 14)
    left = rng.randint(3, 10) + text_extents("8", font, 1)[2] + 4
    right = width - rng.randint(3, 14)
    above, below = rng.randint(8, 16), rng.randint(4, 14)
    room = height - above - below
    unit = max(room // 9, min(room // top, rng.randint(10, 40)))
    base = height - below - rng.randint(0, room - unit * top)
    return _Plan(width, height, left, right, base, unit, top, font)


def _bars(rng: random.Random, plan: _Plan, colours: list[str], values: list[int]) -> list[Bar]:
    """Bars of one width, each in the middle of its share of the axis."""
    slot = (plan.right - plan.left - 2) / len(values)
    wide = max(6, int(slot * rng.uniform(0.4, 0.85)))
    bars = []
    for k, (colour, value) in enumerate(zip(colours, values, strict=True)):
        x = plan.left + 2 + int(k * slot + (slot - wide) / 2)
        bars.append(Bar(colour, value, (float(x), float(plan.y(value)), float(x + wide), float(plan.base))))
    return bars


def _draw(rng: random.Random, plan: _Plan, bars: list[Bar]) -> tuple[np.ndarray, list[Glyph]]:
    """The picture, uint8 (height, 3 * width), and the printed labels of the grid lines from the bottom up."""
    canvas = paper(plan.width, plan.height, rng)
    ink, glyphs = dark_ink(rng), []
    for value in range(1, plan.top + 1):
        shade = rng.randint(140, 160) if value == 5 else rng.randint(196, 210)  # the fifth line helps to count
        fill(canvas, plan.left, plan.y(value), plan.right, plan.y(value) + 1, [shade] * 3)
    _, above, _, below = text_extents("8", plan.font, 1)
    every = 1 if plan.unit >= below - above + 2 else 5
    for value in range(every, plan.top + 1, every):
        right = text_extents(str(value), plan.font, 1)[2]
        y = plan.y(value) - (above + below) // 2
        glyphs += print_text(canvas, plan.left - 4 - right, y, str(value), plan.font, ink)
    for bar in bars:
        x0, y0, x1, y1 = (int(v) for v in bar.box)
        colour = varied(rng, PALETTE[bar.colour])
        fill(canvas, x0, y0, x1, y1, [int(0.75 * channel) for channel in colour])
        fill(canvas, x0 + 1, y0 + 1, x1 - 1, y1, colour)
    fill(canvas, plan.left - 1, max(0, plan.y(plan.top) - 4), plan.left, plan.base + 1, ink)
    fill(canvas, plan.left - 1, plan.base, plan.right, plan.base + 1, ink)
    return canvas, glyphs


def _questions(rng: random.Random, bars: list[Bar], size: tuple[int, int]) -> list[Question]:
    asked, values = [], [bar.value for bar in bars]
    for word, value in (("largest", max(values)), ("smallest", min(values))):
        if values.count(value) == 1:
            bar = bars[values.index(value)]
            text = rng.choice(("which bar is {}?", "which bar is the {}?", "what colour is the {} bar?")).format(word)
            thought = f"{', '.join(b.name for b in bars)}, so {bar.colour}"
            asked.append(Question("chart", text, thought, bar.colour, (bar.box,), f"chart {word}", size))
    for bar in rng.sample(bars, 2):
        words = ("what is the value of the {} bar?", "which value has the {} bar?", "read the value of the {} bar.")
        text = rng.choice(words).format(bar.colour)
        asked.append(Question("chart", text, "", str(bar.value), (bar.box,), "chart value", size))
    pairs = [(a, b) for a in bars for b in bars if a.value > b.value]
    for a, b in rng.sample(pairs, min(2, len(pairs))):
        words = ("how much larger is the {} bar than the {} bar?", "what is the {} bar minus the {} bar?")
        text, answer = rng.choice(words).format(a.colour, b.colour), str(a.value - b.value)
        thought = f"{a.name}, {b.name}, {a.value}-{b.value}={answer}"
        asked.append(Question("chart", text, thought, answer, (a.box, b.box), "chart difference", size))
    rng.shuffle(asked)
    return asked
