"""Figures of `workbench.analyses.selection`: one choice, the bias, margins, two runs side by side."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.result import Result
from workbench.plots import named

from .layers import SERIES, expert_map_of_layers, finish, labels, legend_beside, lines_by_group, share_bar

SHOWN = 24  # experts drawn of a single choice
ROLE_COLOURS = {"special": "0.75", "system": "0.5", "user": "#009E73", "thought": "#CC79A7", "answer": "#D55E00"}
PICTURE_COLOUR = "#0072B2"


def selection_figure(result: Result) -> Figure:
    """Score, bias and their sum for the experts of one choice, best first, and the weights of the chosen."""
    experts = np.argsort(-result["selection"], kind="stable")
    kept = experts[:SHOWN]
    top_k, x = int(result.about["top_k"]), np.arange(len(kept))
    figure = Figure(figsize=(max(7, 0.45 * len(kept) + 3), 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    score, bias, total = (result[name][kept] for name in ("score", "bias", "selection"))
    upper.bar(x, score, 0.36, color=SERIES[5], label="score s")
    upper.bar(x + 0.38, bias, 0.36, color=SERIES[4], label="bias b")
    upper.plot(x + 0.19, total, linestyle="none", marker="D", markersize=6, color="black", label="s + b, which chooses")
    upper.axvline(top_k - 0.31, color="0.3", linestyle="--", linewidth=1, label=f"the best {top_k} are chosen")
    upper.axhline(0, color="0.3", linewidth=0.8)
    upper.legend(fontsize=8, frameon=False, ncols=2)
    upper.set_ylabel("score, bias", fontsize=8)
    missed = [int(expert) for expert in np.flatnonzero(result["chosen_without_bias"]) if not result["chosen"][expert]]
    gained = [int(expert) for expert in np.flatnonzero(result["chosen"]) if not result["chosen_without_bias"][expert]]
    told = f"the bias brought {_listed(gained)} in and put {_listed(missed)} out" if gained else "the bias changed nothing"
    upper.set_title(told, fontsize=9)
    colours = [SERIES[1] if expert in gained else SERIES[0] for expert in kept]
    lower.bar(x + 0.19, result["weight"][kept], 0.7, color=colours)
    lower.set_ylabel("final weight", fontsize=8)
    lower.set_xticks(x + 0.19, [f"{expert}{'*' if expert in missed else ''}" for expert in kept], fontsize=8)
    lower.set_xlabel("expert, highest s + b first (*: put out by the bias; orange weight: brought in by it)", fontsize=8)
    return named(figure, result.title, result.weights)


def _listed(experts: list[int]) -> str:
    return f"expert{'s' if len(experts) > 1 else ''} {', '.join(map(str, experts))}"


def bias_figure(result: Result) -> Figure:
    """How many choices the bias changed, group by group, and what it gave to and took from each expert."""
    layers = labels(result, "bias", "layer")
    figure = Figure(figsize=(13, max(3.8, 2.4 + 0.12 * len(layers))), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=[1, 1.1, 1.1])
    title = "share of experts that the bias put in\n(dashed: bias outweighs scores)"
    lines_by_group(left, result, "replaced", title, percent=True)
    left.set_ylim(0, 1.02)
    most = float(np.abs(result["bias"]).max()) or 1.0
    scale = Normalize(-most, most)
    image = expert_map_of_layers(middle, result["bias"], layers, norm=scale, colours="PuOr", title="selection bias b")
    figure.colorbar(image, ax=middle, fraction=0.05, pad=0.02)
    moved = result["gained"] - result["lost"]
    most = float(np.abs(moved).max()) or 1.0
    scale, title = Normalize(-most, most), "tokens gained by it (above 0) or lost, of all"
    image = expert_map_of_layers(right, moved, layers, norm=scale, colours="PuOr", title=title)
    bar = figure.colorbar(image, ax=right, fraction=0.05, pad=0.02)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    legend_beside(figure, left)
    return named(figure, f"{result.title}; {int(result['tokens'][0])} tokens of {result.about['runs']} runs", result.weights)


def margins_figure(result: Result) -> Figure:
    """Quantiles of the margin over all tokens, and the share of near-ties group by group."""
    layers, quantiles = labels(result, "margin", "layer"), labels(result, "margin", "quantile")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    spread = result["margin"][0]  # (L, Q)
    left.fill_between(layers, spread[:, 0], spread[:, -1], color=SERIES[0], alpha=0.15, label=_range(quantiles, 0))
    left.fill_between(layers, spread[:, 1], spread[:, -2], color=SERIES[0], alpha=0.3, label=_range(quantiles, 1))
    left.plot(layers, spread[:, len(quantiles) // 2], color=SERIES[0], marker="o", markersize=4, label="median")
    near = result.about["near"]
    left.axhline(near, color="0.3", linestyle="--", linewidth=1, label=f"near-tie: below {near:g}")
    finish(left, layers, "margin, all tokens", zero=False)
    left.set_yscale("log")
    left.legend(fontsize=8, frameon=False)
    lines_by_group(right, result, "near_ties", "share of tokens that are near-ties", percent=True)
    legend_beside(figure, right)
    return named(figure, f"{result.title}; {result.about['runs']} runs", result.weights)


def _range(quantiles: list[float], at: int) -> str:
    return f"{quantiles[at]:.0%} to {quantiles[-1 - at]:.0%} of tokens"


def difference_figure(result: Result) -> Figure:
    """Layers by aligned tokens: the share of experts chosen in both runs, over a strip of roles; and its mean by layer."""
    layers, same = labels(result, "same", "layer"), result["same"]
    figure = Figure(figsize=(13, max(4.0, 2.8 + 0.14 * len(layers))), layout="constrained")
    grid = figure.add_gridspec(2, 2, width_ratios=[4, 1], height_ratios=[1, 0.1])
    upper, strip, right = (figure.add_subplot(grid[at]) for at in ((0, 0), (1, 0), (0, 1)))
    scale = Normalize(0, 1)
    image = expert_map_of_layers(upper, same, layers, norm=scale, title="share of experts chosen in both runs, token by token")
    upper.set(xlabel="", xticks=[])
    share_bar(figure, image, upper, "in both (line: chance)", result.chance["same"])
    roles = [str(role) for role in result["role"]]
    strip.imshow([[_rgb(role) for role in roles]], aspect="auto", interpolation="nearest")
    strip.set(yticks=[], xlabel="aligned token; colours: role")
    strip.tick_params(labelsize=8)
    strip.xaxis.set_major_locator(MaxNLocator(integer=True))
    for role in dict.fromkeys("picture" if role.startswith("image ") else role for role in roles):
        strip.plot([], [], marker="s", linestyle="none", color=_colour(role), label=role)
    figure.legend(*strip.get_legend_handles_labels(), loc="outside right lower", fontsize=8, frameon=False)
    right.plot(same.mean(1), range(len(layers)), color=SERIES[0], marker="o", markersize=4)
    right.axvline(result.chance["same"], color="0.3", linestyle="--", linewidth=1)
    right.set(ylim=upper.get_ylim(), xlim=(0, 1.03), yticks=upper.get_yticks(), yticklabels=[])
    right.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    right.tick_params(labelsize=8)
    right.set_title("mean (dashed: chance)", fontsize=9)
    differs = "; ".join(one.split(":")[0] for one in result.about["differs"]) or "nothing that a run records"
    return named(figure, f"{result.title}; the runs differ in: {differs}", result.weights)


def _colour(role: str) -> str:
    return PICTURE_COLOUR if role == "picture" or role.startswith("image ") else ROLE_COLOURS.get(role, "black")


def _rgb(role: str) -> tuple[float, float, float]:
    return to_rgb(_colour(role))
