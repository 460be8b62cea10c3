"""From patches to visual tokens: four neighbours become one token of the decoder's width (report section 2.1).

Letters: P patches, M = P/4 visual tokens, V channels of MoonViT, D channels of the decoder.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import KimiVLConfig
from .vision import Grids


class Projector(nn.Module):
    def __init__(self, config: KimiVLConfig):
        super().__init__()
        width = config.vision.merged_size
        self.merged = Merge(config.vision.merge_kernel_size)
        self.norm = nn.LayerNorm(config.vision.hidden_size, eps=1e-5)  # on each patch, before they are joined
        self.linear_1 = nn.Linear(width, width)
        self.linear_2 = nn.Linear(width, config.text.hidden_size)

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        """(P, V) -> (M, D)."""
        x = self.norm(self.merged(x, grids)).flatten(1)  # (M, 4V)
        return self.linear_2(F.gelu(self.linear_1(x)))  # exact GELU here, the tanh form in MoonViT


class Merge(nn.Module):
    """Puts the patches of each 2x2 cell side by side: (P, V) -> (M, 4, V), cells and patches inside them row-major."""

    def __init__(self, kernel: tuple[int, int]):
        super().__init__()
        self.kernel = kernel

    def forward(self, x: Tensor, grids: Grids) -> Tensor:
        a, b = self.kernel
        pictures = x.split([h * w for h, w in grids])
        return torch.cat(
            [
                rearrange(picture, "(h a w b) v -> (h w) (a b) v", h=h // a, a=a, w=w // b, b=b)
                for picture, (h, w) in zip(pictures, grids, strict=True)
            ]
        )
