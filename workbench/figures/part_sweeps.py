"""Figures of `workbench.analyses.part_sweeps`: each head or part of a layer taken away, beside its random control."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from workbench.analyses.result import Result
from workbench.plots import named

from .attribution import around_zero, by_layer
from .layers import SERIES


def single_heads_figure(result: Result, *, vmax: float | None = None) -> Figure:
    """I6: layer by head, the mean over domains, and the control beside it on one scale around zero."""
    layers, heads = (list(found) for _, found in result.axes["loss"][:2])
    loss, control = result["loss"].mean(-1), result["control"].mean(-1)
    size = (max(8.5, 3.5 + 0.7 * len(heads)), 2.3 + 0.32 * len(layers))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    scale = around_zero([loss, control], vmax)
    titles = ("without the head", "control: a random head of the layer for each token")
    for axes, value, title in zip(panels, (loss, control), titles, strict=True):
        drawn = by_layer(axes, value, scale, layers, title, ticks=14)
        axes.set_xlabel("head")
        if value.size <= 80:
            for (row, column), number in np.ndenumerate(value):
                colour = "white" if abs(number) > 0.7 * float(scale.vmax or 1) else "black"
                written = f"{number:.2f}" if abs(number) >= 0.005 else "0"
                axes.text(column, row, written, ha="center", va="center", fontsize=7, color=colour)
    panels[0].set_ylabel("decoder layer")
    over = max(np.abs(loss).max(), np.abs(control).max()) > float(scale.vmax or 0)
    figure.colorbar(drawn, ax=list(panels), label="nats a token more", extend="both" if over else "neither", fraction=0.04)
    return named(figure, f"{result.title}\n{_where(result)}", result.weights)


def single_layers_figure(result: Result) -> Figure:
    """Bars: the mean over domains without each layer's attention and FFN; dots are domains, hatched bars the control."""
    layers, parts, domains = (list(found) for _, found in result.axes["loss"])
    figure = Figure(figsize=(max(8.0, 3.0 + 0.9 * len(layers)), 4.4), layout="constrained")
    axes = figure.subplots()
    place, width = np.arange(len(layers)), 0.2
    for at, part in enumerate(parts):
        control: dict[str, Any] = {"color": "white", "edgecolor": SERIES[at], "hatch": "////"}
        styles: tuple[tuple[str, dict[str, Any]], ...] = (("loss", {"color": SERIES[at]}), ("control", control))
        for number, (name, style) in enumerate(styles):
            x = place + (2 * at + number - 1.5) * width
            label = part if name == "loss" else f"{part} of a random layer for each token"
            axes.bar(x, result[name][:, at].mean(-1), 0.9 * width, label=label, **style)
            dots = result[name][:, at]  # (L, domains)
            axes.plot(np.repeat(x, len(domains)), dots.ravel(), ".", color="black", markersize=4, label="_")
    axes.axhline(0, color="0.3", linewidth=0.8)
    axes.set_xticks(place, [str(layer) for layer in layers])
    axes.set(xlabel="decoder layer", ylabel="nats a scored token more")
    handles, names = axes.get_legend_handles_labels()
    (dot,) = axes.plot([], [], ".", color="black")
    axes.legend([*handles, dot], [*names, "a domain"], fontsize=8)
    return named(figure, f"{result.title}\n{_where(result)}", result.weights)


def _where(result: Result) -> str:
    return f"{result.about['scenes']} scenes a family: {', '.join(result.axes['loss'][2][1])}"
