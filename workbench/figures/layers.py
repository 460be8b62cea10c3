"""Parts that figures of routing share: lines over layers with intervals, and maps of layers by experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.result import Result
from workbench.plots import COLOURS, colour_bar

# Okabe and Ito's colours, which stay apart for colour-blind readers; greys for what is not a role
GROUP_COLOURS = {
    "all": "black",
    "prefill": "0.45",
    "decode": "0.65",
    "picture": "#0072B2",
    "text": "#56B4E9",
    "question": "#009E73",
    "thought": "#CC79A7",
    "answer": "#D55E00",
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "black", "0.5")
MARKERS = dict(zip(GROUP_COLOURS, "osD^vPX*", strict=True))
FEW = 12  # layers up to which intervals are bars side by side; more become bands


def labels(result: Result, name: str, axis: str) -> list[Any]:
    """What stands along an axis of one value."""
    return next(list(found) for label, found in result.axes[name] if label == axis)


def lines_by_group(axes: Axes, result: Result, name: str, title: str, *, percent: bool = False) -> None:
    """One line a group of tokens over the layers, with 95% intervals, and the chance line of the value."""
    layers, groups = labels(result, name, "layer"), labels(result, name, "group")
    shown = [at for at in range(len(groups)) if not np.isnan(np.asarray(result[name], float)[at]).all()]
    for place, at in enumerate(shown):
        group = groups[at]
        low, high = (result[f"{name}_{end}"][at] for end in ("low", "high"))
        shift = 0.07 * (place - (len(shown) - 1) / 2)
        line(axes, layers, result[name][at], low, high, GROUP_COLOURS[group], group, shift=shift, marker=MARKERS[group])
    chance = result.chance.get(name)
    if chance is not None:
        axes.axhline(float(chance), color="0.3", linestyle="--", linewidth=1, label=_no_repeat(axes, "by chance"))
    finish(axes, layers, title, percent=percent)


def line(
    axes: Axes,
    layers: Sequence[int],
    value: np.ndarray,
    low: np.ndarray,
    high: np.ndarray,
    colour: str,
    label: str,
    *,
    shift: float = 0.0,
    marker: str = "o",
) -> None:
    """One value over the layers: points with bars for few layers, a line with a band for many."""
    if len(layers) <= FEW:
        x = np.asarray(layers) + shift
        axes.plot(x, value, color=colour, marker=marker, markersize=5, linewidth=0.8, alpha=0.95, label=label)
        axes.vlines(x, low, high, color=colour, linewidth=1.6, alpha=0.6)
    else:
        axes.plot(layers, value, color=colour, marker=marker, markersize=3.5, linewidth=1.2, label=label)
        axes.fill_between(layers, low, high, color=colour, alpha=0.15, linewidth=0)


def band(axes: Axes, layers: Sequence[int], low: np.ndarray, high: np.ndarray, label: str) -> None:
    """What luck gives, in grey, widened where it would be too thin to see."""
    axes.fill_between(layers, low, high, color="0.6", alpha=0.6, linewidth=1.5, label=label, zorder=0)


def finish(axes: Axes, layers: Sequence[int], title: str, *, percent: bool = False, zero: bool = True) -> None:
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("decoder layer", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    axes.set_xlim(min(layers) - 0.5, max(layers) + 0.5)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    if zero:
        axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    if percent:
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def legend_beside(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, outside them."""
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right upper", fontsize=8, frameon=False)


def expert_map_of_layers(
    axes: Axes, values: np.ndarray, layers: Sequence[int], *, norm: Normalize, colours: str = COLOURS, title: str = ""
) -> Any:
    """A colour an expert of a layer; nan (nothing to show) in grey."""
    axes.set_facecolor("0.75")
    image = axes.imshow(values, norm=norm, cmap=colours, aspect="auto", interpolation="nearest")
    ticks = range(0, len(layers), -(-len(layers) // 9))
    axes.set_yticks(ticks, [str(layers[at]) for at in ticks], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("expert", fontsize=8)
    axes.set_ylabel("decoder layer", fontsize=8)
    axes.set_title(title, fontsize=9)
    return image


def share_bar(figure: Figure, image: Any, axes: Any, label: str, chance: float, *, above: bool = False) -> None:
    """A colour bar in percent with the chance share marked on it."""
    bar = colour_bar(figure, image, axes, label, above=above)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.axhline(chance, color="white", linewidth=3)
    bar.ax.axhline(chance, color="black", linewidth=1.2)


def _no_repeat(axes: Axes, label: str) -> str:
    return label if label not in axes.get_legend_handles_labels()[1] else "_nolegend_"
