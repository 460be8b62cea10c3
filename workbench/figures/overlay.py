"""Heat on a picture, for figures of several pictures or with something marked on them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.patches import Rectangle

from workbench.plots import COLOURS, SHOWN_SIDE, STRENGTH, edges, faint, show_picture

if TYPE_CHECKING:
    from kimi_vl_ref.images import Picture

MARK = "#56B4E9"  # stands out on magma and on grey, for every kind of sight


def overlay(axes: Axes, picture: Picture, heat: np.ndarray, scale: Normalize, colours: str = COLOURS) -> Any:
    """Lays a heat (rows, columns) of patches or of visual tokens over the grey picture; returns what a colour bar wants.

    Raises ValueError for a heat of another shape.
    """
    grid = picture.grid
    if heat.shape not in (grid.grid, grid.token_grid):
        raise ValueError(
            f"a heat of shape {heat.shape} fits neither the {grid.grid} patches nor the {grid.token_grid} visual tokens "
            "of this picture; give the picture that was analysed"
        )
    image = picture.image.copy()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    show_picture(axes, faint(image), grid, lines="white")
    x, y = edges(grid, 1 if heat.shape == grid.grid else grid.merge)
    shown = heat[: len(y) - 1, : len(x) - 1]  # cells that are all padding have no place on the picture
    return axes.pcolormesh(x, y, shown, norm=scale, cmap=colours, alpha=STRENGTH, linewidth=0, rasterized=True)


def mark(axes: Axes, box: tuple[float, float, float, float], *, dashed: bool = False, label: str = "") -> None:
    """A frame around a box in pixels of the picture."""
    x0, y0, x1, y1 = box
    style = "--" if dashed else "-"
    for colour, width in (("black", 3.5), (MARK, 2.0)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width, linestyle=style))
    axes.plot([], [], color=MARK, linestyle=style, linewidth=2, label=label)


def panel_size(pictures: int, width: int, height: int) -> tuple[float, float]:
    """Inches for `pictures` panels side by side of a picture of this size in pixels."""
    side = 4.2 if pictures > 1 else 5.2
    return side * pictures + 1.0, float(np.clip(side * height / width, 1.8, 7.0)) + 1.2
