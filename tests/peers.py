"""Independent implementations to be measured against, and random cases to measure on.

Everything starts from tensors under their **released names**. Ours loads them through `kimi_vl_ref.weights`.
The peers, transformers' Kimi-K2.5 (of which one frame is Kimi-VL) and DeepSeek-V3, get them through the
conversions below, which share nothing with ours. Configurations are plain `config.json` dicts for that reason.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers.vision_utils
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Kimi_K25Config,
    Kimi_K25ForConditionalGeneration,
)
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.kimi_k25 import modeling_kimi_k25

Tensors = dict[str, Tensor]


# --- released layout ----------------------------------------------------------------------------------------


def released_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a released checkpoint, `rotary_emb.inv_freq` included."""
    vision, text = config["vision_config"], config["text_config"]
    v, patch, mlp = vision["hidden_size"], vision["patch_size"], vision["intermediate_size"]
    table = (vision["init_pos_emb_height"], vision["init_pos_emb_width"], v)
    d, inner, experts = text["hidden_size"], text["moe_intermediate_size"], text["n_routed_experts"]
    heads, rank, rope = text["num_attention_heads"], text["kv_lora_rank"], text["qk_rope_head_dim"]
    nope, value, vocab = text["qk_nope_head_dim"], text["v_head_dim"], text["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {}

    def swiglu(prefix: str, width: int) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (width, d)
        shapes[f"{prefix}.up_proj.weight"] = (width, d)
        shapes[f"{prefix}.down_proj.weight"] = (d, width)

    def with_bias(prefix: str, *shape: int) -> None:
        shapes[f"{prefix}.weight"] = shape
        shapes[f"{prefix}.bias"] = shape[:1]

    shapes["language_model.model.embed_tokens.weight"] = (vocab, d)
    for i in range(text["num_hidden_layers"]):
        layer = f"language_model.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = shapes[f"{layer}.post_attention_layernorm.weight"] = (d,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (heads * (nope + rope), d)
        shapes[f"{layer}.self_attn.kv_a_proj_with_mqa.weight"] = (rank + rope, d)
        shapes[f"{layer}.self_attn.kv_a_layernorm.weight"] = (rank,)
        shapes[f"{layer}.self_attn.kv_b_proj.weight"] = (heads * (nope + value), rank)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (d, heads * value)
        shapes[f"{layer}.self_attn.rotary_emb.inv_freq"] = (rope // 2,)
        if i < text["first_k_dense_replace"]:
            swiglu(f"{layer}.mlp", text["intermediate_size"])
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (experts, d)
        shapes[f"{layer}.mlp.gate.e_score_correction_bias"] = (experts,)
        for e in range(experts):
            swiglu(f"{layer}.mlp.experts.{e}", inner)
        swiglu(f"{layer}.mlp.shared_experts", text["n_shared_experts"] * inner)
    shapes["language_model.model.norm.weight"] = (d,)
    shapes["language_model.lm_head.weight"] = (vocab, d)

    with_bias("vision_tower.patch_embed.proj", v, 3, patch, patch)
    shapes["vision_tower.patch_embed.pos_emb.weight"] = table
    for i in range(vision["num_hidden_layers"]):
        block = f"vision_tower.encoder.blocks.{i}"
        with_bias(f"{block}.norm0", v)
        with_bias(f"{block}.norm1", v)
        with_bias(f"{block}.wqkv", 3 * v, v)
        with_bias(f"{block}.wo", v, v)
        with_bias(f"{block}.mlp.fc0", mlp, v)
        with_bias(f"{block}.mlp.fc1", v, mlp)
    with_bias("vision_tower.encoder.final_layernorm", v)
    with_bias("multi_modal_projector.pre_norm", v)
    with_bias("multi_modal_projector.linear_1", 4 * v, 4 * v)
    with_bias("multi_modal_projector.linear_2", d, 4 * v)
    return shapes


# --- random cases -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A random model and its inputs. `decode_ids` (B, n) follow the prompt one by one, with the cache."""

    config: dict[str, Any]
    tensors: Tensors = field(repr=False)
    pixel_values: Tensor = field(repr=False)  # (N, 3, p, p)
    image_grid_hws: Tensor  # (pictures, 2)
    input_ids: Tensor  # (B, T)
    decode_ids: Tensor

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers (they are float32 at heart), held in another dtype."""
        tensors = {name: tensor.to(dtype) for name, tensor in self.tensors.items()}
        return replace(self, tensors=tensors, pixel_values=self.pixel_values.to(dtype))


def random_case(seed: int, *, grouped: bool = False, scales: dict[str, float] | None = None) -> Case:
    """The whole case from one seed. `grouped`: experts in groups, of which only some compete for a token.

    `scales`: factors for the tensors whose name contains the key, instead of random ones.
    """
    config = random_config(seed, grouped=grouped)
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    tensors = random_tensors(config, generator, random_scales(rng) if scales is None else scales)

    grids = random_grids(config, rng)
    patches, patch = sum(h * w for h, w in grids), config["vision_config"]["patch_size"]
    pixel_values = torch.rand(patches, 3, patch, patch, generator=generator) * 2 - 1
    input_ids = random_prompts(config, grids, rng)
    decode_ids = torch.tensor([[text_token(config, rng) for _ in range(3)] for _ in input_ids])
    return Case(config, tensors, pixel_values, torch.tensor(grids), input_ids, decode_ids)


def random_config(seed: int, *, grouped: bool = False) -> dict[str, Any]:
    """A `config.json` whose sizes are pairwise distinct, so that no axis can stand in for another unseen."""
    rng = random.Random(seed)
    while True:
        config, sizes = _draw_config(rng, grouped, aligned=seed % 2 == 0)
        if len(set(sizes)) == len(sizes):
            return config


def _draw_config(rng: random.Random, grouped: bool, aligned: bool) -> tuple[dict[str, Any], list[int]]:
    step = (
        4 if aligned else 1
    )  # in fp32 a fused grouped product wants widths in fours; other widths take another path
    v_heads, v_head_dim, v_layers = rng.randint(2, 7), rng.choice([8, 12, 16, 20]), rng.randint(1, 3)
    v_mlp, side = rng.randint(30, 110), rng.randint(5, 17)
    heads, layers, dense = rng.randint(2, 7), rng.randint(2, 4), rng.randint(0, 2)
    hidden, inner = rng.randint(24, 64) // step * step, rng.randint(12, 40) // step * step
    rank, nope, rope, value = (
        rng.randint(10, 40),
        rng.randint(5, 24),
        2 * rng.randint(2, 10),
        rng.randint(5, 24),
    )
    groups = rng.randint(3, 5) if grouped else 1
    per_group = rng.randint(3, 5)
    experts = groups * per_group if grouped else rng.randint(7, 19)
    kept = 2 if grouped else 1
    top_k = rng.randint(2, kept * per_group - 1 if grouped else experts // 2)
    shared, wide, vocab = rng.randint(1, 3), rng.randint(40, 100), rng.randint(110, 250)
    sizes = [
        v_heads,
        v_head_dim,
        v_layers,
        v_heads * v_head_dim,
        v_mlp,
        side,
        heads,
        layers,
        hidden,
        inner,
        rank,
        nope,
    ]
    sizes += [
        rope,
        value,
        experts,
        top_k,
        shared * inner,
        wide,
        vocab,
        nope + rope,
        heads * value,
        4 * v_heads * v_head_dim,
    ]
    placeholder = rng.randrange(vocab)
    config = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "model_type": "kimi_vl",
        "media_placeholder_token_id": placeholder,
        "vocab_size": vocab,
        "torch_dtype": "float32",
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "moonvit",
            "patch_size": rng.choice([14, 14, 6]),
            "hidden_size": v_heads * v_head_dim,
            "num_hidden_layers": v_layers,
            "num_attention_heads": v_heads,
            "intermediate_size": v_mlp,
            "init_pos_emb_height": side,  # the peer's table is square
            "init_pos_emb_width": side,
            "merge_kernel_size": [2, 2],
        },
        "text_config": {
            "model_type": "deepseek_v3",
            "vocab_size": vocab,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "q_lora_rank": None,
            "kv_lora_rank": rank,
            "qk_nope_head_dim": nope,
            "qk_rope_head_dim": rope,
            "v_head_dim": value,
            "intermediate_size": wide,
            "moe_intermediate_size": inner,
            "n_routed_experts": experts,
            "n_shared_experts": shared,
            "num_experts_per_tok": top_k,
            "n_group": groups,
            "topk_group": kept,
            "topk_method": "noaux_tc",
            "scoring_func": "sigmoid",
            "norm_topk_prob": rng.random() < 0.8,
            "routed_scaling_factor": rng.choice([2.446, round(rng.uniform(1.2, 3.0), 3)]),
            "first_k_dense_replace": min(dense, layers - 1),
            "moe_layer_freq": 1,
            "rms_norm_eps": rng.choice([1e-5, 1e-5, 3e-4]),
            "hidden_act": "silu",
            "rope_theta": rng.choice([800000.0, 800000.0, 700.0]),
            "rope_scaling": None,
            "max_position_embeddings": 4096,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "pad_token_id": vocab - 1,
            "tie_word_embeddings": False,
        },
    }
    return config, sizes


def random_scales(rng: random.Random) -> dict[str, float]:
    """Small streams here and there: a wrong epsilon hides in large ones."""
    places = ("vision_tower.patch_embed", "kv_a_proj_with_mqa", "embed_tokens")
    return {place: rng.choice([0.05, 0.2, 1.0]) for place in places}


def random_tensors(config: dict[str, Any], generator: torch.Generator, scales: dict[str, float]) -> Tensors:
    """Every tensor random, float32, under its released name. `inv_freq` is NaN: it must not be used."""
    tensors: Tensors = {}
    for name, shape in released_shapes(config).items():
        noise = torch.randn(shape, generator=generator)
        if name.endswith("inv_freq"):
            tensors[name] = noise * float("nan")
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = 0.2 * noise  # scores lie in (0, 1): wide enough to change many choices
        elif name.endswith(("embed_tokens.weight", "pos_emb.weight")):
            tensors[name] = noise
        elif name.endswith("bias"):
            tensors[name] = 0.3 * noise
        elif len(shape) == 1:
            tensors[name] = 1 + 0.3 * noise
        else:
            tensors[name] = noise / math.prod(shape[1:]) ** 0.5
        for part, scale in scales.items():
            if part in name:
                tensors[name] = tensors[name] * scale
    return tensors


def random_grids(config: dict[str, Any], rng: random.Random) -> list[tuple[int, int]]:
    """1 to 5 pictures: sides even, never square, never the table's own size; some share their patch count."""
    sides = range(2, 15, 2)
    shapes = [(h, w) for h in sides for w in sides if h != w and h * w <= 96]
    grids = [rng.choice(shapes) for _ in range(rng.randint(1, 5))]
    if len(grids) > 2:
        grids[2] = grids[0][::-1]
    return grids


def random_prompts(config: dict[str, Any], grids: list[tuple[int, int]], rng: random.Random) -> Tensor:
    """(B, T), one or two rows of equal length; the pictures stand in them in order, row after row."""
    rows: list[list[int]] = [[] for _ in range(rng.randint(1, 2))]
    cut = rng.randint(0, len(grids)) if len(rows) == 2 else len(grids)
    for i, (h, w) in enumerate(grids):
        row = rows[0] if i < cut else rows[1]
        row += [text_token(config, rng) for _ in range(rng.randint(0, 6))]
        row += [config["media_placeholder_token_id"]] * (h * w // 4)
    length = max(len(row) for row in rows) + rng.randint(3, 9)
    return torch.tensor([row + [text_token(config, rng) for _ in range(length - len(row))] for row in rows])


def text_token(config: dict[str, Any], rng: random.Random) -> int:
    """Any token id but the placeholder."""
    token = rng.randrange(config["vocab_size"] - 1)
    return token if token < config["media_placeholder_token_id"] else token + 1


# --- the peers ----------------------------------------------------------------------------------------------


def kimi_k25(config: dict[str, Any], tensors: Tensors) -> Kimi_K25ForConditionalGeneration:
    """Kimi-K2.5 with these weights, in their dtype. One frame of it computes what Kimi-VL computes."""
    vision, text = config["vision_config"], config["text_config"]
    peer_config = Kimi_K25Config(
        text_config=text,
        vision_config={
            "patch_size": vision["patch_size"],
            "hidden_size": vision["hidden_size"],
            "num_hidden_layers": vision["num_hidden_layers"],
            "num_attention_heads": vision["num_attention_heads"],
            "intermediate_size": vision["intermediate_size"],
            "pos_emb_height": vision["init_pos_emb_height"],
            "pos_emb_width": vision["init_pos_emb_width"],
            "merge_kernel_size": list(vision["merge_kernel_size"]),
        },
        projection_hidden_size=vision["hidden_size"],
        image_token_id=config["media_placeholder_token_id"],
        tie_word_embeddings=False,
    )
    state = {
        f"model.{name}": t for name, t in _vision_for_peer(tensors, vision["num_attention_heads"]).items()
    }
    for name, tensor in _decoder_for_peer(tensors, text["n_routed_experts"]).items():
        state[name if name == "lm_head.weight" else name.replace("model.", "model.language_model.", 1)] = (
            tensor
        )
    return _load(Kimi_K25ForConditionalGeneration, peer_config, state)


def deepseek_v3(config: dict[str, Any], tensors: Tensors) -> DeepseekV3ForCausalLM:
    """The decoder alone."""
    text = config["text_config"]
    return _load(
        DeepseekV3ForCausalLM, DeepseekV3Config(**text), _decoder_for_peer(tensors, text["n_routed_experts"])
    )


def _load(peer_class: Any, config: Any, state: Tensors) -> Any:
    config._attn_implementation = "eager"  # the formula in the open, no fused kernel
    config._experts_implementation = "eager"  # its loop over experts
    peer = peer_class(config).to(next(iter(state.values())).dtype).eval()
    peer.load_state_dict(state, strict=True)
    return peer.requires_grad_(False)


def _vision_for_peer(tensors: Tensors, heads: int) -> Tensors:
    state: Tensors = {}
    for name, tensor in tensors.items():
        if name.startswith("multi_modal_projector."):
            name = name.replace("multi_modal_projector", "mm_projector")
            state[name.replace("linear_1", "in_proj").replace("linear_2", "out_proj")] = tensor
        elif ".wqkv." in name:
            block, kind = name.removeprefix("vision_tower.encoder.blocks.").split(".wqkv.")
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                if (
                    part != "v"
                ):  # halves instead of adjacent pairs: even channels of a head first, then odd ones
                    rows = rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)
                state[f"vision_tower.layers.{block}.attn.{part}_proj.{kind}"] = rows.contiguous()
        elif name.startswith("vision_tower."):
            for released, peer in (
                ("encoder.blocks", "layers"),
                ("encoder.final_layernorm", "final_layernorm"),
                ("norm1", "norm2"),
                ("norm0", "norm1"),
                ("fc1", "fc2"),
                ("fc0", "fc1"),
                (".wo.", ".attn.proj."),
                ("pos_emb.weight", "pos_emb.position_embeddings"),
            ):
                name = name.replace(released, peer)
            state[name] = tensor
    return state


def _decoder_for_peer(tensors: Tensors, experts: int) -> Tensors:
    state: Tensors = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("language_model.")
        if name.endswith("rotary_emb.inv_freq") or name.startswith(
            ("vision_tower.", "multi_modal_projector.")
        ):
            continue
        elif ".experts.0.gate_proj" in name:
            mlp = name.removesuffix(".experts.0.gate_proj.weight")
            gate, up, down = (
                torch.stack(
                    [tensors[f"language_model.{mlp}.experts.{e}.{part}_proj.weight"] for e in range(experts)]
                )
                for part in ("gate", "up", "down")
            )
            state[f"{mlp}.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
            state[f"{mlp}.experts.down_proj"] = down
        elif ".experts." not in name:
            state[name] = tensor
    return state


class _Float64Torch:
    """`torch` as the peers see it in float64: what they widen to float32 is widened to float64."""

    float32 = float = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextmanager
def casts_lifted(dtype: torch.dtype) -> Iterator[None]:
    """Inside, the peers' own code runs in float64 throughout, if that is the dtype.

    They cast to float32 in norms, gates, softmax, rotary angles and the resized position table, which would
    hide gaps below 1e-7 or so. Building a peer belongs inside too: it computes its rotary frequencies then.
    """
    if dtype != torch.float64:
        yield
        return
    modules: list[Any] = [modeling_deepseek_v3, modeling_kimi_k25, transformers.vision_utils]
    narrow = torch.Tensor.float
    try:
        torch.Tensor.float = torch.Tensor.double
        for module in modules:
            module.torch = _Float64Torch()
        yield
    finally:
        torch.Tensor.float = narrow
        for module in modules:
            module.torch = torch


@torch.no_grad()
def peer_outputs(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    """What Kimi-K2.5 makes of the case.

    `vision_merged` (M, 4, V), `image_features` (M, D), `logits` (B, T, vocabulary), `decode_logits` (B, n,
    vocabulary).
    """
    case = case.to(dtype)
    with casts_lifted(dtype):
        peer = kimi_k25(case.config, case.tensors)
        grid_thw = torch.nn.functional.pad(case.image_grid_hws, (1, 0), value=1)
        features = peer.model.get_image_features(case.pixel_values, grid_thw)
        out = {
            "vision_merged": peer.model.vision_tower(case.pixel_values, grid_thw=grid_thw).pooler_output,
            "image_features": torch.cat(features.pooler_output),
        }
        pictures = {"pixel_values": case.pixel_values, "image_grid_thw": grid_thw}
        return out | _logits_of_peer(peer, case, **pictures)


@torch.no_grad()
def decoder_peer_outputs(case: Case, dtype: torch.dtype = torch.float32) -> Tensors:
    """DeepSeek-V3's `logits` and `decode_logits` for the ids; placeholders are tokens like any other."""
    case = case.to(dtype)
    with casts_lifted(dtype):
        return _logits_of_peer(deepseek_v3(case.config, case.tensors), case)


def _logits_of_peer(peer: Any, case: Case, **pictures: Tensor) -> Tensors:
    prompt = peer(input_ids=case.input_ids, use_cache=True, **pictures)
    cache, decoded = prompt.past_key_values, []
    for ids in case.decode_ids.split(1, dim=1):
        step = peer(input_ids=ids, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        decoded.append(step.logits)
    return {"logits": prompt.logits, "decode_logits": torch.cat(decoded, dim=1)}
