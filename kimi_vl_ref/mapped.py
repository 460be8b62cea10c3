"""A checkpoint that stays on the disk: its tensors are pages of the shards, read when a token needs them.

For a computer with less memory than the weights take. The system keeps what is used often and drops the rest, without
swap, since nothing is ever written back. A processor that is slow at the stored dtype (many are, at bfloat16) computes in
float32: `widen` leaves the decoder's matrices as they are stored and makes each of them wide when it is used.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import KimiVLConfig
from .experts import SeparateExperts
from .model import KimiVL
from .moe import MoE
from .weights import Filling, Place, fill_from, read_config


def map_checkpoint(folder: str | Path, dtype: torch.dtype | None = None) -> KimiVL:
    """A model on the CPU whose weights lie in the files of a checkpoint folder; `dtype` as in `load_checkpoint`.

    Tensors that are stored in another dtype are converted, which takes memory for them; the others take none of their own.
    Experts are apart (`SeparateExperts`), as they are on the disk. Keep the files while the model is used. Raises as
    `load_checkpoint` does.
    """
    folder = Path(folder)
    config = read_config(folder)
    model = separate(config).to(dtype or getattr(torch, config.torch_dtype))
    fill = Mapping(model)
    fill_from(folder, fill, window=float("inf"))  # one mapping a shard, which stays
    model.load_state_dict(fill.given, assign=True)
    return model.requires_grad_(False).eval()


def separate(config: KimiVLConfig) -> KimiVL:
    """The model on the meta device with its experts apart: names and shapes, no values."""
    with torch.device("meta"):
        model = KimiVL(config)
        for layer in model.decoder.layers:
            if isinstance(layer.ffn, MoE):
                layer.ffn.experts = SeparateExperts(config.text)  # type: ignore[assignment]
    return model


class Mapping(Filling):
    """Takes the tensors as they are given, in place of copying them."""

    def __init__(self, model: KimiVL):
        super().__init__(model)
        self.given: dict[str, Tensor] = {}

    def store(self, place: Place, tensor: Tensor) -> None:
        self.given[place.name] = tensor.to(self.state[place.name].dtype)


class Widened(nn.Module):
    """In the place of a linear layer without bias: its weight stays as it is stored. (..., I) -> (..., O)."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def widen(model: KimiVL, dtype: torch.dtype) -> KimiVL:
    """A mapped model that computes in `dtype`, changed in place.

    The decoder's large matrices stay where they are; the rest, a fourteenth of Kimi-VL-A3B, is converted and then takes
    memory: 4.6 GB in float32.
    """
    for layer in model.decoder.layers:
        attn, ffn = layer.attn, layer.ffn  # type: ignore[union-attr]
        attn.q, attn.out = Widened(attn.q), Widened(attn.out)  # type: ignore[union-attr, arg-type]
        feeds = [ffn.shared, *ffn.experts] if isinstance(ffn, MoE) else [ffn]  # type: ignore[misc]
        for feed in feeds:
            for name in ("gate", "up", "down"):
                setattr(feed, name, Widened(getattr(feed, name)))
    for module in model.modules():
        if not isinstance(module, Widened):
            for value in module.parameters(recurse=False):
                value.data = value.data.to(dtype)
    return model
