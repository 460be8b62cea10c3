"""Arrays in, matplotlib Figures out. Every figure names the model that its numbers come from.

Figures are made without pyplot, so nothing global changes and nothing has to be closed. Scales are fixed by the caller or by
what is shown, start at zero and are drawn; the colour map is perceptually even and safe for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from kimi_vl_ref.images import PatchGrid, Picture

    from .runs import Run

COLOURS = "magma"
STRENGTH = 0.75  # how opaque the heat lies on the grey picture; the colour bar is drawn the same way
SHOWN_SIDE = 1200  # pixels; a larger picture is drawn smaller
LINES = 80  # more lines than this would hide the picture and are left out


def picture_heat(picture: Picture, heat: Any, *, vmax: float | None = None, title: str = "", model_name: str) -> Figure:
    """The picture with its grid, and beside it one value a visual token, laid over the picture in grey.

    heat (rows, columns) of the picture's visual tokens, such as `Run.heat`. Colours run from 0 to `vmax` (default: the
    largest value); to compare figures, give them the same. Raises ValueError for a heat of another shape.
    """
    grid, values = picture.grid, np.asarray(heat, np.float32)
    if values.shape != grid.token_grid:
        raise ValueError(f"a heat of shape {values.shape} does not fit a picture of {grid.token_grid} visual tokens")
    scale = colour_scale(values, vmax)
    image = picture.image.copy()
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    width, height = grid.original
    tall = float(np.clip(4.3 * height / width, 1.6, 7))
    figure = Figure(figsize=(10, tall + 1.0), layout="constrained")
    seen, hot = figure.subplots(1, 2)
    show_picture(seen, image, grid, lines="0.45")
    show_picture(hot, faint(image), grid, lines="white")
    x, y = edges(grid, grid.merge)
    mesh = hot.pcolormesh(x, y, values, norm=scale, cmap=COLOURS, alpha=STRENGTH, linewidth=0, rasterized=True)
    rows, columns = grid.token_grid
    seen.set_title(f"{width} x {height} pixels, {rows} x {columns} visual tokens", fontsize=9)
    hot.set_title("one colour a visual token", fontsize=9)
    colour_bar(figure, mesh, hot, "attention", above=bool(values.size) and float(values.max()) > float(scale.vmax or 0))
    return named(figure, title, model_name)


def attention_heat(
    run: Run,
    position: int,
    *,
    picture: int = 0,
    layer: int | None = None,
    head: int | None = None,
    vmax: float | None = None,
) -> Figure:
    """`picture_heat` of one attention row of a run: what position t read while token t+1 was predicted."""
    where = ["all layers" if layer is None else f"layer {layer}", "all heads" if head is None else f"head {head}"]
    title = f"Attention of row {position} {run.texts[position]!r} on picture {picture}; {', '.join(where)}"
    heat = run.heat(position, picture, layer, head)
    return picture_heat(run.pictures[picture], heat, vmax=vmax, title=title, model_name=run.model_name)


def expert_share(run: Run, positions: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
    """How many of the tokens at these positions (default: all) chose each expert: (L_moe, E) shares in [0, 1]."""
    chosen = run.chosen if positions is None else run.chosen[:, _positions(run, positions)]  # (L_moe, N, K)
    ids = np.arange(run.n_experts)
    return np.stack([(layer[..., None] == ids).any(1).mean(0) for layer in chosen]).astype(np.float32)


def expert_load(
    run: Run, positions: Sequence[int] | np.ndarray | None = None, *, vmax: float | None = None, title: str = ""
) -> Figure:
    """Layer by expert: the share of the tokens at these positions (default: all) that chose the expert.

    A row adds up to K, since every token chooses K experts; chance is K/E, and the colour bar marks it.
    """
    share = expert_share(run, positions)
    top_k = run.chosen.shape[2]
    count = run.chosen.shape[1] if positions is None else len(_positions(run, positions))
    figure = Figure(figsize=(min(12, 3.5 + 0.14 * run.n_experts), 2.0 + 0.18 * len(share)), layout="constrained")
    axes = figure.subplots()
    scale = colour_scale(share, vmax)
    image = axes.imshow(share, norm=scale, cmap=COLOURS, aspect="auto", interpolation="nearest")
    axes.set_xlabel("expert")
    axes.set_ylabel("decoder layer")
    ticks = range(0, len(share), -(-len(share) // 14))
    axes.set_yticks(ticks, [str(run.moe_layers[at]) for at in ticks])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    bar = colour_bar(figure, image, axes, "share of tokens (line: chance)", above=float(share.max()) > float(scale.vmax or 0))
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    chance = top_k / run.n_experts
    if chance < float(scale.vmax or 0):
        bar.ax.axhline(chance, color="white", linewidth=3)
        bar.ax.axhline(chance, color="black", linewidth=1.2)
    name = f"{title or 'Experts chosen'}, {count} tokens; by chance {chance:.1%} each ({top_k} of {run.n_experts})"
    return named(figure, name, run.model_name)


def _positions(run: Run, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    chosen = np.asarray(positions, np.int64).reshape(-1)
    if not len(chosen):
        raise ValueError("there are no positions to count experts over; give at least one")
    outside = chosen[(chosen < 0) | (chosen >= len(run.token_ids))]
    if len(outside):
        raise ValueError(f"position {outside[0]} does not exist; the run has positions 0 to {len(run.token_ids) - 1}")
    return chosen


def colour_scale(values: np.ndarray, vmax: float | None) -> Normalize:
    if vmax is not None and not vmax > 0:
        raise ValueError(f"vmax={vmax} leaves no scale; give a number above 0")
    largest = float(np.nanmax(values)) if values.size else 0.0
    return Normalize(0, vmax if vmax is not None else (largest or 1.0))


def show_picture(axes: Axes, image: Image.Image, grid: PatchGrid, lines: str) -> None:
    """A picture in its own pixel coordinates, with thin lines between patches and stronger ones between visual tokens."""
    width, height = grid.original
    axes.imshow(np.asarray(image), extent=(0, width, height, 0), interpolation="bilinear", cmap="gray", vmin=0, vmax=255)
    for side, thickness in ((1, 0.4), (grid.merge, 0.9)):
        x, y = edges(grid, side)
        if max(len(x), len(y)) <= LINES:
            axes.vlines(x, 0, height, color=lines, linewidth=thickness, alpha=0.5)
            axes.hlines(y, 0, width, color=lines, linewidth=thickness, alpha=0.5)
    axes.set(xlim=(0, width), ylim=(height, 0), xticks=[], yticks=[])


def edges(grid: PatchGrid, side: int) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the lines around cells of `side` patches, in pixels of the picture; the last ones are its border."""
    box = grid.patch_box if side == 1 else grid.token_box
    rows, columns = grid.grid if side == 1 else grid.token_grid
    across = [found for column in range(columns) if (found := box(column))]
    down = [found for row in range(rows) if (found := box(row * columns))]
    x, y = [b[0] for b in across] + [across[-1][2]], [b[1] for b in down] + [down[-1][3]]
    return np.array(x), np.array(y)


def faint(image: Image.Image) -> Image.Image:
    """Grey, with the contrast of the middle tones only, so that the colours on it are those of the bar."""
    return ImageOps.grayscale(image).point(lambda value: 80 + value * 0.5)


def colour_bar(figure: Figure, drawn: Any, axes: Axes, label: str, *, above: bool) -> Any:
    bar = figure.colorbar(drawn, ax=axes, label=label, extend="max" if above else "neither", fraction=0.05, pad=0.02)
    bar.ax.set_facecolor("0.55")
    return bar


def named(figure: Figure, title: str, model_name: str) -> Figure:
    if title:
        figure.suptitle(title.replace("$", r"\$"), fontsize=11)
    figure.supxlabel(model_name.replace("$", r"\$"), fontsize=8, color="0.35")
    return figure
