"""What a written thought is made of, where the model hesitates in it, and whether it still looks at the picture: analyses C1,
C7 and a part of C8. They need runs and no model; economy.py asks what thoughts cost, budget.py cuts them short.

Letters: R runs, C classes of sentences, N thought tokens of all runs, L layers, L_moe layers that route, E experts,
K chosen.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from workbench.runs import Run

from .counting import axes_of, drawn_anew, over_runs, scores_of, shares, with_interval
from .cues import CLASSES, segments, thought_positions
from .result import Result, about_runs

# ---- C1: classes of sentences


def thought_classes(runs: Sequence[Run], bins: int = 10, ngram: int = 3) -> Result:
    """C1: what the sentences of thoughts do, by the cue table of cues.py (schemes of arXiv 2506.19143 and 2504.07128).

        result = thought_classes(runs)
        result["share"]                  # (C,) of thought tokens, with result["share_low"] and result["share_high"]

    share (C,)            of thought tokens, with a 95% interval over runs
    follows (C, C)        P(class of the next sentence | class), nan after a class that no sentence follows
    profile (C, bins)     share of a class among the tokens of each part of the thought, from its start to its end
    reflection (R,)       sentences that check or backtrack, per 1,000 thought tokens
    rumination (R,)       share of word n-grams that the same thought has said before
    Chance: classes in random order (follows), the same everywhere (profile), the same words in random order (rumination).
    Raises ValueError where no run has a thought.
    """
    thoughts = [segments(run) for run in runs]
    about = about_runs(runs, ngram=ngram, with_thought=sum(map(bool, thoughts)), **drawn_anew())
    need_thoughts(thoughts)
    tokens = np.zeros((len(runs), len(CLASSES)))
    pairs = np.zeros((len(runs), len(CLASSES), len(CLASSES)))
    profile = np.zeros((len(runs), len(CLASSES), bins))
    reflection, rumination, shuffled = np.full((3, len(runs)), np.nan)
    rng = np.random.default_rng(0)
    for at, found in enumerate(thoughts):
        if not found:
            continue
        kinds = [CLASSES.index(segment.cue.kind) for segment in found]
        by_token = np.repeat(kinds, [segment.stop - segment.start for segment in found])
        np.add.at(tokens[at], by_token, 1)
        np.add.at(pairs[at], (kinds[:-1], kinds[1:]), 1)
        np.add.at(profile[at], (by_token, _part(len(by_token), bins)), 1)
        reflection[at] = 1000 * sum(CLASSES[kind] in ("check", "backtrack") for kind in kinds) / len(by_token)
        words = re.findall(r"\w+", " ".join(segment.text.lower() for segment in found))
        rumination[at] = repeated_ngrams(words, ngram)
        shuffled[at] = np.mean([repeated_ngrams(rng.permutation(words).tolist(), ngram) for _ in range(20)])
    values = {
        **with_interval("share", over_runs(shares, tokens)),
        "follows": shares(pairs.sum(0)),
        "profile": shares(profile.sum(0), 0),
        "reflection": reflection,
        "rumination": rumination,
    }
    kinds, numbers = ("class", CLASSES), ("run", range(len(runs)))
    axes = {
        "share": [kinds],
        "follows": [kinds, ("next class", CLASSES)],
        "profile": [kinds, ("part of the thought", _part_labels(bins))],
        "reflection": [numbers],
        "rumination": [numbers],
    }
    chance = {
        "follows": shares(pairs.sum((0, 1))),
        "profile": np.repeat(values["share"][:, None], bins, 1),
        "rumination": shuffled,
    }
    title = "What the sentences of a thought do, as shares of its tokens"
    return Result("thought-classes", title, values, axes_of(values, axes), chance, about)


def repeated_ngrams(words: Sequence[str], n: int) -> float:
    """Share of the n-grams of these words that occurred before among them; nan for fewer than n words."""
    grams = [tuple(words[at : at + n]) for at in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else float("nan")


# ---- C7: entropy and forking tokens


def token_entropy(runs: Sequence[Run], top: float = 0.2, seed: int = 0, draws: int = 200) -> Result:
    """C7: where the next thought token was open, and whether the experts knew (arXiv 2506.01939).

        result = token_entropy(runs)
        result["forking_share"]     # (C,) share of each class' tokens that fork; chance is `top`

    entropy (N,)          nats at temperature 1, of the distribution each thought token was drawn from
    forking (N,)          1 for the `top` share with the highest entropy, over all runs
    forking_share (C,)    of the tokens of a class; nan for a class that does not occur
    words, count and mean entropy of the tokens that fork most often
    switch_corr, router_corr (L_moe,)  Spearman correlation of entropy with the share of experts changed since the token
                          before, and with the entropy of the router's scores p = s / sum s, as a share of log E
    switch_at, router_at (3, L_moe)  means of those two at forking tokens, at as many random others, and over all
    Routing is that of the position which predicts the token, t - 1. `switch_corr_null` is the largest size of a correlation
    in 95% of `draws` shufflings; tokens of one thought depend on each other, so read it as a floor.
    """
    if not 0 < top < 1:
        raise ValueError(f"top={top} is no share of tokens; use a number between 0 and 1, such as 0.2")
    thoughts = [segments(run) for run in runs]
    about = about_runs(runs, top=top, seed=seed)
    need_thoughts(thoughts)
    positions, kinds = [], []
    for run, found in zip(runs, thoughts, strict=True):
        told = [(t, CLASSES.index(one.cue.kind)) for one in found for t in range(one.start, one.stop)]
        told = [(t, kind) for t, kind in told if not np.isnan(run.entropies[t])]  # a forced token was not chosen
        positions.append([t for t, _ in told])
        kinds += [kind for _, kind in told]
    kinds = np.array(kinds, int)
    entropy = np.concatenate([run.entropies[at] for run, at in zip(runs, positions, strict=True)]).astype(np.float64)
    texts = [run.texts[t] for run, at in zip(runs, positions, strict=True) for t in at]
    count = max(1, round(top * len(entropy)))
    forking = np.zeros(len(entropy), bool)
    forking[np.argsort(-entropy, kind="stable")[:count]] = True
    total = np.bincount(kinds, minlength=len(CLASSES))
    with np.errstate(invalid="ignore"):
        forking_share = np.bincount(kinds[forking], minlength=len(CLASSES)) / total
    switch = np.concatenate([_switches(run, at) for run, at in zip(runs, positions, strict=True)], 1)  # (L_moe, N)
    router = np.concatenate([_router_entropy(run, at) for run, at in zip(runs, positions, strict=True)], 1)
    rng = np.random.default_rng(seed)
    others = np.flatnonzero(~forking)
    drawn = rng.choice(others, min(count, len(others)), replace=False)
    words = _forking_words(texts, entropy, forking)
    values: dict[str, np.ndarray] = {
        "entropy": entropy,
        "forking": forking.astype(int),
        "forking_share": forking_share,
        "class_tokens": total,
        "word_entropy": np.array([mean for _, _, mean in words]),
        "word_count": np.array([n for _, n, _ in words]),
    }
    layers, classes = ("layer", runs[0].moe_layers), ("class", CLASSES)
    names = [f"{r}:{t}" for r, at in enumerate(positions) for t in at]
    axes: dict[str, Any] = {
        "entropy": [("token", names)],
        "forking": [("token", names)],
        "forking_share": [classes],
        "class_tokens": [classes],
        "word_entropy": [("word", [word for word, _, _ in words])],
        "word_count": [("word", [word for word, _, _ in words])],
    }
    for name, measured in (("switch", switch), ("router", router)):
        values[f"{name}_at"] = np.stack([measured[:, forking].mean(1), measured[:, drawn].mean(1), measured.mean(1)])
        values[f"{name}_corr"] = _spearman(entropy, measured)
        nulls = np.abs([_spearman(rng.permutation(entropy), measured) for _ in range(draws)])
        values[f"{name}_corr_null"] = np.nan_to_num(np.quantile(nulls, 0.95, axis=0))
        axes[f"{name}_corr"] = axes[f"{name}_corr_null"] = [layers]
        axes[f"{name}_at"] = [("tokens", ["forking", "random", "all"]), layers]
    chance = {"forking_share": count / len(entropy), "switch_corr": 0.0, "router_corr": 0.0}
    title = f"Entropy of the next thought token; forking tokens are the top {top:.0%}"
    return Result("token-entropy", title, values, axes, chance, about)


def _forking_words(texts: list[str], entropy: np.ndarray, forking: np.ndarray, most: int = 15) -> list[tuple[str, int, float]]:
    """(word, how often it forked, its mean entropy where it did) of the words that fork most often."""
    found: dict[str, list[float]] = defaultdict(list)
    for at in np.flatnonzero(forking):
        found[texts[at].strip() or repr(texts[at])].append(float(entropy[at]))
    ranked = sorted(found.items(), key=lambda item: (-len(item[1]), -np.mean(item[1])))
    return [(word, len(each), float(np.mean(each))) for word, each in ranked[:most]]


def _switches(run: Run, positions: Sequence[int]) -> np.ndarray:
    """(L_moe, n) share of experts at the predicting position that were not chosen at the one before it."""
    rows = np.asarray(positions, int) - 1
    now, before = run.chosen[:, rows], run.chosen[:, rows - 1]
    return 1 - (now[..., :, None] == before[..., None, :]).any(-1).mean(-1)


def _router_entropy(run: Run, positions: Sequence[int]) -> np.ndarray:
    """(L_moe, n) entropy of the router's scores at the predicting position, as a share of log E."""
    p = shares(scores_of(run)[:, np.asarray(positions, int) - 1])
    return -(p * np.log(np.where(p > 0, p, 1))).sum(-1) / np.log(run.n_experts)


def _spearman(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Rank correlation of x (N,) with each row of (L, N); nan where one of them is constant."""
    a, b = _ranks(x), np.array([_ranks(row) for row in rows])
    a, b = a - a.mean(), b - b.mean(1, keepdims=True)
    with np.errstate(invalid="ignore"):
        return (b @ a) / np.sqrt((b * b).sum(1) * (a @ a))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks with ties sharing their mean."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


# ---- C8: the picture forgotten


def image_reliance(runs: Sequence[Run], bins: int = 10) -> Result:
    """C8: attention on the picture while the thought is written, from its start to its end (arXiv 2503.13360, 2403.06764).

        result = image_reliance(runs)
        result["mass"]     # (L, bins) probability on all pictures, the mean over heads

    mean (bins,) is over layers too, with a 95% interval over runs. The token at t is written by the row at t - 1. Chance: the
    share of positions that the row may see which are picture. Raises ValueError for runs without thought or picture.
    """
    about = about_runs(runs, **drawn_anew())
    need_thoughts([thought_positions(run) for run in runs])
    layers = len(runs[0].role_mass)
    mass, seen, count = np.zeros((len(runs), layers, bins)), np.zeros((len(runs), bins)), np.zeros((len(runs), bins))
    for at, run in enumerate(runs):
        columns = [g for g, name in enumerate(run.role_names) if name.startswith("image ")]
        if not columns:
            raise ValueError(f"run {at} has no picture to look at; analyse runs about pictures")
        positions = np.array(thought_positions(run), int)
        part, rows = _part(len(positions), bins), positions - 1
        kept = rows >= run.first_row  # a very long run may have dropped its first rows
        part, rows = part[kept], rows[kept]
        looked = run.role_mass[:, :, rows - run.first_row][..., columns].astype(np.float64).sum(-1).mean(1)  # (L, n)
        for layer in range(layers):
            np.add.at(mass[at, layer], part, looked[layer])
        np.add.at(seen[at], part, len(run.positions("image")) / (rows + 1))
        np.add.at(count[at], part, 1)
    with np.errstate(invalid="ignore"):
        by_layer, chance = mass.sum(0) / count.sum(0), seen.sum(0) / count.sum(0)
    values = {
        "mass": by_layer,
        **with_interval("mean", over_runs(lambda sums, counts: sums / counts, mass.mean(1), count)),
    }
    parts = ("part of the thought", _part_labels(bins))
    axes = {"mass": [("layer", range(layers)), parts], "mean": [parts]}
    title = "Attention on the picture while the thought is written (probability)"
    return Result("image-reliance", title, values, axes_of(values, axes), {"mean": chance, "mass": chance}, about)


def _part(count: int, bins: int) -> np.ndarray:
    """Which of `bins` equal parts each of `count` tokens lies in, by its middle."""
    return ((np.arange(count) + 0.5) / max(count, 1) * bins).astype(int)


def _part_labels(bins: int) -> list[float]:
    return [round((at + 0.5) / bins, 4) for at in range(bins)]


def need_thoughts(found: Sequence[Sequence[Any]]) -> None:
    """Raises ValueError where no run has a thought; found: something for each run, empty without one."""
    if not any(found):
        raise ValueError("none of the runs has a thought; record questions that the model thinks about, such as counting")
