"""How experts relate to words, to each other, to other checkpoints and to their neighbours: R5 to R8.

Runs in, `Result` out. Letters: R runs, G groups of tokens, L layers that route, E experts, K chosen, T tokens, N pairs.
Intervals are 95% over runs; information is in bits. A token's *first* expert is the chosen one with the largest weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .counting import (
    DRAWS,
    GROUPS,
    axes_of,
    drawn_anew,
    entropy,
    layer_axis,
    mutual_information,
    over_runs,
    positions_of,
    quantiles,
    routing_sizes,
    shares,
    with_interval,
)
from .result import Result, about_runs

if TYPE_CHECKING:
    from workbench.runs import Run

SHUFFLES = 100
SHOWN = 5  # words named for an expert


def first_experts(run: Run) -> np.ndarray:
    """(L, T) the chosen expert with the largest weight; of equal ones the one chosen first."""
    at = run.weights.argmax(-1)[..., None]
    return np.take_along_axis(run.chosen, at, -1)[..., 0].astype(np.int64)


def vocabulary_specialisation(
    runs: Sequence[Run], *, at_least: int = 8, shuffles: int = SHUFFLES, draws: int = DRAWS // 5, seed: int = 0
) -> Result:
    """R5: does a word settle its expert? OLMoE, arXiv 2409.02060 section 5.4; OpenMoE, 2402.01739.

    identity (2, L) = I(first expert; token id) / H(first expert): 1 if the token read ("in") or the next token ("out")
    settles the expert, 0 if it says nothing. Counted are ids of questions, thoughts and answers that occur at least
    `at_least` times. Rare ids raise it by luck alone: `shuffled` is the same with ids dealt out anew (mean and 95% range).
    word_share (L, E, S): for the S words with the largest share going first to this expert, that share N(x, e) / N(x); word
    names them. Raises ValueError when no id occurs that often.

        result = vocabulary_specialisation(runs)
        result["identity"][0] - result["shuffled"][0]       # (L,) above luck, for the token read
    """
    layers, experts, _ = routing_sizes(runs)
    read = [_pairs_of_ids(run, ahead=False) for run in runs]
    ahead = [_pairs_of_ids(run, ahead=True) for run in runs]
    measured = [
        _identity(runs, pairs, experts, at_least, shuffles, draws, seed, what)
        for pairs, what in ((read, "token"), (ahead, "next token"))
    ]
    names = ("identity", "identity_low", "identity_high", "shuffled", "shuffled_low", "shuffled_high", "tokens", "ids")
    values = {name: np.array([one[name] for one in measured]) for name in names}
    word, share = _words(runs, read, experts, at_least)
    layer, side = layer_axis(runs), ("token", ["in", "out"])
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = dict.fromkeys(names, [side, layer])
    axes |= {"tokens": [side], "ids": [side]}
    axes |= dict.fromkeys(("word", "word_share"), [layer, ("expert", range(experts)), ("place", range(1, SHOWN + 1))])
    return Result(
        "vocabulary",
        "How far a token's identity settles its first expert (0 to 1)",
        {**values, "word": word, "word_share": share},
        axes,
        chance={"identity": values["shuffled"], "word_share": 1 / experts},
        about=about_runs(runs, at_least=at_least, shuffles=shuffles, **drawn_anew(seed)),
    )


def _pairs_of_ids(run: Run, *, ahead: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions of words and the id that goes with each: its own, or that of the word after it.

    The system prompt and the markers are left out: they are the same in every run, so anything would settle their experts.
    """
    text = run.positions("user", "assistant", "thought", "answer")
    if not ahead:
        return text, run.token_ids[text].astype(np.int64)
    at = text[np.isin(text + 1, text)]
    return at, run.token_ids[at + 1].astype(np.int64)


def _identity(
    runs: Sequence[Run],
    pairs: Sequence[tuple[np.ndarray, np.ndarray]],
    experts: int,
    at_least: int,
    shuffles: int,
    draws: int,
    seed: int,
    what: str,
) -> dict[str, np.ndarray]:
    ids = np.concatenate([ids for _, ids in pairs])
    expert = np.concatenate([first_experts(run)[:, at] for run, (at, _) in zip(runs, pairs, strict=True)], axis=1)  # (L, N)
    run_of = np.repeat(np.arange(len(runs)), [len(ids) for _, ids in pairs])
    _, number, times = np.unique(ids, return_inverse=True, return_counts=True)
    kept = times[number] >= at_least
    if not kept.any():
        raise ValueError(f"no {what} of these runs occurs {at_least} times; give more runs or a smaller at_least")
    _, number = np.unique(number[kept], return_inverse=True)
    expert, run_of, n_ids = expert[:, kept], run_of[kept], int(number.max()) + 1

    def share(of: np.ndarray, times: np.ndarray | None = None) -> np.ndarray:
        tables = [np.bincount(of * experts + layer, times, n_ids * experts).reshape(n_ids, experts) for layer in expert]
        return np.array([_information_share(table) for table in tables])

    rng = np.random.default_rng(seed)
    dealt = np.array([share(rng.permutation(number)) for _ in range(shuffles)])
    low = high = np.full(len(expert), np.nan)
    if len(runs) > 1:
        often = rng.multinomial(len(runs), np.full(len(runs), 1 / len(runs)), size=draws)
        low, high = quantiles(np.array([share(number, times[run_of]) for times in often]))
    shuffled_low, shuffled_high = quantiles(dealt)
    return {
        "identity": share(number),
        "identity_low": low,
        "identity_high": high,
        "shuffled": dealt.mean(0),
        "shuffled_low": shuffled_low,
        "shuffled_high": shuffled_high,
        "tokens": np.array(kept.sum()),
        "ids": np.array(n_ids),
    }


def _information_share(table: np.ndarray) -> float:
    """I(id; expert) / H(expert) of counts (ids, E); nan if only one expert is used, as nothing is left to settle."""
    information, spread = mutual_information(table), entropy(shares(table.sum(0)))
    return float(information / spread) if spread > 0 else float("nan")


def _words(
    runs: Sequence[Run], pairs: Sequence[tuple[np.ndarray, np.ndarray]], experts: int, at_least: int
) -> tuple[np.ndarray, np.ndarray]:
    """The words that go to each expert first with the largest share, (L, E, S) texts and shares; "" and 0 where none does."""
    texts = {int(id): run.texts[t] for run, (at, ids) in zip(runs, pairs, strict=True) for t, id in zip(at, ids, strict=True)}
    ids = np.concatenate([ids for _, ids in pairs])
    expert = np.concatenate([first_experts(run)[:, at] for run, (at, _) in zip(runs, pairs, strict=True)], axis=1)
    names, number, times = np.unique(ids, return_inverse=True, return_counts=True)
    words = np.array([texts[int(id)] for id in names])
    word = np.full((len(expert), experts, SHOWN), "", words.dtype)
    share = np.zeros(word.shape)
    for at, layer in enumerate(expert):
        table = np.bincount(number * experts + layer, minlength=len(names) * experts).reshape(-1, experts)
        part = np.where(times[:, None] >= at_least, table / times[:, None], 0.0)
        order = np.lexsort((-table, -part), axis=0)[:SHOWN]  # of equal shares the more frequent word
        found = np.take_along_axis(part, order, 0).T  # (E, up to S)
        share[at, :, : found.shape[1]] = found
        word[at, :, : found.shape[1]] = np.where(found > 0, words[order].T, "")
    return word, share


def coactivation(runs: Sequence[Run], group: str = "all") -> Result:
    """R6: which experts are chosen together. OLMoE, arXiv 2409.02060 section 5.2.

    together (L, E, E): the share of the tokens of expert i that chose j as well; 1 on the diagonal, not symmetric.
    by_load (L, E, E) is what the loads alone lead to, (K - 1) f_j / (K - f_i), which is the chance (K - 1) / (E - 1) where all
    loads are equal. Rows of an expert that no token chose are nan.

        result = coactivation(runs)
        result["together"] - result["by_load"]
    """
    layers, experts, top_k = routing_sizes(runs)
    pairs = np.zeros((len(layers), experts, experts))
    tokens = 0
    for run in runs:
        at = positions_of(run, group)
        tokens += len(at)
        for layer, chosen in enumerate(run.chosen[:, at]):
            member = np.zeros((len(at), experts), np.float32)
            np.put_along_axis(member, chosen.astype(np.int64), 1.0, -1)
            pairs[layer] += member.T @ member
    if not tokens:
        raise ValueError(f"these runs have no {group} tokens; choose another group")
    load = pairs.diagonal(axis1=1, axis2=2)  # (L, E)
    with np.errstate(invalid="ignore", divide="ignore"):
        together = pairs / load[..., None]
        f = load / tokens
        by_load = (top_k - 1) * f[:, None, :] / (top_k - f[:, :, None])
    by_load[:, np.arange(experts), np.arange(experts)] = 1.0
    by_load[np.isnan(together)] = np.nan
    axes = [layer_axis(runs), ("expert", range(experts)), ("other expert", range(experts))]
    return Result(
        "coactivation",
        "Share of an expert's tokens that chose another expert as well",
        {"together": together, "by_load": by_load, "load": f},
        {"together": axes, "by_load": axes, "load": axes[:2]},
        chance={"together": (top_k - 1) / (experts - 1)},
        about=about_runs(runs, group=group, top_k=top_k, tokens_counted=tokens),
    )


def agreement(runs: Sequence[Run], others: Sequence[Run], groups: Sequence[str] = GROUPS) -> Result:
    """R7: how far two checkpoints choose the same experts for the same tokens. OLMoE, arXiv 2409.02060 section 5.1.

    runs[i] and others[i] hold the same pictures and the same prompt; what they wrote is compared as long as it is the same.
    same (G, L) = mean |S_a and S_b| / K; K/E by chance. Works for two precisions or two edits as well. Raises ValueError for
    prompts or pictures that differ.

        result = agreement([Run.load(p) for p in before], [Run.load(p) for p in after])
        result["same"][0]       # (L,) over all tokens
    """
    if len(runs) != len(others):
        raise ValueError(f"{len(runs)} runs cannot be paired with {len(others)}; give as many of one as of the other")
    _, experts, top_k = routing_sizes([*runs, *others])
    sums, tokens = [], []
    for at, (run, other) in enumerate(zip(runs, others, strict=True)):
        common = _common_length(run, other, at)
        overlap = chosen_by_both(run.chosen[:, :common], other.chosen[:, :common]) / top_k  # (L, common)
        where = [found[found < common] for found in (positions_of(run, group) for group in groups)]
        sums.append([overlap[:, found].sum(-1) for found in where])
        tokens.append([len(found) for found in where])
    values = {
        **with_interval("same", over_runs(lambda total, n: total / n[..., None], np.array(sums), np.array(tokens))),
        "tokens": np.array(tokens).sum(0),
    }
    by_layer = [("group", list(groups)), layer_axis(runs)]
    a, b = about_runs(runs), about_runs(others)
    weights = a["weights"] if a["fingerprint"] == b["fingerprint"] else f"{a['weights']} and {b['weights']}"
    return Result(
        "agreement",
        "Share of a token's experts that both chose",
        values,
        axes_of(values, {"same": by_layer, "tokens": by_layer[:1]}),
        chance={"same": top_k / experts},
        about={**a, "weights": weights, "other": b, "top_k": top_k, "experts": experts, **drawn_anew()},
    )


def chosen_by_both(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(..., K) and (..., K') -> (...): how many experts are in both choices."""
    return (a[..., :, None] == b[..., None, :]).any(-1).sum(-1)


def _common_length(run: Run, other: Run, at: int) -> int:
    length = min(len(run.token_ids), len(other.token_ids))
    differs = np.flatnonzero(run.token_ids[:length] != other.token_ids[:length])
    common = int(differs[0]) if len(differs) else length
    if common < max(run.prompt_length, other.prompt_length):
        raise ValueError(f"pair {at} has different prompts from token {common} on; compare those with `run_difference`")
    if len(run.pictures) != len(other.pictures) or any(
        not np.array_equal(np.asarray(p.image), np.asarray(q.image)) for p, q in zip(run.pictures, other.pictures, strict=True)
    ):
        raise ValueError(f"pair {at} has different pictures; compare those with `run_difference`")
    return common


def repetition(
    runs: Sequence[Run],
    groups: Sequence[str] = ("picture", "text", "question", "thought", "answer"),
    lags: Sequence[int] = (1, 2, 3, 4, 8),
) -> Result:
    """R8: do neighbours share experts? Mixtral, arXiv 2401.04088 section 5.

    first (G, L, N lags): share of pairs with the same first expert; shared: mean share of the K experts in both. A pair is
    two tokens of the group `lag` apart, in a picture `lag` apart in a row or a column. By chance 1/E and K/E; first_shuffled
    and shared_shuffled (G, L) are what the same tokens give in any order, which is more where loads are uneven.

        result = repetition(runs)
        result["first"][0, :, 0] - result["first_shuffled"][0]      # pictures, neighbours against any two tokens
    """
    _, experts, top_k = routing_sizes(runs)
    if unusable := [lag for lag in lags if lag < 1]:
        raise ValueError(f"lag {unusable[0]} is no distance between two tokens; give numbers from 1 on")
    sums, pairs, mixed, any_two = [], [], [], []
    for run in runs:
        first = first_experts(run)
        found = [[_pairs(run, group, lag) for lag in lags] for group in groups]
        sums.append([[_alike(run, first, at, top_k) for at in of_group] for of_group in found])  # (G, N, 2, L)
        pairs.append([[len(at) for at in of_group] for of_group in found])
        inside = [positions_of(run, group) for group in groups]
        mixed.append([_alike_in_any_order(run, first, at, top_k) for at in inside])  # (G, 2, L)
        any_two.append([len(at) * (len(at) - 1) for at in inside])

    def mean(total: np.ndarray, n: np.ndarray) -> np.ndarray:
        return total / n[..., None, None]

    near, shuffled = over_runs(mean, np.array(sums), np.array(pairs)), over_runs(mean, np.array(mixed), np.array(any_two))
    values: dict[str, np.ndarray] = {}
    for at, name in enumerate(("first", "shared")):
        values |= with_interval(name, tuple(part[:, :, at].transpose(0, 2, 1) for part in near))  # type: ignore[arg-type]
        values[f"{name}_shuffled"] = shuffled[0][:, at]
    values["pairs"] = np.array(pairs).sum(0)
    group, layer, lag = ("group", list(groups)), layer_axis(runs), ("lag", list(lags))
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = dict.fromkeys(("first", "shared"), [group, layer, lag])
    axes |= dict.fromkeys(("first_shuffled", "shared_shuffled"), [group, layer]) | {"pairs": [group, lag]}
    return Result(
        "repetition",
        "How often neighbours share experts",
        values,
        axes_of(values, axes),
        chance={"first": 1 / experts, "shared": top_k / experts},
        about=about_runs(runs, top_k=top_k, experts=experts, **drawn_anew()),
    )


def _pairs(run: Run, group: str, lag: int) -> np.ndarray:
    """(N, 2) positions of two tokens that lie `lag` apart."""
    if group != "picture":
        inside = positions_of(run, group)
        at = inside[np.isin(inside - lag, inside)]
        return np.stack([at - lag, at], -1)
    found = [np.zeros((0, 2), np.int64)]
    for number, picture in enumerate(run.pictures):
        place = picture.grid.token_heat(run.positions(f"image {number}"))  # (rows, columns) of positions
        found.append(np.stack([place[:-lag].ravel(), place[lag:].ravel()], -1))
        found.append(np.stack([place[:, :-lag].ravel(), place[:, lag:].ravel()], -1))
    return np.concatenate(found)


def _alike(run: Run, first: np.ndarray, at: np.ndarray, top_k: int) -> list[np.ndarray]:
    """Summed over pairs, (L,) each: the same first expert; the share of experts in both."""
    a, b = at.T
    return [(first[:, a] == first[:, b]).sum(-1), chosen_by_both(run.chosen[:, a], run.chosen[:, b]).sum(-1) / top_k]


def _alike_in_any_order(run: Run, first: np.ndarray, inside: np.ndarray, top_k: int) -> list[np.ndarray]:
    """The same sums over all ordered pairs of two different tokens of the group."""

    def two_of(experts: np.ndarray) -> np.ndarray:
        counts = [np.bincount(layer.ravel(), minlength=run.n_experts) for layer in experts.astype(np.int64)]
        return np.array([(count * (count - 1)).sum() for count in counts])

    return [two_of(first[:, inside]), two_of(run.chosen[:, inside]) / top_k]
