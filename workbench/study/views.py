"""What a question is about: one picture or several, each with everything that stands in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

if TYPE_CHECKING:
    from .scenes import Obj

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in picture pixels
Glyph = tuple[str, Box]  # a printed character and the box of its ink


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
