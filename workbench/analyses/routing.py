"""Who is chosen: load and balance (R1), confidence (R2), specialisation by domain (R3) and by modality (R4) of the experts.

Runs in, `Result` out, prefill, decode, picture, question, thought and answer apart. Letters: R runs, G groups of tokens,
D domains, L layers that route, E experts, K chosen, T tokens, X kinds of tokens. Intervals are 95% over runs; information is
in bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from .counting import (
    GROUPS,
    KINDS,
    axes_of,
    drawn_anew,
    entropy,
    expert_counts,
    group_tables,
    grouped_counts,
    js_divergence,
    kinds_of,
    layer_axis,
    mutual_information,
    over_runs,
    positions_of,
    quantiles,
    routing_sizes,
    scores_of,
    shares,
    with_interval,
)
from .result import Result, about_runs

if TYPE_CHECKING:
    from workbench.runs import Run

SHUFFLES = 200


def expert_loads(runs: Sequence[Run], groups: Sequence[str] = GROUPS) -> Result:
    """R1: how evenly the experts are used. arXiv 2408.15664 (MaxVio), 2412.19437.

    load (G, L, E) is the share of a group's tokens that chose the expert, so a layer adds up to K; max_vio (G, L) is the
    largest load over the mean load, minus 1 (0: all equal, E/K - 1 at most); cv the standard deviation over the mean; gini
    from 0 (equal) to 1 - K/E; dead the experts no token chose. A few tokens cannot fill many experts: compare groups of like
    size, given in `tokens`.

        result = expert_loads([Run.load(path) for path in paths])
        result["max_vio"][0]        # (L,) over all tokens
    """
    counts, tokens = group_tables(runs, groups)
    layers, experts, top_k = routing_sizes(runs)
    values = {
        "load": shares(counts.sum(0)) * top_k,
        **with_interval("max_vio", over_runs(max_violation, counts)),
        **with_interval("cv", over_runs(_variation, counts)),
        **with_interval("gini", over_runs(gini, counts)),
        "dead": (counts.sum(0) == 0).sum(-1),
        "tokens": tokens.sum(0),
    }
    by_layer = [("group", list(groups)), layer_axis(runs)]
    axes = dict.fromkeys(values, by_layer) | {"load": [*by_layer, ("expert", range(experts))], "tokens": by_layer[:1]}
    return Result(
        "expert-load",
        "Share of tokens that chose each expert, and how uneven that is",
        values,
        axes_of(values, axes),
        chance={"load": top_k / experts, "max_vio": 0.0},
        about=about_runs(runs, top_k=top_k, experts=experts, **drawn_anew()),
    )


def max_violation(counts: np.ndarray) -> np.ndarray:
    """(..., E) -> (...): the largest count over the mean count, minus 1. arXiv 2408.15664."""
    return counts.max(-1) / counts.mean(-1) - 1


def gini(counts: np.ndarray) -> np.ndarray:
    """(..., E) -> (...): half the mean absolute difference of two experts' counts, over the mean count."""
    ordered, n = np.sort(counts, -1), counts.shape[-1]
    return (ordered * (2 * np.arange(1, n + 1) - n - 1)).sum(-1) / (n * ordered.sum(-1))


def _variation(counts: np.ndarray) -> np.ndarray:
    return counts.std(-1) / counts.mean(-1)


def routing_confidence(runs: Sequence[Run], groups: Sequence[str] = GROUPS) -> Result:
    """R2: how sure the router is. All (G, L), means over tokens except where said; bits.

    score_entropy of s / sum s over all experts (log2 E: no preference); weight_entropy of the weights of the chosen (log2 K:
    all count alike); effective_experts 2^H of the load, how many experts share the work; margin the K-th minus the
    (K+1)-th value of s + b; flip_rate the share of tokens that would choose another set with b = 0 (design of the bias:
    arXiv 2412.19437). Scores are kept in float16, which moves margins by up to 0.0005.

        result = routing_confidence(runs)
        result["margin"][result.axes["margin"][0][1].index("answer")]      # (L,)
    """
    layers, experts, top_k = routing_sizes(runs)
    counts, tokens = group_tables(runs, groups)
    measured = [token_confidence(run) for run in runs]
    where = [[positions_of(run, group) for group in groups] for run in runs]

    def mean_of(name: str) -> dict[str, np.ndarray]:
        sums = [[one[name][:, at].sum(-1) for at in found] for one, found in zip(measured, where, strict=True)]  # (R, G, L)
        return with_interval(name, over_runs(lambda total, n: total / n[..., None], np.array(sums), tokens))

    names = ("score_entropy", "weight_entropy", "margin", "flip_rate")
    values = {
        **{key: value for name in names for key, value in mean_of(name).items()},
        **with_interval("effective_experts", over_runs(lambda c: 2 ** entropy(shares(c)), counts)),
        "tokens": tokens.sum(0),
    }
    by_layer = [("group", list(groups)), layer_axis(runs)]
    return Result(
        "routing-confidence",
        "How sure the router is: entropy (bits), margin, and what the selection bias decides",
        values,
        axes_of(values, dict.fromkeys(values, by_layer) | {"tokens": by_layer[:1]}),
        chance={"score_entropy": np.log2(experts), "weight_entropy": np.log2(top_k), "effective_experts": experts},
        about=about_runs(runs, top_k=top_k, experts=experts, **drawn_anew()),
    )


def token_confidence(run: Run) -> dict[str, np.ndarray]:
    """R2 for single tokens, each (L, T): score_entropy, weight_entropy (bits), margin, flip_rate (0 or 1)."""
    scores, bias = scores_of(run), run.bias.astype(np.float64)[:, None]
    top_k = run.chosen.shape[-1]
    biased = np.sort(scores + bias, -1)
    margin = biased[..., -top_k] - biased[..., -top_k - 1] if top_k < run.n_experts else np.full(scores.shape[:2], np.nan)
    return {
        "score_entropy": entropy(shares(scores)),
        "weight_entropy": entropy(shares(run.weights.astype(np.float64))),
        "margin": margin,
        "flip_rate": (best(scores, top_k) != best(scores + bias, top_k)).any(-1).astype(float),
    }


def best(values: np.ndarray, top_k: int) -> np.ndarray:
    """(..., E) -> the same shape, True at the K largest; of equal ones the first."""
    order = np.argsort(-values, axis=-1, kind="stable")[..., :top_k]
    found = np.zeros(values.shape, bool)
    np.put_along_axis(found, order, True, -1)
    return found


def domain_specialisation(
    runs: Sequence[Run], domains: Sequence[str], group: str = "all", *, shuffles: int = SHUFFLES, seed: int = 0
) -> Result:
    """R3: which experts serve which kind of question. OLMoE, arXiv 2409.02060 section 5.3.

    domains names the domain of each run. share (D, L, E): the share of a domain's tokens that chose the expert (K/E for a
    router that does not care); divergence (L, D, D): Jensen-Shannon, bits, of how the domains spread over experts. Few tokens
    differ by luck alone, so divergence_shuffled (2, L) is the 95% range of the mean divergence with the domains dealt out to
    the runs anew, beside `mean_divergence` (L,). Roles weigh differently in different domains: name a `group`, such as
    "answer", to compare like with like. Raises ValueError for fewer than two domains or a domain without such tokens.

        result = domain_specialisation(runs, [run.settings["family"] for run in runs], group="answer")
    """
    layers, experts, top_k = routing_sizes(runs)
    names = sorted(set(domains))
    if len(domains) != len(runs):
        raise ValueError(f"{len(domains)} domains are named for {len(runs)} runs; name one for each run")
    if len(names) < 2:
        raise ValueError(f"all runs are of the domain {names[0]!r}, so there is nothing to compare; give runs of two or more")
    counts = np.array([expert_counts(run, positions_of(run, group)) for run in runs])  # (R, L, E)
    of = np.array([names.index(domain) for domain in domains])
    if empty := [name for at, name in enumerate(names) if not counts[of == at].sum()]:
        raise ValueError(f"the runs of domain {empty[0]!r} have no {group} tokens; choose another group")

    def by_domain(order: np.ndarray) -> np.ndarray:
        return np.array([shares(counts[order == at].sum(0)) for at in range(len(names))])  # (D, L, E)

    def mean_divergence(load: np.ndarray) -> np.ndarray:
        return np.mean([js_divergence(load[a], load[b]) for a, b in combinations(range(len(names)), 2)], axis=0)

    load = by_domain(of)
    share = [over_runs(lambda c: shares(c) * top_k, counts[of == at], seed=seed) for at in range(len(names))]
    rng = np.random.default_rng(seed)
    dealt = [mean_divergence(by_domain(rng.permutation(of))) for _ in range(shuffles)]
    values = {
        **with_interval("share", tuple(np.array(part) for part in zip(*share, strict=True))),  # type: ignore[arg-type]
        "divergence": js_divergence(load[:, None], load[None]).transpose(2, 0, 1),
        "mean_divergence": mean_divergence(load),
        "divergence_shuffled": np.array(quantiles(np.array(dealt))),
    }
    layer = layer_axis(runs)
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = {
        "share": [("domain", names), layer, ("expert", range(experts))],
        "divergence": [layer, ("domain", names), ("other domain", names)],
        "mean_divergence": [layer],
        "divergence_shuffled": [("end", ["low", "high"]), layer],
    }
    return Result(
        "domains",
        f"Share of {_noun(group)} of each domain that chose each expert",
        values,
        axes_of(values, axes),
        chance={"share": top_k / experts, "divergence": 0.0},
        about=about_runs(
            runs,
            group=group,
            top_k=top_k,
            runs_of_domain={name: int((of == at).sum()) for at, name in enumerate(names)},
            shuffles=shuffles,
            **drawn_anew(seed),
        ),
    )


def _noun(group: str) -> str:
    return "tokens" if group == "all" else f"{group} tokens"


def modality_specialisation(runs: Sequence[Run], *, shuffles: int = SHUFFLES, seed: int = 0) -> Result:
    """R4: which experts serve pictures and which text. OLMoE's measure with modality as the domain.

    preference (L, E) = (p - q) / (p + q), p and q the shares of picture and of text tokens that chose the expert: 1 only
    pictures, -1 only text, nan for an expert no one chose. divergence (L,): Jensen-Shannon, bits, between how pictures and
    text spread over experts, beside its 95% range with the modality of tokens shuffled inside each run (2, L). Raises
    ValueError for runs without pictures.

        result = modality_specialisation(runs)
        result["preference"].argmax(-1)      # the expert that most prefers pictures, layer by layer
    """
    layers, experts, top_k = routing_sizes(runs)
    pictured = [np.isin(np.arange(len(run.token_ids)), run.positions("image")).astype(np.int64) for run in runs]
    if not sum(flags.sum() for flags in pictured):
        raise ValueError("these runs show no picture, so there is no modality to compare; record runs with pictures")

    def tables(flags: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([grouped_counts(run, of, 2) for run, of in zip(runs, flags, strict=True)])  # (R, 2, L, E)

    def preference(counts: np.ndarray) -> np.ndarray:
        load = shares(counts)
        text, image = load[..., 0, :, :], load[..., 1, :, :]
        return (image - text) / (image + text)

    def divergence(counts: np.ndarray) -> np.ndarray:
        load = shares(counts)
        return js_divergence(load[..., 0, :, :], load[..., 1, :, :])

    counts, rng = tables(pictured), np.random.default_rng(seed)
    shuffled = [divergence(tables([rng.permutation(flags) for flags in pictured]).sum(0)) for _ in range(shuffles)]
    values = {
        **with_interval("preference", over_runs(preference, counts, seed=seed)),
        **with_interval("divergence", over_runs(divergence, counts, seed=seed)),
        "divergence_shuffled": np.array(quantiles(np.array(shuffled))),
        "tokens": np.array([sum((flags == of).sum() for flags in pictured) for of in (1, 0)]),
    }
    layer = layer_axis(runs)
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = {
        "preference": [layer, ("expert", range(experts))],
        "divergence": [layer],
        "divergence_shuffled": [("end", ["low", "high"]), layer],
        "tokens": [("modality", ["picture", "text"])],
    }
    return Result(
        "modality",
        "Which experts prefer pictures (1) and which text (-1)",
        values,
        axes_of(values, axes),
        chance={"preference": 0.0, "divergence": 0.0},
        about=about_runs(runs, top_k=top_k, experts=experts, shuffles=shuffles, **drawn_anew(seed)),
    )


def expert_map(run: Run, layer: int, picture: int = 0) -> Result:
    """R4: where on a picture each expert of a layer works. weight (E, rows, columns) of the picture's visual tokens is what
    the expert counted for there, 0 where it was not chosen.

    layer is a decoder layer. Raises ValueError for a layer that does not route and a picture that does not exist.

        expert_map(run, layer=3)["weight"].max(0)      # the largest weight at each place
    """
    if layer not in run.moe_layers:
        raise ValueError(f"layer {layer} does not route; choose among {', '.join(map(str, run.moe_layers))}")
    run.tokens_of_picture(picture)  # raises for a picture that does not exist
    at, grid = run.moe_layers.index(layer), run.pictures[picture].grid
    positions = run.positions(f"image {picture}")
    weight = np.zeros((len(positions), run.n_experts), np.float32)
    np.put_along_axis(weight, run.chosen[at, positions].astype(np.int64), run.weights[at, positions].astype(np.float32), -1)
    rows, columns = grid.token_grid
    return Result(
        "expert-map",
        f"What each expert of layer {layer} counted for, over picture {picture}",
        {"weight": grid.token_heat(weight.T)},
        {"weight": [("expert", range(run.n_experts)), ("row", range(rows)), ("column", range(columns))]},
        about=about_runs([run], layer=layer, picture=picture, top_k=run.chosen.shape[-1]),
    )


def kind_information(runs: Sequence[Run], *, shuffles: int = SHUFFLES, seed: int = 0) -> Result:
    """How much the choice of an expert tells of the kind of its token, and whether any expert idles.

    information (L,) = I(expert; kind) in bits, of one of a token's K experts taken at random; kinds are KINDS. Beside it
    the same with kinds shuffled over the tokens of each run (mean and 95% range), and what bounds it: kind_entropy and
    expert_entropy. share (X, L, E) as in R3; max_vio and dead as in R1. Kinds stand together in a run, and a shuffle does
    not keep that: neighbours that are alike for another reason count as information too.

        result = kind_information(runs)
        (result["information_low"] > result["shuffled_high"]).all()
    """
    layers, experts, top_k = routing_sizes(runs)
    kinds = [kinds_of(run) for run in runs]

    def table(order: Sequence[np.ndarray]) -> np.ndarray:
        return np.array([grouped_counts(run, of, len(KINDS)) for run, of in zip(runs, order, strict=True)])  # (R, X, L, E)

    def information(counts: np.ndarray) -> np.ndarray:
        return mutual_information(np.moveaxis(counts, -3, -2))

    counts, rng = table(kinds), np.random.default_rng(seed)
    shuffled = np.array([information(table([rng.permutation(of) for of in kinds]).sum(0)) for _ in range(shuffles)])
    low, high = quantiles(shuffled)
    load, of_kind = counts.sum((0, 1)), np.bincount(np.concatenate(kinds), minlength=len(KINDS))
    values = {
        **with_interval("information", over_runs(information, counts, seed=seed)),
        **with_interval("shuffled", (shuffled.mean(0), low, high)),
        "expert_entropy": entropy(shares(load)),
        "kind_entropy": np.array(entropy(shares(of_kind))),
        "max_vio": max_violation(load),
        "dead": (load == 0).sum(-1),
        "share": shares(counts.sum(0)) * top_k,
        "tokens": of_kind,
    }
    layer = layer_axis(runs)
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = dict.fromkeys(values, [layer]) | {
        "kind_entropy": [],
        "share": [("kind", KINDS), layer, ("expert", range(experts))],
        "tokens": [("kind", KINDS)],
    }
    return Result(
        "kinds",
        "What the choice of an expert tells of the kind of its token (bits)",
        values,
        axes_of(values, axes),
        chance={"information": values["shuffled"], "share": top_k / experts},
        about=about_runs(runs, top_k=top_k, experts=experts, shuffles=shuffles, **drawn_anew(seed)),
    )
