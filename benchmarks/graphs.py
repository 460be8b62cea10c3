"""A decode step of fixed shapes, which a GPU can capture once as a CUDA graph and replay; the eager path is not touched.

At batch 1 a step is some thousand small launches, and Python takes longer to make them than the GPU to run them. A graph
replays them from one call. What it replays must not change shape or read Python numbers, so the cache has all its slots from
the start, every step looks at all of them under a mask, and positions are counted on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import Where
from kimi_vl_ref.cache import LatentCache
from kimi_vl_ref.rope import rotation_1d


class FixedStep:
    """Token ids (B, 1) -> logits (B, vocabulary) of the next, writing into `cache`, which must have room for `slots`.

    On a GPU the first call captures; on a CPU each call runs the same function. `rewind` goes back to where the cache
    stood. The cache's own counters are brought up to date by `finish`, after which the eager path goes on with it. On a GPU
    the logits are those of the last call only: clone them to keep them. Raises ValueError when all slots are taken.
    """

    def __init__(self, model: KimiVL, cache: LatentCache, slots: int):
        if slots < cache.filled + 1:
            raise ValueError(f"{slots} slots hold no token after the {cache.filled} that are cached; give more")
        self.model, self.cache, self.slots = model, cache, slots
        cache.make_room(slots - cache.filled)
        self.window = Window(cache, slots)
        self.lengths = cache.lengths.clone()  # on the device; the step itself counts them up
        self.ids = torch.zeros(len(self.lengths), 1, dtype=torch.long, device=self.lengths.device)
        self.taken, self.start = 0, cache.filled
        self.graph: torch.cuda.CUDAGraph | None = None
        self.logits: Tensor | None = None

    def __call__(self, ids: Tensor) -> Tensor:
        if self.start + self.taken >= self.slots:
            raise ValueError(f"all {self.slots} slots are taken; make a step with more of them")
        self.ids.copy_(ids)
        if not self.ids.is_cuda:
            self.logits = self._step()
        elif self.graph is None:
            self._capture()
        if self.graph is not None:
            self.graph.replay()
        self.taken += 1
        assert self.logits is not None
        return self.logits

    def rewind(self) -> None:
        self.lengths.copy_(self.cache.lengths)
        self.taken = 0

    def finish(self) -> None:
        self.cache.advance(None, self.taken)
        self.start, self.taken = self.cache.filled, 0

    def _step(self) -> Tensor:
        decoder, text = self.model.decoder, self.model.config.text
        positions = self.lengths[:, None]
        x = self.model.embedded(self.ids)
        rotation = rotation_1d(positions, text.qk_rope_head_dim, text.rope_theta, x.dtype)
        visible = torch.arange(self.slots, device=x.device) <= positions[..., None]  # (B, 1, S)
        where = Where(positions, rotation, visible)
        for layer in decoder.layers:
            x = layer(x, where, self.window)
        logits = self.model.logits(decoder.norm(x)[:, -1])
        self.lengths += 1
        return logits

    def _capture(self) -> None:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # once outside: libraries set themselves up
            self._step()
        torch.cuda.current_stream().wait_stream(aside)
        self.lengths.copy_(self.cache.lengths + self.taken)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._step()
        self.lengths.copy_(self.cache.lengths + self.taken)  # capturing runs nothing, but says so nowhere


class Window(LatentCache):
    """The store of another cache, seen as if one token were missing: every write returns all `slots`."""

    def __init__(self, cache: LatentCache, slots: int):
        self.rank, self._layers, self.filled = cache.rank, cache._layers, slots - 1
