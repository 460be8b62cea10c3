"""Figures of `workbench.analyses.attribution` and `occlusion`: maps on the picture, a logit's parts, how good maps are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from workbench.analyses.result import Result
from workbench.plots import named

from .layers import SERIES
from .overlay import mark, overlay

if TYPE_CHECKING:
    from kimi_vl_ref.images import Picture

DIVERGING = "PuOr_r"  # orange adds, purple takes away; the middle is nothing
BETTER = {"deletion": "low is good", "insertion": "high is good", "pointing": "high is good", "overlap": "high is good"}


def attribution_maps(
    result: Result, picture: Picture, *, boxes: Sequence[tuple[float, float, float, float]] = (), vmax: float | None = None
) -> Figure:
    """T1, T3: each map of an `integrated_gradients` or `occlusion` result over the picture, on scales around zero.

    boxes: what the answer is about, framed. vmax: end of the scales, in nats a visual token.
    """
    grid = picture.grid
    maps = {name: np.reshape(value, grid.token_grid) for name, value in result.values.items()}
    gaps = result.about.get("completeness_gap", {})
    # a gradient is another quantity than what an integral adds up to: it gets a scale of its own
    alike = [name for name in maps if name in gaps] or list(maps)
    width, height = grid.original
    size = (max(7.5, 3.6 * len(maps) + 1.4), float(np.clip(3.6 * height / width, 2.2, 6)) + 1.5)
    figure = Figure(figsize=size, layout="constrained")
    panels = dict(zip(maps, figure.subplots(1, len(maps), squeeze=False)[0], strict=True))
    for group in (alike, [name for name in maps if name not in alike]):
        if not group:
            continue
        scale = around_zero([maps[name] for name in group], vmax)
        for name in group:
            drawn = overlay(panels[name], picture, maps[name], scale, DIVERGING)
            for box in boxes:
                mark(panels[name], box)
            total = f"\nsum {maps[name].sum():+.2f}, completeness gap {gaps[name]:+.2f}" if name in gaps else "\n"
            panels[name].set_title(name + total, fontsize=9)
        above = max(np.abs(maps[name]).max() for name in group) > float(scale.vmax or 0)
        bar = {"label": "nats a visual token", "extend": "both" if above else "neither", "fraction": 0.06, "shrink": 0.8}
        figure.colorbar(drawn, ax=[panels[name] for name in group], **bar)
    if boxes:
        next(iter(panels.values())).set_xlabel("frame: what the answer is about", fontsize=8)
    asked = f"\n{result.about['prompts'][0]!r}, reply {result.about['replies'][0]!r}"
    return named(figure, result.title + asked, result.weights)


def logit_parts(result: Result, *, vmax: float | None = None) -> Figure:
    """T2: the logit built up part by part from the embedding to the last layer, and every head and expert by itself."""
    heads, experts = result["heads"], result["experts"]
    moe, layers = list(result.axes["experts"][0][1]), list(result.axes["heads"][0][1])
    figure = Figure(figsize=(13, 5.2 + 0.16 * len(layers)), layout="constrained")
    above, below = np.ravel(figure.subfigures(2, 1, height_ratios=[1.25, 1]))  # type: ignore[arg-type]
    _waterfall(above.subplots(), result, layers, moe)
    scale = around_zero([heads, experts], vmax)
    panels = below.subplots(1, 2, width_ratios=[max(heads.shape[1], 6), experts.shape[1]])
    for axes, value, rows, what in ((panels[0], heads, layers, "head"), (panels[1], experts, moe, "routed expert")):
        drawn = by_layer(axes, value, scale, rows, f"each {what}" + (" (0: not chosen)" if what == "routed expert" else ""))
        axes.set(xlabel=what, ylabel="decoder layer")
    over = max(np.abs(heads).max(), np.abs(experts).max()) > float(scale.vmax or 0)
    below.colorbar(drawn, ax=list(panels), label="added to the logit", extend="both" if over else "neither", fraction=0.03)
    asked = f"\nafter {result.about['prompts'][0]!r}; all parts sum to the logit, {result.about['logit']:.2f}"
    return named(figure, result.title + asked, result.weights)


def _waterfall(axes: Axes, result: Result, layers: list[int], moe: list[int]) -> None:
    parts: list[tuple[str, str, float]] = [("embedding", "embedding", float(result["embedding"].sum()))]
    dense = list(result.axes["dense"][0][1])
    for at, layer in enumerate(layers):
        parts.append((f"{layer}", "attention", float(result["heads"][at].sum())))
        if layer in dense:
            parts.append((f"{layer}", "dense FFN", float(result["dense"][dense.index(layer)])))
        else:
            parts.append((f"{layer}", "shared expert", float(result["shared"][moe.index(layer)])))
            parts.append((f"{layer}", "routed experts", float(result["experts"][moe.index(layer)].sum())))
    tops = np.cumsum([value for *_, value in parts])
    colours = dict(zip(dict.fromkeys(kind for _, kind, _ in parts), SERIES, strict=False))
    for at, ((_, kind, value), top) in enumerate(zip(parts, tops, strict=True)):
        axes.bar(at, value, bottom=top - value, color=colours[kind], width=0.8, label=kind if kind in colours else "")
        axes.hlines(top, at - 0.4, at + 1.4 if at + 1 < len(parts) else at + 0.4, color="0.4", linewidth=0.8)
    first = {kind: next(at for at, part in enumerate(parts) if part[1] == kind) for kind in colours}
    axes.legend([axes.patches[at] for at in first.values()], list(first), fontsize=8, ncols=len(first), loc="upper left")
    if len(parts) <= 60:
        axes.set_xticks(range(len(parts)), [label if kind != "embedding" else "start" for label, kind, _ in parts], fontsize=7)
    axes.axhline(0, color="0.3", linewidth=0.8)
    low, high = min(0.0, tops.min()), max(0.0, tops.max())
    axes.set(xlabel="decoder layer", ylabel="logit so far", ylim=(low - 0.05 * (high - low), high + 0.22 * (high - low)))


def deletion_curves(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], *, model_name: str, insert: bool = False) -> Figure:
    """T3: the reply's probability while cells are hidden, most important first; a curve a map, with its area.

    curves: name -> (shares, probabilities) as `deletion` gives them. insert: they were made with insert=True.
    """
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for at, (name, (shares, probabilities)) in enumerate(curves.items()):
        area = np.trapezoid(probabilities, shares)
        style, colour = "--" if name in ("random", "centre") else "-", SERIES[at % len(SERIES)]
        axes.plot(shares, probabilities, style, color=colour, marker="o", markersize=3.5, label=f"{name}: area {area:.2f}")
    what, good = ("shown again", "high") if insert else ("hidden", "low")
    axes.set(xlabel=f"share of the picture {what}", ylabel="probability of the reply", xlim=(0, 1), ylim=(-0.02, 1.02))
    axes.legend(fontsize=8)
    title = f"{'Insertion' if insert else 'Deletion'}, most important cells first ({good} is good)"
    return named(figure, title, model_name)


def map_curves_figure(result: Result) -> Figure:
    """T3: both ways of `map_curves` side by side, a curve a map with its area; controls are dashed and grey."""
    ways, names, shares = (list(found) for _, found in result.axes["probability"])
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    greys = dict(zip(result.about["controls"], ("0.35", "0.65"), strict=True))
    for w, (axes, way) in enumerate(zip(figure.subplots(1, 2, sharey=True), ways, strict=True)):
        for at, name in enumerate(names):
            colour, dash = greys.get(name, SERIES[at % len(SERIES)]), "--" if name in greys else "-"
            label = f"{name}: area {result['area'][w, at]:.2f}"
            axes.plot(shares, result["probability"][w, at], dash, color=colour, marker="o", markersize=3.5, label=label)
        axes.set(xlabel=f"share of the picture {('hidden', 'shown again')[w]}", xlim=(0, 1), ylim=(-0.02, 1.02))
        axes.set_title(f"{way} ({BETTER[way]})", fontsize=9)
        axes.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
        if not w:
            axes.set_ylabel("probability of the reply")
    asked = f"\n{result.about['prompts'][0]!r}, reply {result.about['replies'][0]!r}; dashed: controls"
    return named(figure, result.title + asked, result.weights)


def league_table(result: Result) -> Figure:
    """T3: a panel a measure, a bar a map; whiskers: 95% over trials. The controls are hatched."""
    names, measures = list(result.axes["score"][0][1]), list(result.axes["score"][1][1])
    controls = result.about.get("controls", [])
    figure = Figure(figsize=(3.1 * len(measures) + 1, 1.6 + 0.36 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    trials = result["each"].shape[1]
    for m, (axes, measure) in enumerate(zip(panels, measures, strict=True)):
        each = result["each"][:, :, m]
        error = 1.96 * each.std(1, ddof=1) / np.sqrt(trials) if trials > 1 else np.zeros(len(names))
        for at, name in enumerate(names):
            style = {"color": "0.8", "hatch": "//"} if name in controls else {"color": SERIES[0]}
            axes.barh(at, each[at].mean(), edgecolor="0.3", **style)
        axes.errorbar(each.mean(1), range(len(names)), xerr=error, fmt="none", ecolor="black", elinewidth=1, capsize=2)
        if measure in result.chance:
            axes.axvline(result.chance[measure], color="#D55E00", linestyle="--", linewidth=1.2)
            axes.text(result.chance[measure], -0.75, " chance", color="#D55E00", fontsize=7, va="bottom")
        axes.set(xlim=(0, 1), yticks=range(len(names)), yticklabels=names)
        axes.set_title(f"{measure}\n({BETTER.get(measure, '')})", fontsize=9)
    panels[0].invert_yaxis()
    return named(figure, f"How well maps show what the answer rests on, {trials} trials (hatched: controls)", result.weights)


def by_layer(
    axes: Axes, value: np.ndarray, scale: Normalize, layers: Sequence[int], title: str, *, ticks: int = 12
) -> AxesImage:
    """Draws layer by unit (a head, an expert) on a scale around zero; at most so many layers are written at the side."""
    drawn = axes.imshow(value, norm=scale, cmap=DIVERGING, aspect="auto", interpolation="nearest")
    written = range(0, len(layers), -(-len(layers) // ticks))
    axes.set_yticks(written, [str(layers[at]) for at in written])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
    axes.set_title(title, fontsize=9)
    return drawn


def around_zero(values: Sequence[Any], vmax: float | None = None) -> Normalize:
    """A scale from -vmax to vmax; default the largest size among the values. Raises ValueError for a vmax of 0 or less."""
    if vmax is not None and not vmax > 0:
        raise ValueError(f"vmax={vmax} leaves no scale; give a number above 0")
    largest = max((float(np.nanmax(np.abs(value))) for value in values if np.size(value)), default=0.0)
    end = vmax if vmax is not None else (largest or 1.0)
    return Normalize(-end, end)
