"""Random checkpoints in the released layout, to practise on what only the real weights could show otherwise.

    python -m workbench.checkup.standin FOLDER --size full            # 33 GB in 7 shards, as large as the real one
    python -m workbench.checkup.standin FOLDER --size small           # 4 MB, the same layout
    python -m workbench.checkup.standin FOLDER --size full --empty    # the same names and sizes; the data are holes

Written tensor by tensor, so that memory stays small. What the model says is noise; how it loads, fits and runs is not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from kimi_vl_ref.chat import SPECIAL_SLOTS, Tokenizer
from kimi_vl_ref.config import KIMI_VL_A3B, KimiVLConfig
from kimi_vl_ref.images import ImageProcessor
from kimi_vl_ref.weights import SELECTION_BIAS, inv_freq_names

from ..study.tokenizer import SPECIAL_OFFSETS
from .weights import INDEX, expected

SHARDS = 7
SMALL = replace(
    KIMI_VL_A3B,
    vision=replace(
        KIMI_VL_A3B.vision,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        init_pos_emb_height=16,
        init_pos_emb_width=16,
    ),
    text=replace(
        KIMI_VL_A3B.text,
        vocab_size=4096 + SPECIAL_SLOTS,
        hidden_size=96,
        num_hidden_layers=4,
        num_attention_heads=3,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        intermediate_size=128,
        moe_intermediate_size=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=8192,
        bos_token_id=4096,
        eos_token_id=4097,
        pad_token_id=4096 + SPECIAL_SLOTS - 1,
    ),
    media_placeholder_token_id=4096 + SPECIAL_OFFSETS["<|media_pad|>"],
)
SIZES = {"full": KIMI_VL_A3B, "small": SMALL}


def write_standin(
    folder: str | Path, config: KimiVLConfig, *, shards: int = SHARDS, seed: int = 0, empty: bool = False
) -> None:
    """A whole checkpoint folder: shards and index, config, tokenizer and processor files.

    empty: headers are as always, the data are holes of zeros that take no space. Raises ValueError for a folder that is not
    empty, and for a disk that is too small.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there and not empty; give a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = stored(config)
    total = sum(_nbytes(name, shape) for name, shape in shapes.items())
    free = shutil.disk_usage(folder).free
    if not empty and total > 0.98 * free:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free, the checkpoint takes {total / 1e9:.1f} GB; give another disk")
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    parts = list(split(shapes, shards))
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        with (folder / f"{file}.part").open("wb") as opened:
            write_shard(opened, part, None if empty else generator)
        os.replace(folder / f"{file}.part", folder / file)
        weight_map |= dict.fromkeys(part, file)
    _write(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write(folder / "config.json", config.to_dict())
    write_tokens(folder, config)
    half = (0.5, 0.5, 0.5)
    processor = ImageProcessor(config.vision.patch_size, config.vision.merge_kernel_size, 4096, True, half, half)
    _write(folder / "preprocessor_config.json", processor.to_dict())


def stored(config: KimiVLConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the order of the files, `inv_freq` included: 5,679 at full size."""
    ignored = dict.fromkeys(inv_freq_names(config), (config.text.qk_rope_head_dim // 2,))
    return expected(config) | ignored


def split(shapes: dict[str, tuple[int, ...]], shards: int) -> Iterator[dict[str, tuple[int, ...]]]:
    """Shards of about equal size, tensors in order."""
    share = sum(_nbytes(name, shape) for name, shape in shapes.items()) / shards
    part, size, done = {}, 0, 0
    for name, shape in shapes.items():
        part[name] = shape
        size += _nbytes(name, shape)
        if size >= share * (done + 1) and done + 1 < shards:
            yield part
            part, done = {}, done + 1
    yield part


def write_shard(file: BinaryIO, shapes: dict[str, tuple[int, ...]], generator: torch.Generator | None) -> None:
    """One safetensors file, a tensor at a time; without a generator its data are a hole."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # wide ones first, so that each starts at a multiple of its own size
    names = sorted(shapes, key=lambda name: -_dtype(name).itemsize)
    for name in names:
        start, end = end, end + _nbytes(name, shapes[name])
        kind = {torch.float32: "F32", torch.bfloat16: "BF16"}[_dtype(name)]
        header[name] = {"dtype": kind, "shape": list(shapes[name]), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    if generator is None:
        file.truncate(8 + len(text) + end)
        return
    for name in names:
        file.write(values(name, shapes[name], generator).to(_dtype(name)).view(torch.uint8).numpy().data)


def values(name: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers of a size that keeps the stream in order: norms about 1, matrices by their width."""
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return noise * 0.02 + (1 if "norm" in name and name.endswith("weight") else 0)
    return noise * (0.02 if "pos_emb" in name else math.prod(shape[1:]) ** -0.5)


def write_tokens(folder: Path, config: KimiVLConfig) -> None:
    """`tiktoken.model` with as many ranks as the vocabulary asks for, and the special tokens of the releases by name and id."""
    base = config.text.vocab_size - SPECIAL_SLOTS
    ranks = {token: rank for rank, token in zip(range(base), _pieces(), strict=False)}
    Tokenizer(ranks, {base + offset: name for name, offset in SPECIAL_OFFSETS.items()}).save(folder)
    ends = [base + SPECIAL_OFFSETS["[EOS]"], base + SPECIAL_OFFSETS["<|im_end|>"]]
    _write(folder / "generation_config.json", {"eos_token_id": ends})


def _pieces() -> Iterator[bytes]:
    """The single bytes, all pairs of them, then threes, so that every one can be reached by merging."""
    single = [bytes([value]) for value in range(256)]
    yield from single
    pairs = [a + b for a in single for b in single]
    yield from pairs
    yield from (pair + one for pair in pairs for one in single)


def _dtype(name: str) -> torch.dtype:
    return torch.float32 if name.endswith((SELECTION_BIAS, "inv_freq")) else torch.bfloat16


def _nbytes(name: str, shape: tuple[int, ...]) -> int:
    return math.prod(shape) * _dtype(name).itemsize


def _write(path: Path, data: object) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m workbench.checkup.standin", description="Random checkpoints.")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--empty", action="store_true", help="holes in the place of data")
    given = parser.parse_args()
    try:
        write_standin(given.folder, SIZES[given.size], empty=given.empty)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(given.folder)


if __name__ == "__main__":
    main()
