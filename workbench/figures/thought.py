"""Figures of thoughts: what sentences do, where they hesitate, what happens when they are cut (C1, C2, C3, C7, C8)."""

from __future__ import annotations

from collections.abc import Sequence
from textwrap import wrap
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from workbench.analyses.cues import CLASSES, segments
from workbench.analyses.result import Result
from workbench.plots import COLOURS, colour_bar, named
from workbench.runs import Run

# Okabe and Ito's colours, in the order of CLASSES
CLASS_COLOURS = dict(
    zip(CLASSES, ("#0072B2", "#56B4E9", "#009E73", "#F0E442", "#D55E00", "#CC79A7", "#BBBBBB"), strict=True)
)
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKS = "osD^vPX*"
CHANCE = {"color": "0.35", "linestyle": "--", "linewidth": 1}


def thought_strip(runs: Sequence[Run], most: int = 12) -> Figure:
    """C1: one bar a run, from its first thought token to its last, coloured by what each sentence does."""
    found = [(run, parts) for run in runs if (parts := segments(run))][:most]
    if not found:
        raise ValueError("none of the runs has a thought to draw; give runs that have one")
    figure = Figure(figsize=(11, 1.6 + 0.55 * len(found)), layout="constrained")
    axes = figure.subplots()
    longest = max(parts[-1].stop - parts[0].start for _, parts in found)
    for row, (_, parts) in enumerate(found):
        for part in parts:
            left, width = part.start - parts[0].start, part.stop - part.start
            axes.barh(row, width, left=left, height=0.8, color=CLASS_COLOURS[part.cue.kind], edgecolor="white")
            room = int(105 * width / longest)
            lines = wrap(part.text.replace("$", r"\$"), max(room, 3))
            if lines and room >= 6 and len(lines) <= 2:
                axes.text(left + width / 2, row, "\n".join(lines), ha="center", va="center", fontsize=7)
    asked = ["\n".join(wrap(run.question, 34)[:2]).replace("$", r"\$") for run, _ in found]
    axes.set_yticks(range(len(found)), asked, fontsize=7)
    axes.set(xlim=(0, longest), ylim=(len(found) - 0.5, -0.5), xlabel="thought token")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    kinds = [kind for kind in CLASSES if any(part.cue.kind == kind for _, parts in found for part in parts)]
    patches = [Patch(color=CLASS_COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=patches, loc="outside upper right", ncols=len(kinds), fontsize=8, frameon=False)
    return named(figure, "What the sentences of each thought do", found[0][0].model_name)


def thought_classes_figure(result: Result) -> Figure:
    """C1: share of each class, where in the thought it stands, and which class follows which."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    bars, areas, matrix = figure.subplots(1, 3, width_ratios=[1, 1.2, 1.2])
    place, share = np.arange(len(CLASSES)), result["share"]
    bars.bar(place, share, color=list(CLASS_COLOURS.values()), edgecolor="0.3", linewidth=0.5)
    bars.vlines(place, result["share_low"], result["share_high"], color="black", linewidth=1.2)
    bars.set_xticks(place, CLASSES, rotation=45, ha="right", rotation_mode="anchor")
    bars.set_title("share of thought tokens\n(bars: 95% over runs)", fontsize=9)
    _percent(bars)
    parts = np.asarray(result.axes["profile"][1][1], float)
    shown = [at for at in range(len(CLASSES)) if share[at] > 0]
    layers = np.nan_to_num(result["profile"][shown])
    colours = [CLASS_COLOURS[CLASSES[at]] for at in shown]
    areas.stackplot(parts, layers, colors=colours, labels=[CLASSES[at] for at in shown], edgecolor="white", linewidth=0.4)
    areas.set(xlim=(parts[0], parts[-1]), xlabel="part of the thought")
    areas.set_title("from the start of the thought to its end", fontsize=9)
    areas.legend(fontsize=8, loc="lower left")
    areas.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _percent(areas)
    last = [at for at in range(len(CLASSES)) if not np.isnan(result["follows"][at]).all()]
    base = np.asarray(result.chance["follows"])
    seen = [at for at in range(len(CLASSES)) if base[at] > 0]
    if last:
        values = np.vstack([result["follows"][np.ix_(last, seen)], base[None, seen]])
        image = matrix.imshow(values, norm=Normalize(0, 1), cmap=COLOURS, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            colour = "white" if value < 0.6 else "black"
            matrix.text(column, row, f"{value:.0%}", ha="center", va="center", color=colour, fontsize=9)
        matrix.axhline(len(last) - 0.5, color="white", linewidth=3)
        matrix.set_xticks(range(len(seen)), [CLASSES[at] for at in seen])
        matrix.set_yticks(range(len(last) + 1), [*(f"after {CLASSES[at]}" for at in last), "by chance"])
        matrix.set_title("class of the next sentence", fontsize=9)
        bar = colour_bar(figure, image, matrix, "share of next sentences", above=False)
        bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    else:
        matrix.set_axis_off()
    reflection, repeated = np.nanmean(result["reflection"]), np.nanmean(result["rumination"])
    n = result.about["ngram"]
    title = (
        f"{result.title}; {result.about['with_thought']} thoughts. Reflections per 1,000 tokens: {reflection:.1f}; repeated "
        f"{n}-grams: {repeated:.1%} (shuffled words: {np.nanmean(result.chance['rumination']):.1%})"
    )
    return named(figure, title, result.weights)


def token_entropy_figure(result: Result) -> Figure:
    """C7: the entropies with the forking cut, forks by class and by word, and what the routing did."""
    figure = Figure(figsize=(13, 7), layout="constrained")
    (histogram, classes), (words, routing) = figure.subplots(2, 2)
    entropy, forking = result["entropy"], result["forking"].astype(bool)
    cut = float(entropy[forking].min())
    kinds = [entropy[~forking], entropy[forking]]
    histogram.hist(kinds, bins=30, stacked=True, color=["0.65", LINES[1]], label=["others", "forking"])
    histogram.axvline(cut, **CHANCE)
    histogram.set(xlabel="entropy of the next token, nats", ylabel="thought tokens", yscale="log")
    histogram.set_title(f"forking: {cut:.2f} nats or more", fontsize=9)
    histogram.legend(fontsize=8)
    shown = [at for at, count in enumerate(result["class_tokens"]) if count]
    for at in shown:
        share, count = result["forking_share"][at], result["class_tokens"][at]
        classes.bar(f"{CLASSES[at]}\n{count} tokens", share, color=CLASS_COLOURS[CLASSES[at]])
    chance = float(result.chance["forking_share"])
    classes.axhline(chance, label=f"by chance, {chance:.0%}", **CHANCE)
    classes.set_ylim(0, max(2 * chance, 1.2 * float(np.nanmax(result["forking_share"]))))
    classes.set_title("share of each class' tokens that fork", fontsize=9)
    classes.legend(fontsize=8)
    classes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    names = [str(word).replace("$", r"\$") for word in result.axes["word_entropy"][0][1]]
    words.bar(range(len(names)), result["word_entropy"], color=LINES[1])
    words.set_xticks(range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor")
    for place, (mean, count) in enumerate(zip(result["word_entropy"], result["word_count"], strict=True)):
        words.text(place, mean, f"{count}x", ha="center", va="bottom", fontsize=7)
    words.set_ylabel("mean entropy, nats")
    words.set_title("tokens that fork most often (how often)", fontsize=9)
    layers = [str(layer) for layer in result.axes["switch_corr"][0][1]]
    place = np.arange(len(layers))
    both = ((-0.2, LINES[0], "switch", "experts that changed"), (0.2, LINES[2], "router", "router entropy"))
    for shift, colour, name, label in both:
        routing.bar(place + shift, result[f"{name}_corr"], 0.38, color=colour, label=label)
        null = result[f"{name}_corr_null"]
        routing.errorbar(place + shift, np.zeros(len(layers)), null, fmt="none", ecolor="0.35", capsize=3, linewidth=1)
    routing.axhline(0, color="black", linewidth=0.8)
    routing.set_xticks(place[:: -(-len(layers) // 14)], layers[:: -(-len(layers) // 14)])
    routing.set(ylim=(-1, 1), xlabel="decoder layer", ylabel="rank correlation")
    routing.set_title("entropy of the token and its routing (whiskers: 95% of shufflings)", fontsize=9)
    routing.legend(fontsize=8)
    return named(figure, f"{result.title}; {len(entropy)} tokens of {result.about['runs']} runs", result.weights)


def thinking_efficiency_figure(result: Result) -> Figure:
    """C8: the three measures, and each thought's length with the place of its first right answer."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, thoughts = figure.subplots(1, 2, width_ratios=[1, 1.6])
    names = [str(name).replace(" (", "\n(") for name in result.axes["measures"][0][1]]
    bars.bar(names, result["measures"], color=LINES[:3])
    for place, value in enumerate(result["measures"]):
        bars.text(place, np.nan_to_num(value), "none" if np.isnan(value) else f"{value:.2f}", ha="center", va="bottom")
    bars.set_ylim(0, 1.08)
    bars.tick_params(axis="x", labelsize=8)
    order = [at for at in np.argsort(-result["tokens"], kind="stable") if not np.isnan(result["tokens"][at])]
    right = result["right"][order].astype(bool)
    place = np.arange(len(order))
    thoughts.bar(place, result["tokens"][order], color=np.where(right, LINES[5], "0.75"), label="_")
    thoughts.scatter(place, result["first_right"][order], marker="_", s=60, color="black", zorder=3)
    handles: list[Any] = [Patch(color=LINES[5], label="right in the end"), Patch(color="0.75", label="wrong in the end")]
    thoughts.legend(handles=handles, title="black: first right answer", fontsize=8, title_fontsize=8)
    thoughts.set(xlabel="thoughts, longest first", ylabel="thought tokens")
    thoughts.xaxis.set_major_locator(MaxNLocator(integer=True))
    return named(figure, f"{result.title}; {result.about['with_thought']} thoughts", result.weights)


def length_reward_figure(result: Result) -> Figure:
    """C8: reward against length within the group; wrong replies are crosses."""
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    right = result["right"].astype(bool)
    length, reward = result["length"].astype(float), result["reward"]
    axes.plot([length.min(), length.max()], [0.5, -0.5], label="lambda", **CHANCE)
    for kind, mark, colour, label in ((right, "o", LINES[0], "right"), (~right, "X", LINES[1], "wrong: min(0, lambda)")):
        places, counts = np.unique(np.stack([length[kind], reward[kind]]), axis=1, return_counts=True)
        axes.scatter(*places, s=70, marker=mark, color=colour, label=f"{label}, {kind.sum()} replies", zorder=3)
        for x, y, count in zip(*places, counts, strict=True):
            if count > 1:
                axes.annotate(f"{count}x", (x, y), textcoords="offset points", xytext=(7, 5), fontsize=8)
    axes.set(xlabel="tokens of the reply", ylabel="length reward", ylim=(-0.6, 0.6))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=8)
    return named(figure, result.title, result.weights)


def image_reliance_figure(result: Result) -> Figure:
    """C8: attention on the picture over the thought: the mean with its chance line, and layer by layer."""
    figure = Figure(figsize=(11, 4), layout="constrained")
    mean, layers = figure.subplots(1, 2)
    parts = np.asarray(result.axes["mean"][0][1], float)
    mean.plot(parts, result["mean"], marker="o", color=LINES[0], label="mean over layers and heads")
    mean.fill_between(parts, result["mean_low"], result["mean_high"], color=LINES[0], alpha=0.2, linewidth=0)
    mean.plot(parts, np.asarray(result.chance["mean"]), label="by chance: share of positions", **CHANCE)
    mean.set(xlim=(0, 1), ylim=(0, 1), xlabel="part of the thought", ylabel="attention on the picture")
    mean.legend(fontsize=8)
    mean.set_title("band: 95% over runs", fontsize=9)
    mass = result["mass"]
    image = layers.imshow(
        mass, norm=Normalize(0, 1), cmap=COLOURS, aspect="auto", origin="lower", extent=(0, 1, -0.5, len(mass) - 0.5)
    )
    layers.yaxis.set_major_locator(MaxNLocator(integer=True))
    layers.set(xlabel="part of the thought", ylabel="decoder layer")
    colour_bar(figure, image, layers, "attention on the picture", above=False)
    for axes in (mean, layers):
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return named(figure, f"{result.title}; {result.about['runs']} runs", result.weights)


def thought_budget_figure(result: Result) -> Figure:
    """C2: accuracy under each budget, family by family, with the share of thoughts that fit it."""
    families, budgets = result.axes["accuracy"][0][1], result.axes["accuracy"][1][1]
    columns = min(3, len(families))
    rows = -(-len(families) // columns)
    figure = Figure(figsize=(4.2 * columns + 2.0, 3.3 * rows + 0.8), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True)
    place = np.arange(len(budgets))
    for at, family in enumerate(families):
        axes = panels.flat[at]
        axes.bar(place[:-1], result["within"][at], color="0.85", label="free thoughts that fit")
        axes.errorbar(place, result["accuracy"][at], _whiskers(result, "accuracy", at), color=LINES[0], marker="o", capsize=3,
                      label="right (95%)")  # fmt: skip
        axes.plot(place, np.asarray(result.chance["accuracy"])[at], label="best constant answer", **CHANCE)
        axes.set_xticks(place, [name.replace(" ", "\n") for name in budgets])
        axes.set(ylim=(0, 1.03), xlabel="thought tokens allowed")
        axes.set_title(str(family), fontsize=10)
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in panels.flat[len(families) :]:
        axes.set_axis_off()
    handles, names = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=8, frameon=False)
    return named(figure, f"{result.title}; {result.about['questions']} questions, greedy", result.weights)


def early_answering_figure(result: Result) -> Figure:
    """C3: how often the answer stays that of the whole thought, and how often it is right, for each variant."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    match, right = figure.subplots(1, 2, sharey=True)
    cuts = np.asarray(result.axes["match"][1][1], float)
    for at, variant in enumerate(result.axes["match"][0][1]):
        x = cuts + 0.008 * (at - 1.5)
        style: dict[str, Any] = {"color": LINES[at], "marker": MARKS[at]}
        label = f"{variant}: AOC {result['aoc'][at]:.2f}"
        match.errorbar(x, result["match"][at], _whiskers(result, "match", at), capsize=3, label=label, **style)
        right.plot(x, result["accuracy"][at], label=str(variant), **style)
    titles = ((match, "match", "same answer as with the whole thought (95%)"), (right, "accuracy", "right answer"))
    for axes, name, title in titles:
        axes.axhline(float(result.chance[name]), label="by chance" if name == "match" else "best constant", **CHANCE)
        axes.set(xlim=(-0.04, 1.04), ylim=(0, 1.05), xlabel="part of the thought kept, reworded or before the mistake")
        axes.set_title(title, fontsize=9)
        axes.legend(fontsize=8)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    return named(figure, f"{result.title} {result.about['with_thought']} thoughts, greedy", result.weights)


def answer_confidence_figure(result: Result) -> Figure:
    """C3: probability of the right answer, and of the model's own, after each part of the thought; grey: another's thought."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    cuts = np.asarray(result.axes["right"][1][1], float)
    titles = {"right": "the right answer", "own": "the answer it gives after the whole thought"}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        for at, (whose, colour, mark) in enumerate(zip(result.axes[name][0][1], (LINES[0], "0.55"), MARKS, strict=False)):
            label = f"after {whose} thought{'' if at == 0 else ', as long'}"
            axes.plot(cuts, result[name][at], color=colour, marker=mark, label=label)
            ends = result[f"{name}_low"][at], result[f"{name}_high"][at]
            axes.fill_between(cuts, *ends, color=colour, alpha=0.2, linewidth=0)
        label = {"right": "best constant answer", "own": "answers to two questions agree"}[name]
        axes.axhline(float(result.chance[name]), label=label, **CHANCE)
        axes.set(xlim=(-0.04, 1.04), ylim=(0, 1.05), xlabel="part of the thought before the answer")
        axes.set_title(f"probability of {title} (band: 95%)", fontsize=9)
        axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.legend(fontsize=8)
    return named(figure, f"{result.title}; {result.about['with_thought']} thoughts, greedy", result.weights)


def picture_removed_figure(result: Result) -> Figure:
    """C8: accuracy when the picture goes after a part of the thought."""
    figure = Figure(figsize=(7, 4.4), layout="constrained")
    axes = figure.subplots()
    cuts = np.asarray(result.axes["accuracy"][1][1], float)
    for at, how in enumerate(result.axes["accuracy"][0][1]):
        x = cuts + 0.008 * (at - 1)
        style: dict[str, Any] = {"color": LINES[at], "marker": MARKS[at], "capsize": 3, "label": how}
        axes.errorbar(x, result["accuracy"][at], _whiskers(result, "accuracy", at), **style)
    axes.axhline(float(result.chance["accuracy"]), label="best constant answer", **CHANCE)
    axes.set(xlim=(-0.04, 1.04), ylim=(0, 1.05), ylabel="right answers (95%)")
    axes.set_xlabel("part of the thought after which the picture goes")
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8, title="picture", title_fontsize=8)
    return named(figure, f"{result.title}; {result.about['with_thought']} thoughts, greedy", result.weights)


def _whiskers(result: Result, name: str, at: int) -> np.ndarray:
    """Distances of the ends of an interval from its value, as errorbar wants them."""
    value = result[name][at]
    return np.maximum(np.stack([value - result[f"{name}_low"][at], result[f"{name}_high"][at] - value]), 0)


def _percent(axes: Axes) -> None:
    axes.set_ylim(0, 1)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
