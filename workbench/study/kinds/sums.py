"""Two printed numbers to add: column by column with carries, and to read one at a time."""

from __future__ import annotations

import random

from PIL import Image

from ..drawing import paper, print_text, text_extents
from ..families import Question
from ..scenes import split_of_content
from ..views import Album, Box, View, union
from .written import dark_ink, fill, start

COLUMNS = 3
SMALLEST_FONT = 14

# sides of the picture in pixels, sizes of print, how often a number has 1, 2, 3 digits
_LEVELS = {
    "first": ((84, 140), (24, 34), (5, 5, 0)),
    "second": ((84, 168), (20, 34), (2, 8, 0)),
    "third": ((84, 196), (16, 34), (2, 4, 4)),
    "full": ((84, 224), (14, 34), (1, 3, 6)),
}

_Line = tuple[str, int, int]  # a text and where its pen starts


def sum_key(a: int, b: int) -> str:
    """What a sum shows, the order left out: the text whose hash decides the split."""
    return f"{min(a, b)}+{max(a, b)}"


def steps(a: int, b: int) -> str:
    """The thought: both numbers as they are printed, then with three digits each, the columns from the right, the sum.

    They are read before zeros are put in front: with the zeros first, a number's length had to be known before it was read,
    and nearly every wrong sum was a number misread.

    A column adds its two digits and the carry, and always writes two digits: the carry for the next column and the
    digit that stays. So everything that a step needs stands at a fixed distance before it, and no step needs to know
    how long the numbers are: steps(348, 75) is "348+75, 348+075: 8+5+0=13, 4+7+1=12, 3+0+1=04, so 423".
    """
    upper, lower = f"{a:0{COLUMNS}d}", f"{b:0{COLUMNS}d}"
    carry, columns = 0, []
    for x, y in zip(reversed(upper), reversed(lower), strict=True):
        total = int(x) + int(y) + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        carry = total // 10
    return f"{a}+{b}, {upper}+{lower}: {', '.join(columns)}, so {a + b}"


def draw(seed: int, split: str = "train", level: str = "full") -> tuple[Album, list[Question]]:
    """Two numbers of 1 to 3 digits, side by side or one above the other; their sum and each of them is asked for.

    The same arguments always give the same. No two splits show the same two numbers, in whichever order.
    """
    rng = start("sum", seed, split, level)
    sides, fonts, lengths = _LEVELS[level]
    while True:
        a, b = (rng.randint(10 ** (n - 1), 10**n - 1) for n in rng.choices((1, 2, 3), lengths, k=2))
        if split_of_content(sum_key(a, b)) == split:
            break
    width, height = rng.randint(*sides), rng.randint(*sides)
    lines, size, spacing, rule = _lay_out(rng, a, b, width, height, rng.randint(*fonts))
    canvas, ink = paper(width, height, rng), dark_ink(rng)
    printed = [print_text(canvas, x, y, text, size, ink, spacing) for text, x, y in lines]
    if rule is not None:
        fill(canvas, *rule, ink)
    glyphs = tuple(glyph for line in printed for glyph in line)
    first, second = (tuple(box for _, box in line) for line in (printed[0], printed[-1]))
    view = View(Image.fromarray(canvas.reshape(height, width, 3)), glyphs=glyphs)
    return Album((view,), seed), _questions(rng, a, b, first, second, (width, height))


def _lay_out(
    rng: random.Random, a: int, b: int, width: int, height: int, size: int
) -> tuple[list[_Line], int, int, tuple[int, int, int, int] | None]:
    """Lines (first number, perhaps a plus, second number), their size and spacing, perhaps a rule below them.

    Print too large for the picture is made smaller; numbers that then still do not fit side by side are stacked.
    """
    spacing, stacked = rng.randint(1, 2), rng.random() < 0.5
    while True:
        lines = _stacked(rng, a, b, size, spacing) if stacked else _side_by_side(rng, a, b, size, spacing)
        x0, y0, x1, y1 = union([_extents(line, size, spacing) for line in lines])
        ruled = stacked and len(lines) == 3 and rng.random() < 0.5
        bottom = y1 + (4 if ruled else 0)
        if x1 - x0 <= width - 6 and bottom - y0 <= height - 6:
            break
        if size > SMALLEST_FONT:
            size -= 1
        else:
            stacked = True
    dx, dy = rng.randint(3 - x0, width - 3 - x1), rng.randint(3 - y0, height - 3 - bottom)
    lines = [(text, x + dx, y + dy) for text, x, y in lines]
    rule = (x0 + dx, y1 + dy + 3, x1 + dx, y1 + dy + 4) if ruled else None
    return lines, size, spacing, rule


def _extents(line: _Line, size: int, spacing: int) -> tuple[int, int, int, int]:
    text, x, y = line
    x0, y0, x1, y1 = text_extents(text, size, spacing)
    return x0 + x, y0 + y, x1 + x, y1 + y


def _side_by_side(rng: random.Random, a: int, b: int, size: int, spacing: int) -> list[_Line]:
    gap, lines, pen = rng.randint(2, 2 + size // 3), [], 0
    for text in (str(a), "+", str(b)):
        x0, _, x1, _ = text_extents(text, size, spacing)
        lines.append((text, pen - x0, 0))
        pen += x1 - x0 + gap
    return lines


def _stacked(rng: random.Random, a: int, b: int, size: int, spacing: int) -> list[_Line]:
    """Mostly as in a school book: flush right, a plus before the second number; else loosely one below the other."""
    down = round(size * rng.uniform(1.0, 1.5))
    tens = [text_extents(str(n), size, spacing) for n in (a, b)]
    shift = 0 if rng.random() < 0.7 else rng.randint(-size, size)
    lines = [(str(a), -tens[0][2], 0), (str(b), shift - tens[1][2], down)]
    if rng.random() < 0.7:
        left = min(line[1] + extent[0] for line, extent in zip(lines, tens, strict=True))
        lines.insert(1, ("+", left - rng.randint(3, 3 + size // 3) - text_extents("+", size, spacing)[2], down))
    return lines


def _questions(
    rng: random.Random, a: int, b: int, first: tuple[Box, ...], second: tuple[Box, ...], size: tuple[int, int]
) -> list[Question]:
    text = rng.choice(("what is the sum?", "add the numbers.", "what is the sum of the numbers?"))
    asked = [Question("sum", text, steps(a, b), str(a + b), first + second, "sum", size)]
    for word, number, boxes in (("first", a, first), ("second", b, second)):
        text = rng.choice(("what is the {} number?", "read the {} number.")).format(word)
        asked.append(Question("read", text, "", str(number), boxes, "read sum", size))
    return asked
