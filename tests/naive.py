"""The decoder once more, slowly and in numpy: token by token, key by key, expert by expert, sharing no code with the model.

What analyses are checked against: probabilities (H, T, T) and routing are in the open everywhere. Letters: T tokens, D stream,
H heads, E experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from kimi_vl_ref import KimiVL

Look = Callable[[int, int, int], bool]  # (layer, query, key) -> may the query see the key?
Works = Callable[[int, int], bool]  # (layer, expert) -> does what the expert writes count?


@dataclass
class Naive:
    """What one pass shows, layer by layer; routing only of layers that route, by their number."""

    streams: list[np.ndarray] = field(default_factory=list)  # (T, D) at the start, then after each layer
    probs: list[np.ndarray] = field(default_factory=list)  # (H, T, T)
    head_writes: list[np.ndarray] = field(default_factory=list)  # (H, T, D)
    scores: dict[int, np.ndarray] = field(default_factory=dict)  # (T, E) without the bias
    bias: dict[int, np.ndarray] = field(default_factory=dict)  # (E,)
    chosen: dict[int, list[list[int]]] = field(default_factory=dict)  # by token, best first
    weights: dict[int, list[list[float]]] = field(default_factory=dict)
    logits: np.ndarray = field(default_factory=lambda: np.zeros(0))  # (T, W)

    @property
    def logprobs(self) -> np.ndarray:
        shifted = self.logits - self.logits.max(-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def naive_decoder(
    model: KimiVL, x: np.ndarray, sees: Look = lambda layer, q, k: True, works: Works = lambda layer, e: True
) -> Naive:
    """The pass over a stream (T, D) as it enters the decoder."""
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    config, found = model.config.text, Naive(streams=[x])
    for layer in range(config.num_hidden_layers):
        start = f"decoder.layers.{layer}."
        part = {name.removeprefix(start): value for name, value in state.items() if name.startswith(start)}
        x = x + _attention(part, config, normed(x, part["attn_norm.weight"], config.rms_norm_eps), layer, sees, found)
        inner = normed(x, part["ffn_norm.weight"], config.rms_norm_eps)
        dense = "ffn.gate.weight" in part
        x = x + (_swiglu(part, "ffn.", inner) if dense else _experts(part, config, inner, layer, works, found))
        found.streams.append(x)
    found.logits = read_out(model, x)
    return found


def read_out(model: KimiVL, stream: np.ndarray) -> np.ndarray:
    """(T, D) of any layer -> logits (T, W)."""
    norm = model.decoder.norm
    return normed(stream, norm.weight.double().numpy(), norm.eps) @ model.logits.weight.double().numpy().T


def normed(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return np.stack([weight * row / np.sqrt(np.mean(row**2) + eps) for row in x])


def _attention(part, config, x: np.ndarray, layer: int, sees: Look, found: Naive) -> np.ndarray:
    heads, n, r, v = config.num_attention_heads, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    tokens, rank = len(x), config.kv_lora_rank
    queries = (x @ part["attn.q.weight"].T).reshape(tokens, heads, n + r)
    down = x @ part["attn.down.weight"].T
    latent = normed(down[:, :rank], part["attn.latent.weight"], 1e-6)
    up = part["attn.up.weight"].reshape(heads, n + v, rank)
    turned = np.stack([_turned(down[t, rank:], t, config.rope_theta) for t in range(tokens)])
    out = part["attn.out.weight"].reshape(-1, heads, v)
    probs, writes = np.zeros((heads, tokens, tokens)), np.zeros((heads, tokens, x.shape[1]))
    for h in range(heads):
        keys, values = latent @ up[h, :n].T, latent @ up[h, n:].T
        for q in range(tokens):
            position = _turned(queries[q, h, n:], q, config.rope_theta)
            scores = np.full(tokens, -np.inf)
            for k in range(q + 1):
                if sees(layer, q, k):
                    scores[k] = (queries[q, h, :n] @ keys[k] + position @ turned[k]) / np.sqrt(n + r)
            raised = np.exp(scores - scores.max())
            probs[h, q] = raised / raised.sum()
        writes[h] = probs[h] @ values @ out[:, h].T
    found.probs.append(probs)
    found.head_writes.append(writes)
    return writes.sum(0)


def _turned(pairs: np.ndarray, position: int, theta: float) -> np.ndarray:
    """Neighbouring channels as complex numbers, each turned by its own angle."""
    numbers = pairs[0::2] + 1j * pairs[1::2]
    numbers = numbers * np.exp(1j * position * theta ** (-np.arange(len(numbers)) / len(numbers)))
    return np.stack([numbers.real, numbers.imag], -1).reshape(-1)


def _experts(part, config, x: np.ndarray, layer: int, works: Works, found: Naive) -> np.ndarray:
    scores = 1 / (1 + np.exp(-x @ part["ffn.router.scores.weight"].T))
    bias, wide = part["ffn.router.chosen.bias"], config.moe_intermediate_size
    found.scores[layer], found.bias[layer] = scores, bias
    found.chosen[layer], found.weights[layer] = [], []
    written = _swiglu(part, "ffn.shared.", x)
    for t in range(len(x)):
        best = sorted(range(config.n_routed_experts), key=lambda e: -(scores[t, e] + bias[e]))[: config.num_experts_per_tok]
        weights = [config.routed_scaling_factor * scores[t, e] / sum(scores[t, one] for one in best) for e in best]
        found.chosen[layer].append(best)
        found.weights[layer].append(weights)
        for expert, weight in zip(best, weights, strict=True):
            inner = part["ffn.experts.gate_up"][expert] @ x[t]
            out = part["ffn.experts.down"][expert] @ (_silu(inner[:wide]) * inner[wide:])
            written[t] += weight * out * works(layer, expert)
    return written


def _swiglu(part, name: str, x: np.ndarray) -> np.ndarray:
    gate, up, down = (part[f"{name}{which}.weight"] for which in ("gate", "up", "down"))
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))
