"""A model over several GPUs: every process holds a part of the routed experts, and all of the rest.

Experts are nine tenths of Kimi-VL-A3B: two cards of 24 GB hold it whole, 18.4 GB each. All processes read the same prompt
and take the same tokens; after each mixture they sum what their experts wrote (torch.distributed, NCCL between GPUs, gloo
between processes of a CPU). Letters: B rows, T tokens, D stream, K chosen, F expert width.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .config import TextConfig
from .experts import SeparateExperts
from .mapped import map_checkpoint
from .model import KimiVL
from .moe import MoE, grouped_ffn, weighted_sum


class Part(nn.Module):
    """Some experts, stacked as in `Experts`; a module, so that nobody takes a part for a whole when saving."""

    gate_up: Tensor  # (experts here, 2F, D)
    down: Tensor  # (experts here, D, F)

    def __init__(self, gate_up: Tensor, down: Tensor):
        super().__init__()
        self.register_buffer("gate_up", gate_up)
        self.register_buffer("down", down)


class SplitExperts(nn.Module):
    """In the place of `Experts`: those of this process, and the sum with what the others' wrote."""

    def __init__(self, experts: SeparateExperts, mine: range):
        super().__init__()
        self.first = mine.start
        gate_up, down = zip(*map(experts.matrices, mine), strict=True)
        self.here = Part(torch.stack(gate_up), torch.stack(down))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (B, T, D), chosen and weights (B, T, K) -> weighted sum of the chosen experts' outputs, (B, T, D)."""
        tokens, top_k = x.flatten(0, -2), chosen.shape[-1]
        gate_up, down = self.here.gate_up, self.here.down
        expert = chosen.flatten() - self.first
        mine = ((expert >= 0) & (expert < len(down))).nonzero().squeeze(1)
        mine = mine[expert[mine].argsort(stable=True)]  # slots of the same expert side by side
        slots = x.new_zeros(len(expert), x.shape[-1])
        if len(mine):
            load = torch.bincount(expert[mine], minlength=len(down))
            slots[mine] = grouped_ffn(tokens[mine // top_k], gate_up, down, load)
        # the sum over processes is taken before the cast, as the sum over experts is
        written = weighted_sum(slots.unflatten(0, (-1, top_k)).to(weights.dtype), weights)
        dist.all_reduce(written)
        return written.to(x.dtype).view_as(x)


def load_split(
    folder: str | Path, rank: int, ranks: int, device: str | torch.device, dtype: torch.dtype | None = None
) -> KimiVL:
    """The part of a checkpoint that process `rank` of `ranks` needs, on its device; `dtype` as in `load_checkpoint`.

    Call it in every process of the group. Raises ValueError for more processes than experts, else as `load_checkpoint`.
    """
    model = map_checkpoint(folder)  # as stored: experts of other processes are never read, nor converted
    check_ranks(model.config.text, ranks)
    experts = model.config.text.n_routed_experts
    for layer in model.decoder.layers:
        if isinstance(layer.ffn, MoE):
            mine = range(experts * rank // ranks, experts * (rank + 1) // ranks)
            layer.ffn.experts = SplitExperts(layer.ffn.experts, mine).to(device, dtype)  # type: ignore[arg-type, assignment]
    return model.to(device, dtype)


def check_ranks(text: TextConfig, ranks: int) -> None:
    """Raises ValueError for more processes than there are experts."""
    if not 1 <= ranks <= text.n_routed_experts:
        raise ValueError(f"{ranks} processes cannot share {text.n_routed_experts} experts; use 1 to {text.n_routed_experts}")
