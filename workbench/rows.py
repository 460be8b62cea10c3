"""Attention of chosen queries, exact and of any prompt length: a row costs H x S numbers, never T x T.

Rows are computed afresh from what the cores were given, so the model keeps its fused attention. Read the inputs with
`attach(model, read=["decoder.layers.*.attn.core@in"])`. With a cache, the keys read there are a view of it: in a batch of
unequal lengths, what padding read is overwritten by the next call. Letters as in attention.py and vision.py.

    with attach(model, read=["decoder.layers.*.attn.core@in"]) as tape:
        model(input_ids, pixel_values, image_grid_hws)
    inputs = tape["decoder.layers.3.attn.core@in"][0]
    decoder_rows(inputs, [-1])                                     # (B, H, 1, S) probabilities of the last query
    decoder_scores(inputs, [-1]).content                           # what words alone would choose, before the softmax
    decoder_norm_rows(inputs, model.decoder.layers[3].attn.out.weight, [-1])
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

Rows = slice | Sequence[int] | Tensor


class Scores(NamedTuple):
    """Scores before the softmax, already scaled: content + position is what the softmax sees where `seen` is true."""

    content: Tensor  # (B, H, rows, S) from the channels without rotation (nope)
    position: Tensor  # (B, H, rows, S) from the rotary channels (rope)
    seen: Tensor  # (B or 1, 1, rows, S) bool: keys that the query may look at


def decoder_scores(inputs: tuple[Any, ...], rows: Rows = slice(None)) -> Scores:
    """Content and position parts of the scores of these queries, apart, in at least float32.

    inputs: what one call of a decoder layer's `attn.core` was given; several layers are a batch when each row has an
    up-projection of its own, (B, H, n+v, R). rows: columns of that call, counted from 0. The up-projection is moved to the
    query's side, so no key is rebuilt (DeepSeek-V2, 2405.04434, section 2.1). Raises ValueError for a row that does not
    exist.
    """
    q_nope, q_rope, latent, k_rope, up, visible = inputs
    rows = _indices(rows, q_nope.shape[1], "query", q_nope.device)
    wide = torch.promote_types(q_nope.dtype, torch.float32)
    q_nope, q_rope, latent, k_rope, up = (part.to(wide) for part in (q_nope[:, rows], q_rope[:, rows], latent, k_rope, up))
    n = q_nope.shape[-1]
    scale = (n + q_rope.shape[-1]) ** -0.5
    ups = "hnr" if up.ndim == 3 else "bhnr"
    q_latent = torch.einsum(f"bthn,{ups}->bhtr", q_nope * scale, up[..., :n, :])  # (B, H, rows, R)
    content = torch.einsum("bhtr,bsr->bhts", q_latent, latent)
    position = torch.einsum("bthr,bsr->bhts", q_rope * scale, k_rope)
    if visible is None:  # the queries are the last keys, causally
        before = latent.shape[1] - inputs[0].shape[1]
        seen = (torch.arange(latent.shape[1], device=rows.device) <= before + rows[:, None])[None, None]
    else:
        seen = visible[:, rows][:, None]
    return Scores(content, position, seen)


def decoder_rows(inputs: tuple[Any, ...], rows: Rows = slice(None), hidden: Tensor | None = None) -> Tensor:
    """What queries of one call read: probabilities (B, H, len(rows), S) over all its keys, in at least float32.

    inputs and rows as in `decoder_scores`. hidden (B, H, len(rows), S) bool: keys that are taken away besides. Raises
    ValueError for a row that does not exist.
    """
    content, position, seen = decoder_scores(inputs, rows)
    if hidden is not None:
        seen = seen & ~hidden
    return (content + position).masked_fill_(~seen, float("-inf")).softmax(-1)


def vision_rows(
    inputs: tuple[Any, ...], picture: int = 0, rows: Rows = slice(None), hidden: Tensor | None = None
) -> Tensor:
    """What patches of one picture read: probabilities (H, len(rows), patches of the picture), in at least float32.

    inputs: what one call of a vision layer's `attn.core` was given. rows: patches of that picture, counted from 0. hidden
    (H, len(rows), patches) bool: patches that are taken away. Raises ValueError for a picture or patch that does not exist.
    """
    q, k, _, packing = inputs
    start, count = _span(packing.counts, picture)
    rows = _indices(rows, count, "patch", q.device)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, k = q[start + rows].to(wide), k[start : start + count].to(wide)
    scores = torch.einsum("phd,shd->hps", q, k) * q.shape[-1] ** -0.5
    return (scores if hidden is None else scores.masked_fill(hidden, float("-inf"))).softmax(-1)


def head_writes(heads: Tensor, out: Tensor) -> Tensor:
    """What each head writes into the stream: heads (..., H, v) of `attn.core`, out (D, H*v) of `attn.out` -> (..., H, D).

    Summed over heads it is `attn.out` in the decoder, and `attn.out` without its bias in MoonViT. A head has the v_head_dim
    channels it reads with, whatever the width of its queries. Raises ValueError where the two do not fit.
    """
    if out.shape[1] != heads.shape[-2] * heads.shape[-1]:
        raise ValueError(
            f"{heads.shape[-2]} heads of {heads.shape[-1]} channels do not fit an output weight of {tuple(out.shape)}; "
            "give attn.core and the weight of attn.out of the same layer"
        )
    return torch.einsum("...hv,dhv->...hd", heads, out.unflatten(1, heads.shape[-2:]))


def decoder_norm_rows(inputs: tuple[Any, ...], out: Tensor, rows: Rows = slice(None)) -> Tensor:
    """Norm-weighted rows, || p_s * v_s W_O || a key and head (Kobayashi et al., 2004.10102): (B, H, len(rows), S).

    A key that is looked at but whose value is near zero (an attention sink, often) counts for little here. inputs and rows
    as in `decoder_rows`; out: the weight (D, H*v) of the layer's `attn.out`.
    """
    q_nope, _, latent, _, up, _ = inputs
    probs = decoder_rows(inputs, rows)
    up, latent = up[:, q_nope.shape[-1] :].to(probs.dtype), latent.to(probs.dtype)
    norms = [torch.linalg.vector_norm(latent @ (r @ v).T, dim=-1) for r, v in zip(_by_head(out, up), up, strict=True)]
    return probs * torch.stack(norms, dim=1)[:, :, None]


def vision_norm_rows(inputs: tuple[Any, ...], out: Tensor, picture: int = 0, rows: Rows = slice(None)) -> Tensor:
    """The same in MoonViT: (H, len(rows), patches of the picture). out: the weight (V, V) of the layer's `attn.out`."""
    probs = vision_rows(inputs, picture, rows)
    start, count = _span(inputs[3].counts, picture)
    values = inputs[2][start : start + count].transpose(0, 1).to(probs.dtype)  # (H, patches, d)
    norms = [torch.linalg.vector_norm(v @ r.T, dim=-1) for r, v in zip(_by_head(out, values.mT), values, strict=True)]
    return probs * torch.stack(norms)[:, None]


def _by_head(out: Tensor, values: Tensor) -> list[Tensor]:
    """For each head a small matrix that makes vectors as long as its part of `out` does: the R of its QR, (<= v, v)."""
    heads, width = values.shape[:2]
    parts = out.to(values.dtype).unflatten(1, (heads, width))  # (D, H, v)
    return [torch.linalg.qr(parts[:, head], mode="r").R for head in range(heads)]


def _span(counts: list[int], picture: int) -> tuple[int, int]:
    """First row and number of rows of one picture of a pack."""
    if not 0 <= picture < len(counts):
        raise ValueError(f"picture {picture} does not exist; this call saw pictures 0 to {len(counts) - 1}")
    return sum(counts[:picture]), counts[picture]


def _indices(rows: Rows, count: int, what: str, device: torch.device) -> Tensor:
    every = torch.arange(count, device=device)
    if isinstance(rows, slice):
        return every[rows]
    chosen = torch.as_tensor(rows, dtype=torch.long, device=device).reshape(-1)
    outside = chosen[(chosen < -count) | (chosen >= count)]
    if len(outside):
        raise ValueError(f"{what} {int(outside[0])} does not exist; this call has {count}")
    return every[chosen]
