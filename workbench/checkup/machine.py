"""What this computer can do with a checkpoint: what fits, how fast a token can be at best, how long a context may grow."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from kimi_vl_ref.config import KimiVLConfig
from kimi_vl_ref.fit import WORKING, choose_fit, needed, room, whole_bytes
from kimi_vl_ref.quantise import quantised_bytes
from kimi_vl_ref.sizes import active, cache_bytes_a_token

from .findings import Report, of

READ = 256 << 20  # bytes; far more than any cache of a processor


def check_machine(report: Report, folder: Path, config: KimiVLConfig) -> None:
    free, dtype = room(), getattr(torch, config.torch_dtype)
    sizes = {
        config.torch_dtype: whole_bytes(config, dtype),
        "int8": quantised_bytes(config, 8, dtype.itemsize),
        "int4": quantised_bytes(config, 4, dtype.itemsize),
    }

    def amount(number: int) -> str:
        return of(number) if sizes[config.torch_dtype] >= 1e9 else of(number, "MB")

    gpu = "no GPU" if free.gpu is None else f"{free.name} with {of(free.gpu)} free"
    weights = ", ".join(f"{name} {amount(size)}" for name, size in sizes.items())
    report.add("memory", "ok", f"weights: {weights}; {of(free.ram)} of memory free, {gpu}")
    fit = choose_fit(folder, free=free)
    squeezed = fit.mapped and needed(config, whole_bytes(config, dtype), dtype) > free.ram
    report.add("fit", "warn" if squeezed else "ok", fit.says)
    held = sizes[config.torch_dtype if fit.bits is None else f"int{fit.bits}"]
    cache = cache_bytes_a_token(config.text, dtype.itemsize)
    if squeezed:
        report.add("speed", "note", "bound by the disk, and by how many experts stay in memory; no estimate")
        held = 0  # pages that the system drops when it needs them
    else:
        rate = bandwidth(fit.device)
        read = active(config.text) * held / whole_bytes(config, dtype) * dtype.itemsize
        at = [f"{rate / (read + tokens * cache):,.0f} at {tokens:,}" for tokens in (1024, 32768) if tokens <= _context(config)]
        says = f"at most {' and '.join(at)} tokens of context: {of(rate)}/s measured, {amount(int(read))} of weights a token"
        more = ", more for making them dense" if fit.bits or fit.compute else ""
        report.add("speed", "ok", f"tokens a second {says}{more}")
    spare = (free.ram if fit.device == "cpu" or free.gpu is None else free.gpu) - held - min(WORKING, max(held, 1))
    longest = max(0, min(_context(config), spare // cache))
    state = "ok" if longest == _context(config) else "warn"
    report.add("context", state, f"{longest:,} of {_context(config):,} tokens fit, {cache:,} bytes a token")


def _context(config: KimiVLConfig) -> int:
    return config.text.max_position_embeddings


def bandwidth(device: str) -> float:
    """Bytes a second that a product of a matrix and a vector reads, which is what writing a token does; about 0.3 s."""
    matrix = torch.zeros(READ // (4 * 4096), 4096, device=device)
    vector = torch.zeros(4096, device=device)
    best = float("inf")
    for _ in range(5):
        _wait(device)
        start = time.perf_counter()
        torch.mv(matrix, vector)
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return READ / best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
