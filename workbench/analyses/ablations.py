"""What an answer loses without experts (paper I4), each time beside a random control of equal size. The picture's side (I5) is
in `picture_ablations.py`.

Losses are nats a scored token; "right" is the share of trials whose scored tokens are all the likeliest, which is what greedy
decoding would write. Letters: B rows, T tokens, E experts, K chosen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimi_vl_ref import Chat, KimiVL, load
from kimi_vl_ref.moe import Choice, MoE
from workbench.edits import ablate_shared, applied, set_top_k
from workbench.runs import fingerprint
from workbench.sweeps import sweep
from workbench.tape import attach

from .result import Result
from .trials import Trial, about_trials, batches, by_domain, domains, score_batches, study_trials


def expert_masking(
    model: KimiVL,
    trials: Sequence[Trial],
    *,
    model_name: str,
    shares: Sequence[float] = (0, 1 / 16, 2 / 16, 3 / 16, 4 / 16),
    seed: int = 0,
    batch: int = 16,
) -> Result:
    """Loss when each token's best-scored experts cannot be chosen and the next best are (paper I4a; arXiv 2401.06066, 4.5).

        result = expert_masking(model, trials, model_name="study")
        result["loss"]              # (shares, domains) nats a token; the first is the model as it is

    shares: of the E experts of every layer, masked token by token in the order of their score without the bias. "control"
    masks as many experts drawn at random for each token. Chance is a uniform guess among all tokens. Raises ValueError for a
    share that leaves fewer than K experts.
    """
    text = model.config.text
    counts = [round(share * text.n_routed_experts) for share in shares]
    if any(not 0 <= count <= text.n_routed_experts - text.num_experts_per_tok for count in counts):
        raise ValueError(f"shares={list(shares)} leave fewer than K={text.num_experts_per_tok} experts; mask fewer")
    seen = batches(model, trials, batch)
    loss, control, right = [], [], []
    for count in counts:
        with masked_experts(model, count):
            scores = score_batches(model, seen)
        with masked_experts(model, count, seed=seed):
            random = score_batches(model, seen)
        loss.append(by_domain(trials, scores.nll))
        right.append(by_domain(trials, scores.right))
        control.append(by_domain(trials, random.nll))
    axes = [("masked", counts), ("domain", domains(trials))]
    values = {"loss": np.stack(loss), "control": np.stack(control), "right": np.stack(right)}
    return Result(
        "expert-masking",
        f"Loss without each token's best experts of {text.n_routed_experts}, nats a token",
        values,
        dict.fromkeys(values, axes),
        chance={"loss": float(np.log(text.vocab_size))},
        about=about_trials(model, trials, model_name, shares=list(shares), seed=seed),
    )


@contextmanager
def masked_experts(model: KimiVL, count: int, seed: int | None = None) -> Iterator[None]:
    """Each token cannot choose its `count` best-scored experts, in any layer; with a seed, `count` random ones."""
    if not count:
        yield
        return
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    with attach(model, swap={"decoder.layers.*.ffn.router.chosen": lambda choice: _Masked(choice, count, generator)}):
        yield


class _Masked(nn.Module):
    """Stands in for `router.chosen`, (B, T, E) -> (B, T, K)."""

    def __init__(self, choice: nn.Module, count: int, generator: torch.Generator | None):
        super().__init__()
        assert isinstance(choice, Choice)
        self.choice, self.count, self.generator = choice, count, generator

    def forward(self, scores: Tensor) -> Tensor:
        judged = scores if self.generator is None else torch.rand(scores.shape, generator=self.generator).to(scores)
        worst = judged.topk(self.count, dim=-1).indices
        return self.choice(scores.scatter(-1, worst, float("-inf")))


def top_k_sweep(
    model: KimiVL,
    trials: Sequence[Trial],
    *,
    model_name: str,
    ks: Sequence[int] | None = None,
    seed: int = 0,
    batch: int = 16,
) -> Result:
    """Loss with K experts a token, with and without the shared expert (paper I4b, c; arXiv 2401.06066, 4.5).

        result = top_k_sweep(model, trials, model_name="study", ks=(1, 2, 3))
        result["loss"][:, 1]        # without the shared expert: compare K there with K - 1 with it

    The model's own K is in about["top_k"]. Dropping the shared expert and adding a routed one is the row K + 1 without it.
    "control" has the size of what stands beside it: where the shared expert is kept, K experts drawn at random for each
    token; where it is dropped, as many of the K routed ones as the shared one is wide are dropped at random in its place (all
    of them where it is wider). Chance is a uniform guess among all tokens. Raises ValueError for a K that the model lacks.
    """
    text = model.config.text
    ks = list(ks if ks is not None else range(1, min(8, text.n_routed_experts) + 1))
    if wrong := [k for k in ks if not 1 <= k <= text.n_routed_experts]:
        raise ValueError(f"K={wrong[0]} experts a token cannot be chosen; use 1 to {text.n_routed_experts}")
    layers = [i for i, layer in enumerate(model.decoder.layers) if isinstance(layer.ffn, MoE)]
    seen = batches(model, trials, batch)
    loss, right, control = [], [], []
    for k in ks:
        changes = [set_top_k(layers, k)]
        for without in ([], [ablate_shared(layer) for layer in layers]):
            with applied(model, changes + without, idle="report"):
                scores = score_batches(model, seen)
            loss.append(by_domain(trials, scores.nll))
            right.append(by_domain(trials, scores.right))
        with drawn_experts(model, k, seed):
            control.append(by_domain(trials, score_batches(model, seen).nll))
        with applied(model, changes, idle="report"), dropped_slots(model, min(k, text.n_shared_experts), seed):
            control.append(by_domain(trials, score_batches(model, seen).nll))
    names = {"loss": loss, "right": right, "control": control}
    values = {name: np.stack(rows).reshape(len(ks), 2, -1) for name, rows in names.items()}
    axes = [("K", ks), ("shared expert", ["kept", "dropped"]), ("domain", domains(trials))]
    about = about_trials(model, trials, model_name, top_k=text.num_experts_per_tok, seed=seed)
    title = "Loss with K experts a token, with and without the shared expert, nats a token"
    chance = {"loss": float(np.log(text.vocab_size))}
    return Result("top-k-sweep", title, values, dict.fromkeys(values, axes), chance, about)


@contextmanager
def drawn_experts(model: KimiVL, k: int, seed: int) -> Iterator[None]:
    """Each token gets k experts drawn at random in every layer that routes; weights follow from their own scores."""
    generator = torch.Generator().manual_seed(seed)
    with attach(model, swap={"decoder.layers.*.ffn.router.chosen": lambda _: _Drawn(k, generator)}):
        yield


class _Drawn(nn.Module):
    """Stands in for `router.chosen`, (B, T, E) -> (B, T, k)."""

    def __init__(self, k: int, generator: torch.Generator):
        super().__init__()
        self.k, self.generator = k, generator

    def forward(self, scores: Tensor) -> Tensor:
        return torch.rand(scores.shape, generator=self.generator).topk(self.k, dim=-1).indices.to(scores.device)


@contextmanager
def dropped_slots(model: KimiVL, count: int, seed: int) -> Iterator[None]:
    """What `count` of each token's chosen experts write, drawn at random in every layer that routes, counts for nothing."""
    generator = torch.Generator().manual_seed(seed)

    def drop(weights: Tensor, _site: str) -> Tensor:
        drawn = torch.rand(weights.shape, generator=generator).topk(count, dim=-1).indices.to(weights.device)
        return weights.scatter(-1, drawn, 0)

    with attach(model, edit={"decoder.layers.*.ffn.router.weights": drop}):
        yield


def single_experts(
    *,
    path: str | Path,
    model_name: str = "study",
    families: Sequence[str] = ("name", "where", "read"),
    scenes: int = 20,
    first: int = 0,
    layers: Sequence[int] | None = None,
    seed: int = 0,
    **options: Any,
) -> Result:
    """Loss of each expert: how much worse the study scenes' answers become without what it writes (paper I4d).

        result = single_experts(path="experts.jsonl", scenes=200)
        result["loss"]              # (layers, experts, domains) nats a token more than with all experts

    Contribution zeroed, routing and the other weights as they were. "control" zeroes as many of the layer's (token, expert)
    slots drawn at random; "slots" is the share of the layer's slots that the expert serves. Scenes `first` to
    `first + scenes - 1` of each family. One case an expert, run by `workbench.sweeps.sweep` with `options` (workers,
    progress, should_stop): it can be stopped and gone on with, and `path` keeps what is done. model_name: as for
    `kimi_vl_ref.load`. Raises SweepError when stopped before the end.
    """
    model, chat = load(model_name)
    experts = model.config.text.n_routed_experts
    able = [i for i, layer in enumerate(model.decoder.layers) if isinstance(layer.ffn, MoE)]
    chosen = able if layers is None else list(layers)
    if outside := [layer for layer in chosen if layer not in able]:
        raise ValueError(f"layer {outside[0]} has no experts; use some of {able}")
    cases = [{"layer": layer, "expert": expert} for layer in chosen for expert in range(experts)]
    settings = {"model": model_name, "families": list(families), "scenes": scenes, "first": first, "seed": seed}
    table, about = swept(model, chat, cases, settings, path=path, work=f"{__name__}:measure_expert", **options)

    def grid(name: str) -> np.ndarray:
        return np.array([result[name] for result in table]).reshape(len(chosen), experts, *np.shape(table[0][name]))

    axes = [("layer", chosen), ("expert", range(experts)), ("domain", list(families))]
    values = {"loss": grid("loss"), "control": grid("control"), "slots": grid("slots")}
    about["beware"] = "taken away one at a time: what two experts can do for each other is not seen"
    return Result(
        "single-experts",
        "Loss without what one expert writes, nats a token more",
        values,
        {"loss": axes, "control": axes, "slots": axes[:2]},
        chance={"loss": 0.0, "slots": 1 / experts},
        about=about,
    )


def swept(
    model: KimiVL,
    chat: Chat,
    cases: Sequence[Mapping[str, Any]],
    settings: dict[str, Any],
    *,
    path: str | Path,
    work: str,
    **options: Any,
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What `work` found for each case where one part of the model is taken away, and the `about` of a Result of them.

    settings: model, families, scenes, first and seed, as `prepare_experts` takes them; path and options as for `sweep`.
    """
    settings = settings | {"weights": fingerprint(model)}
    table = sweep(cases, setup=f"{__name__}:prepare_experts", work=work, settings=settings, path=path, **options).done()
    trials = study_trials(chat, settings["families"], settings["scenes"], first=settings["first"])
    told = {name: settings[name] for name in ("families", "scenes", "first", "seed")}
    return table, about_trials(model, trials, settings["model"], **told)


def prepare_experts(
    model: str, families: Sequence[str], scenes: int, first: int, seed: int, weights: str
) -> dict[str, Any]:
    """What a worker of a sweep holds: the model, trials with their pictures seen, their losses as they are."""
    loaded, chat = load(model)
    if fingerprint(loaded) != weights:
        raise ValueError(f"the weights of {model!r} changed since the sweep began; start it anew")
    trials = study_trials(chat, families, scenes, first=first)
    return expert_bench(loaded, trials, seed)


def expert_bench(model: KimiVL, trials: Sequence[Trial], seed: int, batch: int = 16) -> dict[str, Any]:
    seen = batches(model, trials, batch)
    return {"model": model, "trials": trials, "seen": seen, "before": score_batches(model, seen).nll, "seed": seed}


def measure_expert(shared: Mapping[str, Any], case: Mapping[str, int]) -> dict[str, Any]:
    """One case of `single_experts`: losses by domain without one expert, and without as many random slots."""
    model, layer, seen, trials = shared["model"], case["layer"], shared["seen"], shared["trials"]
    generator = torch.Generator().manual_seed(shared["seed"] * 100_003 + layer * 1009 + case["expert"])
    served = _Served(case["expert"], [batch.real for batch in seen], generator)
    router = f"decoder.layers.{layer}.ffn.router"
    with attach(model, edit={f"{router}.chosen": served.note, f"{router}.weights": served.without}):
        loss = score_batches(model, seen).nll - shared["before"]
    with attach(model, edit={f"{router}.weights": served.without_random}):
        control = score_batches(model, seen).nll - shared["before"]
    return {
        "loss": by_domain(trials, loss).tolist(),
        "control": by_domain(trials, control).tolist(),
        "slots": sum(served.counts) / sum(int(real.sum()) * model.config.text.num_experts_per_tok for real in served.real),
    }


class _Served:
    """The slots that an expert serves, batch after batch, and as many drawn at random among all slots of real tokens."""

    def __init__(self, expert: int, real: list[Tensor], generator: torch.Generator):
        self.expert, self.real, self.generator = expert, real, generator
        self.counts: list[int] = []
        self.batch = 0
        self.chosen = torch.empty(0)

    def note(self, chosen: Tensor, _site: str) -> Tensor:
        self.chosen = chosen
        return chosen

    def without(self, weights: Tensor, _site: str) -> Tensor:
        hit = (self.chosen == self.expert) & self.real[len(self.counts)][..., None]
        self.counts.append(int(hit.sum()))
        return weights.masked_fill(hit, 0)

    def without_random(self, weights: Tensor, _site: str) -> Tensor:
        slots = self.real[self.batch][..., None].expand_as(weights).flatten().nonzero().flatten()
        drawn = slots[torch.randperm(len(slots), generator=self.generator)[: self.counts[self.batch]].to(slots.device)]
        self.batch += 1
        return weights.flatten().index_fill(0, drawn, 0).view_as(weights)
