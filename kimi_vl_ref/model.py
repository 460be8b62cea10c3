"""Kimi-VL (arXiv 2504.07491), the whole of it. Start reading here.

    pixel_values (N, 3, 14, 14)                 input_ids (B, T), one placeholder id per visual token
          |  vision.py     MoonViT: one vector per patch            |
          v                                                         |
    patches (N, V)                                                  |
          |  projector.py  2x2 neighbours -> one visual token       |
          v                                                         v
    visual tokens (N/4, D) -------------------> embedded: text rows, placeholders replaced   (B, T, D)
                                                                    |  decoder.py  layers of
                                                                    |    attention.py  latent attention
                                                                    |    moe.py        routed and shared experts
                                                                    v
                                                        normed stream (B, T, D)
                                                                    |  logits, only for the rows asked for
                                                                    v
                                                        next-token scores (B, T, vocabulary)

Letters: B rows, T tokens, N patches of all pictures, V channels of MoonViT, D channels of the decoder.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .cache import LatentCache
from .config import KimiVLConfig
from .decoder import Decoder
from .projector import Projector
from .vision import Grids, MoonViT


class KimiVL(nn.Module):
    def __init__(self, config: KimiVLConfig):
        super().__init__()
        self.config = config
        self.vision = MoonViT(config.vision)
        self.projector = Projector(config)
        self.embedded = Embedding(config)
        self.decoder = Decoder(config.text)
        self.logits = nn.Linear(config.text.hidden_size, config.text.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        image_grid_hws: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """The normed stream (B, T, D); `model.logits` turns the rows you need into scores (all of them at 128K: 80
        GiB).

        input_ids (B, T), shorter rows padded on the right and their real `lengths` (B,) given; pixel_values (N, 3, 14,
        14) with image_grid_hws (pictures, 2) in the order in which the placeholders stand, row after row. With a cache
        the rows go on where they stopped. Raises ValueError when placeholders and pictures do not match.
        """
        if (pixel_values is None) != (image_grid_hws is None):
            raise ValueError("pixel_values and image_grid_hws belong together; give both, or neither for text alone")
        visual = None
        if pixel_values is not None and image_grid_hws is not None:
            visual = self.see(pixel_values, image_grid_hws)
        x = self.embedded(input_ids, visual)
        return self.decoder(x, lengths, cache)

    def see(self, pixel_values: Tensor, image_grid_hws: Tensor) -> Tensor:
        """Pictures -> visual tokens (N/4, D), picture after picture, row-major inside each."""
        grids: Grids = [(int(h), int(w)) for h, w in image_grid_hws.tolist()]
        down, across = self.config.vision.merge_kernel_size
        for h, w in grids:
            if h < 1 or w < 1 or h % down or w % across:
                raise ValueError(
                    f"a grid of {h} x {w} patches does not divide into cells of {down} x {across}; "
                    "take it from the image processor, which pads pictures to whole cells"
                )
        if sum(h * w for h, w in grids) != len(pixel_values):
            raise ValueError(
                f"the grids {grids} make {sum(h * w for h, w in grids)} patches, but pixel_values holds "
                f"{len(pixel_values)}; take both from the same image processor call"
            )
        return self.projector(self.vision(pixel_values, grids), grids)

    def new_cache(self, batch: int) -> LatentCache:
        weight = self.logits.weight
        return LatentCache(self.config.text, batch, device=weight.device, dtype=weight.dtype)


class Embedding(nn.Module):
    """Rows of the token table, with visual tokens in the place of their placeholders: the stream at its start."""

    def __init__(self, config: KimiVLConfig):
        super().__init__()
        self.placeholder = config.media_placeholder_token_id
        self.weight = nn.Parameter(torch.empty(config.text.vocab_size, config.text.hidden_size))
        nn.init.normal_(self.weight, std=config.text.initializer_range)

    def forward(self, input_ids: Tensor, visual: Tensor | None = None) -> Tensor:
        """input_ids (B, T), visual (M, D) in the order of the placeholders -> (B, T, D)."""
        x = nn.functional.embedding(input_ids, self.weight)
        if visual is None:
            return x  # decoding, or text alone; `Chat` has refused placeholders without pictures
        slots = input_ids == self.placeholder
        count = int(slots.sum())
        if count != len(visual):
            raise ValueError(
                f"the prompt has {count} picture placeholders but the pictures make {len(visual)} visual tokens; "
                "expand each placeholder to its picture's token count (Chat.prompt does)"
            )
        return x.masked_scatter(slots[..., None], visual.to(x.dtype))
