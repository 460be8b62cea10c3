"""What can be read out of activations and weights: linear probes with a control task (P3), similarity of layers and the
distance between pictures and words (P4), the spectrum of weights and the size of Muon's steps (P5).

Letters: N samples, D channels, S sites, L layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.chat import Prompt, collate
from workbench.runs import fingerprint
from workbench.sites import SiteError, match, sites
from workbench.study.optim import MuonAdamW, as_matrices
from workbench.tape import attach

from .counting import quantiles
from .result import Result

Where = Callable[[Prompt], Sequence[int]]


# ---- activations


def visual(prompt: Prompt) -> list[int]:
    """Positions of the visual tokens of all pictures."""
    return [at for at, role in enumerate(prompt.roles) if role.startswith("image ")]


def last(prompt: Prompt) -> list[int]:
    """The last position, which predicts the first token of the reply."""
    return [len(prompt.input_ids) - 1]


@torch.inference_mode()
def features(
    model: KimiVL, prompts: Sequence[Prompt], read: Sequence[str] = ("embedded", "decoder.layers.*"), where: Where = visual
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Activations (N, D) of each site at the positions `where` names, prompt after prompt, and (N,) the prompt of each.

        found, group = features(model, prompts, ["projector", "decoder.layers.*"])

    A site of patches gives the mean of the four under a visual token; there and at the projector only visual tokens can be
    asked for. Raises SiteError for a site without a channel axis of its own.
    """
    known = sites(model)
    names = list(dict.fromkeys(name for glob in read for name in match(glob, known)))
    for name in names:
        if known[name].axes.split()[:-1] not in (["B", "T"], ["P"], ["M"]):
            raise SiteError(f"{name} has the axes {known[name].axes}; probe a site with one row of channels for each token")
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    group: list[int] = []
    weight = model.logits.weight
    for number, prompt in enumerate(prompts):
        at = list(where(prompt))
        inputs = collate([prompt], pad_id=0).to(weight.device, weight.dtype)
        with attach(model, read=names) as tape:
            model(inputs.input_ids, inputs.pixel_values, inputs.image_grid_hws)
        seen = {position: token for token, position in enumerate(visual(prompt))}
        for name in names:
            value = tape.last(name)
            if known[name].axes.startswith("B"):
                value = value[0, at]
            elif missing := [position for position in at if position not in seen]:
                raise SiteError(f"{name} has rows for pictures only, and position {missing[0]} is none; ask for visual tokens")
            else:
                value = value if known[name].axes.startswith("M") else _patch_means(value, prompt)
                value = value[[seen[position] for position in at]]
            found[name].append(value.to(torch.promote_types(value.dtype, torch.float32)).cpu().numpy())
        group += [number] * len(at)
    return {name: np.concatenate(parts) for name, parts in found.items()}, np.array(group)


def _patch_means(value: Tensor, prompt: Prompt) -> Tensor:
    """(P, V) -> (M, V): the mean of the patches under each visual token."""
    rows, start = [], 0
    for picture in prompt.pictures:
        rows += [[start + patch for patch in picture.grid.patches_of_token(t)] for t in range(picture.grid.token_count)]
        start += picture.grid.patch_count
    return value[torch.tensor(rows, device=value.device)].mean(1)


def about_prompts(model: KimiVL, model_name: str, prompts: Sequence[Prompt], **more: Any) -> dict[str, Any]:
    """What a Result says of activations of these prompts."""
    return {"weights": model_name, "fingerprint": fingerprint(model), "prompts": len(prompts), **more}


# ---- P3: linear probes


def linear_probes(
    found: Mapping[str, np.ndarray],
    labels: np.ndarray,
    group: np.ndarray,
    about: Mapping[str, Any],
    *,
    types: np.ndarray | None = None,
    splits: int = 5,
    seed: int = 0,
) -> Result:
    """P3: how well a logistic probe reads a label at each site (arXiv 1610.01644), beside a control task (1909.03368).

        found, group = features(model, prompts)
        result = linear_probes(found, labels, group, about_prompts(model, "study model", prompts))

    found: activations (N, D) by site; labels (N,) of any kind; group (N,), the scene of each: a scene is wholly in training or
    wholly in testing (30% of them). accuracy and control (S, splits), on the test part; selectivity (S,) is the mean of
    accuracy - control. The control label is drawn at random, with the labels' frequencies, once for each entry of `types`
    (N,), such as the cell of the picture or the token id; without types for each sample. Chance: the commonest training label.
    Needs scikit-learn (ImportError). Raises ValueError for fewer than two groups or labels.
    """
    labels, group = np.asarray(labels), np.asarray(group)
    wrong = [name for name, x in found.items() if len(x) != len(labels)]
    if wrong or len(group) != len(labels) or not found:
        raise ValueError(f"{len(labels)} labels and {len(group)} groups do not fit {wrong or 'the sites'}; give one a sample")
    if len(np.unique(group)) < 2 or len(np.unique(labels)) < 2:
        raise ValueError("a probe needs two or more scenes and two or more labels; give more samples")
    rng = np.random.default_rng(seed)
    kinds, kind = np.unique(np.arange(len(labels)) if types is None else types, return_inverse=True, axis=0)
    control = rng.choice(labels, len(kinds))[kind.reshape(-1)]
    accuracy, controlled, chance = np.zeros((len(found), splits)), np.zeros((len(found), splits)), np.zeros(splits)
    for split in range(splits):
        train = _training(labels, group, rng)
        values, counts = np.unique(labels[train], return_counts=True)
        chance[split] = (labels[~train] == values[counts.argmax()]).mean()
        for at, x in enumerate(found.values()):
            accuracy[at, split] = _probe(x, labels, train)
            controlled[at, split] = _probe(x, control, train)
    results = {"accuracy": accuracy, "control": controlled, "selectivity": (accuracy - controlled).mean(1)}
    each = [("site", list(found)), ("split", list(range(splits)))]
    axes = {"accuracy": each, "control": each, "selectivity": each[:1]}
    told = {**about, "samples": len(labels), "scenes": len(np.unique(group)), "labels": len(np.unique(labels)), "seed": seed}
    title = "How well a linear probe reads the label in scenes it has not seen"
    return Result("probes", title, results, axes, {"accuracy": chance.mean(), "control": chance.mean()}, told)


def _training(labels: np.ndarray, group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(N,) bool: the scenes to learn from, about 70%, in which two labels occur."""
    names = np.unique(group)
    tested = max(1, round(0.3 * len(names)))
    for _ in range(100):
        train = ~np.isin(group, rng.permutation(names)[:tested])
        if len(np.unique(labels[train])) > 1:
            return train
    raise ValueError("no 70% of the scenes hold two labels; give more scenes or a label that varies more between them")


def _probe(x: np.ndarray, labels: np.ndarray, train: np.ndarray) -> float:
    """Accuracy on the rest of a logistic probe of standardised channels."""
    try:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression
    except ImportError as error:
        raise ImportError('probes need scikit-learn; install it with pip install "kimi-vl-workbench[notebooks]"') from error
    if len(seen := np.unique(labels[train])) < 2:  # a control label may be the same all over
        return float((labels[~train] == seen[0]).mean())
    mean, spread = x[train].mean(0), x[train].std(0)
    x = (x - mean) / np.where(spread > 0, spread, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # random labels need not be learnt to the last digit
        return float(LogisticRegression(max_iter=300).fit(x[train], labels[train]).score(x[~train], labels[~train]))


# ---- P4: similarity of layers, and the modality gap


def linear_cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear centred kernel alignment of (N, D) and (N, D'), 0 to 1; rotations and scales do not change it (1905.00414)."""
    x, y = x - x.mean(0), y - y.mean(0)
    norms = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.linalg.norm(y.T @ x) ** 2 / norms) if norms > 0 else float("nan")


def similarity(found: Mapping[str, np.ndarray], about: Mapping[str, Any], seed: int = 0) -> Result:
    """P4: linear CKA (S, S) between sites, or between checkpoints, of the same samples.

        found, group = features(model, prompts)
        result = similarity(found, about_prompts(model, "study model", prompts))

    Chance: the same with the samples of one side in random order, which says how far few samples alone raise it.
    """
    parts = [np.asarray(x, np.float64) for x in found.values()]
    order = np.random.default_rng(seed).permutation(len(parts[0]))
    cka = np.array([[linear_cka(x, y) for y in parts] for x in parts])
    chance = np.array([[linear_cka(x, y[order]) for y in parts] for x in parts])
    axes = {"cka": [("site", list(found)), ("other site", list(found))]}
    told = {**about, "samples": len(order), "seed": seed}
    return Result("similarity", "How alike sites are (linear CKA)", {"cka": cka}, axes, {"cka": chance}, told)


def modality_gap(found: Mapping[str, np.ndarray], is_picture: np.ndarray, about: Mapping[str, Any], seed: int = 0) -> Result:
    """P4: how far apart the means of visual and of text tokens lie (arXiv 2203.02053).

        found, group = features(model, prompts, where=lambda prompt: range(len(prompt.input_ids)))
        result = modality_gap(found, is_picture, about)

    gap (S,) = |mean of visual tokens - mean of text tokens|; relative (S,), the same over the root mean square length of all
    tokens; cosine (S,) of the two means. Chance: two random halves of the same sizes. Raises ValueError unless both occur.
    """
    is_picture = np.asarray(is_picture, bool)
    if is_picture.all() or not is_picture.any():
        raise ValueError("all tokens are of one kind; give visual and text tokens to compare")
    measured = np.array([_gap(x, is_picture) for x in found.values()])
    rng = np.random.default_rng(seed)
    drawn = np.mean([[_gap(x, rng.permutation(is_picture)) for x in found.values()] for _ in range(20)], 0)
    names: list[str] = ["gap", "relative", "cosine"]
    values = {name: measured[:, at] for at, name in enumerate(names)}
    chance = {name: drawn[:, at] for at, name in enumerate(names)}
    told = {**about, "visual_tokens": int(is_picture.sum()), "text_tokens": int((~is_picture).sum()), "seed": seed}
    axes = dict.fromkeys(names, [("site", list(found))])
    return Result("modality-gap", "Distance between pictures and words", values, axes, chance, told)


def _gap(x: np.ndarray, is_picture: np.ndarray) -> tuple[float, float, float]:
    a, b = x[is_picture].mean(0, dtype=np.float64), x[~is_picture].mean(0, dtype=np.float64)
    gap = float(np.linalg.norm(a - b))
    size = float(np.sqrt((x.astype(np.float64) ** 2).sum(1).mean()))
    return gap, gap / size if size else float("nan"), float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b) or np.nan))


# ---- P5: weights

# Which group a matrix belongs to: the first part of a name that occurs in its own. What is not listed is no matrix to study.
GROUPS = {
    "vision.layers": "MoonViT",
    "projector.linear": "projector",
    "attn.q.": "attention Q, O",
    "attn.out.": "attention Q, O",
    "attn.down.": "attention KV",
    "attn.up": "attention KV",
    "router.scores": "router",
    "ffn.experts": "experts",
    "ffn.shared": "shared expert",
    "ffn.": "dense FFN",
    "embedded.": "token tables",
    "logits.": "token tables",
}


def weight_matrices(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Of every parameter of GROUPS its group, its name, and the matrices (count, rows, columns) that it holds."""
    for name, value in model.named_parameters():
        group = next((group for part, group in GROUPS.items() if part in name), None)
        if value.ndim > 1 and group is not None:
            yield group, name, as_matrices(name, value.detach())


def svd_entropy(matrix: np.ndarray | Tensor) -> float:
    """Entropy of the squared singular values as shares, over log of their number: 1 all alike, 0 rank one (Moonlight,
    arXiv 2502.16982, section 3.4). nan for a matrix of zeros or with one singular value.
    """
    return float(_svd_entropy(torch.as_tensor(np.asarray(matrix) if not isinstance(matrix, Tensor) else matrix)[None])[0])


def weight_spectrum(model: nn.Module, model_name: str, groups: Sequence[str] | None = None, seed: int = 0) -> Result:
    """P5: SVD entropy of every weight matrix, by group (GROUPS; all of them, or those named).

        result = weight_spectrum(model, "study model", ["experts", "router"])

    entropy (matrices,); parameters that hold several matrices (experts, qkv) are taken apart, numbered in the label.
    Chance: a Gaussian matrix of the same shape, which is what an initialised weight is. Raises ValueError for no matrices.
    """
    labels: list[tuple[str, str]] = []
    entropy: list[float] = []
    chance: list[float] = []
    known: dict[tuple[int, int], float] = {}
    generator = torch.Generator().manual_seed(seed)
    for group, name, matrices in weight_matrices(model):
        if groups is not None and group not in groups:
            continue
        shape = (matrices.shape[1], matrices.shape[2])
        if shape not in known:
            known[shape] = float(_svd_entropy(torch.randn(1, *shape, generator=generator))[0])
        labels += [(group, f"{name}[{at}]" if len(matrices) > 1 else name) for at in range(len(matrices))]
        entropy += _svd_entropy(matrices).tolist()
        chance += [known[shape]] * len(matrices)
    if not entropy:
        listed = ", ".join(dict.fromkeys(GROUPS.values()))
        raise ValueError(f"the model has no weight matrix in {groups}; choose among {listed}")
    axes = {"entropy": [("matrix", [f"{group} | {name}" for group, name in labels])]}
    about = {"weights": model_name, "fingerprint": fingerprint(model), "matrices": len(entropy), "seed": seed}
    title = "How evenly weight matrices use their directions (SVD entropy)"
    return Result("weight-spectrum", title, {"entropy": np.array(entropy)}, axes, {"entropy": np.array(chance)}, about)


def _svd_entropy(matrices: Tensor) -> Tensor:
    """(count, rows, columns) -> (count,)."""
    wide = torch.promote_types(matrices.dtype, torch.float32)
    squares = torch.linalg.svdvals(matrices.to(wide)).square()
    q = squares / squares.sum(-1, keepdim=True)
    return -(torch.special.xlogy(q, q)).sum(-1) / np.log(squares.shape[-1])


def muon_update(shapes: Mapping[str, tuple[int, int]], *, rank: int | None = None, seed: int = 0, draws: int = 5) -> Result:
    """P5: root mean square of one step at learning rate 1, Muon beside AdamW, on matrices of these shapes.

        result = muon_update({"wide": (64, 256)})
        result["rms"]      # (2, shapes): Muon near 0.2, AdamW near 1 in its first step

    The gradient is Gaussian, or of the given rank. Muon's update is orthogonal times 0.2 sqrt(max(rows, columns)), which is an
    rms of 0.2 for exact orthogonalisation and a gradient of full rank (arXiv 2502.16982, section 2.2), and
    0.2 sqrt(r / min(rows, columns)) for rank r: the chance lines. Five Newton-Schulz steps leave singular values between
    about 0.7 and 1.2, so the true step is a little smaller. rms_low, rms_high: the range over `draws`.
    """
    generator = torch.Generator().manual_seed(seed)
    rms = np.zeros((draws, 2, len(shapes)))
    for draw in range(draws):
        for at, shape in enumerate(shapes.values()):
            gradient = torch.randn(shape, generator=generator)
            if rank is not None:
                factors = torch.randn(shape[0], rank, generator=generator), torch.randn(rank, shape[1], generator=generator)
                gradient = factors[0] @ factors[1]
            for number, name in enumerate(("matrix", "embedded.matrix")):  # the second name is AdamW's
                value = torch.zeros(shape)
                value.grad = gradient.clone()
                MuonAdamW({name: value}).step(1.0, 1.0)
                rms[draw, number, at] = value.square().mean().sqrt()
    low, high = quantiles(rms)
    values = {"rms": rms.mean(0), "rms_low": low, "rms_high": high}
    axes = dict.fromkeys(values, [("optimiser", ["Muon", "AdamW"]), ("matrix", list(shapes))])
    full = np.array([0.2 * (min(1.0, (rank or min(shape)) / min(shape))) ** 0.5 for shape in shapes.values()])
    chance = {"rms": np.stack([full, np.ones(len(full))])}
    about = {"weights": "none: random gradients", "rank": rank or "full", "seed": seed, "draws": draws}
    return Result("muon-update", "Size of one optimiser step (root mean square)", values, axes, chance, about)
