"""Checkpoint folders: written and read back without loss, and refused in one clear sentence when damaged."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from kimi_vl_ref.config import TINY, ConfigError, KimiVLConfig
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.weights import (
    CheckpointError,
    from_released,
    inv_freq_names,
    load_checkpoint,
    save_checkpoint,
)
from peers import random_case

GOLDEN = Path(__file__).parent / "golden" / "tiny"
INDEX = "model.safetensors.index.json"


def stored(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a folder's shards, by released name, `inv_freq` left out."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("model*.safetensors")):
        tensors |= load_file(shard)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("inv_freq")}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


# --- round trips --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 600_000, 1])
def test_saved_is_what_was_loaded(tmp_path: Path, shard_bytes: int) -> None:
    save_checkpoint(load_checkpoint(GOLDEN), tmp_path, max_shard_bytes=shard_bytes)
    assert_same(stored(tmp_path), stored(GOLDEN))
    assert KimiVLConfig.from_json(tmp_path / "config.json") == KimiVLConfig.from_json(GOLDEN / "config.json")
    assert not list(tmp_path.glob("*.part"))
    again = load_checkpoint(tmp_path)
    assert_same(again.state_dict(), load_checkpoint(GOLDEN).state_dict())


def test_index_is_complete(tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(GOLDEN), tmp_path, max_shard_bytes=600_000)
    index = json.loads((tmp_path / INDEX).read_text())
    shards = {shard.name: load_file(shard) for shard in tmp_path.glob("*.safetensors")}
    assert len(shards) > 3
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    assert index["metadata"]["total_size"] == sum(
        t.nbytes for tensors in shards.values() for t in tensors.values()
    )
    assert index["weight_map"].keys() == json.loads((GOLDEN / INDEX).read_text())["weight_map"].keys()
    for tensors in shards.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 600_000


def test_inv_freq_are_written_right_and_never_read(tmp_path: Path) -> None:
    model = load_checkpoint(GOLDEN)  # whose own are NaN
    save_checkpoint(model, tmp_path)
    tensors, names = load_file(tmp_path / "model.safetensors"), inv_freq_names(model.config)
    assert len(names) == 4
    for name in names:
        torch.testing.assert_close(tensors[name], 1 / 800000 ** (torch.arange(0, 8, 2) / 8))


def test_bfloat16_keeps_the_selection_bias_exact(tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(GOLDEN), tmp_path, dtype=torch.bfloat16)
    original, written = stored(GOLDEN), stored(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    for name, tensor in written.items():
        expected = original[name] if name.endswith("e_score_correction_bias") else original[name].bfloat16()
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected), name
    loaded = load_checkpoint(tmp_path)
    assert loaded.logits.weight.dtype == torch.bfloat16
    save_checkpoint(loaded, tmp_path / "again")
    assert_same(stored(tmp_path / "again"), written)


def test_a_smaller_save_replaces_a_larger_one(tmp_path: Path) -> None:
    """What lies in the folder afterwards is the second model, whatever shards the first one left."""
    case = random_case(0)
    second = from_released(KimiVLConfig.from_dict(case.config), case.tensors)
    save_checkpoint(load_checkpoint(GOLDEN), tmp_path, max_shard_bytes=600_000)
    save_checkpoint(second, tmp_path)
    assert_same(load_checkpoint(tmp_path).state_dict(), second.state_dict())


def test_saving_onto_the_folder_it_was_loaded_from(tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(GOLDEN), tmp_path, max_shard_bytes=600_000)
    save_checkpoint(load_checkpoint(tmp_path), tmp_path, max_shard_bytes=600_000)
    assert_same(stored(tmp_path), stored(GOLDEN))


@pytest.mark.parametrize("seed", range(3))
def test_released_tensors_in_memory_and_on_disk(tmp_path: Path, seed: int) -> None:
    case = random_case(seed)
    model = from_released(KimiVLConfig.from_dict(case.config), case.tensors)
    save_checkpoint(model, tmp_path, max_shard_bytes=50_000)
    assert_same(stored(tmp_path), {n: t for n, t in case.tensors.items() if not n.endswith("inv_freq")})


def test_file_names_of_shards_may_be_any(tmp_path: Path) -> None:
    """Only the index counts."""
    shutil.copytree(GOLDEN, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / "model-00001-of-00003.safetensors").rename(tmp_path / "first.safetensors")
    index["weight_map"] = {
        n: f.replace("model-00001-of-00003", "first") for n, f in index["weight_map"].items()
    }
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert_same(load_checkpoint(tmp_path).state_dict(), load_checkpoint(GOLDEN).state_dict())


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound checkpoint in several shards, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("sound")
    save_checkpoint(KimiVL(TINY), folder, max_shard_bytes=200_000)
    assert len(list(folder.glob("*.safetensors"))) >= 3
    return folder


@pytest.fixture
def folder(written: Path, tmp_path: Path) -> Path:
    return shutil.copytree(written, tmp_path / "checkpoint")


def shard_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_shard(shard: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(shard)
    change(tensors)
    save_file(tensors, shard)


def assert_refused(folder: Path, error: type[Exception], *words: str) -> None:
    """One sentence that names the culprits: no more than a few lines, ending without a stack of others."""
    with pytest.raises(error) as caught:
        load_checkpoint(folder)
    message = str(caught.value)
    for word in words:
        assert word in message, message
    assert "\n" not in message and len(message) < 500, message


Q = "language_model.model.layers.1.self_attn.q_proj.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.7.up_proj.weight"


def test_missing_shard(folder: Path) -> None:
    shard = shard_with(folder, Q)
    shard.unlink()
    assert_refused(folder, CheckpointError, shard.name, "missing")


@pytest.mark.parametrize("keep", [0, 5, 300, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    shard = shard_with(folder, Q)
    shard.write_bytes(shard.read_bytes()[:keep])
    assert_refused(folder, CheckpointError, shard.name, "cannot be read")


def test_shard_that_is_no_safetensors(folder: Path) -> None:
    shard = shard_with(folder, Q)
    shard.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 12345\n")
    assert_refused(folder, CheckpointError, shard.name, "cannot be read")


@pytest.mark.parametrize(
    "name", [Q, EXPERT, "language_model.model.layers.1.mlp.gate.e_score_correction_bias"]
)
def test_wrong_shape(folder: Path, name: str) -> None:
    shard = shard_with(folder, name)
    edit_shard(shard, lambda tensors: tensors.update({name: tensors[name][:-1].contiguous()}))
    assert_refused(folder, CheckpointError, shard.name, name, "shape")


def test_transposed_tensor(folder: Path) -> None:
    shard = shard_with(folder, EXPERT)
    edit_shard(shard, lambda tensors: tensors.update({EXPERT: tensors[EXPERT].T.contiguous()}))
    assert_refused(folder, CheckpointError, shard.name, EXPERT, "(52, 18)", "(18, 52)")


@pytest.mark.parametrize(
    "name",
    [
        "language_model.model.layers.3.input_layernorm.weight",  # one layer too many
        "language_model.model.layers.2.mlp.experts.11.up_proj.weight",  # one expert too many
        "language_model.model.layers.1.self_attn.q_proj.bias",
        "language_model.model.layers.0.self_attn.rotary_emb.inv_freq.1",  # only the very name is ignored
        "vision_tower.encoder.blocks.0.attn.wqkv.weight",
        "extra",
    ],
)
def test_unknown_tensor(folder: Path, name: str) -> None:
    shard = shard_with(folder, Q)
    edit_shard(shard, lambda tensors: tensors.update({name: torch.ones(52)}))
    assert_refused(folder, CheckpointError, shard.name, name, "not part of")


@pytest.mark.parametrize("name", [Q, EXPERT, "multi_modal_projector.pre_norm.bias"])
def test_missing_tensor(folder: Path, name: str) -> None:
    edit_shard(shard_with(folder, name), lambda tensors: tensors.pop(name))
    assert_refused(folder, CheckpointError, folder.name, name, "missing")


def test_tensor_in_two_shards(folder: Path) -> None:
    tensor = load_file(shard_with(folder, Q))[Q]
    last = sorted(folder.glob("*.safetensors"))[-1]
    edit_shard(last, lambda tensors: tensors.update({Q: tensor}))
    assert_refused(folder, CheckpointError, Q, "second time")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn])
def test_quantised_tensor(folder: Path, dtype: torch.dtype) -> None:
    shard = shard_with(folder, Q)
    edit_shard(shard, lambda tensors: tensors.update({Q: tensors[Q].to(dtype)}))
    assert_refused(folder, CheckpointError, shard.name, Q, str(dtype))


def test_no_weights(folder: Path) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    assert_refused(folder, CheckpointError, folder.name, "model.safetensors")


def test_no_folder(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", CheckpointError, "nowhere", "not a folder")
    (tmp_path / "file").write_bytes(b"")
    assert_refused(tmp_path / "file", CheckpointError, "file", "not a folder")


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_damaged_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert_refused(folder, ValueError, INDEX)


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/hostname", ""])
def test_index_that_points_outside(folder: Path, outside: str) -> None:
    (folder.parent / "secret.safetensors").write_bytes(b"")
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][Q] = outside
    (folder / INDEX).write_text(json.dumps(index))
    assert_refused(folder, CheckpointError, INDEX, "outside")


# --- config.json --------------------------------------------------------------------------------------------


def test_missing_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert_refused(folder, ConfigError, "config.json", "missing")


@pytest.mark.parametrize(
    "data", [b"", b"{", b"{'a': 1}", b"\xff\xfe\x00", b"[" * 100_000, b"3", b"null", b"[1]"]
)
def test_config_that_is_no_json_object(folder: Path, data: bytes) -> None:
    (folder / "config.json").write_bytes(data)
    assert_refused(folder, ConfigError, "config.json")


def refuse_config(folder: Path, path: str, value: Any, *words: str) -> None:
    """Sets one value, `...` to remove it, and expects a refusal that names the field."""
    config = json.loads((folder / "config.json").read_text())
    *section, key = path.split("/")
    target = config[section[0]] if section else config
    if value is ...:
        del target[key]
    else:
        target[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, ConfigError, "config.json", *(words or [key]))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("torch_dtype", "float31"),
        ("torch_dtype", "bf16"),
        ("torch_dtype", 16),
        ("torch_dtype", "int8"),
        ("model_type", "llava"),
        ("tie_word_embeddings", True),
        ("quantization_config", {"quant_method": "fp8"}),
        ("vision_config/model_type", "siglip"),
        ("text_config/model_type", "llama"),
        ("text_config/scoring_func", "softmax"),
        ("text_config/topk_method", "greedy"),
        ("text_config/topk_method", "group_limited_greedy"),
        ("text_config/rope_scaling", {"type": "yarn", "factor": 4.0}),
        ("text_config/hidden_act", "gelu"),
        ("text_config/q_lora_rank", 1536),
        ("text_config/moe_layer_freq", 2),
        ("text_config/attention_bias", True),
        ("text_config/rope_interleave", False),
        ("text_config/tie_word_embeddings", True),
        ("text_config/num_key_value_heads", 1),
        ("text_config/rope_parameters", {"rope_type": "yarn", "rope_theta": 800000.0, "factor": 4.0}),
    ],
    ids=str,
)
def test_value_that_is_not_implemented(folder: Path, path: str, value: Any) -> None:
    refuse_config(folder, path, value)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("vision_config", ...),
        ("text_config", None),
        ("text_config", []),
        ("media_placeholder_token_id", ...),
        ("media_placeholder_token_id", "125"),
        ("media_placeholder_token_id", 131),
        ("media_placeholder_token_id", -1),
        ("vision_config/hidden_size", ...),
        ("vision_config/hidden_size", "56"),
        ("vision_config/patch_size", 0),
        ("vision_config/merge_kernel_size", [2]),
        ("vision_config/merge_kernel_size", "22"),
        ("vision_config/merge_kernel_size", [2, 0]),
        ("text_config/kv_lora_rank", 22.5),
        ("text_config/kv_lora_rank", None),
        ("text_config/num_hidden_layers", True),
        ("text_config/num_hidden_layers", -3),
        ("text_config/rope_theta", ...),
        ("text_config/rope_theta", "800000"),
        ("text_config/rope_theta", 0),
        ("text_config/rope_theta", float("nan")),
        ("text_config/rms_norm_eps", float("inf")),
        ("text_config/rms_norm_eps", ...),
        ("text_config/norm_topk_prob", 1),
        ("text_config/routed_scaling_factor", ...),
        ("text_config/num_experts_per_tok", 12),
        ("text_config/n_group", 2),
        ("text_config/topk_group", 2),
        ("text_config/n_routed_experts", ...),
        ("text_config/first_k_dense_replace", ...),
    ],
    ids=str,
)
def test_value_that_makes_no_sense(folder: Path, path: str, value: Any) -> None:
    refuse_config(folder, path, value)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("vision_config/num_attention_heads", 6, "hidden_size"),
        ("vision_config/num_attention_heads", 28, "head size"),
        ("text_config/qk_rope_head_dim", 5, "qk_rope_head_dim"),
    ],
)
def test_sizes_that_do_not_fit_each_other(folder: Path, path: str, value: Any, words: str) -> None:
    refuse_config(folder, path, value, words)


def test_config_of_another_size(folder: Path) -> None:
    """A config that is sound in itself but not these weights': the tensor at fault is named."""
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, CheckpointError, "language_model.model.layers.2.", "not part of")
    config["text_config"]["num_hidden_layers"] = 4
    (folder / "config.json").write_text(json.dumps(config))
    assert_refused(folder, CheckpointError, "language_model.model.layers.3.", "missing")


def test_keys_without_meaning_here_are_allowed(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "x.Y"}, "transformers_version": "4.50.3"}
    config["text_config"] |= {"use_cache": False, "torch_dtype": "bfloat16", "_name_or_path": ""}
    (folder / "config.json").write_text(json.dumps(config))
    load_checkpoint(folder)
