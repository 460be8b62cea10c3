"""What `benchmarks.speed` times: a prompt read, a token written, a batch of ragged rows, pictures seen; ours beside others.

A contest holds the ways to do one thing, ours first. A way is two functions: one that makes ready, untimed, and one that is
timed, whose output must agree with that of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import peers
from kimi_vl_ref.chat import Inputs
from kimi_vl_ref.generate import prefill as our_prefill
from kimi_vl_ref.vision import Packing

Way = tuple[Callable[[], Any], Callable[[Any], Tensor]]  # make ready; the work, given what that made


@dataclass
class Contest:
    ours: Way
    others: dict[str, Way]
    amount: int  # tokens or patches of one call
    bound: str  # what the work is made of, in words with numbers
    steps: int = 1  # of one call: a time is that of one step
    aside: dict[str, Way] = field(default_factory=dict)  # also timed, but no candidate for the best peer


def ready(thing: Any = None) -> Callable[[], Any]:
    return lambda: thing


def prompt(net: Any, rows: int, tokens: int) -> Tensor:
    """Text tokens: no placeholder of a picture among them."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(net.config.text.vocab_size - 1, (rows, tokens), generator=generator)
    return ids + (ids >= net.config.media_placeholder_token_id)


def prefill(config: str, tokens: int) -> Contest:
    """A prompt into the cache, as `generate` does it, and the logits of its last token."""
    net = peers.ours(config)
    theirs, ids = peers.Theirs(net), prompt(net, 1, tokens)
    inputs = Inputs(ids, torch.tensor([tokens]), None, None, [])

    def by(experts: str) -> Way:
        return ready(), lambda _: theirs.forward(experts, ids)[0]

    text = net.config.text
    pairs = tokens * (tokens + 1) / 2 * text.num_attention_heads * (text.qk_head_dim + text.v_head_dim) * 2
    weights = active_weights(net)
    flops = 2 * weights * tokens + pairs * text.num_hidden_layers
    return Contest(
        (ready(), lambda _: net.logits(our_prefill(net, inputs, net.new_cache(1)))),
        {f"sdpa, {experts}": by(experts) for experts in peers.EXPERTS[:2]},
        tokens,
        f"arithmetic: {flops / 1e9:.0f} GFLOP, attention {pairs * text.num_hidden_layers / flops:.0%} of it",
    )


def active_weights(net: Any) -> int:
    """Numbers of the decoder that one token is multiplied with, embedding and logits left out."""
    text, whole = net.config.text, sum(p.numel() for p in net.decoder.parameters())
    experts = sum(p.numel() for name, p in net.decoder.named_parameters() if ".experts." in name)
    return whole - experts + experts * text.num_experts_per_tok // text.n_routed_experts


def decode(config: str, context: int) -> Contest:
    """Single tokens after `context` others."""
    return stepping(config, [context], steps=max(1, min(8, 8192 // context)))


def batch(config: str, rows: int, longest: int = 1024) -> Contest:
    """Tokens for rows of ragged lengths, from a sixteenth of the longest to the longest, evenly spread."""
    lengths = [longest // 16 + (longest - longest // 16) * row // max(1, rows - 1) for row in range(rows)]
    return stepping(config, lengths, steps=2)


def stepping(config: str, lengths: list[int], steps: int) -> Contest:
    net = peers.ours(config)
    theirs, rows = peers.Theirs(net), len(lengths)
    planted, ids = peers.Planted(net, lengths, steps), prompt(net, rows, steps)
    ragged = len(set(lengths)) > 1

    def our_steps(cache: Any) -> Tensor:
        return torch.stack([net.logits(net(ids[:, at : at + 1], cache=cache)[:, -1]) for at in range(steps)])

    def rewind(cache: Any) -> None:
        cache.lengths, cache.filled = planted.lengths, max(lengths)

    def by(experts: str) -> Way:
        def their_steps(cache: Any) -> Tensor:
            found = []
            for at in range(steps):
                options: dict[str, Any] = {"past_key_values": cache}
                if ragged:  # left-padded: it must be told which slots are real and where the token stands
                    options |= {"attention_mask": planted.mask(at + 1), "position_ids": planted.lengths[:, None] + at}
                logits, cache = theirs.forward(experts, ids[:, at : at + 1], **options)
                found.append(logits)
            return torch.stack(found)

        return planted.theirs, their_steps

    text = net.config.text
    numbers = sum(lengths) * (text.kv_lora_rank + text.qk_rope_head_dim) * text.num_hidden_layers
    return Contest(
        (peers.same_each_time(planted.ours, rewind), our_steps),
        {f"sdpa, {experts}": by(experts) for experts in peers.EXPERTS},
        rows * steps,
        f"bytes: {4 * active_weights(net) / 1e6:.0f} MB of weights a token, {4 * numbers / 1e6:.1f} MB of cache a step",
        steps,
    )


MIXED = [(40, 40), (8, 12), (20, 28), (16, 16), (24, 20), (30, 14), (12, 12), (10, 30)] * 2  # 16 pictures
SMALL = [(4, 6), (6, 4), (2, 8)]


class MaskedCore(nn.Module):
    """One attention over the whole pack with a P x P mask: what `PackedCore` is there to avoid."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        picture = torch.repeat_interleave(torch.arange(len(packing.counts)), torch.tensor(packing.counts))
        mask = picture[:, None] == picture
        q, k, v = (part.transpose(0, 1)[None] for part in (q, k, v))
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)[0].transpose(0, 1)


@contextmanager
def swapped(net: Any, core: nn.Module) -> Iterator[None]:
    """Inside, every layer of MoonViT has `core` in the place of its own."""
    layers = list(net.vision.layers)
    own = [layer.attn.core for layer in layers]
    try:
        for layer in layers:
            layer.attn.core = core
        yield
    finally:
        for layer, one in zip(layers, own, strict=True):
            layer.attn.core = one


def vision(config: str, pictures: int) -> Contest:
    """1: one picture of 64 x 64 patches; 16: pictures of 96 to 1,600 patches. Pixels to visual tokens, projector included."""
    net = peers.ours(config)
    theirs = peers.Theirs(net)
    grids = SMALL if config == "tiny" else [(64, 64)] if pictures == 1 else (MIXED * pictures)[:pictures]
    grids = grids[:pictures] if config == "tiny" else grids
    hws, patches = torch.tensor(grids), sum(h * w for h, w in grids)
    pixels = torch.randn(patches, 3, 14, 14, generator=torch.Generator().manual_seed(3))

    def masked(_: Any) -> Tensor:
        with swapped(net, MaskedCore()):
            return net.see(pixels, hws)

    sizes = net.config.vision
    pairs = sum((h * w) ** 2 for h, w in grids) * 4 * sizes.hidden_size * sizes.num_hidden_layers
    weights = sum(p.numel() for p in net.vision.layers.parameters()) * 2 * patches
    return Contest(
        (ready(), lambda _: net.see(pixels, hws)),
        {"tower, sdpa": (ready(), lambda _: theirs.see(pixels, hws))},
        patches,
        f"arithmetic: {(pairs + weights) / 1e9:.0f} GFLOP, attention {pairs / (pairs + weights):.0%} of it",
        aside={"one masked attention": (ready(), masked)} if len(grids) > 1 else {},
    )


CONTESTS: dict[str, Callable[[str, int], Contest]] = {
    "prefill": prefill,
    "decode": decode,
    "batch": batch,
    "vision": vision,
}
