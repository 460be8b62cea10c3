"""config.json and preprocessor_config.json: values that are known, and those that a release is known to have."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from kimi_vl_ref.config import KIMI_VL_A3B, ConfigError, KimiVLConfig, read_json
from kimi_vl_ref.images import ImageError, ImageProcessor

from .findings import Report

# Files of a checkpoint folder other than the shards are small (an index has 0.6 MB, the ranks 2.8 MB).
MAX_SMALL = 32_000_000
# in_token_limit by what a release is called; the later one sees pictures four times the size
LIMITS = {"2506": 16384, "instruct": 4096, "thinking": 4096}
# Keys of the released config.json that say nothing about the arithmetic, or repeat what stands elsewhere.
HARMLESS = {
    "architectures", "auto_map", "ignore_index", "transformers_version", "vocab_size", "vision_config", "text_config",
    "media_placeholder_token_id", "use_cache", "_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id",
    "num_key_value_heads", "attention_dropout", "aux_loss_alpha", "seq_aux", "ep_size", "pretraining_tp", "torch_dtype",
    "dtype", "model_type", "tie_word_embeddings", "quantization_config", "q_lora_rank", "scoring_func", "topk_method",
    "rope_scaling", "rope_parameters", "hidden_act", "moe_layer_freq", "attention_bias", "rope_interleave",
}  # fmt: skip


def small_enough(report: Report, folder: Path) -> bool:
    """Whether every small file of the folder is a file of a size that is read at all; the first thing that is looked at."""
    read = [path for path in sorted(folder.iterdir()) if path.suffix in (".json", ".model")]
    odd = [f"{path.name} is no file, or a link to nothing; fetch it again" for path in read if not path.is_file()]
    bombs = [
        f"{path.name} has {path.stat().st_size:,} bytes, such a file has a few million; it is not read: fetch it again"
        for path in read
        if path.is_file() and path.stat().st_size > MAX_SMALL
    ]
    return not report.add_first("files", "FAIL", odd + bombs)


def check_config(report: Report, folder: Path) -> KimiVLConfig | None:
    """config.json; None if it cannot be used, and then nothing else can be said."""
    path = folder / "config.json"
    try:
        config, data = KimiVLConfig.from_json(path), read_json(path)
    except ConfigError as error:
        report.add("config.json", "FAIL", str(error))
        return None
    known = HARMLESS | asdict(config.text).keys() | asdict(config.vision).keys()
    unknown = [
        f"{where}{key[:60]} is not a key of the released file, and is ignored; if it changes the arithmetic, answers are wrong"
        for where, section in (("", data), ("vision_config: ", data["vision_config"]), ("text_config: ", data["text_config"]))
        for key in section
        if key not in known
    ]
    differs = _differences(config)
    if not differs:
        report.add("config.json", "ok", "every value as in Kimi-VL-A3B")
    elif _same_sizes(config):
        says = f"sizes of Kimi-VL-A3B, but {', '.join(differs)}; right only if this release says so"
        report.add("config.json", "warn", says)
    else:
        layers, width = config.text.num_hidden_layers, config.text.hidden_size
        report.add("config.json", "note", f"every value is known; not a released size ({layers} layers of {width})")
    report.add_first("config.json", "warn", unknown)
    return config


def released_size(config: KimiVLConfig) -> bool:
    return _same_sizes(config)


def _differences(config: KimiVLConfig) -> list[str]:
    pairs = [(asdict(KIMI_VL_A3B.text), asdict(config.text)), (asdict(KIMI_VL_A3B.vision), asdict(config.vision))]
    return [f"{key}={value} and not {a[key]}" for a, b in pairs for key, value in b.items() if value != a[key]]


def _same_sizes(config: KimiVLConfig) -> bool:
    text, ours = config.text, KIMI_VL_A3B.text
    keys = ("hidden_size", "num_hidden_layers", "n_routed_experts", "vocab_size")
    return config.vision == KIMI_VL_A3B.vision and all(getattr(text, key) == getattr(ours, key) for key in keys)


def check_preprocessor(report: Report, folder: Path, config: KimiVLConfig, name: str) -> None:
    """preprocessor_config.json. name: what the checkpoint is called, which tells the limit that belongs to it."""
    path = folder / "preprocessor_config.json"
    try:
        processor = ImageProcessor.from_json(path)
    except ImageError as error:
        report.add("pictures", "FAIL", str(error))
        return
    limit, wanted = processor.in_token_limit, next((n for key, n in LIMITS.items() if key in name.lower()), None)
    values: list[tuple[str, Any, Any]] = [
        ("patch_size", processor.patch_size, config.vision.patch_size),
        ("merge_kernel_size", tuple(processor.merge_kernel_size), tuple(config.vision.merge_kernel_size)),
        ("pad_input", processor.pad_input, True),
        ("image_mean", tuple(processor.image_mean), (0.5, 0.5, 0.5)),
        ("image_std", tuple(processor.image_std), (0.5, 0.5, 0.5)),
    ]
    wrong = [f"{key}={is_!r}, expected {right!r}" for key, is_, right in values if is_ != right]
    if wanted is not None and limit != wanted:
        wrong.insert(0, f"in_token_limit={limit}, expected {wanted} for this release")
    elif released_size(config) and limit not in LIMITS.values():
        wrong.insert(0, f"in_token_limit={limit}, which no release has (4096, and 16384 in Thinking-2506)")
    if wrong:
        report.add("pictures", "FAIL", f"{path.name}: {'; '.join(wrong)}; take the file from the release of the weights")
        return
    which = {4096: "as Instruct and Thinking have it", 16384: "as Thinking-2506 has it"}.get(limit, "its own")
    says = f"in_token_limit {limit} ({which}); padded, mean and std 0.5, patches of {processor.patch_size}"
    report.add("pictures", "ok", says)
