"""Default figures of analyses/looking.py: attention by kind of position, over time, sinks, massive activations."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.result import Result
from workbench.plots import COLOURS, colour_bar, colour_scale, named

# Okabe and Ito's colours, which stay apart for colour-blind readers
ROLE_COLOURS = {
    "special": "0.6",
    "system": "0.8",
    "image": "#0072B2",
    "user": "#009E73",
    "thought": "#CC79A7",
    "answer": "#D55E00",
}
SERIES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
WORDS = 60  # written tokens up to which each one's text is on the axis


def modality_mass_figure(result: Result) -> Figure:
    """Left, shares of attention stacked over the layers, dashed where they would meet if attention were spread evenly.
    Right, attention a position, its evenly spread value dashed in the same colour.
    """
    groups = list(result.axes["mass"][1][1])
    layers = np.arange(len(result["mass"]))
    colours = [ROLE_COLOURS.get(group, "0.4") for group in groups]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    stacked, single = figure.subplots(1, 2)
    stacked.stackplot(layers, result["mass"].T, labels=groups, colors=colours, edgecolor="white", linewidth=0.6)
    for at in np.cumsum(result.chance["mass"])[:-1]:
        stacked.axhline(at, color="black", linestyle="--", linewidth=1)
    stacked.plot([], [], color="black", linestyle="--", linewidth=1, label="borders if spread evenly")
    stacked.set(xlim=(0, max(1, layers[-1])), ylim=(0, 1), xlabel="decoder layer", ylabel="share of attention")
    stacked.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for values, chance, colour in zip(result["efficiency"].T, result.chance["efficiency"], colours, strict=True):
        single.plot(layers, values, color=colour, marker="o", markersize=4)
        single.axhline(chance, color=colour, linestyle="--", linewidth=1)
    single.set(xlabel="decoder layer", ylabel="attention a position (dashed: spread evenly)")
    single.set_ylim(0, None)
    single.yaxis.set_major_formatter(PercentFormatter(1))
    for axes in (stacked, single):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(*stacked.get_legend_handles_labels(), loc="outside lower center", ncols=len(groups) + 1, fontsize=8)
    return named(figure, f"{result.title}; {result.about['runs']} runs, {result.about['rows']} rows", result.weights)


def attention_timeline_figure(result: Result, *, vmax: float | None = None) -> Figure:
    """For each picture, layer by written token; above, the mean over layers beside what evenly spread attention gives."""
    mass = result["mass"]  # (L, W, pictures)
    layers, written, pictures = mass.shape
    figure = Figure(figsize=(11, 2.6 + 1.9 * pictures), layout="constrained")
    ratios = [1.5] + [1.0] * pictures
    top, *strips = figure.subplots(1 + pictures, 1, sharex=True, height_ratios=ratios, squeeze=False)[:, 0]
    at = np.arange(written)
    scale = colour_scale(mass, vmax)
    for number, axes in enumerate(strips):
        colour = SERIES[number % len(SERIES)]
        top.plot(at, mass[:, :, number].mean(0), color=colour, linewidth=1.6, label=f"picture {number}")
        top.plot(at, result.chance["mass"][:, number], color=colour, linestyle="--", linewidth=1)
        drawn = axes.imshow(mass[:, :, number], norm=scale, cmap=COLOURS, aspect="auto", interpolation="nearest")
        axes.set_ylabel(f"picture {number}\nlayer", fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        colour_bar(figure, drawn, axes, "attention", above=float(mass.max()) > float(scale.vmax or 0))
    top.plot([], [], color="black", linestyle="--", linewidth=1, label="spread evenly")
    top.set(ylim=(0, None), xlim=(-0.5, written - 0.5), ylabel="mean over layers")
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    top.legend(loc="upper right", fontsize=8, ncols=pictures + 1)
    roles = result.about["roles"]
    for start in (change for change in range(1, written) if roles[change] != roles[change - 1]):
        top.axvline(start - 0.5, color="0.6", linewidth=0.8)
    if written <= WORDS:
        words = [str(word).replace("$", r"\$").replace("\n", "↵") for word in result.about["words"]]
        strips[-1].set_xticks(at, words, rotation=90, fontsize=8)
    strips[-1].set_xlabel("written token (grey lines: its role changes)")
    return named(figure, result.title, result.weights)


def attention_sinks_figure(result: Result, *, vmax: float | None = None) -> Figure:
    """Above, in which share of heads each position is a sink; below, what it receives in each layer."""
    figure = Figure(figsize=(11, 5.2), layout="constrained")
    top, below = figure.subplots(2, 1, sharex=True, height_ratios=[1, 1.2])
    sink = result["sink"]
    top.bar(np.arange(len(sink)), sink, width=1.0, color=SERIES[0])
    largest = [f"{one['position']} {one['text']!r} ({one['role']}) {one['share']:.0%}" for one in result.about["largest"]]
    listed = "\n".join(largest).replace("$", r"\$") or "none"
    top.text(1.01, 1.0, f"largest:\n{listed}", transform=top.transAxes, va="top", fontsize=8)
    top.set_ylim(0, max(0.1, 1.1 * float(sink.max())))
    top.set_ylabel("share of heads")
    top.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    scale = colour_scale(result["received"], vmax)
    drawn = below.imshow(result["received"], norm=scale, cmap=COLOURS, aspect="auto", interpolation="nearest")
    below.set(xlabel="position", ylabel="decoder layer")
    below.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    above = float(result["received"].max()) > float(scale.vmax or 0)
    colour_bar(figure, drawn, below, "attention received a query", above=above)
    _chance_beside(top, result)
    return named(figure, result.title, result.weights)


def _chance_beside(axes: Axes, result: Result) -> None:
    """Where the threshold stands against evenly spread attention, which passes it only at the last positions or the first."""
    epsilon, chance = result.about["epsilon"], np.asarray(result.chance["received"])
    passing = int((chance > epsilon).sum())
    even = f"spread evenly, {passing} of {len(chance)} positions would (median {np.median(chance):.1%})"
    axes.set_title(f"a sink receives more than {epsilon:.0%} a query; {even}", fontsize=9)


def massive_activations_figure(result: Result) -> Figure:
    """The three largest numbers of the stream and its median after each layer, the two thresholds, and what passed both."""
    layers = np.array(result.axes["median"][0][1])
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    axes = figure.subplots()
    for rank, (values, style) in enumerate(zip(result["top"].T, ("-", "--", ":"), strict=False), 1):
        axes.plot(layers, values, color=SERIES[0], linestyle=style, marker="o", markersize=3, label=f"largest, no. {rank}")
    axes.plot(layers, result["median"], color="black", linewidth=1.5, label="median")
    axes.plot(layers, result["median"] * result.about["times_median"], color=SERIES[1], label="median x threshold")
    axes.axhline(result.about["above"], color=SERIES[4], label="lowest |x| that counts")
    if "layer" in result.values and len(result["layer"]):
        axes.scatter(result["layer"], np.abs(result["value"]), s=60, facecolor="none", edgecolor=SERIES[3], label="massive")
    axes.set(yscale="log", xlabel="stream after layer (-1: embedding)", ylabel="|x|")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside right center", fontsize=8)
    found = len(result["layer"]) if "layer" in result.values else 0
    return named(figure, f"{result.title}: {found} found", result.weights)
