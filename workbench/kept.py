"""What a run keeps of attention and of its pictures, and in how many bytes: the whole policy.

Routing is small and always whole: ids, weights and all E scores of every token and layer (5.2 MB of scores for 1,560 tokens
of the real model). Attention rows on the pictures are what grows: (L, H, R, M) of float16 are 460 MB for 530 rows over a
picture of 1,024 visual tokens with 27 layers of 16 heads. So by default a run keeps the first of these that fits into
FILE_BYTES together with everything else:

    1. each head, float16                        every run of the study model about a picture of usual size
    2. each head, in 256 steps of the square root: half the bytes, off by at most (2 sqrt(p) + 1/510) / 510
    3. the mean over heads, in the same steps    the run above: 14.7 MB
    4. the same, of the last rows only

detail="full" keeps 1 for as long as it fits into MEMORY_BYTES, and then goes on with 3. A run says in `settings["heads"]`
and `kept` what it has. A picture whose pixels take more than PICTURE_BYTES is kept as large as the model saw it, unless
detail is "full". Letters: L layers, H heads, R rows, M visual tokens, G roles.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kimi_vl_ref.images import Picture

FILE_BYTES = 24_000_000  # of a saved run
MEMORY_BYTES = 1 << 30  # of attention with detail="full"
PICTURE_BYTES = 3_000_000  # of a picture's pixels, three each
DETAILS = ("default", "full")


@dataclass(frozen=True)
class AttentionKept:
    """Which attention a run keeps."""

    each: bool  # every head; False: their mean
    steps: bool  # in 256 steps of the square root; False: float16
    rows: int  # the last so many

    @property
    def heads(self) -> str:
        return "each" if self.each else "mean over heads"


def attention_kept(
    layers: int, heads: int, rows: int, visual: int, roles: int, other: int, detail: str = "default"
) -> AttentionKept:
    """The policy of the module docstring; `other` are the bytes of everything else in the run."""
    masses = 2 * layers * roles  # bytes a row and head of `role_mass`

    def fits(each: bool, steps: bool, limit: int) -> bool:
        return rows * (heads if each else 1) * (masses + layers * visual * (1 if steps else 2)) <= limit

    room = max(0, FILE_BYTES - other)
    if detail == "full":
        if fits(True, False, MEMORY_BYTES):
            return AttentionKept(True, False, rows)
        room = MEMORY_BYTES
    elif fits(True, False, room):
        return AttentionKept(True, False, rows)
    elif fits(True, True, room):
        return AttentionKept(True, True, rows)
    return AttentionKept(False, True, rows if fits(False, True, room) else room // (masses + layers * visual))


def to_steps(probs: np.ndarray) -> np.ndarray:
    """float -> uint8, the square root in 256 steps."""
    return np.round(255 * np.sqrt(probs.astype(np.float32).clip(0, 1))).astype(np.uint8)


def from_steps(steps: np.ndarray) -> np.ndarray:
    """uint8 -> float16; `to_steps` of it is what it came from."""
    return _TABLE[steps]


def on_steps(probs: Tensor) -> Tensor:
    """The nearest of the 256 values of `from_steps`, so that a run in memory is the run that comes back from its file."""
    table = torch.from_numpy(_TABLE).to(probs.device)
    return table[(255 * probs.clamp(0, 1).sqrt()).round().long()]


_TABLE = np.square(np.arange(256, dtype=np.float32) / 255).astype(np.float16)


def picture_kept(picture: Picture, detail: str) -> Picture:
    """The picture itself, or, where its pixels are more than PICTURE_BYTES, as large as the model saw it; the geometry
    stays. The model, asked again, sees the same pixels.
    """
    width, height = picture.image.size
    if detail == "full" or 3 * width * height <= PICTURE_BYTES or picture.grid.resized == (width, height):
        return picture
    return Picture(picture.image.resize(picture.grid.resized, Image.Resampling.BICUBIC), picture.grid)
