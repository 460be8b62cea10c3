"""How a choice of experts came about: scores, bias and weights side by side, near-ties, the shared expert, two runs compared.

Letters: G groups of tokens, L layers that route, E experts, K chosen, T tokens, N aligned tokens, Q quantiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .counting import (
    GROUPS,
    axes_of,
    drawn_anew,
    layer_axis,
    over_runs,
    positions_of,
    routing_sizes,
    scores_of,
    with_interval,
)
from .experts import chosen_by_both
from .result import Result, about_runs
from .routing import best, token_confidence

if TYPE_CHECKING:
    from workbench.runs import Run

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
NEAR = 0.002  # four steps just below 1 of float16, in which scores are kept


def token_selection(run: Run, position: int, layer: int) -> Result:
    """One token at one layer, expert by expert, each (E,): score s, bias b, selection s + b, final weight (0 where not
    chosen), chosen and chosen_without_bias (0 or 1).

    The experts of highest selection are chosen; their weights come from the scores alone (arXiv 2412.19437 section 2.1.2).
    Raises ValueError for a position or layer that does not exist.

        result = token_selection(run, position=40, layer=3)
        result["chosen"] != result["chosen_without_bias"]        # where the bias decided
    """
    if layer not in run.moe_layers:
        raise ValueError(f"layer {layer} does not route; choose among {', '.join(map(str, run.moe_layers))}")
    if not 0 <= position < len(run.token_ids):
        raise ValueError(f"position {position} does not exist; the run has positions 0 to {len(run.token_ids) - 1}")
    at = run.moe_layers.index(layer)
    scores, bias = scores_of(run)[at, position], run.bias[at].astype(np.float64)
    chosen = run.chosen[at, position].astype(np.int64)
    weight, picked = np.zeros(run.n_experts), np.zeros(run.n_experts, int)
    weight[chosen], picked[chosen] = run.weights[at, position], 1
    values = {
        "score": scores,
        "bias": bias,
        "selection": scores + bias,
        "weight": weight,
        "chosen": picked,
        "chosen_without_bias": best(scores, len(chosen)).astype(int),
    }
    where = f"token {position} {run.texts[position]!r} ({run.roles[position]}), layer {layer}"
    return Result(
        "selection",
        f"What chose the experts of {where}",
        values,
        dict.fromkeys(values, [("expert", range(run.n_experts))]),
        about=about_runs([run], position=position, layer=layer, top_k=len(chosen)),
    )


def bias_effect(runs: Sequence[Run], groups: Sequence[str] = GROUPS) -> Result:
    """Where the selection bias changed the choice.

    flip_rate (G, L): share of tokens whose set of experts would be another with b = 0, and replaced (G, L): the mean share of
    their K experts that the bias put there. gained (L, E): share of tokens that an expert got by the bias, lost (L, E): that
    it lost; bias (L, E). unexplained (L,): share of tokens whose recorded choice is not the best K of s + b: rounding of the
    kept scores, or an edit of the routing.

        result = bias_effect(runs)
        result["gained"] - result["lost"]          # what the bias moved, expert by expert
    """
    layers, experts, top_k = routing_sizes(runs)
    groups = list(groups)
    flips, replaced, tokens = [], [], []
    gained, lost, unexplained = (np.zeros((len(layers), experts)) for _ in range(3))
    for run in runs:
        scores = scores_of(run)
        plain = best(scores, top_k)
        biased = best(scores + run.bias.astype(np.float64)[:, None], top_k)
        gained += (biased & ~plain).sum(1)
        lost += (plain & ~biased).sum(1)
        recorded = np.zeros(plain.shape, bool)
        np.put_along_axis(recorded, run.chosen.astype(np.int64), True, -1)
        unexplained += (recorded & ~biased).any(-1).sum(-1)[:, None]
        new = (biased & ~plain).sum(-1)  # (L, T)
        where = [positions_of(run, group) for group in groups]
        flips.append([(new[:, at] > 0).sum(-1) for at in where])
        replaced.append([new[:, at].sum(-1) / top_k for at in where])
        tokens.append([len(at) for at in where])
    n, total = np.array(tokens), sum(len(run.token_ids) for run in runs)

    def mean(sums: np.ndarray, count: np.ndarray) -> np.ndarray:
        return sums / count[..., None]

    values = {
        **with_interval("flip_rate", over_runs(mean, np.array(flips), n)),
        **with_interval("replaced", over_runs(mean, np.array(replaced), n)),
        "gained": gained / total,
        "lost": lost / total,
        "bias": runs[0].bias.astype(np.float64),
        "unexplained": unexplained[:, 0] / total,
        "tokens": n.sum(0),
    }
    layer, by_expert = layer_axis(runs), [layer_axis(runs), ("expert", range(experts))]
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = dict.fromkeys(("flip_rate", "replaced"), [("group", groups), layer])
    axes |= dict.fromkeys(("gained", "lost", "bias"), by_expert)
    axes |= {"unexplained": [layer], "tokens": [("group", groups)]}
    return Result(
        "bias",
        "Where the selection bias changed the choice of experts",
        values,
        axes_of(values, axes),
        chance={"flip_rate": 0.0, "replaced": 1 - top_k / experts},  # a bias that outweighs every score replaces so many
        about=about_runs(runs, top_k=top_k, experts=experts, **drawn_anew()),
    )


def router_margins(runs: Sequence[Run], groups: Sequence[str] = GROUPS, *, near: float = NEAR) -> Result:
    """How narrowly the choice was made. margin (G, L, Q): quantiles over tokens of the K-th minus the (K+1)-th value of
    s + b; near_ties (G, L): share of tokens with a margin below `near`, which another precision may decide otherwise.

        result = router_margins(runs)
        result["near_ties"][0]        # (L,) over all tokens
    """
    layers, experts, top_k = routing_sizes(runs)
    if top_k == experts:
        raise ValueError(f"all {experts} experts are chosen for every token, so there is no margin; analyse another model")
    groups = list(groups)
    margins = [token_confidence(run)["margin"] for run in runs]
    where = [[positions_of(run, group) for group in groups] for run in runs]
    close = [[(one[:, at] < near).sum(-1) for at in found] for one, found in zip(margins, where, strict=True)]
    tokens = np.array([[len(at) for at in found] for found in where])
    spread = np.full((len(groups), len(layers), len(QUANTILES)), np.nan)
    for at in range(len(groups)):
        of_group = np.concatenate([one[:, found[at]] for one, found in zip(margins, where, strict=True)], axis=1)
        if of_group.size:
            spread[at] = np.quantile(of_group, QUANTILES, axis=1).T
    values = {
        "margin": spread,
        **with_interval("near_ties", over_runs(lambda sums, n: sums / n[..., None], np.array(close), tokens)),
        "tokens": tokens.sum(0),
    }
    by_layer = [("group", groups), layer_axis(runs)]
    return Result(
        "margins",
        f"Margin between the last expert chosen and the first left out; near-ties are below {near:g}",
        values,
        axes_of(values, {"margin": [*by_layer, ("quantile", QUANTILES)], "near_ties": by_layer, "tokens": by_layer[:1]}),
        about=about_runs(runs, top_k=top_k, experts=experts, near=near, **drawn_anew()),
    )


def run_difference(run: Run, other: Run) -> Result:
    """Two runs side by side: another prompt, another picture, another precision or an edit.

    Tokens are aligned role by role while their ids are the same (visual tokens by their number), so what stands in one run
    only is left out. same (L, N): share of the K experts that both chose (K/E by chance); score_change (L, N): largest
    |change| of a router score; surprise (N,): log-probability in `other` minus that in `run`, nats, nan in the prompt;
    text, role and both positions (N,). `about["differs"]` lists what the runs do not share. Raises ValueError for models of
    other sizes, or if nothing can be aligned.

        result = run_difference(Run.load("float32.run"), Run.load("bfloat16.run"))
        result["same"].mean(-1)       # (L,)
    """
    layers, experts, top_k = routing_sizes([run, other])
    here, there = _aligned(run, other)
    if not len(here):
        raise ValueError("the two runs have no token in common, role by role; compare runs of like prompts")
    values = {
        "same": chosen_by_both(run.chosen[:, here], other.chosen[:, there]) / top_k,
        "score_change": np.abs(scores_of(run)[:, here] - scores_of(other)[:, there]).max(-1),
        "surprise": other.logprobs[there].astype(float) - run.logprobs[here].astype(float),
        "text": np.array([run.texts[at] for at in here]),
        "role": np.array([run.roles[at] for at in here]),
        "position": here,
        "other_position": there,
    }
    token = ("token", range(len(here)))
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = dict.fromkeys(values, [token])
    axes |= dict.fromkeys(("same", "score_change"), [("layer", layers), token])
    about = about_runs([run])
    return Result(
        "difference",
        "Where two runs chose the same experts",
        values,
        axes,
        chance={"same": top_k / experts},
        about={**about, "weights": _both(run.model_name, other.model_name), "other": about_runs([other]),
               "differs": _differing(run, other), "tokens_in_one_only": len(run.texts) + len(other.texts) - 2 * len(here)},
    )  # fmt: skip


def _aligned(run: Run, other: Run) -> tuple[np.ndarray, np.ndarray]:
    """Positions of both runs that hold the same token of the same role, in order."""
    here, there = [], []
    for role in dict.fromkeys(run.roles):
        a, b = run.positions(role), other.positions(role)
        length = min(len(a), len(b))
        unlike = np.flatnonzero(run.token_ids[a[:length]] != other.token_ids[b[:length]])
        length = int(unlike[0]) if len(unlike) else length
        here.append(a[:length])
        there.append(b[:length])
    first = np.concatenate(here) if here else np.zeros(0, np.int64)
    order = np.argsort(first)
    return first[order], (np.concatenate(there) if there else first)[order]


def _differing(run: Run, other: Run) -> list[str]:
    names = ("question", "model_name", "dtype", "device", "seed", "settings", "edits", "answer")
    found = [f"{name}: {getattr(run, name)!r} / {getattr(other, name)!r}" for name in names if _unlike(run, other, name)]
    if run.versions.get("weights") != other.versions.get("weights"):
        found.append(f"weights: {run.versions.get('weights')} / {other.versions.get('weights')}")
    pictures = [[np.asarray(picture.image) for picture in one.pictures] for one in (run, other)]
    if len(pictures[0]) != len(pictures[1]):
        found.append(f"pictures: {len(pictures[0])} / {len(pictures[1])}")
    found += [f"picture {n}" for n, (a, b) in enumerate(zip(*pictures, strict=False)) if not np.array_equal(a, b)]
    return found


def _unlike(run: Run, other: Run, name: str) -> bool:
    return getattr(run, name) != getattr(other, name)


def _both(a: str, b: str) -> str:
    return a if a == b else f"{a} and {b}"
