"""How many numbers a model of a given configuration has, reads for a token, and remembers of one. Arithmetic, no tensors."""

from __future__ import annotations

from collections.abc import Iterator

from .config import KimiVLConfig, TextConfig


def matrices(text: TextConfig) -> Iterator[tuple[int, int, int]]:
    """The decoder's matrices that may be kept in few bits: rows, columns and how many of this kind."""
    width, layers, dense = text.hidden_size, text.num_hidden_layers, text.num_hidden_layers - moe_layers(text)
    yield text.num_attention_heads * text.qk_head_dim, width, layers  # queries
    yield width, text.num_attention_heads * text.v_head_dim, layers  # output of attention
    shared = text.n_shared_experts * text.moe_intermediate_size
    for inner, copies in ((text.intermediate_size, dense), (shared, layers - dense)):
        yield inner, width, 2 * copies  # gate and up
        yield width, inner, copies
    routed = text.n_routed_experts * (layers - dense)
    yield 2 * text.moe_intermediate_size, width, routed
    yield width, text.moe_intermediate_size, routed


def tower(config: KimiVLConfig) -> int:
    """Numbers of MoonViT and the projector: 416,866,032 and 30,679,808 for Kimi-VL-A3B."""
    vision, d = config.vision, config.text.hidden_size
    v, inner, merged = vision.hidden_size, vision.intermediate_size, vision.merged_size
    block = 4 * v + (3 * v * v + 3 * v) + (v * v + v) + (inner * v + inner) + (v * inner + v)
    ends = v * 3 * vision.patch_size**2 + v + vision.init_pos_emb_height * vision.init_pos_emb_width * v + 2 * v
    projector = 2 * v + merged * merged + merged + merged * d + d
    return ends + vision.num_hidden_layers * block + projector


def decoder(text: TextConfig) -> int:
    """Numbers of the decoder without embedding and logits, selection biases included: 15,289,021,568 for Kimi-VL-A3B."""
    d = text.hidden_size
    latent = (text.kv_lora_rank + text.qk_rope_head_dim) * d + text.kv_lora_rank
    latent += text.num_attention_heads * (text.qk_nope_head_dim + text.v_head_dim) * text.kv_lora_rank
    rest = text.num_hidden_layers * (latent + 2 * d) + moe_layers(text) * text.n_routed_experts * (d + 1) + d
    return rest + sum(rows * columns * copies for rows, columns, copies in matrices(text))


def parameters(config: KimiVLConfig) -> int:
    """Numbers of the whole model: 16,407,656,048 for Kimi-VL-A3B."""
    return tower(config) + decoder(config.text) + 2 * config.text.vocab_size * config.text.hidden_size


def active(text: TextConfig) -> int:
    """Numbers of the decoder and the logits that one token reads: 2,579,231,872 for Kimi-VL-A3B, selection biases included.

    One row of the embedding is left out.
    """
    idle = moe_layers(text) * (text.n_routed_experts - text.num_experts_per_tok)
    return decoder(text) + text.vocab_size * text.hidden_size - idle * 3 * text.moe_intermediate_size * text.hidden_size


def moe_layers(text: TextConfig) -> int:
    return text.num_hidden_layers - min(text.first_k_dense_replace, text.num_hidden_layers)


def cache_bytes_a_token(text: TextConfig, itemsize: int = 2) -> int:
    """What decoding remembers of one token, all layers: 31,104 bytes for Kimi-VL-A3B in bfloat16."""
    return text.num_hidden_layers * (text.kv_lora_rank + text.qk_rope_head_dim) * itemsize
