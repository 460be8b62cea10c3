"""MoonViT: pictures at their own size in, one vector per 14-pixel patch out (report section 2.1).

All pictures of a call are packed into one long sequence (P patches in all), as the report packs them; attention stays
inside each picture. Letters: P patches of all pictures, V channels, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from .config import VisionConfig
from .rope import Rotation, rotate, rotation_2d

Grids = list[tuple[int, int]]  # patches down and across, one pair a picture


class MoonViT(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patches = PatchEmbedding(config)
        self.positions = PositionTable(config)
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=1e-5)

    def forward(self, pixel_values: Tensor, grids: Grids) -> Tensor:
        """pixel_values (P, 3, 14, 14), pictures one after another, patches row-major -> (P, V)."""
        x = self.patches(pixel_values)
        x = x + self.positions(grids)
        rotation = rotation_2d(grids, self.config.head_dim, x.dtype, x.device)
        packing = Packing(grids, x.device)
        for layer in self.layers:
            x = layer(x, rotation, packing)
        return self.norm(x)


class PatchEmbedding(nn.Module):
    """A linear map of the 3*14*14 numbers of a patch; stored, like the released one, in the shape of a convolution."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.hidden_size, 3, config.patch_size, config.patch_size))
        self.bias = nn.Parameter(torch.zeros(config.hidden_size))
        nn.init.normal_(self.weight, std=(3 * config.patch_size**2) ** -0.5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.linear(pixel_values.to(self.weight.dtype).flatten(1), self.weight.flatten(1), self.bias)


class PositionTable(nn.Module):
    """A learned table of patch positions, stretched to each picture's grid."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        size = (config.init_pos_emb_height, config.init_pos_emb_width, config.hidden_size)
        self.weight = nn.Parameter(torch.randn(size))

    def forward(self, grids: Grids) -> Tensor:
        """(h, w) per picture -> (P, V). Plain bicubic without antialiasing: shrinking aliases, and so it was trained.
        """
        if not grids:
            return self.weight.new_zeros(0, self.weight.shape[-1])
        stretched = {grid: self._stretch(grid) for grid in dict.fromkeys(grids)}
        return torch.cat([stretched[grid] for grid in grids])

    def _stretch(self, grid: tuple[int, int]) -> Tensor:
        table = self.weight
        if grid != table.shape[:2]:
            channels_first = rearrange(table, "h w v -> 1 v h w")
            table = rearrange(F.interpolate(channels_first, size=grid, mode="bicubic"), "1 v h w -> h w v")
        return table.flatten(0, 1)


class VisionLayer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.attn_norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.attn = VisionAttention(config)
        self.resid_mid = nn.Identity()  # the stream between attention and FFN: here it can be read and changed
        self.ffn_norm = nn.LayerNorm(config.hidden_size, eps=1e-5)
        self.ffn = VisionFFN(config)

    def forward(self, x: Tensor, rotation: Rotation, packing: Packing) -> Tensor:
        x = self.resid_mid(x + self.attn(self.attn_norm(x), rotation, packing))
        return x + self.ffn(self.ffn_norm(x))


class VisionAttention(nn.Module):
    """Every patch of a picture looks at every patch of the same picture."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.q, self.k, self.v = nn.Identity(), nn.Identity(), nn.Identity()  # the thirds of qkv, before rotation
        self.core = PackedCore()
        self.out = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, rotation: Rotation, packing: Packing) -> Tensor:
        q, k, v = rearrange(self.qkv(x), "p (three h d) -> three p h d", three=3, h=self.heads)
        q, k, v = self.q(q), self.k(k), self.v(v)  # (P, H, d)
        heads = self.core(rotate(q, rotation), rotate(k, rotation), v, packing)
        return self.out(heads.flatten(1))


class PackedCore(nn.Module):
    """Attention inside each picture of a pack, without a mask. q, k, v (P, H, d) -> (P, H, d).

    A masked P x P product would cost the square of the whole pack; here pictures of equal patch count go together.
    """

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        if len(packing.groups) == 1:  # one picture, or all of one size: the pack is already a batch
            count = packing.groups[0][0]
            return self._attend(q, k, v, count)
        heads = torch.empty_like(v)
        for count, rows in packing.groups:
            heads = heads.index_copy(0, rows, self._attend(q[rows], k[rows], v[rows], count))
        return heads

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
        q, k, v = (rearrange(part, "(n p) h d -> n h p d", p=count) for part in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v), "n h p d -> (n p) h d")


class ExplicitPackedCore(nn.Module):
    """The same, with the probabilities in the open as submodule `probs` (one call a picture)."""

    def __init__(self) -> None:
        super().__init__()
        self.probs = nn.Softmax(dim=-1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        heads = []
        for q_i, k_i, v_i in zip(*(part.split(packing.counts) for part in (q, k, v)), strict=True):
            scores = torch.einsum("phd,shd->hps", q_i, k_i) * q.shape[-1] ** -0.5
            probs = self.probs(scores.to(torch.promote_types(q.dtype, torch.float32))).to(q.dtype)
            heads.append(torch.einsum("hps,shd->phd", probs, v_i))
        return torch.cat(heads)


class Packing:
    """Where each picture lies in the pack, and which pictures have as many patches as each other."""

    def __init__(self, grids: Grids, device: torch.device):
        self.counts = [h * w for h, w in grids]
        starts = [sum(self.counts[:i]) for i in range(len(grids))]
        self.groups: list[tuple[int, Tensor]] = []  # patches a picture, and the pack rows of all such pictures
        for count in dict.fromkeys(self.counts):
            first = torch.tensor([s for s, c in zip(starts, self.counts, strict=True) if c == count], device=device)
            rows = first[:, None] + torch.arange(count, device=device)
            self.groups.append((count, rows.flatten()))


class VisionFFN(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.fc0 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc1 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc1(F.gelu(self.fc0(x), approximate="tanh"))  # the projector's GELU is the exact one
