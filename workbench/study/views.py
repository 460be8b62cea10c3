"""What a question is about: one picture or several, each with everything that stands in it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from PIL import Image

if TYPE_CHECKING:
    from .scenes import Obj

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in picture pixels
Number = TypeVar("Number", int, float)
Glyph = tuple[str, Box]  # a printed character and the box of its ink


def union(boxes: Iterable[tuple[Number, Number, Number, Number]]) -> tuple[Number, Number, Number, Number]:
    """The smallest box around all of `boxes`, of which there must be one."""
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


@dataclass(frozen=True)
class View:
    """One picture: its objects (coloured shapes) and its printed characters, in reading order."""

    image: Image.Image
    objects: tuple[Obj, ...] = ()
    glyphs: tuple[Glyph, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        return self.image.size


@dataclass(frozen=True)
class Album:
    """The pictures of one conversation, in the order in which they are shown."""

    views: tuple[View, ...]
    seed: int

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.views[0].image

    @property
    def images(self) -> list[Image.Image]:
        return [view.image for view in self.views]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the first picture."""
        return self.image.size
