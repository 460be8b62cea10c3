"""A window with labelled buttons, to be clicked: stands for the report's screens (ScreenSpot)."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..drawing import paper, print_text, text_extents
from ..families import Question
from ..scenes import PALETTE, clear_of_zone_lines, split_of_content, zone_of
from ..views import Album, Box, Glyph, View
from .written import dark_ink, fill, fill_round, start, varied

LABELS = (
    "back cancel close copy cut edit find help new next no ok open play print save send stop undo yes"
).split()  # fmt: skip
TITLES = "files mail music notes photos maps".split()
FILLS = {**PALETTE, "grey": (176, 179, 184)}
LIGHT = ("yellow", "orange", "grey")  # these carry dark print, the others white

# sides of the picture in pixels, sizes of print, number of buttons
_LEVELS = {
    "first": ((140, 168), (15, 20), (3, 3)),
    "second": ((140, 196), (14, 20), (3, 4)),
    "third": ((140, 224), (13, 20), (3, 5)),
    "full": ((140, 280), (12, 20), (3, 6)),
}


@dataclass(frozen=True)
class Button:
    """One button; `box` = (x0, y0, x1, y1) in picture pixels, `zone` the part of the picture that holds its centre."""

    label: str
    colour: str
    box: Box
    zone: str

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class _Plan:
    """The window in whole pixels: its frame, how high its title and its buttons are, and the buttons."""

    width: int
    height: int
    frame: tuple[int, int, int, int]
    title: int
    font: int
    radius: int
    buttons: tuple[Button, ...]


def window_key(faces: list[tuple[str, str]]) -> str:
    """What a window shows, places left out: the text whose hash decides the split. A face is (label, colour)."""
    return ";".join(sorted(f"{colour} {label}" for label, colour in faces))


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """A window of 3 to 6 buttons and a click for each that can be named.

    The same arguments always give the same. No two splits show the same buttons. Half of the windows have a label twice
    and ask only for buttons that neither label nor colour alone tells from the others; see `asked_buttons`.
    """
    rng = start("window", seed, split, level)
    plan = _plan_until(rng, split, level)
    canvas, glyphs = _draw(rng, plan)
    view = View(Image.fromarray(canvas.reshape(plan.height, plan.width, 3)), glyphs=tuple(glyphs))
    asked = [_question(rng, name, button, view.size) for name, button in asked_buttons(plan.buttons)]
    rng.shuffle(asked)
    return Album((view,), seed), asked


def buttons(seed: int, split: str = "train", level: str = "full") -> tuple[Button, ...]:
    """The buttons of the window that `draw` gives for the same arguments, in reading order."""
    return _plan_until(start("window", seed, split, level), split, level).buttons


def asked_buttons(shown: tuple[Button, ...]) -> list[tuple[str, Button]]:
    """The buttons that can be asked for, with the name that singles each out.

    All by their label where no label occurs twice. Else by colour and label, and only those that share their label with
    one button and their colour with another.
    """
    labels, colours = Counter(b.label for b in shown), Counter(b.colour for b in shown)
    if max(labels.values()) == 1:
        return [(b.label, b) for b in shown]
    return [(f"{b.colour} {b.label}", b) for b in shown if labels[b.label] > 1 and colours[b.colour] > 1]


def _plan_until(rng: random.Random, split: str, level: str) -> _Plan:
    sides, fonts, numbers = _LEVELS[level]
    while True:
        faces = _faces(rng, rng.randint(*numbers), rng.random() < 0.5)
        if split_of_content(window_key(faces)) != split:
            continue
        for _ in range(8):
            plan = _plan(rng, rng.randint(*sides), rng.randint(*sides), rng.randint(*fonts), faces)
            if plan is not None:
                return plan


def _faces(rng: random.Random, n: int, twice: bool) -> list[tuple[str, str]]:
    """Label and colour of n buttons; with `twice` some share both, crosswise, and no two have the same of each."""
    labels = rng.sample(LABELS, n)
    if not twice:
        return [(label, rng.choice(tuple(FILLS))) for label in labels]
    one, two = rng.sample(tuple(FILLS), 2)
    faces = [(labels[0], one), (labels[0], two), (labels[1], one)]
    if n > 3:
        faces.append((labels[1] if rng.random() < 0.5 else labels[2], two))
    while len(faces) < n:
        face = rng.choice(labels), rng.choice(tuple(FILLS))
        if face not in faces:
            faces.append(face)
    return faces


def _plan(rng: random.Random, width: int, height: int, font: int, faces: list[tuple[str, str]]) -> _Plan | None:
    """Buttons of one height in rows; None if they do not fit or if one lies on a line between zones."""
    rng.shuffle(faces)
    x0, y0, x1, y1 = (rng.randint(2, 8) for _ in range(4))
    frame, title = (x0, y0, width - x1, height - y1), rng.randint(17, 22)
    left, top, right, bottom = frame[0] + 5, frame[1] + title + 5, frame[2] - 5, frame[3] - 5
    padding, high = rng.randint(5, 10), _cap_height(font) + 2 * rng.randint(4, 7)
    rows: list[list[tuple[str, str, int]]] = [[] for _ in range(rng.randint(1, max(1, (bottom - top + 5) // (high + 5))))]
    for label, colour in faces:
        e0, _, e1, _ = text_extents(label.upper(), font, 1)
        wide = max(e1 - e0 + 2 * padding, 26)
        fitting = [row for row in rows if sum(w + 5 for *_, w in row) + wide <= right - left]
        if not fitting:
            return None
        rng.choice(fitting).append((label, colour, wide))
    placed = []
    for y, row in zip(_spread(rng, [high] * len(rows), top, bottom), rows, strict=True):
        for x, (label, colour, wide) in zip(_spread(rng, [w for *_, w in row], left, right), row, strict=True):
            centre = x + wide / 2, y + high / 2
            if not clear_of_zone_lines(*centre, width, height):
                return None
            box = (float(x), float(y), float(x + wide), float(y + high))
            placed.append(Button(label, colour, box, zone_of(*centre, width, height)))
    return _Plan(width, height, frame, title, font, rng.choice((0, 3, 6)), tuple(placed))


def _spread(rng: random.Random, lengths: list[int], start: int, end: int) -> list[int]:
    """Where things of these lengths begin, in order, at least 5 apart, with the room that is left cut at random."""
    slack = end - start - sum(lengths) - 5 * (len(lengths) - 1)
    cuts = sorted(rng.randint(0, slack) for _ in lengths)
    return [start + cut + sum(lengths[:k]) + 5 * k for k, cut in enumerate(cuts)]


def _cap_height(font: int) -> int:
    _, y0, _, y1 = text_extents("E", font, 1)
    return y1 - y0


def _draw(rng: random.Random, plan: _Plan) -> tuple[np.ndarray, list[Glyph]]:
    """The picture, uint8 (height, 3 * width), and its print: the title, then the labels in the buttons' order."""
    canvas = paper(plan.width, plan.height, rng)
    x0, y0, x1, y1 = plan.frame
    fill(canvas, x0, y0, x1, y1, [rng.randint(120, 140)] * 3)
    fill(canvas, x0 + 1, y0 + plan.title, x1 - 1, y1 - 1, [rng.randint(218, 230)] * 3)
    shade = rng.randint(60, 84)
    fill(canvas, x0 + 1, y0 + 1, x1 - 1, y0 + plan.title, [shade, shade + 8, shade + 18])
    square = plan.title - 11  # the sign that closes a window
    fill(canvas, x1 - 6 - square, y0 + 6, x1 - 6, y0 + 6 + square, [190, 190, 194])
    title = rng.choice(TITLES).upper()
    glyphs = _print_at(canvas, title, 12, x0 + 6, y0 + (plan.title - _cap_height(12)) // 2, [232, 232, 236])
    for button in plan.buttons:
        left, top, right, bottom = (int(v) for v in button.box)
        fill_round(canvas, left, top, right - left, bottom - top, plan.radius, varied(rng, FILLS[button.colour]))
        ink = dark_ink(rng) if button.colour in LIGHT else [250, 250, 250]
        e0, _, e1, _ = text_extents(button.label.upper(), plan.font, 1)
        x, y = (left + right - (e1 - e0)) // 2, (top + bottom - _cap_height(plan.font)) // 2
        glyphs += _print_at(canvas, button.label.upper(), plan.font, x, y, ink)
    return canvas, glyphs


def _print_at(canvas: np.ndarray, text: str, font: int, x: int, y: int, ink: list[int]) -> list[Glyph]:
    """Prints with the left of the ink at x and the top of the capitals at y."""
    return print_text(canvas, x - text_extents(text, font, 1)[0], y - text_extents("E", font, 1)[1], text, font, ink)


def _question(rng: random.Random, name: str, button: Button, size: tuple[int, int]) -> Question:
    words = ("click the {}.", "press the {} button.", "click the {} button.")
    if name == button.label:
        words = ("click {}.", "press {}.", "press the {} button.", "click the {} button.")
    text = rng.choice(words).format(name)
    (x, y), (width, height) = button.centre, size
    answer = f"click(x={x / width:.3f}, y={y / height:.3f})"
    return Question("point", text, f"{name} {button.zone}", answer, (button.box,), "point window", size)
