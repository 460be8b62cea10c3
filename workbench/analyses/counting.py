"""What the analyses of routing share: which tokens are counted together, tables of counts, intervals over runs.

Letters: R runs, G groups of tokens, L layers that route, E experts, K chosen, T tokens, B draws. Information is in bits.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from workbench.runs import Run

GROUPS = ("all", "prefill", "decode", "picture", "text", "question", "thought", "answer")
KINDS = ("picture", "prompt", "thought", "answer", "digit", "marker")
DRAWS = 1000  # resamplings behind an interval
LEVELS = (0.025, 0.975)  # a 95% interval


def positions_of(run: Run, group: str) -> np.ndarray:
    """Positions of one of GROUPS in a run, in order.

    "prefill" is the prompt, read in one pass; "decode" is what was written, read token by token; "text" is all that is not
    a picture, markers included. Raises ValueError for another name.
    """
    if group in ("prefill", "decode"):
        everything = np.arange(len(run.token_ids))
        return everything[: run.prompt_length] if group == "prefill" else everything[run.prompt_length :]
    return positions_by_role(run.roles, group)


def positions_by_role(roles: Sequence[str], group: str) -> np.ndarray:
    """The same for a list of roles, without the groups of `Run` that are phases of its making."""
    pictures = np.array([role.startswith("image ") for role in roles], bool)
    if group == "all":
        return np.arange(len(roles))
    if group in ("picture", "text"):
        return np.flatnonzero(pictures == (group == "picture"))
    if group not in GROUPS:
        raise ValueError(f"no group of tokens is called {group!r}; choose among {', '.join(GROUPS)}")
    role = "user" if group == "question" else group
    return np.flatnonzero([name == role for name in roles])


def kinds_of(run: Run) -> np.ndarray:
    """(T,) the number in KINDS of every token. Each has one kind: digits are taken out of question, thought and answer,
    and markers are the chat format and the special tokens.
    """
    names = {"thought": "thought", "answer": "answer", "special": "marker"}
    kinds = []
    for role, text in zip(run.roles, run.texts, strict=True):
        if role.startswith("image "):
            kind = "picture"
        else:
            kind = names.get(role, "prompt")
            if kind != "marker" and text.strip().isdigit():
                kind = "digit"
        kinds.append(KINDS.index(kind))
    return np.array(kinds, np.int64)


def routing_sizes(runs: Sequence[Run]) -> tuple[list[int], int, int]:
    """Layers that route, E and K, the same in all runs. Raises ValueError for none, for no routing, and for a run that
    differs.
    """
    if not runs:
        raise ValueError("there are no runs to analyse; give at least one")
    sizes = [(list(run.moe_layers), run.n_experts, run.chosen.shape[-1]) for run in runs]
    for at, found in enumerate(sizes):
        if found != sizes[0]:
            raise ValueError(
                f"run {at} has the layers, experts and top_k {found}, and run 0 has {sizes[0]}; "
                "analyse runs of the same routing together"
            )
    if not sizes[0][0]:
        raise ValueError("these runs have no layer that routes; analyse a model with a mixture of experts")
    return sizes[0]


def scores_of(run: Run) -> np.ndarray:
    """(L, T, E) router scores without the bias, in float64; they were kept in float16."""
    return run.scores.astype(np.float64)


def expert_counts(run: Run, positions: np.ndarray) -> np.ndarray:
    """(L, E) how many of the tokens at these positions chose each expert."""
    return grouped_counts(run, np.zeros(len(positions), np.int64), 1, positions)[0]


def grouped_counts(run: Run, group: np.ndarray, n_groups: int, positions: np.ndarray | None = None) -> np.ndarray:
    """(G, L, E) how many tokens of each group chose each expert; group (N,) is the number of the group of each position."""
    chosen = (run.chosen if positions is None else run.chosen[:, positions]).astype(np.int64)  # (L, N, K)
    layers, experts = len(chosen), run.n_experts
    cell = (group[None, :, None] * layers + np.arange(layers)[:, None, None]) * experts + chosen
    return np.bincount(cell.ravel(), minlength=n_groups * layers * experts).reshape(n_groups, layers, experts)


def group_tables(runs: Sequence[Run], groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Counts (R, G, L, E) of every run by group of tokens, and the numbers of tokens (R, G)."""
    routing_sizes(runs)
    where = [[positions_of(run, group) for group in groups] for run in runs]
    counts = [[expert_counts(run, at) for at in found] for run, found in zip(runs, where, strict=True)]
    return np.array(counts), np.array([[len(at) for at in found] for found in where])


def over_runs(
    statistic: Callable[..., np.ndarray], *tables: np.ndarray, draws: int = DRAWS, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A statistic of summed tables, and the ends of its 95% percentile interval when whole runs are drawn anew.

    Each table is (R, ...), one entry a run; the statistic takes their sums (..., with any axes before) and keeps the axes
    before. Tokens of one run depend on each other, so runs are drawn, not tokens. With one run the ends are nan. A
    statistic that noise can only raise (a largest load, an information) is raised again in every draw, so that its
    interval may lie a little above it.

        mean, low, high = over_runs(lambda sums, counts: sums / counts, sums, counts)
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        value = np.asarray(statistic(*(table.sum(0) for table in tables)), float)
        n_runs = len(tables[0])
        if n_runs < 2:
            return value, np.full(value.shape, np.nan), np.full(value.shape, np.nan)
        times = np.random.default_rng(seed).multinomial(n_runs, np.full(n_runs, 1 / n_runs), size=draws)  # (B, R)
        block = max(1, (1 << 22) // max(table[0].size for table in tables))
        drawn = [
            statistic(*(np.tensordot(times[start : start + block], table, 1) for table in tables))
            for start in range(0, draws, block)
        ]
    low, high = quantiles(np.concatenate(drawn))
    return value, low, high


def drawn_anew(seed: int = 0, what: str = "runs") -> dict[str, Any]:
    """What a Result says of its intervals and shuffles, for its `about`."""
    return {"intervals": f"95%, {what} drawn anew", "seed": seed}


def quantiles(drawn: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The ends of the 95% interval along the first axis; a draw without a value (nan) is left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a column that is nan in every draw stays nan
        low, high = np.nanquantile(drawn, LEVELS, axis=0)
    return low, high


def entropy(p: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    """-sum p log2 p in bits, where p adds up to 1 along the axis."""
    return -(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis)


def shares(counts: np.ndarray, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    """Counts as shares of their sum; nan where there is nothing."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return counts / np.asarray(counts, float).sum(axis, keepdims=True)


def mutual_information(joint: np.ndarray) -> np.ndarray:
    """I(a; b) in bits of counts (..., A, B). Never below 0 in truth; counts of few tokens raise it (see the controls)."""
    p = shares(joint, (-2, -1))
    return entropy(p.sum(-1)) + entropy(p.sum(-2)) - entropy(p, (-2, -1))


def js_divergence(p: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Jensen-Shannon divergence of two distributions along the last axis, in bits: 0 the same, 1 nothing in common."""
    return entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2


def layer_axis(runs: Sequence[Run]) -> tuple[str, Sequence[Any]]:
    return ("layer", list(runs[0].moe_layers))


def with_interval(name: str, triple: tuple[np.ndarray, np.ndarray, np.ndarray]) -> dict[str, np.ndarray]:
    """`name`, `name_low`, `name_high`: how a value with its interval is named in a Result."""
    return dict(zip((name, f"{name}_low", f"{name}_high"), triple, strict=True))


def axes_of(values: dict[str, np.ndarray], axes: dict[str, list[tuple[str, Sequence[Any]]]]) -> dict[str, Any]:
    """The axes of all values; `name_low` and `name_high` have those of `name`."""
    return {name: axes.get(name) or axes[name.removesuffix("_low").removesuffix("_high")] for name in values}
