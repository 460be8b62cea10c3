"""How a checkpoint is loaded so that it fits this computer: whole or in few bits on a GPU, in memory, or left on the disk.

    fit = choose_fit("path/to/Kimi-VL-A3B-Instruct")
    print(fit.says)
    model, chat = load("path/to/Kimi-VL-A3B-Instruct", fit=fit)       # or fit="auto"
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch

from .config import KimiVLConfig
from .mapped import map_checkpoint, widen
from .model import KimiVL
from .quantise import quantise, quantised_bytes
from .sizes import cache_bytes_a_token, parameters
from .weights import load_checkpoint, read_config

WAYS = ("auto", "whole", "int8", "int4", "mapped")
WORKING = 2_000_000_000  # bytes kept free for what a forward pass makes: a chunk of 4,096 tokens, one large picture
CONTEXT = 8192  # tokens whose cache must fit as well


@dataclass(frozen=True)
class Room:
    """What is free, in bytes: `gpu` is None without one. `name`: of the GPU."""

    ram: int
    gpu: int | None = None
    name: str = ""


@dataclass(frozen=True)
class Fit:
    """One way to load, and a sentence that says what it is and why."""

    device: str
    dtype: torch.dtype
    bits: int | None  # None: as stored
    mapped: bool
    says: str
    compute: torch.dtype | None = None  # None: in `dtype`


def room() -> Room:
    """What this computer has free now, limits of a container counted."""
    if not torch.cuda.is_available():
        return Room(free_memory())
    return Room(free_memory(), torch.cuda.mem_get_info()[0], torch.cuda.get_device_name())


def free_memory() -> int:
    """Bytes that a process may still take, without driving others to swap."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):  # another system than Linux tells only what is built in
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        return free if limit == "max" else min(free, int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        return free


@cache
def slow_at(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies float32 more than twice as fast, as one without instructions for `dtype` does.

    Timed once a process, in milliseconds; without them a large product is fifty times as slow.
    """
    least = {}
    for one, rounds in ((dtype, 3), (torch.float32, 9)):  # the fast one again and again, for others may be using the processor
        square, times = torch.ones(256, 256, dtype=one), []
        for _ in range(rounds):
            began = time.perf_counter()
            torch.mm(square, square)
            times.append(time.perf_counter() - began)
        least[one] = min(times[1:])  # the first may set things up
    return least[dtype] > 2 * least[torch.float32]


def whole_bytes(config: KimiVLConfig, dtype: torch.dtype) -> int:
    return parameters(config) * dtype.itemsize


def needed(config: KimiVLConfig, weights: int, dtype: torch.dtype) -> int:
    """Weights and what a run needs beside them, in bytes."""
    tokens = min(CONTEXT, config.text.max_position_embeddings)
    return weights + min(WORKING, weights) + tokens * cache_bytes_a_token(config.text, dtype.itemsize)


def choose_fit(folder: str | Path, way: str = "auto", *, free: Room | None = None) -> Fit:
    """The first way that fits: as stored on a GPU, 8 bits there, 4 bits there, as stored in memory, mapped from disk.

    A processor that is slow at the stored dtype computes in float32; weights that are not to be in few bits then stay mapped
    whatever fits (what is read stays in memory as long as there is room). way: "auto", or one of WAYS to have it so whatever
    fits. free: what is to be counted with, measured unless given. Raises ValueError for an unknown way, CheckpointError or
    ConfigError for the folder.
    """
    if way not in WAYS:
        raise ValueError(f"the way {way!r} to fit a model is not known; choose one of {', '.join(WAYS)}")
    config = read_config(Path(folder))
    fit = _first(config, way, room() if free is None else free)
    if fit.device != "cpu" or way == "whole" or not slow_at(fit.dtype):
        return fit
    says = f"{fit.says}; computed in float32, since this processor is slow at {config.torch_dtype}"
    return replace(fit, mapped=fit.bits is None, compute=torch.float32, says=says)


def _first(config: KimiVLConfig, way: str, free: Room) -> Fit:
    dtype = getattr(torch, config.torch_dtype)
    stored = config.torch_dtype
    whole = whole_bytes(config, dtype)
    device = "cpu" if free.gpu is None else "cuda"
    if way != "auto":
        bits = {"int8": 8, "int4": 4}.get(way)
        device = "cpu" if way == "mapped" else device
        size = whole
        if bits is not None:
            rest = torch.float32 if device == "cpu" and slow_at(dtype) else dtype  # what stays out of the bits
            size = quantised_bytes(config, bits, rest.itemsize)
        return Fit(device, dtype, bits, way == "mapped", f"{way} on {device}, as asked: {_gb(size)} of weights")
    if free.gpu is not None:
        if needed(config, whole, dtype) <= free.gpu:
            return Fit("cuda", dtype, None, False, f"{stored} on {free.name}: {_gb(whole)} of weights, {_gb(free.gpu)} free")
        for bits in (8, 4):
            size = quantised_bytes(config, bits, dtype.itemsize)
            if needed(config, size, dtype) <= free.gpu:
                why = f"{stored} would take {_gb(needed(config, whole, dtype))} and {_gb(free.gpu)} are free"
                return Fit("cuda", dtype, bits, False, f"{bits} bits on {free.name}: {_gb(size)} of weights, since {why}")
    gpu = "no GPU" if free.gpu is None else f"too little room on {free.name} ({_gb(free.gpu)})"
    if needed(config, whole, dtype) <= free.ram:
        says = f"{stored} in the memory of this computer: {_gb(whole)} of weights, {_gb(free.ram)} free, and {gpu}"
        return Fit("cpu", dtype, None, False, says)
    says = f"mapped from disk, so each token reads what it needs there and is slow: {_gb(whole)} of weights, {_gb(free.ram)} of"
    return Fit("cpu", dtype, None, True, f"{says} memory free, and {gpu}")


def load_fitted(folder: str | Path, fit: Fit) -> KimiVL:
    """The model as `fit` says."""
    if fit.bits is None and not fit.mapped:
        return load_checkpoint(folder, fit.device, fit.dtype)
    model = map_checkpoint(folder, fit.dtype)
    if fit.compute is not None:
        widen(model, fit.compute)  # before the bits: what goes into them is not made wide
    return model if fit.bits is None else quantise(model, fit.bits, fit.device)


def _gb(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
