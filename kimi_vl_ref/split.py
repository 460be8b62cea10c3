"""A model over several GPUs: every process holds a part of the routed experts, and all of the rest.

Experts are nine tenths of Kimi-VL-A3B: two cards of 24 GB hold it whole, 18.4 GB each. All processes read the same prompt
and take the same tokens; after each mixture they sum what their experts wrote (torch.distributed, NCCL between GPUs, gloo
between processes of a CPU). Letters: B rows, T tokens, D stream, K chosen, F expert width.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, spawn

from .config import TextConfig
from .experts import SeparateExperts
from .mapped import map_checkpoint
from .model import KimiVL
from .moe import MoE, grouped_linear, weighted_sum


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

    def __init__(self, experts: SeparateExperts, mine: range, device: torch.device):
        super().__init__()
        self.first = mine.start
        gate_up, down = zip(*map(experts.matrices, mine), strict=True)
        self.here = Part(torch.stack(gate_up).to(device), torch.stack(down).to(device))

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
            gate, up = grouped_linear(tokens[mine // top_k], gate_up, load).chunk(2, dim=-1)
            slots[mine] = grouped_linear(F.silu(gate) * up, down, load)
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
    model, device = map_checkpoint(folder, dtype), torch.device(device)
    check_ranks(model.config.text, ranks)
    experts = model.config.text.n_routed_experts
    for layer in model.decoder.layers:
        if isinstance(layer.ffn, MoE):
            mine = range(experts * rank // ranks, experts * (rank + 1) // ranks)
            layer.ffn.experts = SplitExperts(layer.ffn.experts, mine, device)  # type: ignore[arg-type, assignment]
        layer.to(device)
    return model.to(device)


def check_ranks(text: TextConfig, ranks: int) -> None:
    """Raises ValueError where a model cannot be shared among so many processes of this computer."""
    if not 1 <= ranks <= text.n_routed_experts:
        raise ValueError(f"{ranks} processes cannot share {text.n_routed_experts} experts; use 1 to {text.n_routed_experts}")
    gpus = torch.cuda.device_count()
    if 0 < gpus < ranks:
        raise ValueError(f"{ranks} processes need a GPU each and this computer has {gpus}; use at most {gpus}")


def in_processes(ranks: int, work: Callable[..., None], *arguments: Any) -> None:
    """work(rank, device, *arguments) in `ranks` processes of one group, a GPU each, or on the CPU where there is none.

    `work` is importable by name. A ValueError of any of them is raised here, in its own words.
    """
    with tempfile.TemporaryDirectory() as meeting:
        try:
            spawn(_enter, args=(ranks, meeting, work, arguments), nprocs=ranks)
        except ProcessException:
            refused = Path(meeting, "refused")
            if not refused.exists():
                raise
            raise ValueError(refused.read_text(encoding="utf-8")) from None


def _enter(rank: int, ranks: int, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(rank)
    else:  # more threads than cores would wait for each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    where = f"file://{Path(meeting).resolve()}/meet"
    dist.init_process_group("nccl" if on_gpu else "gloo", init_method=where, rank=rank, world_size=ranks)
    try:
        work(rank, f"cuda:{rank}" if on_gpu else "cpu", *arguments)
    except ValueError as error:
        Path(meeting, "refused").write_text(str(error), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()
