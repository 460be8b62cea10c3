"""Weights in 8 or 4 bits, computed with in the model's dtype: for a card that cannot hold the checkpoint as it is.

What is quantised is nearly all of the decoder: queries and output of attention, dense and shared feed-forward, and the
routed experts, which are most of the model. What is not: MoonViT and the projector, embedding and logits, norms, the
router (it decides by small differences), and the latent path of attention (0.6% of the weights, and all that the cache
keeps went through it).

8 bits: one scale a row of a matrix. 4 bits: one scale a row and 32 columns. Scales are bfloat16; rounding is to nearest.
Letters: E experts, O rows, I columns, G groups of columns.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KimiVLConfig
from .experts import SeparateExperts, one_by_one
from .model import KimiVL
from .moe import DenseFFN, Experts, MoE
from .sizes import matrices, moe_layers, parameters

GROUP = 32  # columns that share a scale at 4 bits, fewer where 32 does not divide a row


class Quantised(nn.Module):
    """A weight (..., O, I) as integers and scales, of one matrix or of all experts."""

    stored: Tensor  # (..., O, I) int8, or (..., O, I/2) uint8 with an even column in the low half
    scale: Tensor  # (..., O, G)

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self.bits, top = bits, 2 ** (bits - 1) - 1
        wide = weight.float().unflatten(-1, (-1, columns_a_scale(weight.shape[-1], bits)))  # (..., O, G, I/G)
        scale = (wide.abs().amax(-1).clamp(min=1e-12) / top).bfloat16()
        # divided by the scale as it is kept, so that its own rounding is made good here
        whole = (wide / scale.float()[..., None]).round().clamp(-top - 1, top).to(torch.int8).flatten(-2)
        if bits == 4:
            even, odd = (whole + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
            whole = even | odd << 4
        self.register_buffer("stored", whole)
        self.register_buffer("scale", scale)

    def dense(self, dtype: torch.dtype, at: int | None = None) -> Tensor:
        """The weight as it counts, (..., O, I); `at`: of one expert, (O, I)."""
        stored, scale = (self.stored, self.scale) if at is None else (self.stored[at], self.scale[at])
        if self.bits == 4:
            stored = torch.stack([stored & 15, stored >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
        return (stored.unflatten(-1, (scale.shape[-1], -1)).to(dtype) * scale.to(dtype)[..., None]).flatten(-2)


class QuantisedLinear(nn.Module):
    """In the place of a linear layer without bias. (..., I) -> (..., O)."""

    def __init__(self, weight: Tensor, bits: int):
        super().__init__()
        self.packed = Quantised(weight, bits)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.packed.dense(x.dtype))


class QuantisedExperts(nn.Module):
    """In the place of `Experts` or `SeparateExperts`; one expert at a time is made dense."""

    def __init__(self, experts: Experts | SeparateExperts, bits: int, device: torch.device):
        super().__init__()
        if isinstance(experts, Experts):
            each = zip(experts.gate_up, experts.down, strict=True)
        else:  # made one at a time, not all at once
            each = (experts.matrices(e) for e in range(len(experts)))
        packed = [(Quantised(gate_up.to(device), bits), Quantised(down.to(device), bits)) for gate_up, down in each]
        self.gate_up, self.down = (_stack(list(parts)) for parts in zip(*packed, strict=True))

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (B, T, D), chosen and weights (B, T, K) -> weighted sum of the chosen experts' outputs, (B, T, D)."""

        def run(e: int, tokens: Tensor) -> Tensor:
            gate, up = F.linear(tokens, self.gate_up.dense(x.dtype, e)).chunk(2, dim=-1)
            return F.linear(F.silu(gate) * up, self.down.dense(x.dtype, e))

        return one_by_one(x, chosen, weights, len(self.down.stored), run)


def quantise(model: KimiVL, bits: int, device: str | torch.device | None = None) -> KimiVL:
    """The model with its decoder's matrices in 8 or 4 bits, changed in place and moved to `device` layer by layer.

    A model that is mapped from disk never lies in memory as a whole. Raises ValueError for other bits, and RuntimeError if
    what is held at the end is not the promised `quantised_bytes`: a part that was skipped without a word.
    """
    if bits not in (8, 4):
        raise ValueError(f"{bits} bits are not implemented; weights can be kept in 8 or 4")
    device = model.logits.weight.device if device is None else torch.device(device)
    for layer in model.decoder.layers:
        attn, ffn = layer.attn, layer.ffn  # type: ignore[union-attr]
        for owner, name in ((attn, "q"), (attn, "out")):
            _replace(owner, name, bits, device)  # type: ignore[arg-type]
        dense = ffn.shared if isinstance(ffn, MoE) else ffn
        assert isinstance(dense, DenseFFN)
        for name in ("gate", "up", "down"):
            _replace(dense, name, bits, device)
        if isinstance(ffn, MoE):
            ffn.experts = QuantisedExperts(ffn.experts, bits, device)  # type: ignore[assignment]
        layer.to(device)
    model.to(device)
    held, promised = held_bytes(model), quantised_bytes(model.config, bits, model.logits.weight.itemsize)
    if held != promised:
        raise RuntimeError(f"{held:,} bytes are held in {bits} bits, {promised:,} were promised: a part was not quantised")
    return model


def held_bytes(model: nn.Module) -> int:
    """What the weights and buffers of a model take, in bytes."""
    return sum(tensor.nbytes for tensor in model.state_dict().values())


def quantised_bytes(config: KimiVLConfig, bits: int, itemsize: int = 2) -> int:
    """What a model of this size takes in 8 or 4 bits, the rest in numbers of `itemsize` bytes."""
    dense, packed = 0, 0
    for rows, columns, copies in matrices(config.text):
        scales = columns // columns_a_scale(columns, bits)
        dense += rows * columns * copies
        packed += rows * (columns * bits // 8 + 2 * scales) * copies
    biases = config.text.n_routed_experts * moe_layers(config.text)  # at least float32 whatever the rest is
    return packed + (parameters(config) - dense - biases) * itemsize + biases * max(itemsize, 4)


def columns_a_scale(columns: int, bits: int) -> int:
    """How many neighbours in a row share a scale. Raises ValueError for rows that cannot be packed in pairs."""
    if bits == 4 and columns % 2:
        raise ValueError(f"rows of {columns} numbers cannot be kept two to a byte; use 8 bits")
    return columns if bits == 8 else math.gcd(columns, GROUP)


def _replace(owner: nn.Module, name: str, bits: int, device: torch.device) -> None:
    linear = getattr(owner, name)
    setattr(owner, name, QuantisedLinear(linear.weight.to(device), bits))


def _stack(parts: list[Quantised]) -> Quantised:
    whole = parts[0]
    whole.stored = torch.stack([part.stored for part in parts])
    whole.scale = torch.stack([part.scale for part in parts])
    return whole
