"""What decoding remembers: per layer and token one normed latent and one rotated key, 576 numbers in Kimi-VL-A3B.

Rows of a batch may hold different numbers of tokens; a row's token t lies in slot t.
Letters: B rows, S slots, R latent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import TextConfig


class LatentCache:
    """Grows as needed. `lengths` (B,) counts the tokens of each row; `nbytes` is what the whole cache takes."""

    def __init__(self, config: TextConfig, batch: int, *, device: torch.device | str, dtype: torch.dtype):
        self.width = config.kv_lora_rank + config.qk_rope_head_dim
        self.rank = config.kv_lora_rank
        self.lengths = torch.zeros(batch, dtype=torch.long, device=device)
        self.filled = 0  # slots in use by the longest row, known without asking the device
        self.even = True  # every row fills all of them, known in the same way
        empty = torch.empty(batch, 0, self.width, device=device, dtype=dtype)
        self._layers = [empty] * config.num_hidden_layers  # replaced one by one when room is made

    @property
    def nbytes(self) -> int:
        return sum(layer.numel() * layer.element_size() for layer in self._layers)

    def make_room(self, tokens: int) -> None:
        """Before a forward pass: room for this many more tokens in every row."""
        needed, capacity = self.filled + tokens, self._layers[0].shape[1]
        if needed > capacity:
            grown = max(needed, capacity + capacity // 2, 64)
            for i, old in enumerate(self._layers):
                new = old.new_zeros(old.shape[0], grown, self.width)
                new[:, : self.filled] = old[:, : self.filled]
                self._layers[i] = new

    def write(self, layer: int, latent: Tensor, k_rope: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Stores latent (B, T, R) and k_rope (B, T, d) at positions (B, T); returns views of
        all slots, (B, S, R) and (B, S, d).
        """
        store = self._layers[layer]
        rows = torch.arange(store.shape[0], device=store.device)[:, None]
        store[rows, positions] = torch.cat([latent, k_rope], dim=-1)
        slots = store[:, : self.filled + positions.shape[1]]
        return slots[..., : self.rank], slots[..., self.rank :]

    def advance(self, lengths: Tensor | None, tokens: int) -> None:
        """After a forward pass of `tokens` columns: row b gained lengths[b] tokens (None: all of them); later columns
        were padding.
        """
        self.lengths = self.lengths + (tokens if lengths is None else lengths)
        self.even = self.even and (lengths is None or bool((lengths == tokens).all()))
        self.filled += tokens

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """The latents (B, S, R) and rotated keys (B, S, d) held so far; slots past a row's length hold nothing of
        meaning.
        """
        slots = self._layers[layer][:, : self.filled]
        return slots[..., : self.rank], slots[..., self.rank :]
