"""Figures of `workbench.analyses.causes`, `ablations` and `picture_ablations`; controls are grey or hatched everywhere."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.result import Result
from workbench.plots import named

from .attribution import DIVERGING, around_zero, by_layer
from .layers import SERIES

SHORT = 30  # letters of a label


def patching_figure(result: Result, *, vmax: float | None = None) -> Figure:
    """I1: both directions side by side, layer by unit; one scale around zero, where 1 is the whole way."""
    unit, names = result.axes["denoise"][1]
    layers = list(result.axes["denoise"][0][1])
    few = len(names) <= 16
    wide = min(18.0, max(9.0, 5.0 + 0.28 * 2 * len(names)))
    figure = Figure(figsize=(wide, (2.6 if few else 3.4) + 0.3 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    end = vmax if vmax is not None else max(1.0, *(float(np.abs(value).max()) for value in result.values.values()))
    scale = around_zero([], end)
    titles = {"denoise": "clean into corrupted: what is enough", "noise": "corrupted into clean: what is needed"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        drawn = axes.imshow(result[name], norm=scale, cmap=DIVERGING, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=9)
        axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
        if unit == "position":
            step = -(-len(names) // 40)
            shown = range(0, len(names), step)
            words = [_short(names[at]) for at in shown]
            if few:
                axes.set_xticks(shown, words, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
            else:
                axes.set_xticks(shown, words, rotation=90, fontsize=7)
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=16))
            axes.set_xlabel(unit)
        if few and len(layers) <= 30:
            _numbers(axes, result[name], end)
    panels[0].set_ylabel("decoder layer" if layers != ["patches"] else "")
    over = max(float(np.abs(value).max()) for value in result.values.values()) > end
    figure.colorbar(drawn, ax=list(panels), label="share of the way", extend="both" if over else "neither", fraction=0.04)
    return named(figure, f"{result.title}; {_count(result.about['pairs'], 'pair')}", result.weights)


def _numbers(axes: Axes, values: np.ndarray, end: float) -> None:
    for (row, column), value in np.ndenumerate(values):
        if abs(value) >= 0.05:
            colour = "white" if abs(value) > 0.7 * end else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)


def knockout_figure(result: Result) -> Figure:
    """I3: a panel a pair; the change by window, its random control, and both with all layers blocked at the right."""
    pairs, starts = (list(found) for _, found in result.axes["change"])
    figure = Figure(figsize=(3.3 * len(pairs) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(pairs), sharey=True, squeeze=False)[0]
    end = starts[-1] + max(2, 0.12 * len(starts) + 1)
    styles = (("control", "0.55", "random positions, as many", "s"), ("change", SERIES[0], "the group", "o"))
    for at, (axes, pair) in enumerate(zip(panels, pairs, strict=True)):
        for name, colour, label, marker in styles:
            axes.plot(starts, result[name][at], color=colour, marker=marker, markersize=4, label=label)
            axes.plot([end], [result[f"{name} everywhere"][at]], color=colour, marker=marker, markersize=7)
        axes.axhline(0, color="0.3", linestyle="--", linewidth=1)
        axes.axvline((starts[-1] + end) / 2, color="0.8", linewidth=1)
        step = -(-len(starts) // 8)
        axes.set_xticks([*starts[::step], end], [*map(str, starts[::step]), "all"])
        axes.set_title(f"{pair}\n{_count(result.about['trials_of_pair'][pair], 'trial')}", fontsize=9)
        axes.set_xlabel("first blocked layer")
    low = min(-1.0, float(min(value.min() for value in result.values.values())))
    high = max(0.1, float(max(value.max() for value in result.values.values())))
    panels[0].set(ylabel="change of the reply's probability", ylim=(low - 0.04, high + 0.04))
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].legend(fontsize=8, loc="lower left")
    window = result.about["window"]
    title = f"Looks blocked, {_count(window, 'layer')} at a time (-100%: the reply is gone)"
    title += "\nrandom positions are drawn among all that the queries see, the question's too: a control can lose more"
    return named(figure, title, result.weights)


def masking_figure(result: Result) -> Figure:
    """I4a: loss against masked experts, a line a domain, with the random control of the same colour dashed."""
    figure = Figure(figsize=(7.4, 4.6), layout="constrained")
    axes = figure.subplots()
    masked = list(result.axes["loss"][0][1])
    _by_domain(axes, result, "loss", masked, "best experts masked", control="control", what="random ones masked")
    _uniform_guess(axes, result)
    axes.legend(fontsize=8, loc="upper left")
    axes.set(xlabel="experts masked for each token", ylabel="loss, nats a scored token", xticks=masked)
    return named(figure, result.title, result.weights)


def top_k_figure(result: Result) -> Figure:
    """I4b, c: loss against K, a line a domain, with the shared expert and without it; controls dashed in the same colour; the
    model's own K is marked.
    """
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    ks = list(result.axes["loss"][0][1])
    titles = (
        "shared expert kept\n(dashed: K experts drawn at random)",
        "shared expert dropped\n(dashed: it is kept, as many routed ones are dropped)",
    )
    for dropped, (axes, title) in enumerate(zip(panels, titles, strict=True)):
        for at, domain in enumerate(result.axes["loss"][2][1]):
            colour = SERIES[at % len(SERIES)]
            axes.plot(ks, result["control"][:, dropped, at], "--", color=colour, marker="s", markersize=3)
            axes.plot(ks, result["loss"][:, dropped, at], color=colour, marker="o", markersize=4, label=domain or "all")
        axes.axvline(result.about["top_k"], color="0.5", linestyle=":", linewidth=1.4, label="the model's K")
        axes.set_title(title, fontsize=9)
        axes.set(xlabel="routed experts a token, K", xticks=ks)
    for axes in panels:
        _uniform_guess(axes, result)
    panels[0].set_ylabel("loss, nats a scored token")
    figure.legend(*panels[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return named(figure, result.title, result.weights)


def single_experts_figure(result: Result, *, vmax: float | None = None) -> Figure:
    """I4d: layer by expert, the mean over domains and the control beside it on one scale, and every expert against how many
    slots it serves.
    """
    layers, experts = (list(found) for _, found in result.axes["slots"])
    loss, control = result["loss"].mean(-1), result["control"].mean(-1)
    figure = Figure(figsize=(15, 2.8 + 0.22 * len(layers)), layout="constrained")
    panels = figure.subplots(1, 3, width_ratios=[1.3, 1.3, 1])
    scale = around_zero([loss, control], vmax)
    for axes, value, title in ((panels[0], loss, "without the expert"), (panels[1], control, "control: as many random slots")):
        drawn = by_layer(axes, value, scale, layers, title)
        axes.set(xlabel="expert", ylabel="decoder layer")
    over = max(np.abs(loss).max(), np.abs(control).max()) > float(scale.vmax or 0)
    figure.colorbar(drawn, ax=list(panels[:2]), label="nats a token more", extend="both" if over else "neither", fraction=0.04)
    panels[2].scatter(result["slots"], control, s=14, color="0.6", marker="s", label="random slots, as many")
    panels[2].scatter(result["slots"], loss, s=18, color=SERIES[0], label="an expert")
    panels[2].axvline(result.chance["slots"], color="#D55E00", linestyle="--", linewidth=1, label="even load")
    panels[2].axhline(0, color="0.3", linewidth=0.8)
    panels[2].set(xlabel="share of the layer's slots", ylabel="nats a token more")
    panels[2].xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[2].set_xlim(left=0)
    panels[2].legend(fontsize=8)
    where = f"{result.about['scenes']} scenes a family: {', '.join(result.axes['loss'][2][1])}; {len(experts)} experts a layer"
    return named(figure, f"{result.title}\n{where}", result.weights)


def token_ablation_figure(result: Result) -> Figure:
    """I5: formerly right answers now wrong, a group of bars a domain; random controls are hatched."""
    names, domains = (list(found) for _, found in result.axes["wrong"])
    figure = Figure(figsize=(max(10.0, 5.0 + 1.9 * len(domains)), 4.8), layout="constrained")
    axes = figure.subplots()
    width = 0.85 / len(names)
    styles = _bar_styles(names)
    for at, name in enumerate(names):
        place = np.arange(len(domains)) + (at - (len(names) - 1) / 2) * width
        count = np.nanmean(result["tokens"][at])
        axes.bar(place, result["wrong"][at], width * 0.92, label=f"{name} ({count:.1f} tokens)", **styles[at])
        for x, value in zip(place, result["wrong"][at], strict=True):
            if value == 0:
                axes.plot([x], [0.006], marker="_", color="0.2", markersize=6)  # measured, and nothing
    axes.set_xticks(range(len(domains)), [domain or "all" for domain in domains])
    axes.set(ylabel="right answers that turn wrong", ylim=(0, 1.02))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, loc="outside right center")
    count = f"{result.about['trials']} trials, {result.about['right_before']} right before"
    title = f"{result.title}\n{count}; hatched: random control"
    return named(figure, title, result.weights)


def _bar_styles(names: Sequence[str]) -> list[dict]:
    fill = dict(zip([name for name in names if "random" not in name], SERIES, strict=False))
    styles, last = [], SERIES[0]
    for name in names:
        last = fill.get(name, last)
        random = "random" in name
        styles.append({"color": "white" if random else last, "hatch": "////" if random else None, "edgecolor": "0.35"})
    return styles


def dropping_figure(result: Result) -> Figure:
    """I5, FastV: right answers against the share of visual tokens dropped, a panel a domain."""
    shares, domains = (list(found) for _, found in result.axes["right"])
    figure = Figure(figsize=(3.6 * len(domains) + 0.8, 3.9), layout="constrained")
    panels = figure.subplots(1, len(domains), sharey=True, squeeze=False)[0]
    lines = (
        ("right", SERIES[0], "-", "o", "least attended"),
        ("random", "0.5", "-", "s", "random, as many"),
        ("most attended", SERIES[1], "--", "^", "most attended"),
    )
    for at, (axes, domain) in enumerate(zip(panels, domains, strict=True)):
        for name, colour, style, marker, label in lines:
            axes.plot(shares, result[name][:, at], style, color=colour, marker=marker, markersize=5, label=label)
        axes.set_title(domain or "all", fontsize=9)
        axes.set(xlabel="visual tokens dropped", ylim=(-0.02, 1.02), xlim=(-0.02, 1.02))
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set_ylabel("right answers")
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].legend(fontsize=8, title="dropped", title_fontsize=8)
    return named(figure, f"{result.title}; {result.about['trials']} trials", result.weights)


def _by_domain(axes: Axes, result: Result, name: str, x: Sequence[float], label: str, *, control: str, what: str) -> None:
    for at, domain in enumerate(result.axes[name][1][1]):
        colour = SERIES[at % len(SERIES)]
        domain = domain or "all"
        axes.plot(x, result[name][:, at], color=colour, marker="o", markersize=4, label=f"{domain}: {label}")
        axes.plot(x, result[control][:, at], "--", color=colour, marker="s", markersize=3, label=f"{domain}: {what}")
    axes.set_ylim(bottom=0)


def _uniform_guess(axes: Axes, result: Result) -> None:
    """The chance line, on the scale of the losses: it lies above most of them, and says so in the legend."""
    chance, top = float(result.chance["loss"]), axes.get_ylim()[1]
    label = f"by chance: a uniform guess, {chance:.1f}{' (off the scale)' if chance > top else ''}"
    axes.axhline(chance, color="0.35", linestyle="--", linewidth=1, label=label)
    axes.set_ylim(0, top)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _short(name: str) -> str:
    name = name.replace("$", r"\$").replace("\n", " ")
    return name if len(name) <= SHORT else name[: SHORT - 1] + "…"
