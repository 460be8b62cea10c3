"""Taking experts away: what they contribute, their weight, or the chance to be chosen; and the shared expert.

Letters: B rows, T tokens, E experts, K chosen, D stream. The order within one layer is that of routing.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.moe import Experts

from .change import Change, EditError, Now, Plan, Where, digest, indices, listed, mask
from .parts import ablate_written, filling_of
from .routing import Selecting, Selection, member, moe_layer

HOW = ("contribution", "mean", "resample", "renormalise", "route around")


def ablate_experts(
    layer: int, experts: Any, how: str = "contribution", *, values: Any = None, tokens: Any = None, seed: int = 0
) -> Change:
    """Takes experts of one layer away from the tokens that chose them.

    how   "contribution": their output counts as zero; routing and the other weights stay as they were.
          "mean", "resample": as "contribution", but in place of their output stands `values`: (len(experts), D), or
          (N, len(experts), D) of which the mean, or one draw a position, is taken; `expert_output` computes them.
          "renormalise": their weight is dropped and the other chosen ones are scaled up so that the sum of the weights
          stays; a token left with none gets nothing from the routed experts.
          "route around": they cannot be chosen; the next best biased score is, and weights follow from the new choice.
    tokens   positions, all if left out. Counts: tokens and slots (one of a token's K choices).

        applied(model, [ablate_experts(3, [7, 12], "route around")])
    """
    experts, where = indices(experts, "expert"), Where(tokens)
    if how not in HOW:
        raise EditError(f"how={how!r} is unknown for experts; use one of {', '.join(HOW)}")
    if (values is None) != (how not in ("mean", "resample")):
        raise EditError(f'how={how!r} {"needs" if values is None else "takes no"} values; "mean" and "resample" need them')
    settings = {"layer": layer, "experts": experts, "how": how, "tokens": where.json, "values": digest(values), "seed": seed}

    def prepare(model: KimiVL) -> Plan:
        moe_layer(model, layer, experts)
        ids, plan = torch.tensor(experts), Plan()
        taken: list[Tensor] = []

        def around(selection: Selection, now: Now) -> None:
            named = mask(where, now, selection.biased)
            hit = member(selection.chosen(), ids) & named[..., None]
            plan.count(tokens=hit.any(-1).sum(), slots=hit.sum())
            selection.rank(named, ids, float("-inf"))

        def drop(weights: Tensor, chosen: Tensor, now: Now) -> Tensor:
            hit = member(chosen, ids) & mask(where, now, weights)[..., None]
            plan.count(tokens=hit.any(-1).sum(), slots=hit.sum())
            left = weights.masked_fill(hit, 0.0)
            if how == "renormalise":
                remains = left.sum(-1, keepdim=True)
                return torch.where(remains > 0, left * (weights.sum(-1, keepdim=True) / remains.clamp(min=1e-20)), left)
            if values is not None:  # what each expert counted for, (B, T, len(experts))
                each = chosen[..., None] == ids.to(chosen.device)
                taken[:] = [torch.einsum("btk,btke->bte", weights - left, each.to(weights.dtype))]
            return left

        if how == "route around":
            plan.choose[layer] = around
        else:
            plan.weigh[layer] = drop
        if values is not None:
            filling = filling_of(how, values, (len(experts), model.config.text.hidden_size), "experts", seed)

            def put(written: Tensor, now: Now | None) -> Tensor:
                assert now is not None
                new = filling.new(now.positions, taken[0]).expand(*taken[0].shape, -1)  # (B, T, len(experts), D)
                return written + torch.einsum("bte,bted->btd", taken[0], new).to(written)

            plan.sites[f"decoder.layers.{layer}.ffn.experts"] = put
        return plan

    return Change("ablate_experts", settings, f"ablate {listed(experts, 'expert')} of layer {layer} ({how}){where}", prepare)


def ablate_shared(layer: int, how: str = "zero", *, values: Any = None, tokens: Any = None, seed: int = 0) -> Change:
    """What the shared expert of one layer writes becomes zero, or `values`: (D,), or (N, D) of which the mean or one
    draw a position is taken. Counts: tokens.

        applied(model, [ablate_shared(3)])
    """

    what, check = "the shared expert", lambda model: moe_layer(model, layer, [])
    return ablate_written("ablate_shared", layer, ["ffn.shared"], what, how, values, tokens, seed, {}, check)


@torch.no_grad()
def expert_output(model: KimiVL, layer: int, experts: Any, x: Tensor) -> Tensor:
    """What each expert alone would write, before its weight: x (..., D) as read at `ffn_norm` -> (..., len(experts), D).

        expert_output(model, 3, [7], tape["decoder.layers.3.ffn_norm"][0])      # (B, T, 1, D)
    """
    experts = indices(experts, "expert")
    worker = stacked(moe_layer(model, layer, experts).experts)
    inner = torch.einsum("...d,eid->...ei", x, worker.gate_up[experts])
    gate, up = inner.chunk(2, dim=-1)
    return torch.einsum("...ei,edi->...ed", F.silu(gate) * up, worker.down[experts])


def stacked(experts: nn.Module) -> Experts:
    """The experts, if their weights can be read side by side. Raises ValueError for those of a model that was made to fit."""
    if not isinstance(experts, Experts):
        raise ValueError("the experts of this model lie apart or in few bits; load the checkpoint without fit= to read them")
    return experts


class Weighing(nn.Module):
    """Stands in for `router.weights`, scores (B, T, E) and chosen (B, T, K) -> (B, T, K)."""

    def __init__(self, here: Callable[[], Now], steps: Sequence[Callable[[Tensor, Tensor, Now], Tensor]], by: Selecting):
        super().__init__()
        self.here, self.steps, self.selecting = here, steps, [by]

    def around(self, weights: nn.Module) -> Weighing:
        self.replaced = [weights]
        return self

    def forward(self, scores: Tensor, chosen: Tensor) -> Tensor:
        before = self.selecting[0].before
        weights = self.replaced[0](scores, chosen if before is None else before[chosen])
        for step in self.steps:
            weights = step(weights, chosen, self.here())
        return weights
