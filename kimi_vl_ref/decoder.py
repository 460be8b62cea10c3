"""The decoder: a residual stream that attention and feed-forward layers read from and write to, and nothing else.

Letters: B rows, T tokens, D stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .attention import LatentAttention, RMSNorm, Where
from .cache import LatentCache
from .config import TextConfig
from .moe import DenseFFN, MoE
from .rope import rotation_1d


class Decoder(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.config = config
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, lengths: Tensor | None = None, cache: LatentCache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D), normed. With a cache the rows go on where they stopped.

        lengths (B,): how many of the T columns of each row are real; the rest is padding on the right.
        """
        where = self.place(x, cache)
        for layer in self.layers:
            x = layer(x, where, cache)
        if cache is not None:
            cache.advance(lengths, x.shape[1])
        return self.norm(x)

    def place(self, x: Tensor, cache: LatentCache | None) -> Where:
        """Positions, rotation and visibility for the columns of x. Padding on the right needs no mask: nothing looks
        back at it.
        """
        columns = torch.arange(x.shape[1], device=x.device)
        if cache is None:
            positions, visible = columns.expand(x.shape[0], -1), None
        else:
            cache.make_room(x.shape[1])
            positions = cache.lengths[:, None] + columns
            slots = torch.arange(cache.filled + x.shape[1], device=x.device)
            visible = None if cache.even else slots <= positions[..., None]  # (B, T, S)
        rotation = rotation_1d(positions, self.config.qk_rope_head_dim, self.config.rope_theta, x.dtype)
        return Where(positions, rotation, visible)


class Layer(nn.Module):
    def __init__(self, config: TextConfig, index: int):
        super().__init__()
        self.attn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn = LatentAttention(config, index)
        self.resid_mid = nn.Identity()  # the stream between attention and FFN: here it can be read and changed
        self.ffn_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.ffn = MoE(config) if config.is_moe(index) else DenseFFN(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, where: Where, cache: LatentCache | None = None) -> Tensor:
        x = self.resid_mid(x + self.attn(self.attn_norm(x), where, cache))
        return x + self.ffn(self.ffn_norm(x))
