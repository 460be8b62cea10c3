"""Ink on paper: shapes, printed characters and faint noise as numpy arrays, blended onto a picture.

Arrays hold every value three times along x, once a channel, because numpy is much faster on long rows.
"""

from __future__ import annotations

import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .views import union


@lru_cache(maxsize=4096)
def shape_ink(shape: str, side: int, half_x: int, half_y: int) -> tuple[np.ndarray, np.ndarray]:
    """Coverage and shaded coverage, float32 (h, 3w), of a shape whose box starts 0 or 1 half pixels in.

    Coverage is 0.5 minus the signed distance (pixels) to the outline, clipped to 0..1; shading darkens a rim.
    Every value stands three times, once a channel: numpy is much faster on long rows.
    """
    radius = side / 2
    u = ((np.arange(side + half_x) + 0.5 - half_x / 2) / radius - 1)[None, :]
    v = ((np.arange(side + half_y) + 0.5 - half_y / 2) / radius - 1)[:, None]
    if shape == "circle":
        distance = np.hypot(u, v) - 1
    elif shape == "square":
        distance = np.maximum(abs(u), abs(v)) - 1
    elif shape == "triangle":
        distance = np.maximum(v - 1, (2 * abs(u) - v - 1) / 5**0.5)
    elif shape == "cross":
        bar = 0.36
        upright = np.maximum(abs(u) - bar, abs(v) - 1)
        distance = np.minimum(upright, np.maximum(abs(u) - 1, abs(v) - bar))
    else:  # star: inside at least four of the five lines through its inner pentagon
        x, y = u * np.cos(np.pi / 10), (v + 1) / 2 * (1 + np.cos(np.pi / 5)) - 1
        tips = [2 * np.pi * k / 5 - np.pi / 2 for k in range(5)]
        lines = np.stack([x * np.cos(t) + y * np.sin(t) - np.cos(0.4 * np.pi) for t in tips])
        distance = np.sort(lines, axis=0)[-2] / np.cos(np.pi / 10)
    distance = distance * radius
    cover, rim = np.clip(0.5 - distance, 0, 1), np.clip(distance + 2.2, 0, 1)
    return _three(cover), _three(cover * (1 - 0.16 * rim))


def _three(mask: np.ndarray) -> np.ndarray:
    return np.repeat(mask.astype(np.float32), 3, axis=1)


@lru_cache(maxsize=64)
def font(size: int):
    return ImageFont.load_default(size)


@lru_cache(maxsize=1024)
def glyph_ink(character: str, size: int) -> tuple[np.ndarray, int, int]:
    """Ink of a character, float32 (h, 3w) without empty edges, and the (x, y) of its corner seen from the pen."""
    image = Image.new("L", (2 * size, 2 * size))
    ImageDraw.Draw(image).text((size // 2, size // 4), character, fill=255, font=font(size))
    mask = np.asarray(image, dtype=np.float32) / 255
    mask[mask < 0.03] = 0
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    ink = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return _three(ink), int(columns[0]) - size // 2, int(rows[0]) - size // 4


@lru_cache(maxsize=1024)
def advance(character: str, size: int) -> int:
    return round(font(size).getlength(character))


@lru_cache(maxsize=1)
def grain() -> np.ndarray:
    """A tile of faint noise, uint8 (512, 3 * 512) of 0..6; pictures show a random window of it."""
    return np.random.default_rng(0).binomial(6, 0.5, (512, 3 * 512)).astype(np.uint8)


def blend(canvas: np.ndarray, x: int, y: int, ink: np.ndarray, shaded: np.ndarray, colour: list[int]):
    """Lays ink (h, 3w) of one colour over the canvas (height, 3 * width) in place."""
    h, w3 = ink.shape
    window = canvas[y : y + h, 3 * x : 3 * x + w3]
    window[...] = window * (1 - ink) + shaded * np.array(colour * (w3 // 3), dtype=np.float32) + 0.5


def paper(width: int, height: int, rng: random.Random) -> np.ndarray:
    """A light ground of one tint with faint noise, uint8 (height, 3 * width), of any size."""
    tile = grain()
    if max(width, height) > 512:
        tile = np.tile(tile, (-(-height // 512) + 1, -(-width // 512) + 1))
    top, left = rng.randrange(tile.shape[0] - height + 1), 3 * rng.randrange(tile.shape[1] // 3 - width + 1)
    tint = [232 + rng.randrange(18) for _ in range(3)]
    return tile[top : top + height, left : left + 3 * width] + np.array(tint * width, dtype=np.uint8)


def text_extents(text: str, size: int, spacing: int = 1) -> tuple[int, int, int, int]:
    """x0, y0, x1, y1 of a line's ink, seen from the pen that `print_text` starts with."""
    boxes, x = [], 0
    for character in text:
        ink, dx, dy = glyph_ink(character, size)
        boxes.append((x + dx, dy, x + dx + ink.shape[1] // 3, dy + ink.shape[0]))
        x += advance(character, size) + spacing
    return union(boxes)


def print_text(
    canvas: np.ndarray, x: int, y: int, text: str, size: int, colour: list[int], spacing: int = 1
) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Prints a line with its pen starting at (x, y), the top left of the line; the characters and their boxes (blanks
    have none).
    """
    printed = []
    for character in text:
        if character != " ":
            ink, dx, dy = glyph_ink(character, size)
            blend(canvas, x + dx, y + dy, ink, ink, colour)
            left, top = x + dx, y + dy
            box = (float(left), float(top), float(left + ink.shape[1] // 3), float(top + ink.shape[0]))
            printed.append((character, box))
        x += advance(character, size) + spacing
    return printed
