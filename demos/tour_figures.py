"""The small figures of the tour: each is drawn from the tensors of the visitor's own picture and question.

Letters as in workbench/sites.py. Drawn without pyplot; a figure becomes SVG whose ink is the colour of the text around it, so
that it suits light and dark.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from io import StringIO
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator

from kimi_vl_ref.images import PatchGrid, Picture
from workbench.figures.overlay import MARK, overlay
from workbench.plots import SHOWN_SIDE, colour_scale, show_picture

INK = "#80817f"  # becomes the colour of the text around the figure
HOT, COLD, PALE = "#d95f02", "#0072b2", "#9aa3b1"  # told apart by colour-blind eyes
STEPS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
SHOWN = 96  # rows and columns of a matrix; more would not be seen


def svg(figure: Figure, said: str) -> str:
    """The figure as part of a page; `said` is what it shows, for those who do not see it."""
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(INK, "currentColor")
    return f'<div class="drawn" role="img" aria-label="{html.escape(said, quote=True)}">{drawn}</div>'


def pixels(values: np.ndarray, picture: Picture, patch: int) -> Figure:
    """values (3, height, width), normalised: the picture with one patch marked, and that patch's three colours."""
    figure, axes = _panels(4, picture.grid, [2.2, 1, 1, 1])
    _picture(axes[0], picture)
    row, column = divmod(patch, picture.grid.grid[1])
    side = picture.grid.patch_size
    _mark(axes[0], picture.grid.patch_box(patch))
    cut = values[:, row * side : (row + 1) * side, column * side : (column + 1) * side]
    image = None
    for one, name, numbers in zip(axes[1:], ("red", "green", "blue"), cut, strict=True):
        image = one.imshow(numbers, cmap="gray", vmin=-1, vmax=1)
        one.set_title(name, fontsize=9)
        one.set(xticks=[], yticks=[])
    _bar(figure, image, axes[1:], "value")
    return _inked(figure)


def patches(vectors: np.ndarray, picture: Picture) -> Figure:
    """vectors (P, V): the picture cut into patches, and their vectors as rows."""
    figure, axes = _panels(2, picture.grid, [1, 1.5])
    _picture(axes[0], picture)
    _matrix(figure, axes[1], vectors, "patch", "number of its vector")
    return _inked(figure)


def merged(cells: np.ndarray, picture: Picture, token: int) -> Figure:
    """cells (M, 4, V): one visual token's four patches on the picture, and their vectors side by side."""
    figure, axes = _panels(2, picture.grid, [1, 1.5])
    _picture(axes[0], picture)
    _mark(axes[0], picture.grid.token_box(token))
    _matrix(figure, axes[1], cells[token], "patch of the four", "number of its vector")
    return _inked(figure)


def tokens(vectors: np.ndarray, picture: Picture) -> Figure:
    """vectors (M, D): how long each visual token's vector is, on the picture, and the vectors as rows."""
    figure, axes = _panels(2, picture.grid, [1, 1.2])
    length = picture.grid.token_heat(np.linalg.norm(vectors, axis=-1))
    _heat(figure, axes[0], picture, length, "length of the vector", top=next((s for s in STEPS if s >= length.max()), None))
    _matrix(figure, axes[1], vectors, "visual token", "number of its vector")
    return _inked(figure)


def attention(latent: np.ndarray, read: np.ndarray, picture: Picture) -> Figure:
    """latent (T, R), read (M,) share of its attention that the last token gave each visual token, the mean over heads."""
    figure, axes = _panels(2, picture.grid, [1, 1.2])
    top = next(step for step in STEPS if step >= read.max())
    _heat(figure, axes[0], picture, picture.grid.token_heat(read), "share of the attention", top=top)
    _matrix(figure, axes[1], latent, "token", "number of its latent")
    return _inked(figure)


def router(scores: np.ndarray, bias: np.ndarray, chosen: np.ndarray, weights: np.ndarray) -> Figure:
    """scores, bias (E,), chosen, weights (K,) of one token: who is chosen, and for how much each counts."""
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    axes = figure.subplots()
    experts = np.arange(len(scores))
    ink = np.where(np.isin(experts, chosen), HOT, PALE)
    axes.bar(experts, scores, color=ink, width=0.8)
    axes.scatter(experts, scores + bias, marker="_", s=1400 / len(scores) + 30, color=INK, linewidth=2, label="score + bias")
    for expert, weight in zip(chosen, weights, strict=True):
        axes.annotate(f"{weight:.2f}", (expert, max(scores[expert], scores[expert] + bias[expert])), (0, 4),
                      textcoords="offset points", ha="center", fontsize=8, color=INK)  # fmt: skip
    top = max(1.0, float((scores + bias).max()))
    axes.set(xlabel="expert", ylabel="score", ylim=(min(0.0, float((scores + bias).min())), 1.18 * top))
    axes.set_xticks(experts[:: max(1, len(experts) // 16)])
    kinds = [Patch(color=HOT, label="score, chosen (number: its weight)"), Patch(color=PALE, label="score, not chosen")]
    _legend(figure, kinds + axes.get_legend_handles_labels()[0])
    return _inked(figure)


def experts(on_picture: np.ndarray, on_words: np.ndarray, chance: float) -> Figure:
    """Shares (E,) of the picture's tokens and of the words that each expert serves; the line is chance, K/E."""
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(on_picture))
    axes.bar(at - 0.2, on_picture, 0.4, color=COLD, label="picture tokens")
    axes.bar(at + 0.2, on_words, 0.4, color=HOT, label="words")
    axes.axhline(chance, color=INK, linewidth=1.2, linestyle="--", label=f"chance, {chance:.0%}")
    axes.set(xlabel="expert", ylabel="share served", ylim=(0, 1))
    axes.set_xticks(at[:: max(1, len(at) // 16)])
    _legend(figure, axes.get_legend_handles_labels()[0])
    return _inked(figure)


def words(names: Sequence[str], probs: Sequence[float]) -> Figure:
    """The likeliest next words and their probabilities."""
    figure = Figure(figsize=(7.2, 2.7), layout="constrained")
    axes = figure.subplots()
    at = np.arange(len(names))[::-1]
    axes.barh(at, probs, color=[HOT] + [PALE] * (len(names) - 1))
    for y, p in zip(at, probs, strict=True):
        axes.annotate(percent(p), (p, y), (4, 0), textcoords="offset points", va="center", fontsize=8, color=INK)
    axes.set(xlim=(0, 1.1), xlabel="probability")
    axes.set_xticks(np.linspace(0, 1, 5))
    axes.set_yticks(at, [name.strip().replace("$", r"\$") or "(blank)" for name in names])
    return _inked(figure)


def percent(share: float) -> str:
    return "<0.1%" if share < 0.0005 else f"{share:.1%}"


def _panels(count: int, grid: PatchGrid, widths: Sequence[float]) -> tuple[Figure, Any]:
    width, height = grid.original
    figure = Figure(figsize=(7.2, float(np.clip(2.6 * height / width, 1.8, 3.6))), layout=ConstrainedLayoutEngine(w_pad=0.12))
    return figure, figure.subplots(1, count, width_ratios=list(widths))


def _picture(axes: Axes, picture: Picture) -> None:
    image = picture.image.copy()
    image.thumbnail((SHOWN_SIDE // 2, SHOWN_SIDE // 2))
    show_picture(axes, image, picture.grid, lines="0.45")


def _heat(figure: Figure, axes: Axes, picture: Picture, heat: np.ndarray, label: str, top: float | None) -> None:
    _bar(figure, overlay(axes, picture, heat, colour_scale(heat, top)), axes, label)


def _mark(axes: Axes, box: tuple[float, float, float, float] | None) -> None:
    if box is not None:
        x0, y0, x1, y1 = box
        for colour, width in (("black", 3), (MARK, 1.6)):
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=width))


def _matrix(figure: Figure, axes: Axes, values: np.ndarray, rows: str, columns: str) -> None:
    """A heat map of the first rows and columns, on a scale from a fixed list that holds 99% of them."""
    top = next((step for step in STEPS if step >= np.quantile(np.abs(values), 0.99)), STEPS[-1])
    shown = values[:SHOWN, :SHOWN]
    image = axes.imshow(shown, cmap="PuOr_r", vmin=-top, vmax=top, aspect="auto", interpolation="nearest")
    for name, few, all_ in ((rows, shown.shape[0], values.shape[0]), (columns, shown.shape[1], values.shape[1])):
        label = f"{name}, {all_}" if few == all_ else f"{name}, first {few} of {all_}"
        (axes.set_ylabel if name == rows else axes.set_xlabel)(label)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    _bar(figure, image, axes, "", extend="both")


def _bar(figure: Figure, drawn: Any, axes: Any, label: str, extend: str = "neither") -> None:
    bar = figure.colorbar(drawn, ax=axes, label=label, extend=extend, fraction=0.06, pad=0.03)
    bar.outline.set_visible(False)


def _legend(figure: Figure, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside upper left", ncols=3, fontsize=8, frameon=False, labelcolor=INK)


def _inked(figure: Figure) -> Figure:
    for axes in figure.axes:
        axes.set_facecolor("none")
        axes.tick_params(colors=INK, labelsize=8)
        for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
            label.set_color(INK)
            label.set_fontsize(9)
        for spine in axes.spines.values():
            spine.set_color(INK)
            spine.set_linewidth(0.6)
    return figure
