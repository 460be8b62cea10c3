"""Feed-forward layers: the dense one of layer 0, and the mixture of experts of all later layers.

DeepSeek-V3 report (arXiv 2412.19437) section 2.1.2. A token's scores choose a few experts; a bias tips the choice to
keep the load even, and touches nothing else. Letters: B rows, T tokens, D stream, E experts, K chosen, F expert width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import TextConfig


class DenseFFN(nn.Module):
    """SwiGLU: down(silu(gate x) * up x). Also the shared expert, which sees every token."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False)
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class MoE(nn.Module):
    """What the chosen experts write, plus what the shared expert writes. (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.router = Router(config)
        self.experts = Experts(config)
        # two shared experts are stored as one of twice the width; their output is not scaled
        self.shared = DenseFFN(config.hidden_size, config.n_shared_experts * config.moe_intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        chosen, weights = self.router(x)
        return self.experts(x, chosen, weights) + self.shared(x)


class Router(nn.Module):
    def __init__(self, config: TextConfig):
        super().__init__()
        self.scores = Scores(config)
        self.chosen = Choice(config)
        self.weights = Weights(config)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scores = self.scores(x)  # (B, T, E)
        chosen = self.chosen(scores)  # (B, T, K)  the bias tips this choice, and touches nothing else
        return chosen, self.weights(scores, chosen)  # (B, T, K)


class Scores(nn.Module):
    """How well each expert suits each token, in (0, 1) and independent of the others. At least float32 throughout."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        nn.init.normal_(self.weight, std=config.initializer_range)

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.linear(x.to(wide), self.weight.to(wide)).sigmoid()


class Choice(nn.Module):
    """The K experts with the highest biased score, (B, T, E) -> (B, T, K) indices; best first."""

    bias: Tensor

    def __init__(self, config: TextConfig):
        super().__init__()
        self.top_k, self.n_group, self.topk_group = config.num_experts_per_tok, config.n_group, config.topk_group
        self.register_buffer("bias", torch.zeros(config.n_routed_experts))

    def forward(self, scores: Tensor) -> Tensor:
        biased = scores.detach() + self.bias  # choosing has no gradient
        if self.topk_group < self.n_group:  # only the best groups compete, judged by their two best experts
            groups = biased.unflatten(-1, (self.n_group, -1))  # (B, T, G, E/G)
            best = groups.topk(min(2, groups.shape[-1]), dim=-1).values.sum(-1).topk(self.topk_group, dim=-1).indices
            kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)
            biased = groups.masked_fill(~kept[..., None], float("-inf")).flatten(-2)
        return biased.topk(self.top_k, dim=-1).indices

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Choice:
        # a blanket .to(bfloat16) must not round the bias: near-ties would flip
        exact = self.bias
        super()._apply(fn, recurse)
        if torch.finfo(self.bias.dtype).bits < 32:
            self.bias = exact.to(self.bias.device)
        return self


class Weights(nn.Module):
    """What each chosen expert counts for: its own unbiased score, normalised over the chosen, times 2.446."""

    def __init__(self, config: TextConfig):
        super().__init__()
        self.normalise, self.scale = config.norm_topk_prob, config.routed_scaling_factor

    def forward(self, scores: Tensor, chosen: Tensor) -> Tensor:
        weights = scores.gather(-1, chosen)
        if self.normalise:
            weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
        return weights * self.scale


class Experts(nn.Module):
    """All routed experts at once: tokens sorted by expert, one grouped matrix product a projection."""

    def __init__(self, config: TextConfig):
        super().__init__()
        experts, width, inner = config.n_routed_experts, config.hidden_size, config.moe_intermediate_size
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * inner, width))  # gate rows first, then up rows
        self.down = nn.Parameter(torch.empty(experts, width, inner))
        for weight in (self.gate_up, self.down):
            nn.init.normal_(weight, std=config.initializer_range)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """x (B, T, D), chosen and weights (B, T, K) -> weighted sum of the chosen experts' outputs, (B, T, D)."""
        tokens, top_k = x.flatten(0, -2), chosen.shape[-1]
        order = chosen.flatten().argsort(stable=True)  # slots of the same expert side by side
        # slots each expert serves; bincount would make a GPU wait
        load = chosen.new_zeros(len(self.gate_up)).scatter_add(0, chosen.flatten(), torch.ones_like(chosen).flatten())
        out = grouped_ffn(tokens[order // top_k], self.gate_up, self.down, load)  # (B*T*K, D)
        slots = torch.empty_like(out).index_copy(0, order, out).unflatten(0, (-1, top_k))
        return weighted_sum(slots, weights).view_as(x)


def weighted_sum(slots: Tensor, weights: Tensor) -> Tensor:
    """What the K experts of each of N tokens wrote, (N, K, D), summed by their weights (..., K) -> (N, D).

    In the precision of the weights (at least float32), then back.
    """
    return torch.einsum("nkd,nk->nd", slots.to(weights.dtype), weights.flatten(0, -2)).to(slots.dtype)


def grouped_ffn(x: Tensor, gate_up: Tensor, down: Tensor, load: Tensor) -> Tensor:
    """`DenseFFN` of expert e for row block e of x (N, D), load[e] rows long. gate_up (E, 2F, D), down (E, D, F) -> (N, D)."""
    gate, up = grouped_linear(x, gate_up, load).chunk(2, dim=-1)
    return grouped_linear(F.silu(gate) * up, down, load)


def grouped_linear(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """Row block e of x, load[e] rows long, times weight[e] transposed. x (N, I), weight (E, O, I), load (E,) -> (N, O).
    """
    # torch's grouped product takes bfloat16 on a GPU, these three on a CPU, and rows of a multiple of 16 bytes
    dtypes = (torch.bfloat16,) if x.is_cuda else (torch.bfloat16, torch.float16, torch.float32)
    if x.dtype in dtypes and all(size * x.element_size() % 16 == 0 for size in weight.shape[1:]):
        return F.grouped_mm(x, weight.transpose(1, 2), offs=load.cumsum(0).to(torch.int32))
    return padded_grouped_linear(x, weight, load)


def padded_grouped_linear(x: Tensor, weight: Tensor, load: Tensor) -> Tensor:
    """The same as one batched product, every block padded to the longest."""
    longest, starts = int(load.max()), load.cumsum(0) - load
    expert = torch.repeat_interleave(torch.arange(len(weight), device=x.device), load)
    slot = expert * longest + torch.arange(len(x), device=x.device) - starts[expert]
    blocks = x.new_zeros(len(weight) * longest, x.shape[1]).index_copy(0, slot, x).unflatten(0, (len(weight), longest))
    return torch.bmm(blocks, weight.transpose(1, 2)).flatten(0, 1)[slot]
