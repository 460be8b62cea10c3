"""What a checkpoint's `config.json` says, as frozen dataclasses, and a refusal of every value the code does not
implement.

Fields carry the names of the released file. `KIMI_VL_A3B` is the released configuration written out; `TINY` has
pairwise distinct sizes, because Kimi-VL's own sizes coincide (27 = 27 layers, 16 = 16 heads, 64 experts = 64 rotary
channels) and hide axis mistakes.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from .told import short, shown

LARGEST = 1 << 30  # of any size; what is larger is damage, and would fail in the middle of making a tensor
MOST_LAYERS = 1024


class ConfigError(ValueError):
    """A configuration that is damaged, incomplete, or asks for something that is not implemented."""


@dataclass(frozen=True)
class VisionConfig:
    """MoonViT. Sizes in patches, channels or counts; report section 2.1."""

    patch_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    init_pos_emb_height: int
    init_pos_emb_width: int
    merge_kernel_size: tuple[int, int] = (2, 2)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def merged_size(self) -> int:
        """Channels of one visual token before the projector: all patches of a merge cell side by side."""
        return self.hidden_size * self.merge_kernel_size[0] * self.merge_kernel_size[1]


@dataclass(frozen=True)
class TextConfig:
    """Moonlight, a DeepSeek-V3 style decoder. Sizes in channels or counts."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    first_k_dense_replace: int
    routed_scaling_factor: float
    rope_theta: float
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    pad_token_id: int | None = None

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_moe(self, layer: int) -> bool:
        """The first layers keep one dense FFN, all later ones route."""
        return layer >= self.first_k_dense_replace


@dataclass(frozen=True)
class KimiVLConfig:
    vision: VisionConfig
    text: TextConfig
    media_placeholder_token_id: int
    torch_dtype: str = "bfloat16"

    @classmethod
    def from_json(cls, path: str | Path) -> KimiVLConfig:
        """Reads `config.json`. Raises ConfigError naming the file and the field."""
        return cls.from_dict(read_json(path), source=str(path))

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str = "config.json") -> KimiVLConfig:
        _refuse_unknown(data, _IMPLEMENTED, source)
        vision, text = (_section(data, name, source) for name in ("vision_config", "text_config"))
        _refuse_unknown(vision, _IMPLEMENTED_VISION, f"{source}, vision_config")
        _refuse_unknown(text, _IMPLEMENTED_TEXT, f"{source}, text_config")
        heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
        if kv_heads is not None and kv_heads != heads:
            raise ConfigError(
                f"{source}, text_config: num_key_value_heads={kv_heads} differs from num_attention_heads={heads}; "
                "latent attention rebuilds one key and value per head, so the two must be equal"
            )
        config = cls(
            vision=_build(VisionConfig, vision, f"{source}, vision_config"),
            text=_build(TextConfig, text, f"{source}, text_config"),
            media_placeholder_token_id=_number(data, "media_placeholder_token_id", int, source),
            torch_dtype=str(data.get("torch_dtype", data.get("dtype", "bfloat16"))).removeprefix("torch."),
        )
        _check_sizes(config, source)
        return config

    def to_dict(self) -> dict[str, Any]:
        """The released layout of `config.json`, complete: other loaders read it too."""
        vision: dict[str, Any] = {"model_type": "moonvit", **asdict(self.vision)}
        vision["merge_kernel_size"] = list(self.vision.merge_kernel_size)
        text = {
            **_IMPLEMENTED_TEXT_WRITTEN,
            **asdict(self.text),
            "num_key_value_heads": self.text.num_attention_heads,
        }
        return {
            "architectures": ["KimiVLForConditionalGeneration"],
            "model_type": "kimi_vl",
            "ignore_index": -100,
            "media_placeholder_token_id": self.media_placeholder_token_id,
            "vocab_size": self.text.vocab_size,
            "torch_dtype": self.torch_dtype,
            "tie_word_embeddings": False,
            "vision_config": vision,
            "text_config": text,
        }


# What the code implements, for the keys whose other values would silently change the maths. A missing key is fine
# where the released class has the same default.
_IMPLEMENTED: dict[str, tuple[Any, ...]] = {
    "model_type": ("kimi_vl",),
    "tie_word_embeddings": (False,),
    "torch_dtype": ("bfloat16", "float16", "float32", "float64"),
    "dtype": ("bfloat16", "float16", "float32", "float64"),
    "quantization_config": (None,),
}
_IMPLEMENTED_VISION: dict[str, tuple[Any, ...]] = {"model_type": ("moonvit",)}
_IMPLEMENTED_TEXT: dict[str, tuple[Any, ...]] = {
    "model_type": ("deepseek_v3", "kimi_vl_text"),
    "q_lora_rank": (None,),
    "scoring_func": ("sigmoid",),
    "topk_method": ("noaux_tc",),
    "rope_scaling": (None,),
    "rope_parameters": (None,),  # the name newer configs give to rope_theta and rope_scaling together
    "hidden_act": ("silu",),
    "moe_layer_freq": (1,),
    "attention_bias": (False,),
    "tie_word_embeddings": (False,),
    "rope_interleave": (True,),
    "quantization_config": (None,),
}
_IMPLEMENTED_TEXT_WRITTEN = {
    "model_type": "deepseek_v3",
    "q_lora_rank": None,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "rope_scaling": None,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "seq_aux": True,
    "ep_size": 1,
    "pretraining_tp": 1,
    "use_cache": True,
    "tie_word_embeddings": False,
}


def read_json(path: str | Path) -> dict[str, Any]:
    """A JSON object from a file; ConfigError if it is missing, not UTF-8, not JSON or not an object."""
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} is missing; a checkpoint folder in the released layout has it") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    except RecursionError:
        raise ConfigError(f"{path} nests too deeply to be a configuration; fetch it again") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({short(error)}); fetch it again or mend it") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{path} holds a JSON {type(data).__name__}, expected an object with named fields")
    return data


def _refuse_unknown(data: dict[str, Any], implemented: dict[str, tuple[Any, ...]], source: str) -> None:
    for key, allowed in implemented.items():
        if key in data and not any(data[key] is v or (data[key] == v and v is not None) for v in allowed):
            raise ConfigError(
                f"{source}: {key}={_json(data[key])} is not implemented; "
                f"this code knows {' or '.join(json.dumps(v) for v in allowed)}"
            )


def _json(value: Any) -> str:
    """A value as it stands in the file, short."""
    try:
        return short(json.dumps(value))
    except (RecursionError, ValueError):
        return shown(value)


def _section(data: dict[str, Any], name: str, source: str) -> dict[str, Any]:
    section = data.get(name)
    if not isinstance(section, dict):
        raise ConfigError(f"{source}: {name} is missing or not an object; is this a Kimi-VL checkpoint?")
    return section


def _number(data: dict[str, Any], key: str, kind: type, source: str) -> Any:
    if key not in data:
        raise ConfigError(f"{source}: {key} is missing; the released file gives it")
    value: Any = data[key]
    accepted = (int, float) if kind is float else (kind,)
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise ConfigError(f"{source}: {key}={_json(value)} should be {kind.__name__}; use the released file")
    return value if kind is float and abs(value) > 1e300 else kind(value)  # refused by `_check_sizes`, which says why


_KINDS: dict[str, type] = {"int": int, "float": float, "bool": bool}


def _build(cls: type, data: dict[str, Any], source: str) -> Any:
    values: dict[str, Any] = {}
    for field in fields(cls):
        optional = field.type == "int | None"
        if field.name == "merge_kernel_size":
            pair = data.get("merge_kernel_size", [2, 2])
            if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(type(p) is int and p > 0 for p in pair)):
                raise ConfigError(f"{source}: merge_kernel_size={shown(pair)} should be two positive integers")
            values[field.name] = tuple(pair)
        elif optional and data.get(field.name) is None:
            values[field.name] = None
        elif field.name not in data and field.name in _MAY_BE_MISSING:
            continue
        else:
            values[field.name] = _number(data, field.name, int if optional else _KINDS[str(field.type)], source)
    return cls(**values)


# Only where the released classes' default is ours: theirs is 1e-6 for rms_norm_eps and 8 for n_group.
_MAY_BE_MISSING = {"norm_topk_prob", "initializer_range"}


def _check_sizes(config: KimiVLConfig, source: str) -> None:
    vision, text = config.vision, config.text
    for section, data in (("vision_config", asdict(vision)), ("text_config", asdict(text))):
        for key, value in data.items():
            may_be_zero = key in ("first_k_dense_replace", "bos_token_id", "eos_token_id", "pad_token_id")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            # Python reads NaN and Infinity from JSON as well
            if number and not 0 < value + may_be_zero <= LARGEST:
                sizes = f"a positive number up to {LARGEST:,}"
                raise ConfigError(f"{source}, {section}: {key}={shown(value)} should be {sizes}; use the released file")
        if data["num_hidden_layers"] > MOST_LAYERS:
            layers = f"num_hidden_layers={data['num_hidden_layers']}"
            raise ConfigError(f"{source}, {section}: {layers} is above {MOST_LAYERS}; use the released file")
    rules = [
        (
            vision.hidden_size % vision.num_attention_heads == 0,
            "num_attention_heads must divide the vision hidden_size",
        ),
        (vision.head_dim % 4 == 0, "the vision head size must be a multiple of 4 (two axes of adjacent rotary pairs)"),
        (text.qk_rope_head_dim % 2 == 0, "qk_rope_head_dim must be even (adjacent rotary pairs)"),
        (text.num_experts_per_tok <= text.n_routed_experts, "num_experts_per_tok must not exceed n_routed_experts"),
        (text.n_routed_experts % text.n_group == 0, "n_group must divide n_routed_experts"),
        (text.topk_group <= text.n_group, "topk_group must not exceed n_group"),
        (
            text.num_experts_per_tok <= text.n_routed_experts // text.n_group * text.topk_group,
            "topk_group groups must hold num_experts_per_tok experts",
        ),
        (
            0 <= config.media_placeholder_token_id < text.vocab_size,
            "media_placeholder_token_id must lie below vocab_size",
        ),
    ]
    for holds, sentence in rules:
        if not holds:
            raise ConfigError(f"{source}: {sentence}; use the released file")


KIMI_VL_A3B = KimiVLConfig(
    vision=VisionConfig(
        patch_size=14,
        hidden_size=1152,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=4304,
        init_pos_emb_height=64,
        init_pos_emb_width=64,
    ),
    text=TextConfig(
        vocab_size=163840,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        rope_theta=800000.0,
        max_position_embeddings=131072,
        bos_token_id=163584,
        eos_token_id=163585,
        pad_token_id=163839,
    ),
    media_placeholder_token_id=163605,
)

TINY = KimiVLConfig(
    vision=VisionConfig(
        patch_size=14,
        hidden_size=56,
        num_hidden_layers=2,
        num_attention_heads=7,
        intermediate_size=26,
        init_pos_emb_height=9,
        init_pos_emb_width=13,
    ),
    text=TextConfig(
        vocab_size=131,
        hidden_size=52,
        num_hidden_layers=3,
        num_attention_heads=5,
        kv_lora_rank=22,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=12,
        intermediate_size=34,
        moe_intermediate_size=18,
        n_routed_experts=11,
        n_shared_experts=2,
        num_experts_per_tok=4,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        rope_theta=800000.0,
        max_position_embeddings=4096,
        bos_token_id=120,
        eos_token_id=121,
        pad_token_id=130,
    ),
    media_placeholder_token_id=125,
    torch_dtype="float32",
)
