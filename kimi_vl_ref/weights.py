"""Released tensor names <-> ours, in ONE table, and what follows from it: loading, saving, refusing what does not fit.

The table speaks of modules, so that it serves parameters here and hooks elsewhere (which activation of ours is which
of the released implementation's). Released checkpoints store every expert by itself; ours are stacked, so an expert's
tensor is a slice. The stored `rotary_emb.inv_freq` are never read: rounded to bf16 they would be off by many turns at
long context.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .config import KimiVLConfig, read_json
from .model import KimiVL
from .told import cause, short
from .whole import write_json

# ours -> released; {i} is a layer
MODULES = {
    "embedded": "language_model.model.embed_tokens",
    "decoder.layers.{i}.attn_norm": "language_model.model.layers.{i}.input_layernorm",
    "decoder.layers.{i}.attn.q": "language_model.model.layers.{i}.self_attn.q_proj",
    "decoder.layers.{i}.attn.down": "language_model.model.layers.{i}.self_attn.kv_a_proj_with_mqa",
    "decoder.layers.{i}.attn.latent": "language_model.model.layers.{i}.self_attn.kv_a_layernorm",
    "decoder.layers.{i}.attn.up": "language_model.model.layers.{i}.self_attn.kv_b_proj",
    "decoder.layers.{i}.attn.out": "language_model.model.layers.{i}.self_attn.o_proj",
    "decoder.layers.{i}.attn": "language_model.model.layers.{i}.self_attn",
    "decoder.layers.{i}.ffn_norm": "language_model.model.layers.{i}.post_attention_layernorm",
    "decoder.layers.{i}.ffn.gate": "language_model.model.layers.{i}.mlp.gate_proj",
    "decoder.layers.{i}.ffn.up": "language_model.model.layers.{i}.mlp.up_proj",
    "decoder.layers.{i}.ffn.down": "language_model.model.layers.{i}.mlp.down_proj",
    "decoder.layers.{i}.ffn.router.scores": "language_model.model.layers.{i}.mlp.gate",
    "decoder.layers.{i}.ffn.router.chosen": "language_model.model.layers.{i}.mlp.gate",
    "decoder.layers.{i}.ffn.experts": "language_model.model.layers.{i}.mlp.experts",
    "decoder.layers.{i}.ffn.shared.gate": "language_model.model.layers.{i}.mlp.shared_experts.gate_proj",
    "decoder.layers.{i}.ffn.shared.up": "language_model.model.layers.{i}.mlp.shared_experts.up_proj",
    "decoder.layers.{i}.ffn.shared.down": "language_model.model.layers.{i}.mlp.shared_experts.down_proj",
    "decoder.layers.{i}.ffn.shared": "language_model.model.layers.{i}.mlp.shared_experts",
    "decoder.layers.{i}.ffn": "language_model.model.layers.{i}.mlp",
    "decoder.layers.{i}": "language_model.model.layers.{i}",
    "decoder.norm": "language_model.model.norm",
    "logits": "language_model.lm_head",
    "vision.patches": "vision_tower.patch_embed.proj",
    "vision.positions": "vision_tower.patch_embed.pos_emb",
    "vision.layers.{i}.attn_norm": "vision_tower.encoder.blocks.{i}.norm0",
    "vision.layers.{i}.attn.qkv": "vision_tower.encoder.blocks.{i}.wqkv",
    "vision.layers.{i}.attn.out": "vision_tower.encoder.blocks.{i}.wo",
    "vision.layers.{i}.ffn_norm": "vision_tower.encoder.blocks.{i}.norm1",
    "vision.layers.{i}.ffn.fc0": "vision_tower.encoder.blocks.{i}.mlp.fc0",
    "vision.layers.{i}.ffn.fc1": "vision_tower.encoder.blocks.{i}.mlp.fc1",
    "vision.layers.{i}.ffn": "vision_tower.encoder.blocks.{i}.mlp",
    "vision.layers.{i}": "vision_tower.encoder.blocks.{i}",
    "vision.norm": "vision_tower.encoder.final_layernorm",
    "vision": "vision_tower",
    "projector.norm": "multi_modal_projector.pre_norm",
    "projector.linear_1": "multi_modal_projector.linear_1",
    "projector.linear_2": "multi_modal_projector.linear_2",
    "projector": "multi_modal_projector",
}
SEPARATE = re.compile(r"(decoder\.layers\.\d+)\.ffn\.experts\.(\d+)\.(gate|up|down)\.weight")  # experts.py
MAPPED = 16 << 20  # bytes of a shard that are mapped at a time while it is read
SELECTION_BIAS = "e_score_correction_bias"  # the one tensor that keeps float32 whatever the model's dtype
INV_FREQ = re.compile(r"language_model\.model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


class CheckpointError(ValueError):
    """A checkpoint folder that is incomplete, damaged, or of another architecture."""


@dataclass(frozen=True)
class Place:
    """Where a released tensor lives: a parameter or buffer of ours, or a slice of one."""

    name: str
    shape: tuple[int, ...]
    index: tuple[int | slice, ...] = ()


def released_module(ours: str) -> str:
    """The released name of one of our modules; KeyError if the released code has no such module."""
    layer = re.search(r"\.layers\.(\d+)", ours)
    template = ours if layer is None else ours.replace(layer.group(), ".layers.{i}", 1)
    return MODULES[template].format(i=layer.group(1) if layer else "")


def places(model: KimiVL) -> dict[str, Place]:
    """Every tensor of the released layout (the ignored `inv_freq` apart) and where it lives in `model`."""
    table: dict[str, Place] = {}
    inner = model.config.text.moe_intermediate_size
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        if expert := SEPARATE.fullmatch(name):
            layer, e, leaf = expert.groups()
            released = released_module(f"{layer}.ffn.experts")
            table[f"{released}.{e}.{leaf}_proj.weight"] = Place(name, tuple(tensor.shape))
        elif name.endswith((".packed.stored", ".packed.scale", ".gate_up.stored", ".down.stored", ".here.gate_up")):
            how = "in part" if name.endswith(".here.gate_up") else "in few bits"
            raise CheckpointError(f"{module} is kept {how}, which the released layout has no place for; load it whole")
        elif module.endswith(".experts"):
            released, width = released_module(module), model.config.text.hidden_size
            for e in range(len(tensor)):
                if leaf == "down":
                    table[f"{released}.{e}.down_proj.weight"] = Place(name, (width, inner), (e,))
                else:
                    table[f"{released}.{e}.gate_proj.weight"] = Place(name, (inner, width), (e, slice(inner)))
                    table[f"{released}.{e}.up_proj.weight"] = Place(name, (inner, width), (e, slice(inner, None)))
        else:
            leaf = SELECTION_BIAS if module.endswith(".chosen") else leaf
            table[f"{released_module(module)}.{leaf}"] = Place(name, tuple(tensor.shape))
    return table


def inv_freq_names(config: KimiVLConfig) -> list[str]:
    layers = range(config.text.num_hidden_layers)
    return [f"language_model.model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in layers]


def parameter_count(model: KimiVL) -> int:
    """Numbers a checkpoint stores, selection biases included (16,407,656,048 for Kimi-VL-A3B)."""
    return sum(tensor.numel() for tensor in model.state_dict().values())


def to_released(model: KimiVL) -> Iterator[tuple[str, Tensor]]:
    """(released name, tensor) pairs, `inv_freq` included; slices share memory with the model."""
    state = model.state_dict()
    for released, place in places(model).items():
        yield released, state[place.name][place.index] if place.index else state[place.name]
    text = model.config.text
    exponents = torch.arange(0, text.qk_rope_head_dim, 2, dtype=torch.float64) / text.qk_rope_head_dim
    for released in inv_freq_names(model.config):
        yield released, (text.rope_theta**-exponents).float()


def empty_model(config: KimiVLConfig, device: str | torch.device, dtype: torch.dtype) -> KimiVL:
    """The model without values, nothing initialised on the way; the selection biases stay at least float32."""
    with torch.device("meta"):
        model = KimiVL(config)
    return model.to(dtype).to_empty(device=device).requires_grad_(False).eval()


def from_released(
    config: KimiVLConfig,
    tensors: Mapping[str, Tensor],
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> KimiVL:
    """A model from tensors under their released names, all in memory."""
    model = empty_model(config, device, dtype)
    fill = Filling(model)
    for name, tensor in tensors.items():
        fill.put(name, tensor, "the given tensors")
    fill.finish("the given tensors")
    return model


class Filling:
    """Copies released tensors into a model one at a time and knows at the end what was missing."""

    def __init__(self, model: KimiVL):
        self.state = model.state_dict()
        self.table = places(model)
        self.missing = dict.fromkeys(self.table)

    def put(self, name: str, tensor: Tensor, source: str) -> None:
        if INV_FREQ.fullmatch(name):
            return
        place = self.table.get(name)
        if place is None:
            raise CheckpointError(
                f"{source}: the tensor {name} is not part of Kimi-VL with this config.json; "
                "the shard belongs to another model or the config does"
            )
        if tuple(tensor.shape) != place.shape:
            raise CheckpointError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, config.json asks for {place.shape}; "
                "use the config.json that came with the weights"
            )
        if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
            raise CheckpointError(
                f"{source}: {name} is stored as {tensor.dtype}; "
                "only float16, bfloat16, float32 and float64 weights are read"
            )
        if name not in self.missing:
            raise CheckpointError(f"{source}: {name} comes a second time; remove the shard that does not belong here")
        self.store(place, tensor)
        del self.missing[name]

    def store(self, place: Place, tensor: Tensor) -> None:
        target = self.state[place.name]
        (target[place.index] if place.index else target).copy_(tensor)

    def finish(self, source: str) -> None:
        if self.missing:
            first = ", ".join(list(self.missing)[:3])
            raise CheckpointError(
                f"{source}: {len(self.missing)} tensors are missing, the first of them {first}; "
                "a shard was not downloaded or the config.json is another model's"
            )


def load_checkpoint(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> KimiVL:
    """A model from a folder laid out like a released checkpoint. dtype: the one config.json names unless given.

    Reads one tensor at a time, so memory peaks at the weights and one tensor. Raises CheckpointError or ConfigError
    with the file and tensor at fault.
    """
    folder = Path(folder)
    config = read_config(folder)
    wanted: torch.dtype = dtype or getattr(torch, config.torch_dtype)
    try:
        model = empty_model(config, device, wanted)
    except (RuntimeError, TypeError, MemoryError) as error:  # OutOfMemoryError is a RuntimeError
        name = str(wanted).removeprefix("torch.")
        raise CheckpointError(
            f"{folder} asks for more memory in {name} than {device} has ({short(error)}); load it with fit=\"auto\" or in a "
            "smaller dtype, or fetch config.json again if its sizes are wrong"
        ) from None
    fill_from(folder, Filling(model))
    return model


def read_config(folder: Path) -> KimiVLConfig:
    """config.json of a checkpoint folder. Raises CheckpointError if the folder is none, ConfigError for the file."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give a checkpoint folder in the released layout, or 'study'")
    return KimiVLConfig.from_json(folder / "config.json")


def fill_from(folder: Path, fill: Filling, window: float = MAPPED) -> None:
    """Puts every tensor of a folder's shards into place, one at a time; `window` as in `stored`."""
    for shard in find_shards(folder):
        try:
            for name, tensor in stored(shard, window):
                fill.put(name, tensor, shard.name)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise CheckpointError(
                f"{shard} cannot be read as safetensors ({short(error, 120)}); "
                "the download was cut off or the file is another kind, fetch it again"
            ) from None
    fill.finish(str(folder))


def stored(shard: Path, window: float) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a safetensors file, in its order. The file is mapped, and what was read of a mapping stays resident
    until that is closed: so it is opened anew after every `window` bytes.
    """
    with safe_open(shard, framework="pt", device="cpu") as opened:
        names = deque(opened.keys())
    while names:
        read = 0
        with safe_open(shard, framework="pt", device="cpu") as opened:
            while names and read < window:
                tensor = opened.get_tensor(name := names.popleft())
                read += tensor.nbytes
                yield name, tensor
                del tensor  # it holds the mapping


def find_shards(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, or the single `model.safetensors`."""
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if not index.exists():
        if single.exists():
            return [single]
        raise CheckpointError(
            f"{folder} holds neither model.safetensors nor model.safetensors.index.json; "
            "only safetensors checkpoints are read, never pickles"
        )
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise CheckpointError(f"{index}: weight_map is missing or does not map tensors to files; fetch it again")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    for shard in shards:
        if shard.parent != folder:
            raise CheckpointError(f"{index}: {short(shard.name)!r} points outside {folder}; fetch the index again")
        if len(shard.name) > 255 or not shard.is_file():  # longer names are an error of the system
            missing = f"the shard {short(shard.name)} named by {index.name} is missing"
            raise CheckpointError(f"{folder}: {missing}; fetch it again")
    return shards


def save_checkpoint(
    model: KimiVL, folder: str | Path, *, dtype: torch.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes config.json and safetensors shards (with an index when there are several) under the released names.

    dtype: the model's unless given; selection biases stay float32. What lies in the folder is, after a kill at any moment,
    the earlier weights or these, never some of both: shards are written under names that are not in use, and the index
    turns to them in one step. A second save of several shards is therefore named "model.1-00001-of-...", and a third as the
    first. The tokenizer's files are `Tokenizer.save`'s. Raises CheckpointError for a folder that cannot be written, or a
    full disk.
    """
    try:
        _save(model, Path(folder), dtype or model.logits.weight.dtype, max_shard_bytes)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the system says
        for part in Path(folder).glob("*.part"):
            part.unlink(missing_ok=True)
        raise CheckpointError(
            f"cannot write the checkpoint to {folder} ({cause(error)}); make room or choose another folder, "
            "what was there is unchanged"
        ) from error


def _save(model: KimiVL, folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)

    def stored_as(name: str, tensor: Tensor) -> torch.dtype:
        return tensor.dtype if name.endswith((SELECTION_BIAS, "inv_freq")) else dtype

    shards: list[list[str]] = [[]]
    tensors, size, total = dict(to_released(model)), 0, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * stored_as(name, tensor).itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    index = folder / "model.safetensors.index.json"
    several = [f"-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    turn = {stem: [folder / (stem + end) for end in several] for stem in ("model", "model.1")}
    old = next((stem for stem, files in turn.items() if _names(index, files)), None)
    new = "model.1" if old == "model" else "model"
    files = [folder / "model.safetensors"] if len(shards) == 1 else turn[new]
    weight_map = {}
    for file, names in zip(files, shards, strict=True):
        part = {n: tensors[n].detach().to("cpu", stored_as(n, tensors[n])).contiguous().clone() for n in names}
        save_file(part, f"{file}.part", metadata={"format": "pt"})
        os.replace(f"{file}.part", file)
        weight_map |= dict.fromkeys(names, file.name)
    if len(shards) > 1:
        write_json(index, {"metadata": {"total_size": total}, "weight_map": weight_map})
        for file in turn[old] if old else ():
            file.unlink(missing_ok=True)
    else:
        index.unlink(missing_ok=True)  # one that an earlier, larger save left would win over the single file
    config = model.config.to_dict() | {"torch_dtype": str(dtype).removeprefix("torch.")}
    write_json(folder / "config.json", config)


def _names(index: Path, files: list[Path]) -> bool:
    """Whether an index is there and names one of these files."""
    try:
        named = set(read_json(index)["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        return False
    return not named.isdisjoint(file.name for file in files)
