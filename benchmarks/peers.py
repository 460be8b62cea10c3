"""Models for the benchmarks of speed, and transformers' Kimi-K2.5 on the same weights; caches planted with the same numbers.

A decode step needs a full cache, and filling one by prefill would take most of the time of a benchmark. Both sides keep one
normed latent and one rotated key a token, so random ones are written into both; that the outputs agree shows they are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kimi_vl_ref import TINY, KimiVL, KimiVLConfig, load
from kimi_vl_ref.cache import LatentCache

CONFIGS = ("issue", "study", "tiny")
EXPERTS = ("grouped_mm", "eager", "batched_mm")  # transformers' own ways to compute experts


def config(name: str) -> KimiVLConfig:
    """'issue': heads as wide as the released ones, half its MoonViT's width, 4 layers each. 'tiny': for tests."""
    vision = replace(TINY.vision, init_pos_emb_height=12, init_pos_emb_width=12)  # transformers' table is square
    text = replace(TINY.text, max_position_embeddings=1 << 18, moe_intermediate_size=20)  # theirs wants rows of 16 bytes
    tiny = replace(TINY, vision=vision, text=text)
    if name == "tiny":
        return tiny
    if name != "issue":
        raise ValueError(f"the configuration {name!r} is not known; choose one of {', '.join(CONFIGS)}")
    vision = replace(
        vision,
        hidden_size=576,
        num_hidden_layers=4,
        num_attention_heads=8,
        intermediate_size=2152,
        init_pos_emb_height=64,
        init_pos_emb_width=64,
    )
    text = replace(
        tiny.text,
        vocab_size=2048,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=1408,
        moe_intermediate_size=352,
        n_routed_experts=16,
        num_experts_per_tok=4,
    )
    return replace(tiny, vision=vision, text=text, media_placeholder_token_id=2047)


def ours(name: str) -> KimiVL:
    """The model in float32: the study model's weights, or random ones."""
    if name == "study":
        model, _ = load("study")
        text = replace(model.config.text, max_position_embeddings=1 << 18)
        model.config = replace(model.config, text=text)
        return model
    torch.manual_seed(0)
    return KimiVL(config(name)).eval().requires_grad_(False)


class Theirs:
    """Kimi-K2.5 with the weights of `model`, SDPA everywhere, the experts in the way named."""

    def __init__(self, model: KimiVL):
        from workbench.released import as_transformers

        self.whole: Any = as_transformers(model)
        self.whole.set_attn_implementation("sdpa")
        self.decoder = self.whole.model.language_model

    def forward(self, experts: str, ids: Tensor, **options: Any) -> tuple[Tensor, Any]:
        """Logits of the last column, and the cache."""
        self.decoder.config._experts_implementation = experts
        out = self.decoder(input_ids=ids, use_cache=True, **options)
        return self.whole.lm_head(out.last_hidden_state[:, -1]), out.past_key_values

    def see(self, pixels: Tensor, grids: Tensor) -> Tensor:
        thw = torch.nn.functional.pad(grids, (1, 0), value=1)
        return torch.cat(tuple(self.whole.get_image_features(pixels, thw).pooler_output))


class Planted:
    """Random latents and keys of rows of the given lengths, and what both implementations make of them."""

    def __init__(self, model: KimiVL, lengths: list[int], room: int):
        text = model.config.text
        self.model, self.lengths, self.room = model, torch.tensor(lengths), room
        weight = model.logits.weight
        self.like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        self.lengths = self.lengths.to(weight.device)
        generator = torch.Generator(weight.device).manual_seed(2)
        shape = (len(lengths), max(lengths))
        self.layers = [
            (
                torch.randn(*shape, text.kv_lora_rank, generator=generator, **self.like),
                torch.randn(*shape, text.qk_rope_head_dim, generator=generator, **self.like),
            )
            for _ in range(text.num_hidden_layers)
        ]

    def ours(self) -> LatentCache:
        cache, longest = self.model.new_cache(len(self.lengths)), int(self.lengths.max())
        cache.make_room(longest + self.room)
        positions = torch.arange(longest, device=self.lengths.device).expand(len(self.lengths), -1)
        for i, (latent, key) in enumerate(self.layers):
            cache.write(i, latent, key, positions)
        cache.advance(self.lengths, longest)
        return cache

    def theirs(self) -> Any:
        """Rows of different lengths are padded on the left, and a head's rotary channels lie in halves."""
        from transformers import DynamicCache

        cache, longest = DynamicCache(), int(self.lengths.max())
        for i, (latent, key) in enumerate(self.layers):
            key = torch.cat([key[..., 0::2], key[..., 1::2]], dim=-1)
            moved = [torch.zeros_like(part) for part in (latent, key)]
            for row, length in enumerate(self.lengths.tolist()):
                for to, part in zip(moved, (latent, key), strict=True):
                    to[row, longest - length :] = part[row, :length]
            cache.update(moved[0][:, None], moved[1][:, None], i)
        return cache

    def mask(self, new: int) -> Tensor:
        """1 for a real slot of `theirs`, of `new` tokens more, too."""
        slots = torch.arange(int(self.lengths.max()) + new, device=self.lengths.device)
        return (slots >= int(self.lengths.max()) - self.lengths[:, None]).long()


def same_each_time(build: Callable[[], Any], rewind: Callable[[Any], None]) -> Callable[[], Any]:
    """The thing built at the first call, rewound at each later one."""
    kept: list[Any] = []

    def get() -> Any:
        if not kept:
            kept.append(build())
        else:
            rewind(kept[0])
        return kept[0]

    return get


def resident(field: str) -> int:
    """Bytes of this process: 'VmRSS' now, 'VmHWM' at its largest since `forget_peak`."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(field))


def forget_peak() -> None:
    if not sys.platform.startswith("linux"):
        raise ValueError("peak memory is read from /proc, which only Linux has; run this one on Linux")
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")
