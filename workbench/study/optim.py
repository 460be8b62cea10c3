"""Muon for matrices and AdamW for the rest, as Moonlight mixes them (arXiv 2502.16982, sections 2.1 and 2.2).

A matrix's momentum is orthogonalised (all its directions get the same weight) and scaled by 0.2 sqrt(max(rows,
columns)), which gives it the size of an AdamW step, so both halves share one learning rate schedule and one weight
decay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kimi_vl_ref.fit import slow_at
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.moe import Choice

# Embedding-like tables, routers, the eye's throw-away readers and everything that is not a matrix go to AdamW.
_TABLES = ("embedded.", "logits.", "vision.positions.", "vision.patches.", ".router.", "heads.")
# Parameters that hold several matrices side by side along their rows: each is orthogonalised by itself.
_STACKED = {"attn.qkv.weight": 3, "experts.gate_up": 2}


@dataclass
class Slot:
    """One parameter and what its optimiser remembers."""

    name: str
    value: Tensor
    first: Tensor  # momentum
    second: Tensor | None  # AdamW only: mean squared gradient


class MuonAdamW:
    """step(lr, lr_adamw) applies the gradients in `.grad`; `state()` and `load_state()` are for resuming."""

    def __init__(
        self, parameters: Mapping[str, Tensor], momentum: float = 0.95, decay: float = 0.1, rank: int = 0, ranks: int = 1
    ):
        self.momentum, self.decay, self.steps, self.rank, self.ranks = momentum, decay, 0, rank, ranks
        self.muon: list[Slot] = []
        self.adamw: list[Slot] = []
        for name, value in parameters.items():
            is_matrix = value.ndim >= 2 and not any(part in name for part in _TABLES)
            second = None if is_matrix else torch.zeros_like(value)
            (self.muon if is_matrix else self.adamw).append(Slot(name, value, torch.zeros_like(value), second))

    @torch.no_grad()
    def step(self, lr: float, lr_adamw: float) -> None:
        self.steps += 1
        self._step_adamw(lr_adamw)
        same_shape: dict[tuple[int, int], list[tuple[Slot, Tensor]]] = defaultdict(list)
        for slot in self.muon:
            if slot.value.grad is None:
                continue
            slot.first.mul_(self.momentum).add_(slot.value.grad)
            nesterov = slot.value.grad + self.momentum * slot.first
            matrices = as_matrices(slot.name, nesterov)
            wide = matrices if matrices.shape[1] <= matrices.shape[2] else matrices.transpose(1, 2)
            same_shape[(wide.shape[1], wide.shape[2])].append((slot, wide))
        for group in same_shape.values():  # matrices of one shape are orthogonalised in one batch
            directions = self._orthogonalised(torch.cat([wide for _, wide in group]))
            scale = 0.2 * max(directions.shape[1:]) ** 0.5
            for (slot, _), direction in zip(group, directions.split([len(wide) for _, wide in group]), strict=True):
                matrices = as_matrices(slot.name, slot.value)
                update = direction if direction.shape == matrices.shape else direction.transpose(1, 2)
                slot.value.mul_(1 - lr * self.decay)
                slot.value.sub_(lr * scale * update.reshape(slot.value.shape))

    def _orthogonalised(self, matrices: Tensor) -> Tensor:
        """`orthogonalise`, each rank doing its share of the matrices."""
        if self.ranks == 1:
            return orthogonalise(matrices)
        shares = torch.arange(len(matrices)).tensor_split(self.ranks)
        directions = torch.zeros_like(matrices)
        directions[shares[self.rank]] = orthogonalise(matrices[shares[self.rank]])
        dist.all_reduce(directions)
        return directions

    def _step_adamw(self, lr: float, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8) -> None:
        for slot in self.adamw:
            grad, second = slot.value.grad, slot.second
            if grad is None or second is None:
                continue
            slot.first.lerp_(grad, 1 - betas[0])
            second.lerp_(grad.square(), 1 - betas[1])
            size = (second / (1 - betas[1] ** self.steps)).sqrt_().add_(eps)
            if slot.value.ndim >= 2:
                slot.value.mul_(1 - lr * self.decay)
            slot.value.addcdiv_(slot.first / (1 - betas[0] ** self.steps), size, value=-lr)

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs, as named tensors."""
        tensors = {"steps": torch.tensor(self.steps)}
        for slot in self.muon + self.adamw:
            tensors[f"first.{slot.name}"] = slot.first
            if slot.second is not None:
                tensors[f"second.{slot.name}"] = slot.second
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.steps = int(tensors["steps"])
        for slot in self.muon + self.adamw:
            slot.first.copy_(tensors[f"first.{slot.name}"])
            if slot.second is not None:
                slot.second.copy_(tensors[f"second.{slot.name}"])


def as_matrices(name: str, value: Tensor) -> Tensor:
    """A parameter as the (count, rows, columns) matrices it is made of."""
    value = value.flatten(0, -3) if value.ndim > 3 else value
    stacked = next((count for ending, count in _STACKED.items() if name.endswith(ending)), 1)
    value = value if value.ndim == 3 else value[None]
    return value.unflatten(1, (stacked, -1)).flatten(0, 1)


def quick_dtype() -> torch.dtype:
    """bfloat16, or float32 on a processor that is slow at it."""
    return torch.float32 if slow_at(torch.bfloat16) else torch.bfloat16


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Pushes all singular values of (count, rows, columns), rows <= columns, towards 1 by a Newton-Schulz iteration."""
    # in bfloat16, as Muon is usually run, where that is quick: the iteration forgives rounding
    x = (matrices / (matrices.flatten(1).norm(dim=1)[:, None, None] + 1e-7)).to(quick_dtype())
    for _ in range(steps):
        gram = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.to(matrices.dtype)


class Balancer:
    """Keeps the experts evenly loaded without a loss: after each step, the bias of an overloaded expert sinks by
    `rate`.

    DeepSeek-V3 report (arXiv 2412.19437) section 2.1.2. Counts choices by a hook from outside.
    """

    def __init__(self, model: KimiVL):
        self.choices = [module for module in model.modules() if isinstance(module, Choice)]
        self.loads = torch.zeros(len(self.choices), len(self.choices[0].bias))
        self.hooks = [c.register_forward_hook(self._counter(i)) for i, c in enumerate(self.choices)]

    def _counter(self, index: int):
        def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], chosen: Tensor) -> None:
            self.loads[index] += torch.bincount(chosen.flatten(), minlength=self.loads.shape[1])

        return count

    def update(self, rate: float) -> Tensor:
        """Moves the biases; returns each layer's MaxVio, (largest load - mean load) / mean load, and forgets the
        counts.
        """
        mean = self.loads.mean(1, keepdim=True)
        for choice, load in zip(self.choices, self.loads, strict=True):
            choice.bias += rate * torch.sign(load.mean() - load)
        violation = (self.loads.max(1).values - mean[:, 0]) / mean[:, 0].clamp(min=1)
        self.loads.zero_()
        return violation

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()
