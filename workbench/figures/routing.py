"""Figures of `workbench.analyses.routing`: load, confidence, domains, modality, kinds, and an expert's place on a picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from workbench.analyses.result import Result
from workbench.plots import COLOURS, STRENGTH, colour_bar, colour_scale, edges, faint, named, show_picture

from .layers import SERIES, band, expert_map_of_layers, finish, labels, legend_beside, line, lines_by_group, share_bar

if TYPE_CHECKING:
    from kimi_vl_ref.images import Picture

DIVERGING = "PuOr"


def load_figure(result: Result, *, vmax: float | None = None) -> Figure:
    """R1: who is chosen how often (all tokens), and how uneven that is, group by group. vmax: top of the colour scale."""
    layers, groups = labels(result, "load", "layer"), labels(result, "load", "group")
    load, experts = result["load"][0], result["load"].shape[-1]
    figure = Figure(figsize=(12, max(3.6, 2.2 + 0.12 * len(layers))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.2 if experts > 32 else 1, 1])
    scale = colour_scale(load, vmax)
    image = expert_map_of_layers(left, load, layers, norm=scale, title=f"load of each expert, {groups[0]} tokens")
    above = bool(load.max() > float(scale.vmax or 1))
    share_bar(figure, image, left, "share of tokens (line: chance)", result.chance["load"], above=above)
    lines_by_group(right, result, "max_vio", "MaxVio: largest load over the mean load, minus 1 (0: even)")
    legend_beside(figure, right)
    return named(figure, f"{result.title}; {int(result['tokens'][0])} tokens of {result.about['runs']} runs", result.weights)


def confidence_figure(result: Result) -> Figure:
    """R2: entropy of scores and of weights, margin, and the share of choices that the bias decides."""
    figure = Figure(figsize=(12, 6.6), layout="constrained")
    panels = figure.subplots(2, 2)
    titles = {
        "score_entropy": "entropy of the scores, bits (chance: no preference)",
        "weight_entropy": "entropy of the weights of the chosen, bits (chance: all alike)",
        "margin": "margin between the last chosen and the first left out",
        "flip_rate": "tokens that would choose others without the selection bias",
    }
    for axes, (name, title) in zip(panels.flat, titles.items(), strict=True):
        lines_by_group(axes, result, name, title, percent=name == "flip_rate")
    panels[1, 1].set_ylim(0, 1.02)
    legend_beside(figure, panels[0, 0])
    return named(figure, f"{result.title}; bars: 95% over {result.about['runs']} runs", result.weights)


def domains_figure(result: Result) -> Figure:
    """R3: a map of layers by experts for each domain, on one scale, and how far the domains are apart."""
    domains, layers = labels(result, "share", "domain"), labels(result, "share", "layer")
    columns = min(4, len(domains))
    rows = -(-len(domains) // columns)
    figure = Figure(figsize=(13, max(5.2, rows * (1.3 + 0.11 * len(layers)) + 0.8)), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[2.2, 1])
    maps, side = parts
    panels = np.atleast_1d(maps.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)).ravel()
    scale = Normalize(0, float(np.nanmax(result["share"])))
    image = None
    for axes, domain, share in zip(panels, domains, result["share"], strict=False):
        image = expert_map_of_layers(axes, share, layers, norm=scale, title=domain)
        axes.label_outer()
    for axes in panels[len(domains) :]:
        axes.set_visible(False)
    share_bar(maps, image, list(panels), "share of tokens (line: chance)", result.chance["share"])  # type: ignore[arg-type]
    matrix, lines = side.subplots(2, 1, height_ratios=[1.5, 1])
    apart = result["divergence"].mean(0)
    drawn = matrix.imshow(apart, norm=colour_scale(apart, None), cmap=COLOURS)
    matrix.set_xticks(range(len(domains)), domains, rotation=60, ha="right", rotation_mode="anchor", fontsize=8)
    matrix.set_yticks(range(len(domains)), domains, fontsize=8)
    matrix.set_title("divergence of two domains, bits,\nmean over layers", fontsize=9)
    colour_bar(side, drawn, matrix, "", above=False)  # type: ignore[arg-type]
    nothing = np.full(len(layers), np.nan)
    line(lines, layers, result["mean_divergence"], nothing, nothing, SERIES[0], "domains as they are")
    band(lines, layers, *result["divergence_shuffled"], label="domains dealt out anew (95%)")
    finish(lines, layers, "mean divergence of two domains, bits")
    lines.legend(fontsize=7, frameon=False, loc="best")
    return named(figure, f"{result.title}; {result.about['runs']} runs", result.weights)


def modality_figure(result: Result) -> Figure:
    """R4: which experts prefer pictures and which text, and how far the two are apart in each layer."""
    layers = labels(result, "preference", "layer")
    figure = Figure(figsize=(12, max(3.6, 2.2 + 0.12 * len(layers))), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.5, 1])
    scale = Normalize(-1, 1)
    title = "preference (grey: never chosen)"
    image = expert_map_of_layers(left, result["preference"], layers, norm=scale, colours=DIVERGING, title=title)
    colour_bar(figure, image, left, "-1 only text, 0 alike, 1 only pictures", above=False)
    ends = result["divergence_low"], result["divergence_high"]
    line(right, layers, result["divergence"], *ends, SERIES[0], "pictures against text")
    band(right, layers, *result["divergence_shuffled"], label="modality shuffled (95%)")
    finish(right, layers, "divergence of the loads, bits (1: no expert in common)")
    right.legend(fontsize=8, frameon=False)
    pictures, text = (int(n) for n in result["tokens"])
    return named(figure, f"{result.title}; {pictures} picture and {text} text tokens", result.weights)


def expert_map_figure(result: Result, picture: Picture, experts: Sequence[int] | None = None) -> Figure:
    """R4: what experts counted for over a picture; default the six that count most in all. One scale for all."""
    weight, grid = result["weight"], picture.grid
    busiest = np.argsort(-weight.sum((1, 2)), kind="stable")[:6].tolist()
    shown: list[int] = busiest if experts is None else list(experts)
    if not shown or any(not 0 <= expert < len(weight) for expert in shown):
        raise ValueError(f"experts {shown} cannot be drawn; name some of 0 to {len(weight) - 1}")
    panels = len(shown) + 1
    columns = min(4, panels)
    rows, (width, height) = -(-panels // columns), grid.original
    tall = float(np.clip(3.0 * height / width, 1.2, 5))
    figure = Figure(figsize=(3.2 * columns + 0.8, rows * (tall + 0.4) + 0.8), layout="constrained")
    every = figure.subplots(rows, columns, squeeze=False).ravel()
    show_picture(every[0], picture.image, grid, lines="0.45")
    every[0].set_title("the picture", fontsize=9)
    scale, (x, y) = Normalize(0, float(weight[shown].max()) or 1.0), edges(grid, grid.merge)
    mesh = None
    for axes, expert in zip(every[1:], shown, strict=False):
        show_picture(axes, faint(picture.image), grid, lines="white")
        mesh = axes.pcolormesh(x, y, weight[expert], norm=scale, cmap=COLOURS, alpha=STRENGTH, linewidth=0, rasterized=True)
        axes.set_title(f"expert {expert}: {(weight[expert] > 0).mean():.0%} of the tokens", fontsize=9)
    for axes in every[panels:]:
        axes.set_visible(False)
    colour_bar(figure, mesh, list(every), "weight (0: not chosen)", above=False)  # type: ignore[arg-type]
    chance = result.about["top_k"] / len(weight)
    return named(figure, f"{result.title}; by chance {chance:.1%} of the tokens each", result.weights)


def kinds_figure(result: Result) -> Figure:
    """What the choice of an expert tells of the kind of its token, beside the same with kinds shuffled."""
    layers, kinds = labels(result, "information", "layer"), labels(result, "share", "kind")
    figure = Figure(figsize=(13, max(3.8, 2.4 + 0.25 * len(layers))), layout="constrained")
    parts: Any = figure.subfigures(1, 2, width_ratios=[1, 2])
    left, right = parts
    axes = left.subplots()
    ends = result["information_low"], result["information_high"]
    line(axes, layers, result["information"], *ends, SERIES[0], "kinds as they are")
    line(axes, layers, result["shuffled"], result["shuffled_low"], result["shuffled_high"], "0.5", "kinds shuffled", marker="s")
    most = float(result["kind_entropy"])
    finish(axes, layers, f"information on the kind, bits (at most {most:.2f})")
    axes.legend(fontsize=8, frameon=False)
    present = [at for at in range(len(kinds)) if result["tokens"][at]]
    columns = min(3, len(present))
    panels = right.subplots(-(-len(present) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    scale = Normalize(0, float(np.nanmax(result["share"])))
    image = None
    for panel, at in zip(panels, present, strict=False):
        title = f"{kinds[at]}, {int(result['tokens'][at])} tokens"
        image = expert_map_of_layers(panel, result["share"][at], layers, norm=scale, title=title)
        panel.label_outer()
    for panel in panels[len(present) :]:
        panel.set_visible(False)
    share_bar(right, image, list(panels), "share of tokens (line: chance)", result.chance["share"])  # type: ignore[arg-type]
    dead = int(result["dead"].sum())
    title = f"{result.title}; {result.about['runs']} runs, MaxVio {result['max_vio'].mean():.2f}, {dead} experts never chosen"
    return named(figure, title, result.weights)
