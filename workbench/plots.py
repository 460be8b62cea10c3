"""Pictures of what was measured: arrays or a Run in, a matplotlib Figure out. Nothing is shown or kept open.

Every figure names the weights it came from and prints the range of its colours; scales are fixed, not stretched to each map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from kimi_vl_ref.images import Picture

from .runs import Run

# light to dark, even steps to the eye, safe for colour-blind readers; starts transparent so that a picture shows through
_STOPS = [(0.0, "#fcfdbf00"), (0.15, "#fec98d70"), (0.4, "#fa7f5eb0"), (0.65, "#b63679d0"), (0.85, "#6a176ee0"), (1.0, "#1c1044f0")]
HEAT = LinearSegmentedColormap.from_list("heat", _STOPS)
_SHARE = LinearSegmentedColormap.from_list("share", ["#ffffff", "#fec98d", "#fa7f5e", "#b63679", "#6a176e", "#1c1044"])


def picture_heat(picture: Picture, heat: np.ndarray, *, vmax: float = 0.2, title: str = "", weights: str = "") -> Figure:
    """A picture under its visual-token grid, coloured by `heat` (rows, columns) on the fixed scale 0 to vmax.

    Cells lie where the patches lie, native resolution and padding included; only the part over the picture is drawn.
    """
    grid = picture.grid
    heat = np.asarray(heat, dtype=np.float32)
    if heat.shape != grid.token_grid:
        raise ValueError(f"the heat is {heat.shape}, the picture's visual tokens are {grid.token_grid}; use PatchGrid.token_heat")
    width, height = grid.original
    figure = Figure(figsize=(5.2, 5.2 * height / width * 0.86 + 0.9), layout="constrained")
    axes = figure.subplots()
    axes.imshow(np.asarray(picture.image), extent=(0, width, height, 0), interpolation="nearest")
    across = grid.patch_size * grid.merge * width / grid.resized[0]  # one token, in pixels of the original
    down = grid.patch_size * grid.merge * height / grid.resized[1]
    left, top = (-grid.offset[axis] * grid.original[axis] / grid.resized[axis] for axis in (0, 1))
    rows, columns = grid.token_grid
    extent = (-left, -left + columns * across, -top + rows * down, -top)
    shown = axes.imshow(heat, cmap=HEAT, vmin=0, vmax=vmax, extent=extent, interpolation="nearest")
    axes.set(xlim=(0, width), ylim=(height, 0), title=title)
    axes.set_xticks(np.arange(columns + 1) * across - left, labels=[])
    axes.set_yticks(np.arange(rows + 1) * down - top, labels=[])
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.grid(color="#1d2430", alpha=0.18, linewidth=0.6)
    axes.tick_params(length=0)
    bar = figure.colorbar(shown, ax=axes, orientation="horizontal", shrink=0.9, pad=0.02)
    bar.set_label("share of attention on one visual token" + (f"\n{weights}" if weights else ""), fontsize=8)
    return figure


def expert_shares(run: Run, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """For each routed layer, the share of these positions that chose each expert: (L_moe, E); a row sums to K."""
    positions = np.asarray(positions, dtype=int)
    if positions.size == 0:
        raise ValueError("no positions are chosen; take some, such as run.positions('answer')")
    chosen = run.chosen[:, positions].astype(int)  # (L_moe, n, K)
    counts = np.stack([np.bincount(layer.ravel(), minlength=run.n_experts) for layer in chosen])
    return counts / positions.size


def expert_load(run: Run, positions: Sequence[int] | np.ndarray, *, title: str = "") -> Figure:
    """Layer x expert: which experts served these positions. The line on the colour bar is what chance would give, K / E."""
    shares = expert_shares(run, positions)
    chance = run.chosen.shape[2] / run.n_experts
    layers = len(run.moe_layers)
    figure = Figure(figsize=(6.4, 0.42 * layers + 1.6), layout="constrained")
    axes = figure.subplots()
    shown = axes.imshow(shares, cmap=_SHARE, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    axes.set_yticks(range(layers), labels=[f"layer {i}" for i in run.moe_layers])
    axes.set_xticks(range(0, run.n_experts, max(1, run.n_experts // 16)))
    axes.set_xticks(np.arange(run.n_experts + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#e3e5ea", linewidth=0.8)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="expert", title=title or f"experts of {len(np.asarray(positions))} tokens")
    bar = figure.colorbar(shown, ax=axes, shrink=0.95, pad=0.02)
    bar.ax.axhline(chance, color="#2f5fd0", linewidth=2)
    bar.set_label(f"share of the tokens (chance {chance:.0%})", fontsize=8)
    figure.supxlabel(run.model_name, fontsize=8, color="#5d6675")
    return figure


def training_curve(log: Sequence[dict[str, Any]], *, title: str = "") -> Figure:
    """The loss on the assistant's words and the dense accuracies over scenes seen, from a training log."""
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    words = [(line["scenes"], line["words"]) for line in log if "words" in line]
    if words:
        left.semilogy(*zip(*words, strict=True), color="#2f5fd0", linewidth=1)
    left.set(xlabel="scenes", title="loss on the assistant's words (nats a token)")
    for name, colour in (("centre_object_acc", "#0f8a7e"), ("digits_acc", "#b0610a"), ("zone_acc", "#8c2f6b")):
        points = [(line["scenes"], line[name]) for line in log if name in line]
        if points:
            right.plot(*zip(*points, strict=True), color=colour, linewidth=1, label=name.removesuffix("_acc"))
    right.set(xlabel="scenes", title="dense heads, share right", ylim=(0, 1.02))
    right.legend(frameon=False, fontsize=8)
    figure.suptitle(title, fontsize=9)
    return figure
