"""Default figures of analyses/eyes.py: head atlas, one patch's attention, rollout, relevancy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.result import Result
from workbench.plots import colour_bar, colour_scale, named

from .overlay import mark, overlay, panel_size

if TYPE_CHECKING:
    from kimi_vl_ref.images import Picture
    from workbench.runs import Run

POINT = "#0072B2"
FRAGMENT = 4  # maps side by side; more would be too small to read


def head_atlas_figure(result: Result) -> Figure:
    """A dot a head over the layers: how far it looks, and how evenly; dashed: evenly over the whole picture."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    names = (("distance", "mean distance, pixels"), ("entropy", "entropy, nats"))
    for axes, (name, label) in zip(figure.subplots(1, 2), names, strict=True):
        values = result[name]
        layers, heads = values.shape
        spread = np.linspace(-0.15, 0.15, heads) if heads > 1 else np.zeros(1)  # so that equal heads stay apart
        axes.scatter(np.arange(layers)[:, None] + spread, values, s=22, color=POINT, alpha=0.75, linewidth=0)
        axes.axhline(result.chance[name], color="black", linestyle="--", linewidth=1.2, label="attention spread evenly")
        axes.set_ylim(0, 1.1 * max(float(values.max()), float(result.chance[name])))
        axes.set(xlabel="MoonViT layer (a dot a head)", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="lower right", fontsize=8)
    return named(figure, result.title, result.weights)


def patch_attention_figure(
    result: Result, picture: Picture, layer: int | None = None, head: int | None = None, *, vmax: float | None = None
) -> Figure:
    """What the framed patch reads, over the picture: one layer and head, or the mean over what is not named."""
    heat = result["attention"]
    heat = heat.mean(0) if layer is None else heat[layer]
    heat = heat.mean(0) if head is None else heat[head]
    where = f"{'all layers' if layer is None else f'layer {layer}'}, {'all heads' if head is None else f'head {head}'}"
    title = f"{result.title}; {where}"
    return _maps(result, picture, [(heat, result.about["patch"])], "attention", result.chance["attention"], title, vmax)


def rollout_figure(result: Result, picture: Picture, *, vmax: float | None = None) -> Figure:
    """A map a patch that asks (framed), four at most; or the mean over all patches."""
    labels = list(result.axes["rollout"][0][1])
    maps = [(heat, None if label == "all" else int(label)) for heat, label in zip(result["rollout"], labels, strict=True)]
    return _maps(result, picture, maps[:FRAGMENT], "rollout", result.chance["rollout"], result.title, vmax)


def relevancy_figure(result: Result, run: Run, *, vmax: float | None = None) -> Figure:
    """Each picture with what the token owes to it, on one scale, and the shares of all roles beside their chance."""
    heats = [result[f"picture {number}"] for number in range(len(run.pictures))]
    width, height = run.pictures[0].grid.original if run.pictures else (1, 1)
    across, tall = panel_size(len(heats), width, height)
    figure = Figure(figsize=(across + 3.6, max(tall, 3.6)), layout="constrained")
    panels = figure.subplots(1, len(heats) + 1, width_ratios=[4.2] * len(heats) + [3.2], squeeze=False)[0]
    if heats:
        scale = colour_scale(np.concatenate([heat.ravel() for heat in heats]), vmax)
        drawn = [overlay(axes, p, heat, scale) for axes, p, heat in zip(panels, run.pictures, heats, strict=False)]
        above = any(float(heat.max()) > float(scale.vmax or 0) for heat in heats)
        bar = colour_bar(figure, drawn[-1], panels[len(heats) - 1], "relevancy", above=above)
        bar.ax.tick_params(labelsize=8)
    _shares(panels[-1], result)
    return named(figure, result.title, result.weights)


def _shares(axes: Axes, result: Result) -> None:
    names, shares = list(result.axes["share"][0][1]), result["share"]
    at = np.arange(len(names))
    axes.barh(at, shares, color=POINT, height=0.6)
    for place, chance in zip(at, result.chance["share"], strict=True):
        axes.plot([chance, chance], [place - 0.42, place + 0.42], color="black", linestyle="--", linewidth=1.2)
    axes.plot([], [], color="black", linestyle="--", linewidth=1.2, label="share of positions")
    axes.set_yticks(at, names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 1), xlabel="share of all relevancy")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(loc="lower right", fontsize=8)


def _maps(
    result: Result,
    picture: Picture,
    maps: list[tuple[np.ndarray, int | None]],
    label: str,
    chance: float,
    title: str,
    vmax: float | None,
) -> Figure:
    scale = colour_scale(np.stack([heat for heat, _ in maps]), vmax)
    figure = Figure(figsize=panel_size(len(maps), *picture.grid.original), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    drawn = None
    for axes, (heat, patch) in zip(panels, maps, strict=True):
        drawn = overlay(axes, picture, heat, scale)
        box = None if patch is None else picture.grid.patch_box(patch)
        if box is not None:
            mark(axes, box)
            axes.set_title(f"patch {patch} (framed)", fontsize=9)
    above = any(float(heat.max()) > float(scale.vmax or 0) for heat, _ in maps)
    bar = colour_bar(figure, drawn, panels[-1], f"{label} (line: spread evenly)", above=above)
    if chance < float(scale.vmax or 0):
        bar.ax.axhline(chance, color="white", linewidth=3)
        bar.ax.axhline(chance, color="black", linewidth=1.2)
    return named(figure, title, result.weights)
