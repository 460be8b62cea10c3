"""Routed experts that lie apart: what a checkpoint mapped from disk, or kept in few bits, runs in the place of `Experts`.

Same signature, same sums; an expert that no token chose is never touched, so its pages stay on the disk.
Letters: B rows, T tokens, D stream, E experts, K chosen, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .config import TextConfig
from .moe import DenseFFN, weighted_sum


class SeparateExperts(nn.ModuleList):
    """Every expert a module with three matrices of its own, as a released checkpoint stores them."""

    def __init__(self, config: TextConfig):
        width, inner = config.hidden_size, config.moe_intermediate_size
        super().__init__(DenseFFN(width, inner) for _ in range(config.n_routed_experts))

    def matrices(self, e: int) -> tuple[Tensor, Tensor]:
        """What `Experts` keeps of one expert: gate and up rows (2F, D), and down (D, F)."""
        one = self[e]
        assert isinstance(one, DenseFFN)
        return torch.cat([one.gate.weight, one.up.weight]), one.down.weight

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (B, T, D), chosen and weights (B, T, K) -> weighted sum of the chosen experts' outputs, (B, T, D)."""
        return one_by_one(x, chosen, weights, len(self), lambda e, tokens: self[e](tokens))


def one_by_one(
    x: Tensor, chosen: Tensor, weights: Tensor, experts: int, run: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """The weighted sum with `run(e, tokens)`, (n, D) -> (n, D), called once for each expert that has tokens."""
    tokens, top_k = x.flatten(0, -2), chosen.shape[-1]
    order = chosen.flatten().argsort(stable=True)  # slots of the same expert side by side
    load = torch.bincount(chosen.flatten(), minlength=experts).tolist()
    slots = x.new_empty(len(order), x.shape[-1])
    for e, mine in enumerate(order.split(load)):
        if len(mine):
            slots[mine] = run(e, tokens[mine // top_k])
    return weighted_sum(slots.unflatten(0, (-1, top_k)), weights).view_as(x)
