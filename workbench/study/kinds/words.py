"""A printed word to read, letter by letter, with a few coloured shapes beside it."""

from __future__ import annotations

import random

from PIL import Image

from ..drawing import blend, paper, print_text, shape_ink, text_extents
from ..families import Question
from ..scenes import COLOURS, GAP, PALETTE, SHAPES, Obj, in_reading_order, split_of_content, zone_of
from ..views import Album, Box, View
from .written import dark_ink, free_box, start, varied

COMMON = (
    "air apple ball bell bird blue boat book bread cake car cat chair clock cloud corn cup dog door ear egg eye farm "
    "fish five fox frog game garden glass gold green hand hat home house ice jam key king lake lamp leaf lion map milk "
    "moon night nose ocean orange paper park pen queen quiz rain river road salt sea ship sky snow star stone sun table "
    "tree water wind wood yard year zebra zoo"
).split()  # fmt: skip
VOWELS, CONSONANTS = "aeiouy", "bcdfghjklmnpqrstvwxz"

# sides of the picture in pixels, sizes of print, letters, most coloured shapes
_LEVELS = {
    "first": ((84, 140), (24, 34), (3, 4), 0),
    "second": ((84, 168), (20, 34), (3, 5), 1),
    "third": ((84, 196), (16, 34), (3, 6), 2),
    "full": ((84, 224), (14, 34), (3, 6), 3),
}


def a_word(rng: random.Random, shortest: int, longest: int) -> str:
    """A third common words; else made-up ones in which vowels and consonants take turns, so that no letter is rare."""
    if rng.random() < 0.33:
        return rng.choice([word for word in COMMON if shortest <= len(word) <= longest])
    n, vowel = rng.randint(shortest, longest), rng.randint(0, 1)
    return "".join(rng.choice(VOWELS if (k + vowel) % 2 else CONSONANTS) for k in range(n))


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """A word in capitals; the questions ask for it, first of all, and for one of its letters. Answers are lower case.

    The same arguments always give the same. No word occurs in two splits, so held-out words must be read, not known.
    """
    rng = start("words", seed, split, level)
    sides, fonts, letters, most = _LEVELS[level]
    while True:
        word = a_word(rng, *letters)
        if split_of_content(word) == split:
            break
    width, height = rng.randint(*sides), rng.randint(*sides)
    size, spacing, printed = rng.randint(*fonts), rng.randint(1, 2), word.upper()
    x0, y0, x1, y1 = text_extents(printed, size, spacing)
    while x1 - x0 > width - 6:
        size -= 1
        x0, y0, x1, y1 = text_extents(printed, size, spacing)
    x, y = rng.randint(3 - x0, width - 3 - x1), rng.randint(3 - y0, height - 3 - y1)
    canvas = paper(width, height, rng)
    word_box = (float(x + x0), float(y + y0), float(x + x1), float(y + y1))
    objects = _objects(rng, rng.randint(0, most), width, height, word_box)
    for o in objects:
        left, top, right, _ = (int(v) for v in o.box)
        blend(canvas, left, top, *shape_ink(o.shape, right - left, 0, 0), varied(rng, PALETTE[o.colour]))
    glyphs = tuple(print_text(canvas, x, y, printed, size, dark_ink(rng), spacing))
    view = View(Image.fromarray(canvas.reshape(height, width, 3)), objects, glyphs)
    return Album((view,), seed), _questions(rng, word, tuple(box for _, box in glyphs), view.size)


def _objects(rng: random.Random, n: int, width: int, height: int, word: Box) -> tuple[Obj, ...]:
    """Up to n shapes (fewer where there is no room) in reading order."""
    taken, objects = [word], []
    largest = min(40, min(width, height) // 2 - GAP)
    for _ in range(n):
        box = free_box(rng, rng.randint(20, largest), width, height, taken)
        if box is not None:
            taken.append(box)
            zone = zone_of((box[0] + box[2]) / 2, (box[1] + box[3]) / 2, width, height)
            objects.append(Obj(rng.choice(COLOURS), rng.choice(SHAPES), box, zone))
    return in_reading_order(objects)


def _questions(rng: random.Random, word: str, boxes: tuple[Box, ...], size: tuple[int, int]) -> list[Question]:
    text = rng.choice(("what word is written?", "read the word.", "which word is written?"))
    asked = [Question("read", text, " ".join(word), word, boxes, "read word", size)]
    for place, at in (("first", 0), ("last", -1)):
        text = rng.choice(("what is the {} letter?", "read the {} letter.", "which letter is {}?")).format(place)
        asked.append(Question("read", text, "", word[at], (boxes[at],), "read letter", size))
    return asked
