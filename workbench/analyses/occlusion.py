"""Occlusion, and how good a map of a picture is: deletion and insertion, pointing game, overlap with the target (paper T3).

A map has one value a visual token, (rows, columns) of the picture; more means "this matters more". Whatever is covered is
covered with the processor's mean colour, mid-grey in every Kimi-VL checkpoint. Letters: N patches, M visual tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.images import PatchGrid
from workbench.rows import decoder_rows
from workbench.tape import attach

from .result import Result
from .trials import Box, Trial, about_trials, read, token_logprobs

MapMaker = Callable[[Trial], np.ndarray]
COVER = 0.2  # a token belongs to the target if this share of it, or of the box, is covered


def occlusion(
    model: KimiVL, trial: Trial, *, model_name: str, side: int = 28, stride: int = 14, batch: int = 32
) -> Result:
    """How much log-probability of the reply is lost while a grey box hides a part of the picture (arXiv 1311.2901).

        result = occlusion(model, trial, model_name="study", side=28, stride=14)
        result["loss"]              # (rows, columns) nats, positive where hiding hurts

    side, stride: of the sliding box, in pixels of what the model sees (after resizing and padding). Each visual token gets
    the mean over the boxes that touch it, weighted by how much of it they cover. Raises ValueError for a trial without
    exactly one picture, or a box that does not fit.
    """
    grid, pixels = _picture(model, trial)
    height, width = pixels.shape[1:]
    if side < 1 or stride < 1 or side > min(height, width):
        raise ValueError(f"a box of side={side} and stride={stride} does not fit {width} x {height} pixels; make it smaller")
    corners = [(y, x) for y in _starts(height, side, stride) for x in _starts(width, side, stride)]
    masks = torch.zeros(len(corners), height, width, dtype=torch.bool, device=pixels.device)
    for mask, (y, x) in zip(masks, corners, strict=True):
        mask[y : y + side, x : x + side] = True
    whole = _logprobs(model, trial, pixels[None], batch)[0]
    losses = whole - _logprobs(model, trial, (pixels.masked_fill(mask, 0) for mask in masks), batch)
    rows, columns = grid.token_grid
    covered = rearrange(masks.double(), "n (r a) (c b) -> n r c a b", r=rows, c=columns).mean((-1, -2)).cpu().numpy()
    spread = np.einsum("n,nrc->rc", losses, covered) / np.maximum(covered.sum(0), 1e-12)
    return Result(
        "occlusion",
        "Log-probability of the reply lost while a grey box hides this place, nats",
        {"loss": spread},
        {"loss": [("row", range(rows)), ("column", range(columns))]},
        about=about_trials(model, [trial], model_name, side=side, stride=stride, boxes=len(corners), log_probability=whole),
    )


def deletion(
    model: KimiVL, trial: Trial, heat: np.ndarray, *, insert: bool = False, points: int = 12, seed: int = 0, batch: int = 32
) -> tuple[np.ndarray, np.ndarray, float]:
    """Hides the picture's cells from the most to the least important (arXiv 1806.07421): shares hidden, the reply's
    probability at each, and the area under that curve, which is low for a good map.

        shares, probabilities, area = deletion(model, trial, heat)

    insert: starts from the grey picture and uncovers instead; then high is good. heat (rows, columns) of visual tokens;
    equal values are ordered at random by `seed`, so that reading order gives no advantage. Raises ValueError.
    """
    grid, pixels = _picture(model, trial)
    heat = _checked(heat, grid)
    tie = np.random.default_rng(seed).random(heat.size)
    order = np.lexsort((tie, -heat.ravel()))  # most important first
    counts = np.unique(np.linspace(0, heat.size, min(points, heat.size + 1)).round().astype(int))

    def picture(count: int) -> Tensor:
        mask = torch.zeros(heat.size, dtype=torch.bool)
        mask[torch.from_numpy(order[:count].copy())] = True
        return pixels.masked_fill(_of_tokens(mask if not insert else ~mask, grid).to(pixels.device), 0)

    probabilities = np.exp(_logprobs(model, trial, map(picture, counts.tolist()), batch))
    shares = counts / heat.size
    return shares, probabilities, float(np.trapezoid(probabilities, shares))


def target_tokens(grid: PatchGrid, boxes: Sequence[Box]) -> np.ndarray:
    """Which visual tokens show the boxes, bool (rows, columns): those of which a fifth is covered by one, or that hold a
    fifth of one. Raises ValueError for no boxes.
    """
    if not boxes:
        raise ValueError("the trial has no target boxes; give what the answer is about as boxes=")
    hit = np.zeros(grid.token_count, bool)
    for token in range(grid.token_count):
        cell = grid.token_box(token)
        if cell is None:  # all padding
            continue
        for box in boxes:
            across = min(cell[2], box[2]) - max(cell[0], box[0])
            down = min(cell[3], box[3]) - max(cell[1], box[1])
            smaller = min((b[2] - b[0]) * (b[3] - b[1]) for b in (cell, box))
            hit[token] |= across > 0 and down > 0 and across * down >= COVER * smaller
    return hit.reshape(grid.token_grid)


def pointing(heat: np.ndarray, target: np.ndarray) -> float:
    """1 if the map's highest value lies on the target, else 0 (arXiv 1608.00507); a share where several are highest.

        pointing(np.array([[0.1, 0.9]]), np.array([[False, True]]))     # 1.0
    """
    return float(target[heat == heat.max()].mean())


def overlap(heat: np.ndarray, target: np.ndarray) -> float:
    """Intersection over union of the target and as many of the map's highest tokens as the target has.

        overlap(np.array([[3, 2, 1]]), np.array([[True, False, True]]))     # 1 of 3 tokens is in both: 1/3

    Equal values at the edge are taken as their expected share.
    """
    wanted = int(target.sum())
    edge = np.sort(heat.ravel())[::-1][wanted - 1]
    above, level = heat > edge, heat == edge
    share = (wanted - above.sum()) / level.sum()
    inside = (target & above).sum() + share * (target & level).sum()
    return float(inside / (2 * wanted - inside))


def attention_map(model: KimiVL) -> MapMaker:
    """Attention of the row that predicts the first scored token, the mean over all layers and heads.

        map_league(model, trials, {"attention": attention_map(model)}, model_name="study")
    """

    def make(trial: Trial) -> np.ndarray:
        row, seen = trial.scored[0] - 1, trial.positions("picture")
        names = [f"decoder.layers.{i}.attn.core@in" for i in range(len(model.decoder.layers))]
        with torch.no_grad(), attach(model, read=names, keep=lambda given, _: decoder_rows(given, [row])[0, :, 0]) as tape:
            read(model, trial)
        mean = torch.stack([tape.last(name) for name in names]).mean((0, 1))  # (S,)
        return trial.pictures[0].grid.token_heat(mean[seen].cpu().numpy())

    return make


def map_league(
    model: KimiVL,
    trials: Sequence[Trial],
    maps: Mapping[str, MapMaker],
    *,
    model_name: str,
    points: int = 12,
    seed: int = 0,
) -> Result:
    """Maps compared on pictures whose target is known: deletion and insertion area, pointing, overlap (paper T3).

        league = map_league(model, trials, {"attention": attention_map(model)}, model_name="study")

    maps: name -> function of a trial that gives its (rows, columns). Two controls always stand beside them: "random" and
    "centre", which prefers the middle of the picture. Value "score" (maps, measures) is the mean over trials, "each" has
    them all. Raises ValueError for trials without exactly one picture or without target boxes.
    """
    contestants = _with_controls(maps, seed)
    measures = ["deletion", "insertion", "pointing", "overlap"]
    each = np.zeros((len(contestants), len(trials), len(measures)))
    for m, make in enumerate(contestants.values()):
        for t, trial in enumerate(trials):
            grid, _ = _picture(model, trial)
            heat, target = _checked(make(trial), grid), target_tokens(grid, trial.boxes)
            areas = [deletion(model, trial, heat, insert=insert, points=points, seed=seed)[2] for insert in (False, True)]
            each[m, t] = [*areas, pointing(heat, target), overlap(heat, target)]
    names = ("map", list(contestants))
    chance = {"pointing": float(np.mean([target_tokens(t.pictures[0].grid, t.boxes).mean() for t in trials]))}
    return Result(
        "map-league",
        "How well maps of a picture show what the answer rests on (deletion: low is good; the others: high)",
        {"score": each.mean(1), "each": each},
        {
            "score": [names, ("measure", measures)],
            "each": [names, ("trial", range(len(trials))), ("measure", measures)],
        },
        chance=chance,
        about=about_trials(model, trials, model_name, seed=seed, points=points, controls=["random", "centre"]),
    )


def map_curves(
    model: KimiVL,
    trial: Trial,
    maps: Mapping[str, MapMaker],
    *,
    model_name: str,
    points: int = 12,
    seed: int = 0,
) -> Result:
    """The curves behind deletion and insertion for several maps of one picture, with the controls of `map_league` (paper T3).

        curves = map_curves(model, trial, {"attention": attention_map(model)}, model_name="study")

    probability (2, maps, points) of the reply when the most important cells are hidden ("deletion") or shown again
    ("insertion"); area (2, maps) under each curve. Raises ValueError as `deletion` does.
    """
    contestants = _with_controls(maps, seed)
    grid, _ = _picture(model, trial)
    heats = [_checked(make(trial), grid) for make in contestants.values()]
    options = {"points": points, "seed": seed}
    found = [[deletion(model, trial, heat, insert=insert, **options) for heat in heats] for insert in (False, True)]
    ways, names = ("way", ["deletion", "insertion"]), ("map", list(contestants))
    return Result(
        "map-curves",
        "The reply's probability while cells are hidden or shown again, most important first",
        {
            "probability": np.array([[one[1] for one in row] for row in found]),
            "area": np.array([[one[2] for one in row] for row in found]),
        },
        {"probability": [ways, names, ("share", found[0][0][0].tolist())], "area": [ways, names]},
        about=about_trials(model, [trial], model_name, seed=seed, points=points, controls=["random", "centre"]),
    )


def _with_controls(maps: Mapping[str, MapMaker], seed: int) -> dict[str, MapMaker]:
    rng = np.random.default_rng(seed)
    return {
        **maps,
        "random": lambda trial: rng.random(trial.pictures[0].grid.token_grid),
        "centre": lambda trial: centre_map(trial.pictures[0].grid),
    }


def centre_map(grid: PatchGrid) -> np.ndarray:
    """Highest in the middle of the picture, falling to its corners: what a map gains by liking the middle."""
    rows, columns = grid.token_grid
    y, x = np.mgrid[:rows, :columns]
    return -np.hypot((y + 0.5) / rows - 0.5, (x + 0.5) / columns - 0.5)


def _picture(model: KimiVL, trial: Trial) -> tuple[PatchGrid, Tensor]:
    """The one picture's geometry, and its pixels as the model sees them, (3, height, width)."""
    if len(trial.pictures) != 1 or trial.pixel_values is None:
        raise ValueError(f"the trial {trial.question!r} has {len(trial.pictures)} pictures; maps need exactly one")
    grid, weight = trial.pictures[0].grid, model.logits.weight
    pixels = rearrange(trial.pixel_values, "(h w) c y x -> c (h y) (w x)", h=grid.grid[0])
    return grid, pixels.to(weight.device, weight.dtype)


@torch.no_grad()
def _logprobs(model: KimiVL, trial: Trial, pictures: Iterable[Tensor], batch: int) -> np.ndarray:
    """Log-probability of the reply for each picture (3, height, width), `batch` at a time."""
    waiting, found = list(pictures), []
    side = trial.pictures[0].grid.patch_size
    for start in range(0, len(waiting), batch):
        some = torch.stack(waiting[start : start + batch])
        patches = rearrange(some, "n c (h y) (w x) -> (n h w) c y x", y=side, x=side)
        assert trial.grids is not None
        visual = model.see(patches, trial.grids.repeat(len(some), 1)).unflatten(0, (len(some), -1))
        logprobs, _ = token_logprobs(model, trial, read(model, trial, visual))
        found.append(logprobs.sum(-1).double().cpu().numpy())
    return np.concatenate(found)


def _of_tokens(mask: Tensor, grid: PatchGrid) -> Tensor:
    """bool (M,) of visual tokens -> (height, width) of pixels."""
    side = grid.patch_size * grid.merge
    return mask.reshape(grid.token_grid).repeat_interleave(side, 0).repeat_interleave(side, 1)


def _starts(length: int, side: int, stride: int) -> list[int]:
    """Where boxes begin, so that the last one ends at the edge."""
    starts = list(range(0, length - side + 1, stride))
    return starts if starts[-1] == length - side else [*starts, length - side]


def _checked(heat: np.ndarray, grid: PatchGrid) -> np.ndarray:
    heat = np.asarray(heat, float)
    if heat.shape != grid.token_grid:
        raise ValueError(f"a map of shape {heat.shape} does not fit a picture of {grid.token_grid} visual tokens")
    if not np.isfinite(heat).all():
        raise ValueError("the map has values that are not finite numbers, which have no order; replace them")
    return heat
