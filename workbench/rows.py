"""Attention probabilities of chosen queries, exact and of any prompt length: a row costs H x S numbers, never T x T.

They are computed afresh from what the cores were given, so the model keeps its fused attention. Read the inputs with
`attach(model, read=["decoder.layers.*.attn.core@in"])`. With a cache, the keys read there are a view of it: in a batch of
unequal lengths, what padding read is overwritten by the next call. Letters as in attention.py and vision.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Rows = slice | Sequence[int] | Tensor


def decoder_rows(inputs: tuple[Any, ...], rows: Rows = slice(None)) -> Tensor:
    """What queries of one call read: probabilities (B, H, len(rows), S) over all its keys, in at least float32.

    inputs: what one call of a decoder layer's `attn.core` was given. rows: columns of that call, counted from 0. The
    up-projection is moved to the query's side, so no key is rebuilt. Raises ValueError for a row that does not exist.
    """
    q_nope, q_rope, latent, k_rope, up, visible = inputs
    rows = _indices(rows, q_nope.shape[1], "query", q_nope.device)
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    q_nope, q_rope, latent, k_rope, up = (part.to(wide) for part in (q_nope[:, rows], q_rope[:, rows], latent, k_rope, up))
    n = q_nope.shape[-1]
    q_latent = torch.einsum("bthn,hnr->bhtr", q_nope, up[:, :n])  # (B, H, rows, R)
    scores = torch.einsum("bhtr,bsr->bhts", q_latent, latent)
    scores = (scores + torch.einsum("bthr,bsr->bhts", q_rope, k_rope)) * (n + q_rope.shape[-1]) ** -0.5
    if visible is None:  # the keys are the queries, causally
        seen = torch.arange(latent.shape[1], device=rows.device) <= rows[:, None]  # (rows, S)
    else:
        seen = visible[:, rows][:, None]  # (B, 1, rows, S)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def vision_rows(inputs: tuple[Any, ...], picture: int = 0, rows: Rows = slice(None)) -> Tensor:
    """What patches of one picture read: probabilities (H, len(rows), patches of the picture), in at least float32.

    inputs: what one call of a vision layer's `attn.core` was given. rows: patches of that picture, counted from 0. Raises
    ValueError for a picture or patch that does not exist.
    """
    q, k, _, packing = inputs
    counts = packing.counts
    if not 0 <= picture < len(counts):
        raise ValueError(f"picture {picture} does not exist; this call saw pictures 0 to {len(counts) - 1}")
    start, count = sum(counts[:picture]), counts[picture]
    rows = _indices(rows, count, "patch", q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q[start + rows].to(wide), k[start : start + count].to(wide)
    return (torch.einsum("phd,shd->hps", q, k) * q.shape[-1] ** -0.5).softmax(-1)


def _indices(rows: Rows, count: int, what: str, device: torch.device) -> Tensor:
    every = torch.arange(count, device=device)
    if isinstance(rows, slice):
        return every[rows]
    chosen = torch.as_tensor(rows, dtype=torch.long, device=device).reshape(-1)
    outside = chosen[(chosen < -count) | (chosen >= count)]
    if len(outside):
        raise ValueError(f"{what} {int(outside[0])} does not exist; this call has {count}")
    return every[chosen]
