"""A checkpoint that stays on the disk: its tensors are pages of the shards, read when a token needs them.

For a computer with less memory than the weights take. The system keeps what is used often and drops the rest, without
swap, since nothing is ever written back.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

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
    fill_from(folder, fill)
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
