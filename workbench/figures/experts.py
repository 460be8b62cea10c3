"""Figures of `workbench.analyses.experts` and `magnitudes`: words, partners, checkpoints, neighbours, sizes."""

from __future__ import annotations

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from workbench.analyses.result import Result
from workbench.plots import colour_bar, named

from .layers import GROUP_COLOURS, MARKERS, SERIES, finish, labels, legend_beside, line, lines_by_group

BUSIEST = 32  # experts drawn in a map of pairs
LISTED = 12  # experts named with their words


def vocabulary_figure(result: Result) -> Figure:
    """R5: how far a token settles its expert, and the experts that belong most to some words."""
    layers = labels(result, "identity", "layer")
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1, 1.15])
    for at, (name, marker) in enumerate((("token read", "o"), ("next token", "s"))):
        ends = result["identity_low"][at], result["identity_high"][at]
        shift = 0.07 * (at - 0.5)
        line(left, layers, result["identity"][at], *ends, SERIES[at], name, shift=shift, marker=marker)
        dealt = result["shuffled"][at], result["shuffled_low"][at], result["shuffled_high"][at]
        line(left, layers, *dealt, ("0.35", "0.65")[at], f"{name}, ids shuffled", shift=shift, marker=marker)
    finish(left, layers, "I(first expert; id) / H(first expert): 1 the id settles it, 0 it says nothing")
    left.set_ylim(0, 1.02)
    left.legend(fontsize=8, frameon=False)
    right.axis("off")
    chance = f"{result.chance['word_share']:.0%}"
    right.set_title(f"experts with the words that most often go to them first (by chance {chance})", fontsize=9)
    share, word = result["word_share"], result["word"]
    order = np.argsort(-share.mean(-1), axis=None, kind="stable")[:LISTED]
    for row, place in enumerate(order):
        layer, expert = np.unravel_index(place, share.shape[:2])
        found = [f"{w.strip() or '␣'} {s:.0%}" for w, s in zip(word[layer, expert], share[layer, expert], strict=True) if w]
        y = 0.97 - row / LISTED
        right.text(0.0, y, f"layer {layers[layer]}, expert {expert}", fontsize=8, va="top", transform=right.transAxes)
        text = "   ".join(found).replace("$", r"\$")
        right.text(0.27, y, text, fontsize=8, va="top", transform=right.transAxes, family="monospace")
    return named(figure, f"{result.title}; {int(result['tokens'][0])} tokens of {result.about['runs']} runs", result.weights)


def coactivation_figure(result: Result, layer: int | None = None) -> Figure:
    """R6: which experts of a layer are chosen together more, or less, than their loads lead to; default the layer where they
    differ most. The 32 busiest, those alike side by side. Raises ValueError for a layer that does not route.
    """
    layers = labels(result, "together", "layer")
    excess = result["together"] - result["by_load"]
    strength = np.nan_to_num(np.abs(excess)).mean((1, 2))
    if layer is not None and layer not in layers:
        raise ValueError(f"layer {layer} does not route; choose among {', '.join(map(str, layers))}")
    at = int(strength.argmax()) if layer is None else layers.index(layer)
    busy = np.argsort(-result["load"][at], kind="stable")[:BUSIEST]
    shown = np.nan_to_num(excess[at][np.ix_(busy, busy)])
    order = _alike_together(shown)
    busy, shown = busy[order], shown[np.ix_(order, order)]
    np.fill_diagonal(shown, np.nan)
    most = float(np.nanmax(np.abs(shown))) if len(busy) > 1 else 1.0
    figure = Figure(figsize=(11.5, 5.2), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.35, 1])
    left.set_facecolor("0.75")
    image = left.imshow(shown, norm=Normalize(-most or -1, most or 1), cmap="PuOr", interpolation="nearest")
    for ticks in (left.set_xticks, left.set_yticks):
        ticks(range(len(busy)), [str(expert) for expert in busy], fontsize=7)
    left.set(xlabel="chosen as well", ylabel="of the tokens of expert")
    left.set_title(f"layer {layers[at]}: share of tokens above what the loads lead to", fontsize=9)
    colour_bar(figure, image, left, "difference of shares (0: by load)", above=False)
    chance = result.chance["together"]
    off = ~np.eye(excess.shape[-1], dtype=bool)
    pairs = [values[off][~np.isnan(values[off])] for values in result["together"]]
    right.boxplot(pairs, positions=layers, widths=0.5, whis=(0, 100), medianprops={"color": SERIES[1]}, manage_ticks=False)
    right.axhline(chance, color="0.3", linestyle="--", linewidth=1, label=f"by chance, loads even: {chance:.1%}")
    title = "share of an expert's tokens shared with each other one\n(box: quartiles, whiskers: all pairs)"
    finish(right, layers, title, percent=True)
    right.legend(fontsize=8, frameon=False)
    return named(figure, f"{result.title}; {result.about['tokens_counted']} tokens", result.weights)


def _alike_together(excess: np.ndarray) -> np.ndarray:
    """An order in which experts that are chosen together stand side by side: the second eigenvector of the Laplacian."""
    if len(excess) < 3:
        return np.arange(len(excess))
    alike = np.maximum(excess + excess.T, 0)
    np.fill_diagonal(alike, 0)
    _, vectors = np.linalg.eigh(np.diag(alike.sum(0)) - alike)
    return np.argsort(vectors[:, 1], kind="stable")


def agreement_figure(result: Result) -> Figure:
    """R7: the share of experts that both checkpoints chose for the same tokens."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    lines_by_group(axes, result, "same", "mean share of a token's K experts chosen by both", percent=True)
    axes.set_ylim(0, 1.03)
    legend_beside(figure, axes)
    counted = f"{int(result['tokens'][0])} tokens of {result.about['runs']} pairs of runs"
    return named(figure, f"{result.title}; {counted}", result.weights)


def repetition_figure(result: Result) -> Figure:
    """R8: do neighbours have the same first expert and share experts; nearest neighbours, and by distance."""
    layers, groups, lags = (labels(result, "first", name) for name in ("layer", "group", "lag"))
    figure = Figure(figsize=(12.5, 4.2), layout="constrained")
    panels = figure.subplots(1, 3)
    titles = {"first": "same first expert", "shared": "share of experts in common"}
    for axes, (name, title) in zip(panels, titles.items(), strict=False):
        for place, (at, group) in enumerate(_present(result, groups)):
            shift = 0.08 * (place - 2)
            ends = result[f"{name}_low"][at, :, 0], result[f"{name}_high"][at, :, 0]
            colour = GROUP_COLOURS[group]
            line(axes, layers, result[name][at, :, 0], *ends, colour, group, shift=shift, marker=MARKERS[group])
            x = np.asarray(layers) + shift
            axes.plot(x, result[f"{name}_shuffled"][at], linestyle="none", marker="_", markersize=9, color=colour)
        axes.axhline(result.chance[name], color="0.3", linestyle="--", linewidth=1, label="by chance")
        finish(axes, layers, f"{title}, nearest neighbours\n(dashes: any two tokens of the group)", percent=True)
    for at, group in _present(result, groups):
        panels[2].plot(lags, result["shared"][at].mean(0), color=GROUP_COLOURS[group], marker=MARKERS[group], linewidth=1)
    panels[2].axhline(result.chance["shared"], color="0.3", linestyle="--", linewidth=1)
    finish(panels[2], lags, "share of experts in common,\nmean over layers, by distance", percent=True)
    panels[2].set_xlabel("distance in tokens (pictures: along a row or column)", fontsize=8)
    panels[2].set_xticks(lags)
    legend_beside(figure, panels[0])
    return named(figure, f"{result.title}; {result.about['runs']} runs", result.weights)


def _present(result: Result, groups: list[str]) -> list[tuple[int, str]]:
    return [(at, group) for at, group in enumerate(groups) if result["pairs"][at].any()]


def super_experts_figure(result: Result) -> Figure:
    """R9: the largest output of every expert in order of size with both lines, and |x| in the stream, layer by layer."""
    layers = labels(result, "magnitude", "layer")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    flat = result["magnitude"].ravel()
    order = np.argsort(-flat, kind="stable")
    rank = np.arange(1, len(flat) + 1)
    used = flat[order] > 0
    left.plot(rank[used], flat[order][used], ".", color=SERIES[0], markersize=4)
    for (name, at), style in zip(result.chance["magnitude"].items(), ("--", ":"), strict=True):
        if at > 0:
            left.axhline(at, color="0.3", linestyle=style, linewidth=1.2, label=name)
    is_super, candidate = result["is_super"].ravel()[order], result["candidate"].ravel()[order]
    for place in np.flatnonzero(candidate)[:10]:
        layer, expert = np.unravel_index(order[place], result["magnitude"].shape)
        what = "super: " if is_super[place] else ""
        left.annotate(f"{what}layer {layers[layer]}, expert {expert}", (rank[place], flat[order[place]]), (6, 0),
                      textcoords="offset points", fontsize=8, va="center")  # fmt: skip
    left.set(yscale="log", xlabel="expert, largest first", ylabel="largest |output|")
    left.set_title("an expert is super above both lines,\nin a layer where massive activations form", fontsize=9)
    left.legend(fontsize=8, frameon=False, loc="upper right")
    every = labels(result, "largest", "layer")
    right.plot(every, result["largest"], color=SERIES[1], marker="o", markersize=4, label="largest |x|")
    right.plot(every, result["median"], color="0.4", marker="s", markersize=4, label="median |x|")
    line_at = np.maximum(100.0, 1000 * result["median"])
    right.plot(every, line_at, color="0.3", linestyle="--", linewidth=1, label="massive: 100, and 1,000 medians")
    formed = np.flatnonzero(result["massive"])
    star = {"linestyle": "none", "marker": "*", "markersize": 13, "color": SERIES[1]}
    right.plot(formed, result["largest"][formed], label="formed here", **star)
    finish(right, every, "the stream after each layer", zero=False)
    right.set_yscale("log")
    for axes in (left, right):
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    legend_beside(figure, right)
    return named(figure, f"{result.title}; {result.about['trials']} trials", result.weights)


def pruning_figure(result: Result) -> Figure:
    """R9: what the reply loses without some experts beside random sets of the same size, and what becomes of the sinks."""
    layers, change = labels(result, "sink_decay", "layer"), result["nll_change"].mean(1)
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    places = np.linspace(-0.15, 0.15, len(change) - 1) if len(change) > 2 else np.zeros(len(change) - 1)
    left.plot(1 + places, change[1:], linestyle="none", marker="o", color="0.5", label="random sets of the same size")
    left.plot([0], change[:1], linestyle="none", marker="D", color=SERIES[1], label="these experts")
    left.axhline(0, color="0.3", linewidth=1)
    left.set_xticks([0, 1], ["these", "random"])
    left.set_xlim(-0.6, 1.6)
    left.grid(axis="y", color="0.9", linewidth=0.6)
    left.set_title(f"change of nats a token (before: {result.about['nll']:.3f})", fontsize=9)
    right.plot(layers, result["sink_decay"][1:].T, color="0.6", marker="o", markersize=3, linewidth=0.8)
    right.plot(layers, result["sink_decay"][0], color=SERIES[1], marker="D", markersize=5, linewidth=1)
    right.axhline(0, color="0.3", linewidth=1)
    finish(right, layers, "attention that sinks lost\n(no point: no sink in the layer)", percent=True)
    legend_beside(figure, left)
    return named(figure, f"{result.title}; {result.about['trials']} trials", result.weights)


def shared_figure(result: Result) -> Figure:
    """The shared expert's part of what is written, and how alike the two directions are."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    lines_by_group(left, result, "shared_part", "shared / (shared + routed), of norms (dashed: half each)", percent=True)
    left.set_ylim(0, 1)
    lines_by_group(right, result, "cosine", "cosine between shared and routed (dashed: unrelated)")
    legend_beside(figure, left)
    return named(figure, f"{result.title}; bars: 95% over {result.about['trials']} trials", result.weights)
