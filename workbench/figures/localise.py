"""Default figures of analyses/localise.py: localisation heads, where they point, hits by head, relative attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.localise import Box, Heads, localise
from workbench.analyses.result import Result
from workbench.plots import COLOURS, colour_bar, colour_scale, named

from .overlay import mark, overlay, panel_size

if TYPE_CHECKING:
    from kimi_vl_ref.images import Picture
    from workbench.runs import Run

DIVERGING = "PuOr"
POINT, CONTROL = "#0072B2", "0.6"


def localisation_heads_figure(result: Result) -> Figure:
    """A dot a head: attention on the picture against spatial entropy, coloured by how often it was picked; the chosen are
    named by layer.head.
    """
    figure = Figure(figsize=(8.5, 5), layout="constrained")
    axes = figure.subplots()
    mass, entropy, picked = (result[name].ravel() for name in ("mass", "entropy", "picked"))
    candidate = result["candidate"].ravel() == 1
    scale = Normalize(0, 1)
    axes.scatter(mass[~candidate], entropy[~candidate], s=26, facecolor="none", edgecolor="0.5", label="not a candidate")
    drawn = axes.scatter(
        mass[candidate], entropy[candidate], c=picked[candidate], norm=scale, cmap="cividis", s=46, edgecolor="black",
        linewidth=0.5, label="candidate",
    )  # fmt: skip
    for layer, head in result.about["heads"]:
        at = (result["mass"][layer, head], result["entropy"][layer, head])
        axes.annotate(f"{layer}.{head}", at, xytext=(6, 5), textcoords="offset points", fontsize=9, fontweight="bold")
    axes.axvline(result.about["knee"], color="#D55E00", linewidth=1.2, label="knee of the masses")
    axes.axvline(result.chance["mass"], color="black", linestyle="--", linewidth=1, label="spread evenly")
    axes.set(xlim=(0, 1.03), ylim=(-0.02, 1.05 * max(float(entropy.max()), 0.1)))
    axes.set(xlabel="attention on the picture", ylabel="spatial entropy, nats (0: one spot)")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar = colour_bar(figure, drawn, axes, "share of runs in which it was picked (line: chance)", above=False)
    bar.ax.axhline(result.chance["picked"], color="white", linewidth=3)
    bar.ax.axhline(result.chance["picked"], color="black", linewidth=1.2)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    title = f"Localisation heads: on the picture, and on one spot of it (layer.head); {result.about['runs']} runs"
    return named(figure, title, result.weights)


def localisation_figure(result: Result) -> Figure:
    """Hits, overlap and accuracy of the chosen heads beside as many random ones."""
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    pairs = [(result["hit"].mean(), result["hit_random"].mean()), (result["iou"].mean(), result["iou_random"].mean())]
    pairs.append((result["accuracy"][0], result["accuracy"][1]))
    at = np.arange(3)
    axes.bar(at - 0.2, [ours for ours, _ in pairs], 0.36, color=POINT, label=f"these {len(result.about['heads'])} heads")
    axes.bar(at + 0.2, [other for _, other in pairs], 0.36, color=CONTROL, label="as many random heads, mean of 20 sets")
    axes.plot([-0.42, 0.42], [result.chance["hit"]] * 2, color="black", linestyle="--", linewidth=1.2, label="chance")
    axes.set_xticks(at, ["peak touches\nthe truth", "mean overlap\n(IoU) of the box", "overlap of\n0.5 or more"])
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="upper right", fontsize=8)
    return named(figure, f"{result.title}; {result.about['runs']} runs", result.weights)


def pointing_figure(run: Run, heads: Heads, truth: Box | None = None, picture: int = 0, *, row: str = "word") -> Figure:
    """One run: the map of these heads over the picture, their box, and the true one dashed."""
    heat, box = localise(run, heads, picture, row=row)
    grid = run.pictures[picture].grid
    figure = Figure(figsize=panel_size(1, *grid.original), layout="constrained")
    axes = figure.subplots()
    drawn = overlay(axes, run.pictures[picture], heat, colour_scale(heat, None))
    mark(axes, box, label="where the heads point")
    if truth is not None:
        mark(axes, truth, dashed=True, label="truth")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    colour_bar(figure, drawn, axes, f"attention, {len(heads)} heads, smoothed", above=False)
    return named(figure, f"{run.question!r} answered {run.answer!r}", run.model_name)


def head_hits_figure(result: Result) -> Figure:
    """Layer by head: how often the head's peak touches what is asked about; the line in the colour bar is chance."""
    hit = result["hit"]
    figure = Figure(figsize=(3.5 + 0.35 * hit.shape[1], 2.4 + 0.22 * hit.shape[0]), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(hit, norm=Normalize(0, 1), cmap=COLOURS, aspect="auto", interpolation="nearest")
    axes.set(xlabel="head", ylabel="decoder layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    bar = colour_bar(figure, drawn, axes, "share of runs (line: chance)", above=False)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    bar.ax.axhline(result.chance["hit"], color="white", linewidth=3)
    bar.ax.axhline(result.chance["hit"], color="black", linewidth=1.2)
    return named(figure, f"Whose peak touches what is asked about; {result.about['runs']} runs", result.weights)


def relative_attention_figure(result: Result, picture: Picture, layer: int | None = None, *, most: float = 4.0) -> Figure:
    """Attention over that for the neutral question, as powers of two around 1 (no difference): one layer, or the geometric
    mean over all. Factors beyond 2^`most` get the last colour; what could not be divided stays grey.
    """
    logs = np.log2(np.maximum(result["relative"], 2.0 ** (-2 * most)))  # a zero has no logarithm
    if layer is None:
        known = np.isfinite(logs)
        heat = np.where(known.any(0), np.where(known, logs, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)
    else:
        heat = logs[layer]
    figure = Figure(figsize=panel_size(1, *picture.grid.original), layout="constrained")
    axes = figure.subplots()
    drawn = overlay(axes, picture, np.ma.masked_invalid(heat), Normalize(-most, most), DIVERGING)
    label = "times the neutral question's attention"
    bar = figure.colorbar(drawn, ax=axes, extend="both", fraction=0.05, pad=0.02, label=label)
    ticks = np.linspace(-most, most, 5)
    bar.set_ticks(ticks.tolist(), labels=[f"{2.0**tick:.3g}" for tick in ticks])
    bar.ax.axhline(0, color="black", linewidth=1.2)
    title = result.title.replace(" relative to", "\nrelative to")
    where = "mean over layers" if layer is None else f"layer {layer}"
    return named(figure, f"{title}; {where}", result.weights)
