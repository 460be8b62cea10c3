"""Attention inside each picture of a pack by torch's kernel for rows of many lengths, in one call (a GPU, bfloat16 or float16).

A drop-in for `PackedCore`, which makes a call for every number of patches. Here, and not in the reference, until it has been
timed on a GPU: `python -m benchmarks.gpu --only packed`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from kimi_vl_ref.vision import Packing


class VarlenCore(nn.Module):
    """q, k, v (P, H, d) -> (P, H, d); signature and result of `PackedCore`."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        # where each picture begins, and where the last one ends
        starts = torch.tensor([0, *packing.counts], device=q.device).cumsum(0).to(torch.int32)
        longest = max(packing.counts)
        heads = varlen_attn(q.contiguous(), k.contiguous(), v.contiguous(), starts, starts, longest, longest)
        assert isinstance(heads, Tensor)
        return heads
