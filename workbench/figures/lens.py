"""Figures of the logit lens, on words and on patches, of probes, of similarity and of weight spectra (P1, P3, P4, P5)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter

from kimi_vl_ref.images import Picture
from workbench.analyses.result import Result
from workbench.plots import COLOURS, colour_bar, edges, faint, named, show_picture

LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
MARKS = "osD^vPX"
CHANCE = {"color": "0.35", "linestyle": "--", "linewidth": 1}
SHOWN = 28  # positions of one table


def logit_lens_figure(result: Result, start: int = 0) -> Figure:
    """P1: each layer's likeliest next token at up to 28 positions from the `start`-th; below, how far it is from the end.

    Layers run upwards. A frame marks the first layer that says what the last one says. Raises ValueError for a start past
    the end.
    """
    count = min(SHOWN, len(result.axes["prob"][1][1]) - start)
    if start < 0 or count < 1:
        raise ValueError(f"start={start} leaves no position of {len(result.axes['prob'][1][1])}; use a smaller one")
    part = slice(start, start + count)
    words, probs, kl = result["words"][:, part, 0], result["probs"][:, part, 0], result["kl"][:, part]
    names, tokens = result.axes["prob"][0][1], result.about["tokens_shown"][part]
    figure = Figure(figsize=(2.2 + 0.62 * count, 3.4 + 0.36 * len(names)), layout="constrained")
    table, curve = figure.subplots(2, 1, height_ratios=[max(2.0, 0.34 * len(names)), 1.6], sharex=True)
    image = table.imshow(probs, norm=Normalize(0, 1), cmap=COLOURS, aspect="auto", origin="lower")
    for (row, column), word in np.ndenumerate(words):
        colour = "white" if probs[row, column] < 0.6 else "black"
        table.text(column, row, _short(word), ha="center", va="center", fontsize=7, color=colour)
    for column, row in enumerate(result["first"][part]):
        table.add_patch(_frame(column, int(row)))
    table.set_yticks(range(len(names)), names, fontsize=8)
    table.set_ylabel("after decoder layer")
    table.set_title("likeliest next token; frame: first layer that agrees with the last", fontsize=9)
    bar = colour_bar(figure, image, table, "its probability", above=False)
    bar.ax.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for at, (row, name) in enumerate(zip(kl, names, strict=True)):
        shade = 0.85 * (1 - at / max(1, len(names) - 1))
        label = str(name) if at in (0, len(names) // 2, len(names) - 1) else "_"
        curve.plot(range(count), row, color=str(shade), linewidth=1.3, label=label)
    curve.plot(range(count), np.asarray(result.chance["kl"])[0, part], label="a uniform guess", **{**CHANCE, "color": LINES[1]})
    curve.set(ylabel="KL from last, nats", ylim=(0, None))
    curve.legend(fontsize=7, ncols=4, title="after layer", title_fontsize=7)
    curve.set_xticks(range(count), [_short(token) for token in tokens])
    _turn(curve)
    curve.set_xlabel("token just read")
    return named(figure, result.title, result.weights)


def patch_words_map(result: Result, picture: Picture, layer: str | int, *, vmax: float | None = None) -> Figure:
    """P1: the lens' likeliest word on each visual token of one picture, from `logit_lens` at all its visual tokens.

    layer: a name along the result's layer axis, such as "embedded" or 3; colours run from 0 to `vmax` (default 1). Raises
    ValueError for a result that does not fit the picture, or for a layer that it lacks.
    """
    names = [str(name) for name in result.axes["prob"][0][1]]
    grid = picture.grid
    if str(layer) not in names:
        raise ValueError(f"layer {layer!r} is none of {', '.join(names)}; choose one of these")
    if result["prob"].shape[1] != grid.token_count:
        raise ValueError(
            f"the result has {result['prob'].shape[1]} positions and the picture {grid.token_count} visual tokens; "
            "give logit_lens the positions of this picture"
        )
    at = names.index(str(layer))
    probs, words = grid.token_heat(result["probs"][at, :, 0]), grid.token_heat(result["words"][at, :, 0])
    width, height = grid.original
    figure = Figure(figsize=(11, float(np.clip(5.0 * height / width, 2.2, 7)) + 1.0), layout="constrained")
    seen, read = figure.subplots(1, 2)
    show_picture(seen, picture.image, grid, lines="0.45")
    show_picture(read, faint(picture.image), grid, lines="white")
    scale = Normalize(0, vmax or 1)
    x, y = edges(grid, grid.merge)
    mesh = read.pcolormesh(x, y, probs, norm=scale, cmap=COLOURS, alpha=0.75, linewidth=0, rasterized=True)
    size = float(np.clip(60 / len(x), 4, 9))
    for (row, column), word in np.ndenumerate(words):
        if row + 1 < len(y) and column + 1 < len(x) and x[column + 1] - x[column] > 0.5 * (x[1] - x[0]):  # room for a word
            bright = probs[row, column] > 0.6 * float(scale.vmax or 1)
            centre = (x[column] + x[column + 1]) / 2, (y[row] + y[row + 1]) / 2
            read.text(*centre, _short(word), ha="center", va="center", fontsize=size, color="black" if bright else "white")
    seen.set_title(f"{width} x {height} pixels", fontsize=9)
    read.set_title(f"likeliest word, {'embedded' if layer == 'embedded' else f'after decoder layer {layer}'}", fontsize=9)
    colour_bar(figure, mesh, read, "its probability", above=float(probs.max()) > float(scale.vmax or 1))
    return named(figure, f"The lens on patches: {result.title.lower()}", result.weights)


def patch_words_figure(result: Result) -> Figure:
    """P1: share of object tokens that the lens names, layer by layer, against the names in other pictures."""
    names = [str(name) for name in result.axes["share"][1][1]]
    figure = Figure(figsize=(7.5, 4), layout="constrained")
    axes = figure.subplots()
    chance = np.asarray(result.chance["share"])
    for at, kind in enumerate(result.axes["share"][0][1]):
        axes.plot(names, result["share"][at], color=LINES[at], marker=MARKS[at], label=str(kind))
        axes.plot(names, chance[at], color=LINES[at], linestyle="--", linewidth=1, label=f"{kind}, another picture's names")
        low, high = result["shuffled_low"][at], result["shuffled_high"][at]
        axes.fill_between(names, low, high, color=LINES[at], alpha=0.15, linewidth=0)
    axes.set(ylim=(0, 1), xlabel="after decoder layer", ylabel="visual tokens of objects")
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.legend(fontsize=8)
    told = f"{result.about['visual_tokens']} tokens of {result.about['runs']} pictures"
    return named(figure, f"{result.title}; {told}", result.weights)


def probes_figure(results: Mapping[str, Result]) -> Figure:
    """P3: accuracy and control at each site, one panel a label; small dots are splits."""
    figure = Figure(figsize=(max(5.0, 4.6 * len(results)), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for axes, (label, result) in zip(panels, results.items(), strict=True):
        names = _sites(result, "accuracy")
        for name, colour, mark in (("accuracy", LINES[0], "o"), ("control", LINES[1], "s")):
            values = result[name]
            place = np.repeat(np.arange(len(names)), values.shape[1])
            axes.plot(names, values.mean(1), color=colour, marker=mark, label=name)
            axes.plot(place, values.ravel(), ".", color=colour, alpha=0.4, markersize=4)
        axes.axhline(float(result.chance["accuracy"]), label="commonest label", **CHANCE)
        axes.set_title(f"{label}: {result.about['labels']} labels, {result.about['samples']} samples", fontsize=9)
        axes.set_ylim(0, 1.03)
        _turn(axes)
    panels[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    panels[0].set_ylabel("right in unseen scenes")
    panels[0].legend(fontsize=8)
    one = next(iter(results.values()))
    return named(figure, "What a linear probe reads, and what it can memorise (control)", one.weights)


def similarity_figure(result: Result) -> Figure:
    """P4: the CKA of every two sites, and what random pairing gives."""
    names = _sites(result, "cka")
    figure = Figure(figsize=(4.2 + 0.32 * len(names), 3.0 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(result["cka"], norm=Normalize(0, 1), cmap=COLOURS, origin="lower")
    if len(names) <= 12:
        for (row, column), value in np.ndenumerate(result["cka"]):
            colour = "white" if value < 0.6 else "black"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    _turn(axes)
    chance = float(np.nanmean(result.chance["cka"]))
    bar = colour_bar(figure, image, axes, "linear CKA (line: random pairing)", above=False)
    bar.ax.axhline(chance, color="white", linewidth=1.5)
    return named(figure, f"{result.title}, {result.about['samples']} samples; random pairing {chance:.2f}", result.weights)


def modality_gap_figure(result: Result) -> Figure:
    """P4: the gap in units of the stream's own length, and the cosine of the two means, over depth."""
    names = _sites(result, "gap")
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    titles = {"relative": "distance of the means / length of a token", "cosine": "cosine of the means"}
    for axes, (name, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        axes.plot(names, result[name], marker="o", color=LINES[0], label="pictures and words")
        axes.plot(names, np.asarray(result.chance[name]), label="labels dealt out anew", **CHANCE)
        axes.set_title(title, fontsize=9)
        axes.set_ylim((0, None) if name == "relative" else (-1, 1.05))
        axes.legend(fontsize=8)
        _turn(axes)
    told = f"{result.about['visual_tokens']} visual and {result.about['text_tokens']} text tokens"
    return named(figure, f"{result.title}; {told}", result.weights)


def weight_spectrum_figure(result: Result) -> Figure:
    """P5: a dot a matrix, a box a group of five or more; dashes are Gaussian matrices of the same shapes."""
    labels = [str(label).split(" | ")[0] for label in result.axes["entropy"][0][1]]
    groups = list(dict.fromkeys(labels))
    entropy, chance = result["entropy"], np.asarray(result.chance["entropy"])
    figure = Figure(figsize=(2.5 + 1.05 * len(groups), 4.4), layout="constrained")
    axes = figure.subplots()
    rng = np.random.default_rng(0)
    for place, group in enumerate(groups):
        at = [index for index, label in enumerate(labels) if label == group]
        if len(at) >= 5:
            axes.boxplot(entropy[at], positions=[place], widths=0.55, showfliers=False, medianprops={"color": LINES[0]})
        axes.plot(place + rng.uniform(-0.18, 0.18, len(at)), entropy[at], ".", color=LINES[0], alpha=0.5, markersize=4)
        label = "_" if place else "Gaussian of this shape"
        axes.hlines(np.unique(chance[at].round(4)), place - 0.35, place + 0.35, label=label, **CHANCE)
    counted = [f"{group} ({labels.count(group)})" for group in groups]
    axes.set_xticks(range(len(groups)), counted, rotation=30, ha="right", rotation_mode="anchor")
    low = min(float(np.nanmin(entropy)), float(chance.min()))
    axes.set(xlim=(-0.6, len(groups) - 0.4), ylim=(max(0.0, low - 0.08), 1.005), ylabel="SVD entropy (1: all directions alike)")
    axes.legend(fontsize=8)
    return named(figure, f"{result.title}, {len(entropy)} matrices", result.weights)


def muon_update_figure(result: Result) -> Figure:
    """P5: root mean square of a step, Muon and AdamW, each with its formula's value."""
    names = [str(name) for name in result.axes["rms"][1][1]]
    figure = Figure(figsize=(max(7.0, 2.5 + 0.85 * len(names)), 3.8), layout="constrained")
    axes = figure.subplots()
    place = np.arange(len(names))
    formula = np.asarray(result.chance["rms"])
    for at, optimiser in enumerate(result.axes["rms"][0][1]):
        x = place + 0.4 * at - 0.2
        axes.bar(x, result["rms"][at], 0.36, color=LINES[at], label=str(optimiser))
        axes.hlines(formula[at], x - 0.19, x + 0.19, color="black", linewidth=1.6, label="formula" if not at else "_")
    if len(names) > 4:
        axes.set_xticks(place, names, rotation=30, ha="right", rotation_mode="anchor", fontsize=8)
    else:
        axes.set_xticks(place, names)
    axes.set_ylim(0, 1.3)
    axes.set_ylabel("root mean square at learning rate 1")
    axes.legend(fontsize=8, ncols=3, loc="upper center")
    return named(figure, f"{result.title}; gradient rank: {result.about['rank']}", result.weights)


def _short(word: object) -> str:
    text = str(word).strip() or repr(str(word))
    text = text if len(text) <= 9 else f"{text[:8]}…"
    return text.replace("$", r"\$")


def _frame(column: int, row: int) -> Rectangle:
    return Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, fill=False, edgecolor=LINES[5], linewidth=1.6)


def _sites(result: Result, name: str) -> list[str]:
    sites = [str(site) for site in result.axes[name][0][1]]
    return [site.replace("decoder.layers.", "layer ").replace("vision.layers.", "eye ") for site in sites]


def _turn(axes: Axes) -> None:
    axes.tick_params(axis="x", labelsize=8)
    for label in axes.get_xticklabels():
        label.set(rotation=45, ha="right", rotation_mode="anchor")
