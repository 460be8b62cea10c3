"""Rotary positions in one dimension (the decoder) and in two (MoonViT), side by side.

Both rotate **adjacent** channel pairs (2j, 2j+1), the layout of the released weights; only the angles differ.
Letters: B rows, T tokens, P patches, H heads, d channels of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (..., d/2), one pair of channels an entry


def rotation_1d(positions: Tensor, dim: int, theta: float, dtype: torch.dtype) -> Rotation:
    """Angles `position * theta^(-2i/dim)` for pair i. positions (B, T) -> two of (B, T, dim/2)."""
    exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float64) / dim
    return _cos_sin(positions[..., None].double() * theta**-exponents, dtype)


def rotation_2d(grids: list[tuple[int, int]], dim: int, dtype: torch.dtype, device: torch.device) -> Rotation:
    """Angles of patch rows and columns, counted from 0 inside each picture. grids of (h, w) -> two of (P, dim/2).

    Pair 2i turns with the **column** and pair 2i+1 with the **row**, both by `10000^(-4i/dim)`: the order of the
    released arithmetic, which a docstring travelling with the released code states the other way round.
    """
    frequencies = 10000.0 ** -(torch.arange(0, dim, 4, device=device, dtype=torch.float64) / dim)  # (dim/4,)
    angles = []
    for h, w in grids:
        row = torch.arange(h, device=device).repeat_interleave(w)  # patches are row-major
        column = torch.arange(w, device=device).repeat(h)
        column_row = torch.stack([column, row], dim=-1)  # (h*w, 2)
        angles.append((frequencies[None, :, None] * column_row[:, None, :]).flatten(1))  # (h*w, dim/2)
    return _cos_sin(torch.cat(angles), dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turns each adjacent channel pair of x (..., H, d) by its angle; the rotation (..., d/2) is shared by all heads.
    """
    turn = torch.complex(*rotation)[..., None, :]  # cos + i sin, with the head axis
    # copied: neighbours may only be read as one number where they begin at an even place of their storage
    wide = x.to(rotation[0].dtype).clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))  # (..., H, d/2): even + i odd
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def _cos_sin(angles: Tensor, dtype: torch.dtype) -> Rotation:
    # at position 131071 a bf16 angle would be off by many turns: float64 angles, then at least float32 tables
    table = torch.promote_types(dtype, torch.float32)
    return angles.cos().to(table), angles.sin().to(table)
