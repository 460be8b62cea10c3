"""Synthetic pictures of which everything is known: objects, colours, places, a printed number.

A scene is laid out first, with plain arithmetic, and drawn only once its content falls in the asked split.
Train, choose and report scenes therefore never share a content, whatever their seeds. A picture follows from
(seed, split, level, kind) alone.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from .drawing import advance, blend, glyph_ink, grain, paper, shape_ink
from .views import View, union

PALETTE = {
    "red": (208, 36, 48),
    "blue": (38, 92, 212),
    "green": (40, 158, 70),
    "yellow": (247, 208, 40),
    "purple": (144, 62, 192),
    "orange": (243, 126, 24),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "star", "cross")
ZONES = (
    "top left", "top middle", "top right",
    "middle left", "centre", "middle right",
    "bottom left", "bottom middle", "bottom right",
)  # fmt: skip
KINDS = ("any", "objects", "distractors", "count", "read", "large")
SPLITS = ("train", "choose", "report")
GLYPHS = {character: at for at, character in enumerate("0123456789abcdefghijklmnopqrstuvwxyz")}  # case is not told apart
NO_OBJECT, NO_GLYPH, UNSURE = len(COLOURS) * len(SHAPES), len(GLYPHS), -100

LARGE = (225, 504)  # pixels a side of the kind "large": up to those of `tiny`, which asks other questions
GAP = 4  # free pixels between two things
ZONE_MARGIN = 3.0  # a centre stays this many pixels off the lines between zones, so no place is a coin toss


@dataclass(frozen=True)
class Level:
    """How hard scenes are; every pair is an inclusive range. Sizes are pixels, chances 0..1."""

    name: str
    size: tuple[int, int] = (84, 224)
    objects: tuple[int, int] = (1, 8)
    side: tuple[int, int] = (20, 46)
    digits: tuple[int, int] = (1, 6)
    font: tuple[int, int] = (14, 34)
    number_chance: float = 0.15
    distractor_chance: float = 0.8
    duplicate_chance: float = 0.5


LEVELS = {
    level.name: level
    for level in (
        Level("first", size=(84, 112), objects=(1, 2), side=(24, 46), digits=(1, 2), font=(24, 34)),
        Level("second", size=(84, 140), objects=(1, 4), side=(22, 46), digits=(1, 3), font=(20, 34)),
        Level("third", size=(84, 168), objects=(1, 6), side=(20, 46), digits=(1, 4), font=(16, 34)),
        Level("full"),
    )
}


@dataclass(frozen=True)
class Obj:
    """One drawn shape; `box` = (x0, y0, x1, y1) are its exact extents in picture pixels."""

    colour: str
    shape: str
    box: tuple[float, float, float, float]
    zone: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        x0, y0, x1, y1 = self.box
        return (x0 + x1) / 2, (y0 + y1) / 2


@dataclass(frozen=True)
class Scene:
    """A picture and its ground truth. Objects come in reading order: by zone, then from left to right."""

    image: Image.Image
    objects: tuple[Obj, ...]
    number: str
    digit_boxes: tuple[tuple[float, float, float, float], ...]
    seed: int

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size

    @property
    def images(self) -> list[Image.Image]:
        return [self.image]

    @property
    def glyphs(self) -> tuple[tuple[str, tuple[float, float, float, float]], ...]:
        """The digits with their boxes."""
        return tuple(zip(self.number, self.digit_boxes, strict=True))

    @property
    def views(self) -> tuple[Scene, ...]:
        """A scene is the only picture of its conversation."""
        return (self,)


@dataclass(frozen=True)
class _Glyph:
    """A digit printed at some pen position: where its ink goes, in whole pixels."""

    digit: str
    font_size: int
    x: int
    y: int


@dataclass(frozen=True)
class _Layout:
    width: int
    height: int
    objects: tuple[Obj, ...]
    glyphs: tuple[_Glyph, ...]


def zone_of(x: float, y: float, width: int, height: int) -> str:
    """Name of the part of a 3x3 grid that holds the point (x, y) of a width x height picture."""
    column, row = min(2, int(3 * x / width)), min(2, int(3 * y / height))
    return ZONES[3 * row + column]


def content_key(objects: tuple[Obj, ...], number: str) -> str:
    """What a scene shows, without sizes and exact positions: the text whose hash decides the split."""
    return ";".join(sorted(f"{o.colour} {o.shape} {o.zone}" for o in objects)) + "|" + number


def split_of(objects: tuple[Obj, ...], number: str) -> str:
    """The split this content belongs to, wherever and however often it is drawn."""
    return split_of_content(content_key(objects, number))


def split_of_content(content: str) -> str:
    """The split of anything that can be shown, told in words: 1 in 16 report, 1 in 16 choose, the rest train."""
    bucket = hashlib.sha256(content.encode()).digest()[0] % 16
    return {0: "report", 1: "choose"}.get(bucket, "train")


def clear_of_zone_lines(x: float, y: float, width: int, height: int) -> bool:
    """True if the point is well off the lines between the nine zones, so that its zone is no coin toss."""
    across = min(abs(x - width / 3), abs(x - 2 * width / 3))
    return min(across, abs(y - height / 3), abs(y - 2 * height / 3)) >= ZONE_MARGIN


def in_reading_order(objects: Iterable[Obj]) -> tuple[Obj, ...]:
    """By zone, then from left to right."""
    return tuple(sorted(objects, key=lambda o: (ZONES.index(o.zone), o.centre)))


def has_distractors(target: Obj, objects: tuple[Obj, ...]) -> bool:
    """True if neither colour nor shape alone tells the target from the other objects."""
    same_colour = any(o.colour == target.colour and o.shape != target.shape for o in objects)
    same_shape = any(o.shape == target.shape and o.colour != target.colour for o in objects)
    return same_colour and same_shape


def is_unique(target: Obj, objects: tuple[Obj, ...]) -> bool:
    """True if no second object has the target's colour and shape."""
    return sum(o.name == target.name for o in objects) == 1


def scene(seed: int, split: str = "train", level: Level | str = "full", kind: str = "any") -> Scene:
    """The scene of this seed, split, level and kind; the same arguments always give the same picture.

    Kinds: "objects" (shapes), "distractors" (some unique object shares its colour with one other and its
    shape with another), "count" (0 to 5 objects alike), "read" (always a number), "any" (a mixture of these), "large" (the
    same mixture on LARGE pictures, at every level).
    A level that allows fewer than three objects cannot hold distractors and gives plain objects instead.
    """
    if isinstance(level, str):
        if level not in LEVELS:
            raise ValueError(f"level is {level!r}; choose one of {', '.join(LEVELS)} or pass a Level")
        level = LEVELS[level]
    if split not in SPLITS:
        raise ValueError(f"split is {split!r}; choose one of {', '.join(SPLITS)}")
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; choose one of {', '.join(KINDS)}")
    rng = random.Random(f"{seed}/{split}/{level.name}/{kind}")
    if kind == "large":
        level = replace(level, size=LARGE)
    if kind in ("any", "large"):
        kind = rng.choices(("objects", "distractors", "count", "read"), (25, 30, 20, 25))[0]
    if kind == "distractors" and level.objects[1] < 3:
        kind = "objects"
    for _ in range(20_000):
        layout = _lay_out(rng, level, kind)
        if layout is None:
            continue
        number = "".join(g.digit for g in layout.glyphs)
        if split_of(layout.objects, number) == split:
            break
    else:
        raise ValueError(
            f"level {level.name!r} leaves no {kind!r} scene for split {split!r}; allow more objects or digits"
        )
    boxes = tuple(_glyph_box(g) for g in layout.glyphs)
    return Scene(Image.fromarray(_draw(layout, rng)), layout.objects, number, boxes, seed)


# ---- layout: what goes where


def _lay_out(rng: random.Random, level: Level, kind: str) -> _Layout | None:
    """One random arrangement, or None when it came out unfit for its kind."""
    width, height = rng.randint(*level.size), rng.randint(*level.size)
    taken: list[tuple[float, float, float, float]] = []
    glyphs: tuple[_Glyph, ...] = ()
    if kind == "read" or rng.random() < level.number_chance:
        glyphs = _place_number(rng, level, width, height)
        taken.append(union([_glyph_box(g) for g in glyphs]))
    free = width * height - sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in taken)
    room = max(1, int(0.42 * free / (level.side[0] + GAP) ** 2))
    wanted = _choose_objects(rng, level, kind, min(level.objects[1], room))
    side_limit = int(0.62 * (free / (len(wanted) + 1)) ** 0.5)
    largest = min(level.side[1], max(level.side[0], side_limit))
    objects = []
    for colour, shape in wanted:
        box = _free_box(rng, rng.randint(level.side[0], largest), width, height, taken)
        if box is None:
            continue  # crowded: the scene has one object fewer
        taken.append(box)
        zone = zone_of((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, width, height)
        objects.append(Obj(colour, shape, box, zone))
    objects = in_reading_order(objects)
    hard = any(is_unique(o, objects) and has_distractors(o, objects) for o in objects)
    if (kind == "distractors" and not hard) or not (objects or glyphs):
        return None
    return _Layout(width, height, objects, glyphs)


def _choose_objects(rng: random.Random, level: Level, kind: str, most: int) -> list[tuple[str, str]]:
    """Colour and shape of at most `most` objects, those that matter first (late ones may find no room)."""
    colour, shape = rng.choice(COLOURS), rng.choice(SHAPES)
    if kind == "count":
        return _choose_alike(rng, colour, shape, most)
    if kind == "read":
        return [_any_object(rng) for _ in range(rng.randint(0, min(3, most)))]
    n = rng.randint(min(level.objects[0], most), most)
    if kind == "distractors":
        n = max(3, n)
    chosen = [(colour, shape)]
    if n >= 3 and (kind == "distractors" or rng.random() < level.distractor_chance):
        chosen += [(colour, _other(rng, SHAPES, shape)), (_other(rng, COLOURS, colour), shape)]
    if len(chosen) < n and rng.random() < level.duplicate_chance:
        twin = rng.choice(chosen[1:] if kind == "distractors" else chosen)  # the target itself stays unique
        chosen += [twin] * min(rng.randint(1, 3), n - len(chosen))
    while len(chosen) < n:
        extra = _any_object(rng)
        if kind != "distractors" or extra != chosen[0]:
            chosen.append(extra)
    return chosen


def _choose_alike(rng: random.Random, colour: str, shape: str, most: int) -> list[tuple[str, str]]:
    """0 to 5 objects that share colour, shape or both, among others that are near misses."""
    k = min(most, rng.randint(0, 5))
    by = rng.choice(("both", "colour", "shape"))
    alike = {"both": (colour, shape), "colour": (colour, None), "shape": (None, shape)}[by]
    chosen = [(alike[0] or rng.choice(COLOURS), alike[1] or rng.choice(SHAPES)) for _ in range(k)]
    for _ in range(rng.randint(0 if k else 1, max(1, most - k)) if most > k else 0):
        c, s = rng.choice(((colour, rng.choice(SHAPES)), (rng.choice(COLOURS), shape), _any_object(rng)))
        if alike[0] in (c, None) and alike[1] in (s, None):  # would raise the count: change what is shared
            c, s = (c, _other(rng, SHAPES, s)) if by == "shape" else (_other(rng, COLOURS, c), s)
        chosen.append((c, s))
    return chosen


def _below(rng: random.Random, n: int) -> int:
    """A whole number in 0..n-1; much faster than randrange, and this is the inner loop."""
    return int(rng.random() * n)


def _any_object(rng: random.Random) -> tuple[str, str]:
    return COLOURS[_below(rng, len(COLOURS))], SHAPES[_below(rng, len(SHAPES))]


def _other(rng: random.Random, values: tuple[str, ...], than: str) -> str:
    return rng.choice([v for v in values if v != than])


def _free_box(rng, side: int, width: int, height: int, taken) -> tuple[float, float, float, float] | None:
    """A side x side box at half-pixel positions, clear of `taken` and of the lines between zones."""
    half = side / 2
    for _ in range(30):
        x0 = 2 + _below(rng, 2 * (width - side) - 7) / 2
        y0 = 2 + _below(rng, 2 * (height - side) - 7) / 2
        x1, y1, cx, cy = x0 + side, y0 + side, x0 + half, y0 + half
        if min(abs(cx - width / 3), abs(cx - 2 * width / 3)) < ZONE_MARGIN:
            continue
        if min(abs(cy - height / 3), abs(cy - 2 * height / 3)) < ZONE_MARGIN:
            continue
        if all(x1 + GAP <= a or c + GAP <= x0 or y1 + GAP <= b or d + GAP <= y0 for a, b, c, d in taken):
            return x0, y0, x1, y1
    return None


def _place_number(rng: random.Random, level: Level, width: int, height: int) -> tuple[_Glyph, ...]:
    """A number without leading zero, anywhere in the picture, in a size that fits its width."""
    length = rng.randint(*level.digits)
    text = str(rng.randint(10 ** (length - 1) if length > 1 else 0, 10**length - 1))
    font_size, spacing = rng.randint(*level.font), rng.randint(1, 2)
    while font_size > 8 and sum(advance(d, font_size) + spacing for d in text) > width - 8:
        font_size -= 1
    pen, glyphs = 0, []
    for digit in text:
        glyphs.append(_Glyph(digit, font_size, pen, 0))
        pen += advance(digit, font_size) + spacing
    x0, y0, x1, y1 = union([_glyph_box(g) for g in glyphs])
    dx = rng.randint(2, int(width - 2 - (x1 - x0))) - int(x0)
    dy = rng.randint(2, int(height - 2 - (y1 - y0))) - int(y0)
    return tuple(_Glyph(g.digit, g.font_size, g.x + dx, g.y + dy) for g in glyphs)


# ---- drawing


def _glyph_box(glyph: _Glyph) -> tuple[float, float, float, float]:
    ink, dx, dy = glyph_ink(glyph.digit, glyph.font_size)
    x, y = glyph.x + dx, glyph.y + dy
    return float(x), float(y), float(x + ink.shape[1] // 3), float(y + ink.shape[0])


def _draw(layout: _Layout, rng: random.Random) -> np.ndarray:
    """The picture as uint8 (height, width, 3)."""
    height, width = layout.height, layout.width
    if max(width, height) > 512:
        canvas = paper(width, height, rng)
    else:  # as `paper`, and faster: this is the inner loop of training
        top, left = _below(rng, 512 - height), 3 * _below(rng, 512 - width)
        tint = [232 + _below(rng, 18) for _ in range(3)]
        canvas = grain()[top : top + height, left : left + 3 * width] + np.array(tint * width, dtype=np.uint8)
    for o in layout.objects:
        x0, y0, x1, _ = o.box
        ink, shaded = shape_ink(o.shape, int(x1 - x0), int(2 * x0) % 2, int(2 * y0) % 2)
        colour = [min(255, max(0, c + _below(rng, 21) - 10)) for c in PALETTE[o.colour]]
        blend(canvas, int(x0), int(y0), ink, shaded, colour)
    dark = [15 + _below(rng, 45) for _ in range(3)]
    for g in layout.glyphs:
        ink, dx, dy = glyph_ink(g.digit, g.font_size)
        blend(canvas, g.x + dx, g.y + dy, ink, ink, dark)
    return canvas.reshape(height, width, 3)


# ---- dense labels, for teaching the eye alone


def token_labels(view: Scene | View, grid_h: int, grid_w: int, cell: int = 28) -> tuple[np.ndarray, np.ndarray]:
    """What each cell of the picture, padded right and below, shows: objects, printed characters; int64 (grid_h, grid_w).

    Objects are 5 * colour + shape, NO_OBJECT (30) where there is none; characters by GLYPHS, NO_GLYPH
    where there is none. A cell belongs to the thing that covers most of it. UNSURE (-100) marks cells where the cover is
    above zero but under a fifth of the smaller of cell and thing (so a small thing inside a large cell counts
    as seen), or where another class covers nearly as much. Objects count by their ink, characters by their box.
    """
    width, height = view.size
    if grid_h * cell < height or grid_w * cell < width:
        raise ValueError(
            f"a {grid_h} x {grid_w} grid of {cell}-px cells does not cover the {width} x {height} picture; "
            f"pass at least {-(-height // cell)} x {-(-width // cell)}"
        )
    objects, glyphs = [], []
    for o in view.objects:
        x0, y0, x1, _ = o.box
        ink, _ = shape_ink(o.shape, int(x1 - x0), int(2 * x0) % 2, int(2 * y0) % 2)
        label = len(SHAPES) * COLOURS.index(o.colour) + SHAPES.index(o.shape)
        objects.append((label, int(x0), int(y0), ink[:, ::3]))
    for character, (x0, y0, x1, y1) in view.glyphs:
        label, box = GLYPHS.get(character.lower(), UNSURE), np.ones((int(y1 - y0), int(x1 - x0)), np.float32)
        glyphs.append((label, int(x0), int(y0), box))
    object_labels = _cell_labels(objects, grid_h, grid_w, cell, NO_OBJECT)
    return object_labels, _cell_labels(glyphs, grid_h, grid_w, cell, NO_GLYPH)


def patch_labels(view: Scene | View, grid_h: int, grid_w: int) -> tuple[np.ndarray, np.ndarray]:
    """`token_labels` for the 14-px patches."""
    return token_labels(view, grid_h, grid_w, cell=14)


def _cell_labels(things, grid_h: int, grid_w: int, cell: int, none: int) -> np.ndarray:
    labels = np.full((grid_h, grid_w), none, dtype=np.int64)
    best = np.zeros((grid_h, grid_w), dtype=np.float32)
    for label, x, y, ink in things:
        starts_y = [0, *range(cell - y % cell, ink.shape[0], cell)]
        starts_x = [0, *range(cell - x % cell, ink.shape[1], cell)]
        cover = np.add.reduceat(np.add.reduceat(ink, starts_y, axis=0), starts_x, axis=1)
        window = np.s_[y // cell : y // cell + len(starts_y), x // cell : x // cell + len(starts_x)]
        held, before = labels[window], best[window]
        new = np.where(cover >= 0.2 * min(cell * cell, float(cover.sum())), label, UNSURE)
        rival = (np.minimum(cover, before) > 0.8 * np.maximum(cover, before)) & (held != label)
        labels[window] = np.where(rival, UNSURE, np.where(cover > before, new, held))
        best[window] = np.maximum(cover, before)
    return labels
