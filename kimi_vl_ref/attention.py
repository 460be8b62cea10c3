"""Latent attention (MLA). Keys and values are rebuilt from one narrow latent per token, so that is all the cache keeps.

Moonlight report (arXiv 2502.16982) and DeepSeek-V2 (arXiv 2405.04434) section 2.1. Interchangeable cores compute the
same thing: `ExpandedCore` rebuilds every key and value, `AbsorbedCore` stays in the latent space, `BlockwiseCore` does so
in one pass, `ExplicitCore` shows its probabilities. Letters: B rows, T queries, S keys, H heads, R latent, n/r/v channels
(content, rotary, value), D stream.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right

from .cache import LatentCache
from .config import TextConfig
from .rope import Rotation, rotate


class RMSNorm(nn.Module):
    """Scales x to unit root mean square, in at least float32; the weight multiplies after the cast back."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


class LatentAttention(nn.Module):
    def __init__(self, config: TextConfig, layer: int):
        super().__init__()
        self.layer = layer
        self.heads, self.rank = config.num_attention_heads, config.kv_lora_rank
        self.q_split = (config.qk_nope_head_dim, config.qk_rope_head_dim)
        self.down_split = (config.kv_lora_rank, config.qk_rope_head_dim)
        up_width = self.heads * (config.qk_nope_head_dim + config.v_head_dim)
        self.q = nn.Linear(config.hidden_size, self.heads * config.qk_head_dim, bias=False)
        self.down = nn.Linear(config.hidden_size, sum(self.down_split), bias=False)
        # not rms_norm_eps: the released code leaves its default here
        self.latent = RMSNorm(config.kv_lora_rank, eps=1e-6)
        self.q_rope, self.k_rope = Rotate(), Rotate()
        # its weight only: the cores apply it where it pays
        self.up = nn.Linear(config.kv_lora_rank, up_width, bias=False)
        self.core: nn.Module = LatentCore(config)
        self.out = nn.Linear(self.heads * config.v_head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, where: Where, cache: LatentCache | None = None) -> Tensor:
        """x (B, T, D) -> (B, T, D)."""
        # (B, T, H, n), (B, T, H, r)
        q_nope, q_rope = self.q(x).unflatten(-1, (self.heads, -1)).split(self.q_split, dim=-1)
        latent, k_rope = self.down(x).split(self.down_split, dim=-1)  # (B, T, R), (B, T, r)
        latent = self.latent(latent)
        q_rope = self.q_rope(q_rope, where.rotation)
        k_rope = self.k_rope(k_rope[:, :, None], where.rotation).squeeze(2)  # one rotary key, shared by all heads
        if cache is not None:
            latent, k_rope = cache.write(self.layer, latent, k_rope, where.positions)  # (B, S, R), (B, S, r)
        up = self.up.weight.view(self.heads, -1, self.rank)  # (H, n+v, R)
        heads = self.core(q_nope, q_rope, latent, k_rope, up, where.visible)  # (B, T, H, v)
        return self.out(heads.flatten(2))


class Rotate(nn.Module):
    """Rotary turn of (B, T, H, r), a module so that the rotated part has a name."""

    def forward(self, x: Tensor, rotation: Rotation) -> Tensor:
        return rotate(x, rotation)


class Where:
    """Where the tokens of this call stand: computed once, used by every layer."""

    def __init__(self, positions: Tensor, rotation: Rotation, visible: Tensor | None):
        self.positions = positions  # (B, T), counted from the start of the row
        self.rotation = rotation  # two of (B, T, r/2)
        # (B, T, S) keys a query may see; None: the queries are the last T of the S keys, and see causally
        self.visible = visible


# The signature of a core:
#   q_nope (B, T, H, n), q_rope (B, T, H, r), latent (B, S, R), k_rope (B, S, r), up (H, n+v, R), visible (B, T, S)
#   or None -> what each head read, (B, T, H, v)


class LatentCore(nn.Module):
    """The cheapest of three equal forms: rebuilding all keys pays only when many queries share them."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.expanded, self.absorbed, self.blockwise = ExpandedCore(), AbsorbedCore(), BlockwiseCore()
        # S keys cost R(n+v) to rebuild each; a query costs 2R+r a key in latent space, n+r+v against rebuilt keys
        n_plus_v = config.qk_nope_head_dim + config.v_head_dim
        saved = 2 * config.kv_lora_rank - n_plus_v
        self.queries_worth_expanding = config.kv_lora_rank * n_plus_v / saved if saved > 0 else float("inf")

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        # a prefill from nothing always expands: it then needs no mask at all
        many = q_nope.shape[1] > min(self.queries_worth_expanding, latent.shape[1] - 1)
        # one pass pays where a CPU would fetch the cache twice from memory; on a GPU a block is too little work
        long = latent.shape[1] > 8 * self.blockwise.block and not latent.is_cuda
        core = self.expanded if many else self.blockwise if long else self.absorbed
        return core(q_nope, q_rope, latent, k_rope, up, visible)


class ExpandedCore(nn.Module):
    """Rebuilds each head's keys and values from the latents, then attends as usual. For prefill."""

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        q, k, v = expand(q_nope, q_rope, latent, k_rope, up)
        d, v_dim = q.shape[-1], v.shape[-1]
        if v_dim < d:  # the fused kernels want keys and values equally wide
            v = F.pad(v, (0, d - v_dim))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T or S, d)
        if visible is None:
            heads = causal_attention(q, k, v)
        else:
            heads = F.scaled_dot_product_attention(q, k, v, attn_mask=visible[:, None])
        return heads.transpose(1, 2)[..., :v_dim]


class AbsorbedCore(nn.Module):
    """Moves the up-projection to the query's side: scores and sums stay in the latent space, shared by all heads.

    (U c_s).q = c_s.(U^T q): the cache is read as it lies, as one key of R + r channels for every head. For decoding.
    """

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        queries, n = latent_queries(q_nope, q_rope, up), q_nope.shape[-1]  # (B, H*T, R), (B, H*T, r)
        heads = up.shape[0], q_nope.shape[1]
        scores = latent_scores(*queries, latent, k_rope, (n + q_rope.shape[-1]) ** -0.5)  # (B, H*T, S)
        probs = masked_softmax(scores.unflatten(1, heads), visible)  # (B, H, T, S)
        read = probs.to(latent.dtype).flatten(1, 2) @ latent  # (B, H*T, R)
        return torch.einsum("bhtr,hvr->bthv", read.unflatten(1, heads), up[:, n:])


class BlockwiseCore(nn.Module):
    """The absorbed form in one pass over a long cache, `block` tokens at a time: each is read while it is near, for its
    scores and for its share of the sum. A share is rescaled when a later score is higher (online softmax, arXiv 1805.02867).
    """

    def __init__(self, block: int = 1024):
        super().__init__()
        self.block = block

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        queries, n = latent_queries(q_nope, q_rope, up), q_nope.shape[-1]
        heads, t, s = up.shape[0], q_nope.shape[1], latent.shape[1]
        scale = (n + q_rope.shape[-1]) ** -0.5
        if visible is None and t > 1:
            visible = torch.ones(t, s, dtype=torch.bool, device=latent.device).tril(s - t)[None]
        wide = torch.promote_types(latent.dtype, torch.float32)
        top = queries[0].new_full((len(latent), heads * t, 1), torch.finfo(wide).min, dtype=wide)
        total, read = torch.zeros_like(top), torch.zeros_like(queries[0], dtype=wide)
        for start in range(0, s, self.block):
            near = slice(start, start + self.block)
            scores = latent_scores(*queries, latent[:, near], k_rope[:, near], scale).to(wide)  # (B, H*T, block)
            if visible is not None:
                scores = hide(scores.unflatten(1, (heads, t)), visible[..., near]).flatten(1, 2)
            higher = torch.maximum(top, scores.amax(-1, keepdim=True))  # finite even where a whole block is hidden
            probs, shrink = (scores - higher).exp(), (top - higher).exp()
            total = total * shrink + probs.sum(-1, keepdim=True)
            read = read * shrink + probs.to(latent.dtype) @ latent[:, near]
            top = higher
        read = (read / total).to(latent.dtype).unflatten(1, (heads, t))
        return torch.einsum("bhtr,hvr->bthv", read, up[:, n:])


def latent_queries(q_nope: Tensor, q_rope: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Queries as the latents see them, (B, H*T, R), and their rotary part, (B, H*T, r). All heads share the keys."""
    q_latent = torch.einsum("bthn,hnr->bhtr", q_nope, up[:, : q_nope.shape[-1]])
    return q_latent.flatten(1, 2), q_rope.transpose(1, 2).flatten(1, 2)


def latent_scores(q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, scale: float) -> Tensor:
    """(B, H*T, S): the keys of all heads are columns of one product, which reads the cache once and as it lies."""
    content = latent @ q_latent.transpose(1, 2)
    # scaled here and not in the queries, which bfloat16 would round once more
    return torch.baddbmm(content, k_rope, q_rope.transpose(1, 2), beta=scale, alpha=scale).transpose(1, 2)


class ExplicitCore(nn.Module):
    """The formula as written, with the probabilities (B, H, T, S) in the open as submodule `probs`. For reading."""

    def __init__(self) -> None:
        super().__init__()
        self.probs = nn.Softmax(dim=-1)

    def forward(
        self, q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor, visible: Tensor | None
    ) -> Tensor:
        q, k, v = expand(q_nope, q_rope, latent, k_rope, up)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        probs = self.probs(hide(scores.to(torch.promote_types(q.dtype, torch.float32)), visible))
        return torch.einsum("bhts,bshv->bthv", probs.to(v.dtype), v)


def expand(
    q_nope: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, up: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole queries (B, T, H, n+r), rebuilt keys (B, S, H, n+r) and values (B, S, H, v)."""
    n, heads = q_nope.shape[-1], q_nope.shape[2]
    rebuilt = F.linear(latent, up.flatten(0, 1)).unflatten(-1, (heads, -1))  # (B, S, H, n+v)
    k_nope, v = rebuilt.split([n, up.shape[1] - n], dim=-1)
    q = torch.cat([q_nope, q_rope], dim=-1)
    k = torch.cat([k_nope, k_rope[:, :, None].expand(-1, -1, heads, -1)], dim=-1)
    return q, k, v


def causal_attention(q: Tensor, k: Tensor, v: Tensor, block: int = 256) -> Tensor:
    """Attention of q (B, H, T, d), the last T of the keys k (B, H, S, d), without a T x S mask; v (B, H, S, d).

    From nothing (T = S), or on a GPU, it is one fused call. Behind a cache on a CPU the queries go in blocks: each sees
    all keys before it, and the mask is one of `block` rows.
    """
    past = k.shape[2] - q.shape[2]
    if past == 0:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_lower_right(q.shape[2], k.shape[2]))
    heads = []
    for start, part in zip(range(past, k.shape[2], block), q.split(block, dim=2), strict=True):
        stop = start + part.shape[2]
        mask = torch.ones(part.shape[2], stop, dtype=torch.bool, device=q.device).tril(start)
        heads.append(F.scaled_dot_product_attention(part, k[:, :, :stop], v[:, :, :stop], attn_mask=mask))
    return torch.cat(heads, dim=2)


def hide(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Scores (B, H, T, S) with -inf where a query may not look; `visible` as in `Where`."""
    if visible is None:
        t, s = scores.shape[-2:]
        if t == 1:
            return scores  # the last token sees everything
        visible = torch.ones(t, s, dtype=torch.bool, device=scores.device).tril(s - t)[None]
    return scores.masked_fill(~visible[:, None], float("-inf"))


def masked_softmax(scores: Tensor, visible: Tensor | None) -> Tensor:
    """Probabilities in at least float32, (B, H, T, S)."""
    return hide(scores.to(torch.promote_types(scores.dtype, torch.float32)), visible).softmax(-1)
