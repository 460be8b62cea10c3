"""The shards of a checkpoint: all there, whole, and holding exactly the tensors of the architecture. Headers only."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from kimi_vl_ref.config import KimiVLConfig, read_json
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.weights import SELECTION_BIAS, CheckpointError, find_shards, inv_freq_names, places

from .findings import Report, of
from .headers import HeaderError, Stored, read_header

INDEX = "model.safetensors.index.json"
DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64"}


def check_weights(report: Report, folder: Path, config: KimiVLConfig) -> None:
    """Shards, names, shapes and dtypes, a line each where all is well."""
    try:
        shards = find_shards(folder)
    except (CheckpointError, ValueError) as error:
        report.add("shards", "FAIL", str(error))
        return
    held: dict[str, tuple[str, Stored]] = {}
    problems, twice = [], []
    for shard in shards:
        try:
            header = read_header(shard)
        except (HeaderError, OSError) as error:
            problems.append(f"{shard.name} {error}")
            continue
        twice += [f"{name} is in {held[name][0]} and again in {shard.name}; remove the shard that does not belong here"
                  for name in header if name in held]  # fmt: skip
        held |= {name: (shard.name, stored) for name, stored in header.items()}
    if report.add_first("shards", "FAIL", problems + twice):
        return
    size = sum(stored.nbytes for _, stored in held.values())
    total = of(size) if size >= 1e8 else of(size, "MB")
    report.add("shards", "ok", f"{len(shards)} of {len(shards)} there, {total} of weights; headers and file sizes agree")
    _check_index(report, folder, held)
    _check_names(report, config, held)
    _check_dtypes(report, config, held)


def _check_index(report: Report, folder: Path, held: dict[str, tuple[str, Stored]]) -> None:
    if not (folder / INDEX).exists():
        return
    named = read_json(folder / INDEX)["weight_map"]
    wrong = [
        f"{INDEX} says {name[:100]} is in {shard[:60]}, where it is not; take index and shards from the same release"
        for name, shard in named.items()
        if name not in held or held[name][0] != shard
    ]
    unnamed = [f"{held[name][0]} holds {name[:100]}, which {INDEX} does not name; other loaders would not find it"
               for name in held if name not in named]  # fmt: skip
    report.add_first("index", "FAIL", wrong)
    report.add_first("index", "warn", unnamed)
    if not wrong and not unnamed:
        report.add("index", "ok", f"{INDEX} names every tensor where it is")


def expected(config: KimiVLConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the released layout for this config.json, the ignored `inv_freq` left out, and its shape."""
    with torch.device("meta"):
        return {name: place.shape for name, place in places(KimiVL(config)).items()}


def _check_names(report: Report, config: KimiVLConfig, held: dict[str, tuple[str, Stored]]) -> None:
    shapes, ignored = expected(config), inv_freq_names(config)
    missing = [name for name in shapes if name not in held]
    extra = [name for name in held if name not in shapes and name not in ignored]
    wrong = [
        f"{name} in {held[name][0]} has shape {list(held[name][1].shape)}, config.json asks for {list(shape)}; "
        "use the config.json that came with the weights"
        for name, shape in shapes.items()
        if name in held and held[name][1].shape != shape
    ]
    if missing:
        report.add(
            "tensors",
            "FAIL",
            f"{len(missing):,} are missing, the first is {missing[0]}; a shard was not fetched or config.json is another's",
        )
    if extra:
        report.add(
            "tensors",
            "FAIL",
            f"{len(extra):,} do not belong here, the first is {extra[0][:100]} in {held[extra[0]][0]}; "
            "the shard is another model's or config.json is",
        )
    report.add_first("tensors", "FAIL", wrong)
    if not missing and not extra and not wrong:
        present = sum(name in held for name in ignored)
        says = f"{len(held):,} names and shapes, as config.json asks; {present} stored inv_freq are ignored and recomputed"
        report.add("tensors", "ok", says)


def _check_dtypes(report: Report, config: KimiVLConfig, held: dict[str, tuple[str, Stored]]) -> None:
    asked = DTYPES[config.torch_dtype]
    ignored = set(inv_freq_names(config))
    weights = {n: s.dtype for n, (_, s) in held.items() if n not in ignored and not n.endswith(SELECTION_BIAS)}
    biases = Counter(stored.dtype for name, (_, stored) in held.items() if name.endswith(SELECTION_BIAS))
    unread = [
        f"{name} in {held[name][0]} is stored as {dtype}; only {', '.join(DTYPES.values())} weights are read: "
        "fetch the checkpoint that is not quantised"
        for name, dtype in weights.items()
        if dtype not in DTYPES.values()
    ]
    others = Counter(dtype for dtype in weights.values() if dtype != asked and dtype in DTYPES.values())
    if report.add_first("dtypes", "FAIL", unread):
        return
    if others:
        first = next(name for name, dtype in weights.items() if dtype in others)
        says = f"config.json says {asked}, but {sum(others.values())} weights are {', '.join(others)}, the first is {first}; "
        report.add("dtypes", "warn", says + "they are cast on loading, and cannot be used in place")
    else:
        report.add("dtypes", "ok", f"weights are {asked} as config.json says")
    rounded = [dtype for dtype in biases if dtype in ("BF16", "F16")]
    says = f"selection biases are {' and '.join(biases) or 'none'} on disk and float32 in use"
    report.add("dtypes", "note" if rounded else "ok", says + (": near ties may differ from training" if rounded else ""))
