"""Heads that find what is asked about, the box they point at, and attention relative to a neutral question (V8).

Recorded runs in, `Result` out. `row` says whose attention counts: "word" is the last word of the question ("where is the red
star?": star), "question" its last token, "prompt" the last token of all, a special one in a chat format, which writes the
first word. The papers take the last; in the study model the word that names a thing finds it, and the tokens after it do so
less and less. Letters: N runs, L layers, H heads. Looking at the right place does not make an answer right (arXiv 2502.17422).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .result import Result, about_runs

if TYPE_CHECKING:
    from kimi_vl_ref.images import PatchGrid
    from workbench.runs import Run

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of the picture
Heads = Sequence[tuple[int, int]]  # (layer, head)

CONTROLS = 20  # sets of random heads
LEAST = 1e-6  # float16 has 4 bits left here


def localisation_heads(
    runs: Sequence[Run], picture: int = 0, *, row: str = "word", skip: int = 2, lowest: int = 10, keep: int = 3
) -> Result:
    """V8: heads that look at the picture, and at one spot of it, whatever is asked. arXiv 2503.06287, section 3.

    mass (L, H): attention of the `row` on the picture, mean over runs; chance is the picture's share of what it
    sees. Heads before the knee of the sorted masses, past the first `skip` layers, are candidates (candidate, 0 or 1).
    entropy (L, H): spatial entropy of their maps, mean over runs, nats. picked (L, H): in which share of runs the head is
    among the `lowest` candidates by entropy (half of the candidates, where there are fewer than twice as many); chance is
    that number over the candidates. about["heads"] are the `keep` most often picked: use these fixed ones, as choosing anew
    for each picture is much worse.

        heads = localisation_heads(runs).about["heads"]
        localise(run, heads)
    """
    about = about_runs(runs, picture=picture, row=row, skip=skip)
    maps = [_maps(run, picture, row) for run in runs]  # each (L, H, rows, columns)
    mass = np.mean([each.sum((2, 3)) for each in maps], axis=0)
    cut = knee(mass.ravel())
    late = np.arange(len(mass))[:, None] >= skip
    candidate = (mass >= cut) & late
    if not candidate.any():
        raise ValueError(f"no head past layer {skip} looks at picture {picture} enough (knee {cut:.3f}); lower skip")
    entropy = np.array([[[spatial_entropy(one) for one in layer] for layer in each] for each in maps])  # (N, L, H)
    few = min(lowest, max(1, int(candidate.sum()) // 2))
    ranked = np.where(candidate, entropy, np.inf).reshape(len(runs), -1)
    first = np.argsort(ranked, axis=1, kind="stable")[:, :few]
    picked = np.stack([np.bincount(one, minlength=mass.size) for one in first]).mean(0).reshape(mass.shape)
    mean = entropy.mean(0)
    order = sorted(zip(*np.nonzero(candidate), strict=True), key=lambda at: (-picked[at], mean[at]))
    axes = [("layer", range(mass.shape[0])), ("head", range(mass.shape[1]))]
    values = {"mass": mass, "entropy": mean, "picked": picked, "candidate": candidate.astype(np.int64)}
    share = np.mean([one.pictures[picture].grid.token_count / (_position(one, row) + 1) for one in runs])
    return Result(
        "localisation-heads",
        "Heads that look at one spot of the picture: attention on it, and the spatial entropy of the map",
        values,
        dict.fromkeys(values, axes),
        chance={"mass": float(share), "picked": few / int(candidate.sum())},
        about=about | {"knee": cut, "lowest": few, "heads": [(int(layer), int(head)) for layer, head in order[:keep]]},
    )


def localise(
    run: Run, heads: Heads, picture: int = 0, *, row: str = "word", sigma: float = 1.0
) -> tuple[np.ndarray, Box]:
    """Where these heads point: the map (rows, columns) of visual tokens, and a box in pixels of the picture.

    Each head's map is smoothed by a Gaussian of `sigma` visual tokens, and they are added up. The box is that of the part
    above the mean (8-connected) that holds the most; a convex hull has the same box. Chosen before looking, from
    `localisation_heads` of other runs. Raises ValueError for a head that does not exist, or none.

        heat, box = localise(run, [(3, 1), (3, 4)])
    """
    maps = _maps(run, picture, row)
    if not heads:
        raise ValueError("there are no heads to localise with; give at least one (layer, head)")
    for layer, head in heads:
        if not (0 <= layer < maps.shape[0] and 0 <= head < maps.shape[1]):
            raise ValueError(f"head {head} of layer {layer} does not exist; the run has {maps.shape[0]} x {maps.shape[1]}")
    heat = np.sum([smoothed(maps[layer, head], sigma) for layer, head in heads], axis=0)
    parts = components(heat > heat.mean())
    numbers = range(1, int(parts.max()) + 1)
    strongest = max(numbers, key=lambda number: heat[parts == number].sum(), default=0)  # 0: the map is flat
    return heat, _box(parts == strongest, run.pictures[picture].grid)


def localisation(
    runs: Sequence[Run],
    boxes: Sequence[Box],
    heads: Heads,
    picture: int = 0,
    *,
    row: str = "word",
    sigma: float = 1.0,
    seed: int = 0,
) -> Result:
    """V8: how well the heads' boxes meet the true ones. box (N, 4) in pixels, iou (N), iou_random (N): mean over 20 sets of
    as many other heads drawn at random; hit and hit_random (N): whether the map's highest visual token touches the truth;
    chance of a hit is the share of visual tokens that do. accuracy (heads): share of runs with iou >= 0.5, which a truth
    smaller than a visual token cannot reach.

        localisation(runs, [question.targets[0] for question in questions], heads)["accuracy"]
    """
    if len(boxes) != len(runs):
        raise ValueError(f"there are {len(boxes)} boxes for {len(runs)} runs; give one for each")
    about = about_runs(runs, picture=picture, row=row, heads=list(heads), seed=seed, sigma=sigma)
    layers, each = runs[0].picture_attention.shape[:2]
    others = [(layer, head) for layer in range(layers) for head in range(each) if (layer, head) not in set(heads)]
    if len(others) < len(heads):
        raise ValueError(f"{len(heads)} heads of {layers * each} leave too few others for a control; give fewer")
    rng = np.random.default_rng(seed)
    sets = [[others[at] for at in rng.choice(len(others), len(heads), replace=False)] for _ in range(CONTROLS)]
    found, ours, random, chances = [], [], [], []
    for run, truth in zip(runs, boxes, strict=True):
        touched = _touched(run.pictures[picture].grid, truth)
        heat, box = localise(run, heads, picture, row=row, sigma=sigma)
        control = [localise(run, some, picture, row=row, sigma=sigma) for some in sets]
        found.append(box)
        ours.append((iou(box, truth), touched[heat.argmax()]))
        random.append([(iou(other, truth), touched[one.argmax()]) for one, other in control])
        chances.append(touched.mean())
    a, b = np.array(ours, np.float64), np.array(random, np.float64)  # (N, 2), (N, sets, 2)
    run_axis = [("run", range(len(runs)))]
    values = {
        "box": np.array(found),
        "iou": a[:, 0],
        "iou_random": b[..., 0].mean(1),
        "hit": a[:, 1],
        "hit_random": b[..., 1].mean(1),
        "accuracy": np.array([(a[:, 0] >= 0.5).mean(), (b[..., 0] >= 0.5).mean()]),
    }
    axes = dict.fromkeys(values, run_axis) | {
        "box": [*run_axis, ("side", ["x0", "y0", "x1", "y1"])],
        "accuracy": [("heads", ["chosen", "random"])],
    }
    title = "How well the boxes of these heads meet the true ones"
    return Result("localisation", title, values, axes, {"hit": float(np.mean(chances))}, about)


def head_hits(runs: Sequence[Run], boxes: Sequence[Box], picture: int = 0, *, row: str = "word") -> Result:
    """How often each head's highest visual token touches the true box: hit (L, H), share of runs. Chance is the share of
    visual tokens that touch it. The measure that `localisation_heads` does without; a pointing game (arXiv 1608.00507) a head.

        head_hits(runs, [question.targets[0] for question in questions])["hit"].max()
    """
    if len(boxes) != len(runs):
        raise ValueError(f"there are {len(boxes)} boxes for {len(runs)} runs; give one for each")
    about = about_runs(runs, picture=picture, row=row)
    touched = [_touched(run.pictures[picture].grid, box) for run, box in zip(runs, boxes, strict=True)]
    peaks = [_maps(run, picture, row).reshape(*run.picture_attention.shape[:2], -1).argmax(-1) for run in runs]
    hit = np.mean([one[peak] for one, peak in zip(touched, peaks, strict=True)], axis=0)
    axes = [("layer", range(hit.shape[0])), ("head", range(hit.shape[1]))]
    chance = float(np.mean([one.mean() for one in touched]))
    title = "How often a head's highest visual token touches what is asked about"
    return Result("head-hits", title, {"hit": hit}, {"hit": axes}, {"hit": chance}, about)


def relative_attention(run: Run, neutral: Run, picture: int = 0, *, row: str = "word") -> Result:
    """V8: attention on the picture for this question over that for a neutral one about the same picture, such as "describe
    the picture." (arXiv 2502.17422, section 4): what the question adds, with what is looked at anyway divided out.

    relative (L, rows, columns), mean over heads before dividing; 1 is no difference. nan where the neutral question
    gave less than a run's float16 can be divided by. Raises ValueError for runs of different pictures or weights.

        relative_attention(run, neutral)["relative"].mean(0)      # (rows, columns)
    """
    about = about_runs([run, neutral], picture=picture, row=row)
    if [one.grid for one in run.pictures] != [one.grid for one in neutral.pictures]:
        raise ValueError("the two runs are about pictures of different sizes; record both with the same pictures")
    asked, anyway = (_maps(one, picture, row).mean(1) for one in (run, neutral))  # (L, rows, columns)
    values = np.divide(asked, anyway, out=np.full_like(asked, np.nan), where=anyway >= LEAST)
    axes = list(zip(("layer", "row", "column"), map(range, values.shape), strict=True))
    title = f"Attention for {run.question!r} relative to {neutral.question!r}"
    return Result("relative-attention", title, {"relative": values}, {"relative": axes}, {"relative": 1.0}, about)


# --- arrays --------------------------------------------------------------------------------------------------------------


def spatial_entropy(heat: np.ndarray) -> float:
    """Entropy in nats of how the part of a map (rows, columns) above its mean falls into pieces: 0 is one spot, log n are n
    equal ones. A flat map has no piece, and counts as scattered as a map can be.
    """
    sizes = np.bincount(components(heat > heat.mean()).ravel())[1:]
    if not len(sizes):
        return float(np.log(heat.size))
    share = sizes / sizes.sum()
    return float(-(share * np.log(share)).sum()) + 0.0  # no negative zero


def components(mask: np.ndarray) -> np.ndarray:
    """Pieces of a bool map, corners touching included (8-connected): 1, 2, ... in reading order, 0 outside."""
    labels, count = np.zeros(mask.shape, np.int64), 0
    for start in zip(*np.nonzero(mask), strict=True):
        if labels[start]:
            continue
        count += 1
        labels[start] = count
        todo = deque([start])
        while todo:
            y, x = todo.popleft()
            ys, xs = slice(max(0, y - 1), y + 2), slice(max(0, x - 1), x + 2)
            fresh = np.argwhere(mask[ys, xs] & (labels[ys, xs] == 0)) + (ys.start, xs.start)
            for at in map(tuple, fresh):
                labels[at] = count
                todo.append(at)
    return labels


def knee(values: np.ndarray) -> float:
    """Where a falling curve bends, at the point farthest from the line between its ends: the least value before the bend."""
    falling = np.sort(np.asarray(values, np.float64))[::-1]
    spread = falling[0] - falling[-1]
    if spread == 0:
        return float(falling[0])
    above = (falling - falling[-1]) / spread - np.linspace(1, 0, len(falling))
    at = int(np.abs(above).argmax())
    return float(falling[at if above[at] > 0 else at - 1])  # below the line, the fall is over already


def smoothed(heat: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian blur of (rows, columns), mirrored at the borders so that nothing is lost there."""
    if sigma == 0:
        return np.asarray(heat, np.float64)
    reach = int(np.ceil(3 * sigma))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel /= kernel.sum()
    for axis in (0, 1):
        padded = np.pad(heat, [(reach, reach) if at == axis else (0, 0) for at in (0, 1)], mode="symmetric")
        heat = np.apply_along_axis(np.convolve, axis, padded, kernel, mode="valid")
    return heat


def iou(a: Box, b: Box) -> float:
    """Overlap of two boxes over what they cover together."""
    both = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    return both / (_area(a) + _area(b) - both)


def _area(box: Box) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _position(run: Run, row: str) -> int:
    asked = [at for at in range(run.prompt_length) if run.roles[at] == "user"]
    words = [at for at in asked if any(letter.isalnum() for letter in run.texts[at])]
    ends = {"word": words, "question": asked, "prompt": [run.prompt_length - 1]}
    if not ends.get(row):
        raise ValueError(f"row={row!r} is not in the run about {run.question!r}; give 'word', 'question' or 'prompt'")
    return ends[row][-1]


def _maps(run: Run, picture: int, row: str) -> np.ndarray:
    """What that position read of a picture: (L, H, rows, columns)."""
    at, tokens = _position(run, row) - run.first_row, run.tokens_of_picture(picture)
    if run.settings.get("heads") == "mean over heads" or not 0 <= at < run.picture_attention.shape[2]:
        raise ValueError(
            f"the run about {run.question!r} has not kept single heads or not this row; record it with detail='full'"
        )
    return run.pictures[picture].grid.token_heat(run.picture_attention[:, :, at, tokens].astype(np.float64))


def _box(mask: np.ndarray, grid: PatchGrid) -> Box:
    """The smallest box around these visual tokens, clipped to the picture."""
    boxes = [box for token in np.flatnonzero(mask) if (box := grid.token_box(int(token)))]
    if not boxes:
        return (0.0, 0.0, 0.0, 0.0)
    x0, y0, x1, y1 = zip(*boxes, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _touched(grid: PatchGrid, truth: Box) -> np.ndarray:
    """Which visual tokens share some of the picture with a box: (tokens,) bool."""
    boxes = [grid.token_box(token) for token in range(grid.token_count)]
    return np.array([box is not None and iou(box, truth) > 0 for box in boxes])
