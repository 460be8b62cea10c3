"""Kimi-VL-A3B at its real size, on the meta device: names, shapes and counts, no values."""

from __future__ import annotations

import re

import pytest
import torch

from kimi_vl_ref.config import KIMI_VL_A3B, KimiVLConfig
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.weights import inv_freq_names, parameter_count, places
from peers import released_shapes

# `config.json` of Kimi-VL-A3B-Instruct, revision 398eede0903c
RELEASED_CONFIG = {
    "architectures": ["KimiVLForConditionalGeneration"],
    "model_type": "kimi_vl",
    "auto_map": {
        "AutoConfig": "configuration_kimi_vl.KimiVLConfig",
        "AutoModel": "modeling_kimi_vl.KimiVLForConditionalGeneration",
        "AutoModelForCausalLM": "modeling_kimi_vl.KimiVLForConditionalGeneration",
    },
    "ignore_index": -100,
    "media_placeholder_token_id": 163605,
    "vocab_size": 163840,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
    "transformers_version": "4.50.3",
    "vision_config": {
        "model_type": "moonvit",
        "patch_size": 14,
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
        "init_pos_emb_height": 64,
        "init_pos_emb_width": 64,
        "merge_kernel_size": [2, 2],
        "torch_dtype": "bfloat16",
    },
    "text_config": {
        "model_type": "deepseek_v3",
        "vocab_size": 163840,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 800000.0,
        "rope_scaling": None,
        "max_position_embeddings": 131072,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "pad_token_id": 163839,
        "ep_size": 1,
        "pretraining_tp": 1,
        "use_cache": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    },
}

# released name, {} standing for every layer and expert that has it -> shape and how many there are
RELEASED_TABLE = {
    "language_model.model.embed_tokens.weight": ((163840, 2048), 1),
    "language_model.model.layers.{}.input_layernorm.weight": ((2048,), 27),
    "language_model.model.layers.{}.post_attention_layernorm.weight": ((2048,), 27),
    "language_model.model.layers.{}.self_attn.q_proj.weight": ((3072, 2048), 27),
    "language_model.model.layers.{}.self_attn.kv_a_proj_with_mqa.weight": ((576, 2048), 27),
    "language_model.model.layers.{}.self_attn.kv_a_layernorm.weight": ((512,), 27),
    "language_model.model.layers.{}.self_attn.kv_b_proj.weight": ((4096, 512), 27),
    "language_model.model.layers.{}.self_attn.o_proj.weight": ((2048, 2048), 27),
    "language_model.model.layers.{}.self_attn.rotary_emb.inv_freq": ((32,), 27),
    "language_model.model.layers.{}.mlp.gate_proj.weight": ((11264, 2048), 1),
    "language_model.model.layers.{}.mlp.up_proj.weight": ((11264, 2048), 1),
    "language_model.model.layers.{}.mlp.down_proj.weight": ((2048, 11264), 1),
    "language_model.model.layers.{}.mlp.gate.weight": ((64, 2048), 26),
    "language_model.model.layers.{}.mlp.gate.e_score_correction_bias": ((64,), 26),
    "language_model.model.layers.{}.mlp.experts.{}.gate_proj.weight": ((1408, 2048), 26 * 64),
    "language_model.model.layers.{}.mlp.experts.{}.up_proj.weight": ((1408, 2048), 26 * 64),
    "language_model.model.layers.{}.mlp.experts.{}.down_proj.weight": ((2048, 1408), 26 * 64),
    "language_model.model.layers.{}.mlp.shared_experts.gate_proj.weight": ((2816, 2048), 26),
    "language_model.model.layers.{}.mlp.shared_experts.up_proj.weight": ((2816, 2048), 26),
    "language_model.model.layers.{}.mlp.shared_experts.down_proj.weight": ((2048, 2816), 26),
    "language_model.model.norm.weight": ((2048,), 1),
    "language_model.lm_head.weight": ((163840, 2048), 1),
    "vision_tower.patch_embed.proj.weight": ((1152, 3, 14, 14), 1),
    "vision_tower.patch_embed.proj.bias": ((1152,), 1),
    "vision_tower.patch_embed.pos_emb.weight": ((64, 64, 1152), 1),
    "vision_tower.encoder.blocks.{}.norm0.weight": ((1152,), 27),
    "vision_tower.encoder.blocks.{}.norm0.bias": ((1152,), 27),
    "vision_tower.encoder.blocks.{}.norm1.weight": ((1152,), 27),
    "vision_tower.encoder.blocks.{}.norm1.bias": ((1152,), 27),
    "vision_tower.encoder.blocks.{}.wqkv.weight": ((3456, 1152), 27),
    "vision_tower.encoder.blocks.{}.wqkv.bias": ((3456,), 27),
    "vision_tower.encoder.blocks.{}.wo.weight": ((1152, 1152), 27),
    "vision_tower.encoder.blocks.{}.wo.bias": ((1152,), 27),
    "vision_tower.encoder.blocks.{}.mlp.fc0.weight": ((4304, 1152), 27),
    "vision_tower.encoder.blocks.{}.mlp.fc0.bias": ((4304,), 27),
    "vision_tower.encoder.blocks.{}.mlp.fc1.weight": ((1152, 4304), 27),
    "vision_tower.encoder.blocks.{}.mlp.fc1.bias": ((1152,), 27),
    "vision_tower.encoder.final_layernorm.weight": ((1152,), 1),
    "vision_tower.encoder.final_layernorm.bias": ((1152,), 1),
    "multi_modal_projector.pre_norm.weight": ((1152,), 1),
    "multi_modal_projector.pre_norm.bias": ((1152,), 1),
    "multi_modal_projector.linear_1.weight": ((4608, 4608), 1),
    "multi_modal_projector.linear_1.bias": ((4608,), 1),
    "multi_modal_projector.linear_2.weight": ((2048, 4608), 1),
    "multi_modal_projector.linear_2.bias": ((2048,), 1),
}


@pytest.fixture(scope="module")
def full_size() -> KimiVL:
    with torch.device("meta"):
        return KimiVL(KIMI_VL_A3B)


def our_shapes(model: KimiVL) -> dict[str, tuple[int, ...]]:
    width = (model.config.text.qk_rope_head_dim // 2,)
    return {name: place.shape for name, place in places(model).items()} | dict.fromkeys(
        inv_freq_names(model.config), width
    )


def test_released_config_is_the_one_written_out() -> None:
    assert KimiVLConfig.from_dict(RELEASED_CONFIG) == KIMI_VL_A3B


def test_config_survives_its_own_layout() -> None:
    assert KimiVLConfig.from_dict(KIMI_VL_A3B.to_dict()) == KIMI_VL_A3B


def test_parameter_count(full_size: KimiVL) -> None:
    assert parameter_count(full_size) == 16_407_656_048
    biases = sum(b.numel() for name, b in full_size.named_buffers())
    assert biases == 26 * 64  # the selection biases, and no other buffer
    assert sum(p.numel() for p in full_size.parameters()) + biases == 16_407_656_048


def test_parameter_counts_of_the_parts(full_size: KimiVL) -> None:
    def count(module: torch.nn.Module) -> int:
        return sum(tensor.numel() for tensor in module.state_dict().values())

    assert count(full_size.vision) == 416_866_032
    assert count(full_size.projector) == 30_679_808
    assert count(full_size.embedded) == count(full_size.logits) == 335_544_320
    assert count(full_size.decoder) == 15_289_021_568
    assert count(full_size.decoder.layers[0]) == 82_973_184
    assert {count(layer) for layer in full_size.decoder.layers[1:]} == {584_847_936}


def test_names_and_shapes_are_the_released_ones(full_size: KimiVL) -> None:
    ours = our_shapes(full_size)
    assert len(ours) == 5_679
    assert ours == released_shapes(RELEASED_CONFIG)  # the rule that the random cases are built by
    table: dict[str, tuple[tuple[int, ...], int]] = {}
    for name, shape in ours.items():
        pattern = re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)
        seen, count = table.get(pattern, (shape, 0))
        assert seen == shape, name
        table[pattern] = (shape, count + 1)
    assert table == RELEASED_TABLE


def test_inv_freq_names(full_size: KimiVL) -> None:
    names = inv_freq_names(KIMI_VL_A3B)
    assert len(names) == 27
    assert names[26] == "language_model.model.layers.26.self_attn.rotary_emb.inv_freq"
    assert not set(names) & set(places(full_size))
