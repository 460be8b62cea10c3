"""How much experts write: super experts and what pruning them breaks (R9), and the shared expert against the routed ones.

A model and trials in, `Result` out. Letters: S sets of experts, N trials, G groups of tokens, L layers that route, A all
decoder layers, E experts, K chosen, H heads, T tokens, D stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.moe import MoE, grouped_linear
from workbench.edits import Change, ablate_experts, applied
from workbench.edits.experts import stacked
from workbench.rows import decoder_rows
from workbench.tape import Keep, attach

from .counting import axes_of, drawn_anew, over_runs, positions_by_role, with_interval
from .result import Result
from .trials import Trial, about_trials, read, token_logprobs

QUANTILE, SHARE = 0.995, 0.1  # a super expert is above this quantile of all experts and above this share of the largest
MASSIVE, TIMES = 100.0, 1000.0  # arXiv 2402.17762: |x| above 100 and 1,000 times the median of its hidden state
GROWTH = 1.1  # a massive activation forms in a layer that makes the largest one so many times larger; our reading
SINK = 0.3  # arXiv 2410.10781: mean attention that makes a position a sink
ROWS = 256  # attention rows in memory at a time


@torch.no_grad()
def super_experts(model: KimiVL, trials: Sequence[Trial], *, model_name: str) -> Result:
    """R9: the few experts whose output is far larger than all others'. arXiv 2507.23279.

    magnitude (L, E): the largest |output of down_proj| over all tokens, 0 for an expert that no token chose. candidate
    (L, E): above the 99.5th percentile and above a tenth of the largest. is_super (L, E): a candidate in a layer where
    massive activations form. largest, median (A,): of |x| in the stream after each decoder layer; massive (A,): whether they
    form there.

        result = super_experts(model, study_trials(chat, ["count"], 20), model_name="study model")
        result.about["super experts"]           # [[layer, expert], ...]
    """
    layers = _routed(model)
    experts = model.config.text.n_routed_experts
    magnitude = torch.zeros(len(layers), experts, dtype=torch.float64)
    stream = []
    wanted: dict[str, Keep | None] = {f"decoder.layers.{i}.ffn.experts@in": _largest_outputs(model, i) for i in layers}
    every = [f"decoder.layers.{i}" for i in range(len(model.decoder.layers))]
    for trial in trials:
        with attach(model, read={**wanted, **dict.fromkeys(every, _size)}) as tape:
            read(model, trial)
        magnitude = torch.maximum(magnitude, torch.stack([tape.last(site) for site in wanted]))
        stream.append([tape.last(site) for site in every])
    sizes = np.array(stream)  # (N, A, 2)
    massive = ((sizes[..., 0] > MASSIVE) & (sizes[..., 0] >= TIMES * sizes[..., 1])).any(0)
    largest = sizes[..., 0].max(0)
    massive &= largest > GROWTH * np.concatenate([[0.0], largest[:-1]])
    found = magnitude.numpy()
    lines = {"99.5th percentile": float(np.quantile(found, QUANTILE)), "a tenth of the largest": SHARE * float(found.max())}
    candidate = found > max(lines.values())
    is_super = candidate & massive[layers][:, None]
    by_expert = [("layer", layers), ("expert", range(experts))]
    values = {
        "magnitude": found,
        "candidate": candidate.astype(int),
        "is_super": is_super.astype(int),
        "largest": largest,
        "median": np.median(sizes[..., 1], 0),
        "massive": massive.astype(int),
    }
    axes: dict[str, list[tuple[str, Sequence[Any]]]] = dict.fromkeys(values, [("layer", range(len(every)))])
    return Result(
        "super-experts",
        "Largest output of each expert",
        values,
        axes | dict.fromkeys(("magnitude", "candidate", "is_super"), by_expert),
        chance={"magnitude": lines},
        about={
            **about_trials(model, trials, model_name),
            "super experts": [[layers[at], int(expert)] for at, expert in np.argwhere(is_super)],
            "candidates": [[layers[at], int(expert)] for at, expert in np.argwhere(candidate)],
        },
    )


def _routed(model: KimiVL) -> list[int]:
    layers = [i for i, layer in enumerate(model.decoder.layers) if isinstance(layer.ffn, MoE)]
    if not layers:
        raise ValueError("no layer of this model routes; give a model with a mixture of experts")
    return layers


def _largest_outputs(model: KimiVL, layer: int) -> Keep:
    """(E,) what each expert's down-projection gives at most, from what one call of the layer's experts was given."""
    experts = stacked(model.get_submodule(f"decoder.layers.{layer}.ffn.experts"))

    def keep(inputs: tuple[Any, ...], _site: str) -> Tensor:
        x, chosen, _ = inputs
        order = chosen.flatten().argsort(stable=True)
        load = torch.bincount(chosen.flatten(), minlength=len(experts.down))
        gate, up = grouped_linear(x.flatten(0, -2)[order // chosen.shape[-1]], experts.gate_up, load).chunk(2, dim=-1)
        out = grouped_linear(F.silu(gate) * up, experts.down, load).abs().amax(-1).double()  # one a slot, expert by expert
        ids = torch.repeat_interleave(torch.arange(len(load), device=out.device), load)
        return out.new_zeros(len(load)).scatter_reduce(0, ids, out, "amax").cpu()

    return keep


def _size(stream: Tensor, _site: str) -> tuple[float, float]:
    absolute = stream.abs().float()
    return float(absolute.max()), float(absolute.median())


@torch.no_grad()
def pruning_damage(
    model: KimiVL,
    trials: Sequence[Trial],
    experts: Sequence[tuple[int, int]],
    *,
    model_name: str,
    controls: int = 10,
    seed: int = 0,
) -> Result:
    """R9: what the output of some experts is worth, beside as many others of the same layers. arXiv 2507.23279.

    experts are (layer, expert) pairs; their contribution becomes zero, routing stays. nll_change (S, N): nats a scored token,
    per trial, that the reply loses; S is "these", then `controls` random sets of the same size in the same layers.
    sink_decay (S, A): 1 - (attention on sinks) / (attention on them before), mean over heads that have one; sinks are keys
    which take more than 0.3 of a head's attention and which half of the queries or more can see; nan in a layer without.
    Raises ValueError when a layer has too few other experts.

        found = super_experts(model, trials, model_name="study model").about["super experts"]
        pruning_damage(model, trials, [tuple(one) for one in found], model_name="study model")["nll_change"].mean(1)
    """
    if not experts:
        raise ValueError("there are no experts to prune; name (layer, expert) pairs")
    rng = np.random.default_rng(seed)
    sets = {"these": [(int(layer), int(expert)) for layer, expert in experts]}
    sets |= {f"random {n}": _others(model, experts, rng) for n in range(controls)}
    before = [_reply(model, trial, []) for trial in trials]
    change, decay = np.zeros((len(sets), len(trials))), []
    for at, of in enumerate(sets.values()):
        changes = [ablate_experts(layer, [e for at_layer, e in of if at_layer == layer]) for layer in {one: 0 for one, _ in of}]
        after = [_reply(model, trial, changes) for trial in trials]
        change[at] = [now[0] - then[0] for now, then in zip(after, before, strict=True)]
        decay.append(sink_decay([sinks for _, sinks in before], [sinks for _, sinks in after]))
    return Result(
        "pruning",
        "What the reply loses without some experts (nats a token)",
        {"nll_change": change, "sink_decay": np.array(decay)},
        {
            "nll_change": [("experts", list(sets)), ("trial", range(len(trials)))],
            "sink_decay": [("experts", list(sets)), ("layer", range(len(model.decoder.layers)))],
        },
        chance={"nll_change": float(change[1:].mean()) if controls else 0.0, "sink_decay": 0.0},
        about={
            **about_trials(model, trials, model_name),
            "sets": {name: [list(one) for one in of] for name, of in sets.items()},
            "nll": float(np.mean([nll for nll, _ in before])),
            "seed": seed,
        },
    )


def _others(model: KimiVL, experts: Sequence[tuple[int, int]], rng: np.random.Generator) -> list[tuple[int, int]]:
    found = []
    for layer in dict.fromkeys(layer for layer, _ in experts):
        named = [expert for at, expert in experts if at == layer]
        rest = np.setdiff1d(np.arange(model.config.text.n_routed_experts), named)
        if len(rest) < len(named):
            raise ValueError(f"layer {layer} has {len(rest)} other experts, too few to control for {len(named)}; prune fewer")
        found += [(int(layer), int(expert)) for expert in rng.choice(rest, len(named), replace=False)]
    return found


def _reply(model: KimiVL, trial: Trial, changes: Sequence[Change]) -> tuple[float, np.ndarray]:
    """Nats a scored token, and the mean attention that keys get (A, H, T)."""
    cores = [f"decoder.layers.{i}.attn.core@in" for i in range(len(model.decoder.layers))]
    with applied(model, changes, read=dict.fromkeys(cores, received), idle="report") as done:
        stream = read(model, trial)
    logprobs, _ = token_logprobs(model, trial, stream)
    return float(-logprobs.mean()), np.stack([done.tape.last(core) for core in cores])


def received(inputs: tuple[Any, ...], _site: str) -> np.ndarray:
    """(H, T) mean attention that each key gets from the queries that can see it; 0 for keys that under half can see."""
    total, count = 0.0, inputs[0].shape[1]
    for start in range(0, count, ROWS):
        total = total + decoder_rows(inputs, slice(start, start + ROWS))[0].sum(1).cpu().numpy()
    seen_by = np.arange(count, 0, -1)
    return np.where(2 * seen_by >= count, total / seen_by, 0.0)


def sink_decay(before: Sequence[np.ndarray], after: Sequence[np.ndarray]) -> np.ndarray:
    """What sinks lost, (A,), of the attention that keys received before and after, (A, H, T) a trial; nan without a sink."""
    left = []
    for then, now in zip(before, after, strict=True):
        sinks = then > SINK
        mass = (then * sinks).sum(-1)
        left.append(np.where(mass > 0, (now * sinks).sum(-1) / np.where(mass > 0, mass, 1.0), np.nan))
    each = np.concatenate(left, axis=1)  # (A, H of all trials)
    has = ~np.isnan(each)
    mean = np.nansum(each, -1) / np.maximum(has.sum(-1), 1)
    return np.where(has.any(-1), 1 - mean, np.nan)


@torch.no_grad()
def shared_and_routed(
    model: KimiVL,
    trials: Sequence[Trial],
    groups: Sequence[str] = ("all", "picture", "text", "question", "thought", "answer"),
    *,
    model_name: str,
) -> Result:
    """How much the shared expert writes beside the routed ones, (G, L), means over tokens with 95% intervals over trials.

    shared and routed: norms of what each writes into the stream; shared_part = shared / (shared + routed); cosine between the
    two. Half each and a cosine of 0 is what two vectors of like size in random directions give.

        result = shared_and_routed(model, trials, model_name="study model")
        result["shared_part"][0]       # (L,) over all tokens
    """
    layers, groups = _routed(model), list(groups)
    names = ("shared", "routed", "shared_part", "cosine")
    sites = [f"decoder.layers.{i}.ffn.{part}" for i in layers for part in ("shared", "experts")]
    sums, tokens = [], []
    for trial in trials:
        with attach(model, read=sites) as tape:
            read(model, trial)
        where = [positions_by_role(trial.roles, group) for group in groups]
        of_layer = [_compared(tape.last(s)[0], tape.last(r)[0]) for s, r in zip(sites[::2], sites[1::2], strict=True)]
        sums.append([[[values[at].sum() for values in each] for each in of_layer] for at in where])  # (G, L, 4)
        tokens.append([len(at) for at in where])
    mean, low, high = over_runs(lambda total, n: total / n[..., None, None], np.array(sums), np.array(tokens))
    values: dict[str, np.ndarray] = {"tokens": np.array(tokens).sum(0)}
    for at, name in enumerate(names):
        values |= with_interval(name, (mean[..., at], low[..., at], high[..., at]))
    by_layer: list[tuple[str, Sequence[Any]]] = [("group", groups), ("layer", layers)]
    return Result(
        "shared-expert",
        "What the shared expert writes beside the routed ones",
        values,
        axes_of(values, dict.fromkeys(names, by_layer) | {"tokens": by_layer[:1]}),
        chance={"shared_part": 0.5, "cosine": 0.0},
        about=about_trials(model, trials, model_name, **drawn_anew(what="trials")),
    )


def _compared(shared: Tensor, routed: Tensor) -> list[np.ndarray]:
    """(T, D) twice -> norms of both, the shared part, the cosine, (T,) each."""
    a, b = shared.double().norm(dim=-1), routed.double().norm(dim=-1)
    cosine = F.cosine_similarity(shared.double(), routed.double(), dim=-1)
    return [one.cpu().numpy() for one in (a, b, a / (a + b), cosine)]
