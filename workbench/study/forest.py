"""The decoder on a Forest: trees of conversations in one row, each branch seeing the shared part and itself.

The reference's layers run as they are; only the attention core is another one, which knows where trees and branches begin.
Letters: N tokens of all trees, H heads, n/r/v channels, R latent.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kimi_vl_ref.attention import Where, expand
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.rope import rotation_1d

from .batches import Forest


class TreeCore(nn.Module):
    """A core (see attention.py) for one row of trees: `plant` says where they are, then every layer may call it.

    Plain products and a softmax: at some hundred tokens a tree they are faster on a CPU, forwards and backwards, than the
    fused kernels, above all in bfloat16.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trees: list[tuple[slice, Tensor]] = []  # and -inf where a query may not see, else 0: (T, T) of one tree

    def plant(self, forest: Forest) -> None:
        self.trees = []
        for start, stop in forest.trees:
            branch = forest.branches[start:stop]
            seen = (branch[None] == 0) | (branch[None] == branch[:, None])
            hidden = torch.zeros(seen.shape).masked_fill_(~(seen & torch.ones_like(seen).tril()), float("-inf"))
            self.trees.append((slice(start, stop), hidden))

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        q, k, v = (part[0].transpose(0, 1) for part in expand(q_nope, q_rope, latent, k_rope, up))  # (H, N, n+r or v)
        q = q * q.shape[-1] ** -0.5
        heads = []
        for tree, hidden in self.trees:
            scores = torch.baddbmm(hidden.to(q.dtype), q[:, tree], k[:, tree].transpose(1, 2))
            heads.append(scores.float().softmax(-1).to(v.dtype) @ v[:, tree])
        return torch.cat(heads, dim=1).transpose(0, 1)[None]  # (1, N, H, v)


def run(model: KimiVL, forest: Forest, visual: Tensor) -> Tensor:
    """The normed stream (N, D). The model's layers must hold a TreeCore that has been told of this forest."""
    config = model.config.text
    x = model.embedded(forest.input_ids[None], visual)
    positions = forest.positions[None]
    rotation = rotation_1d(positions, config.qk_rope_head_dim, config.rope_theta, x.dtype)
    where = Where(positions, rotation, None)
    for layer in model.decoder.layers:
        x = layer(x, where, None)
    return model.decoder.norm(x)[0]
