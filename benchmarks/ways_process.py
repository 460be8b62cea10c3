"""What `benchmarks.speed` measures a process at a time: peak memory of a long prompt, loading, and length up to 131,072.

Peak memory is the largest resident size since just before the work, less what was resident then: torch, transformers and the
weights are not in it. For loading the weights are in it, and nothing else is asked.
"""

from __future__ import annotations

import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import peers
from benchmarks.ways_speed import our_prefill, prompt, stepping
from kimi_vl_ref.chat import Inputs
from kimi_vl_ref.weights import load_checkpoint, save_checkpoint


def memory(config: str, tokens: int, way: str) -> dict[str, Any]:
    """A prompt, then 4 tokens. `peak` in bytes above the loaded model, `logits` to compare."""
    net = peers.ours(config)
    ids = prompt(net, 1, tokens + 4)
    theirs = peers.Theirs(net) if way != "ours" else None
    peers.forget_peak()
    before, start = peers.resident("VmRSS"), time.perf_counter()
    if theirs is None:
        cache = net.new_cache(1)
        our_prefill(net, Inputs(ids[:, :tokens], torch.tensor([tokens]), None, None, []), cache)
        for at in range(tokens, tokens + 4):
            logits = net.logits(net(ids[:, at : at + 1], cache=cache)[:, -1])
    else:
        logits, their_cache = theirs.forward("grouped_mm", ids[:, :tokens])
        for at in range(tokens, tokens + 4):
            logits, their_cache = theirs.forward("grouped_mm", ids[:, at : at + 1], past_key_values=their_cache)
    seconds = time.perf_counter() - start
    return {"peak": peers.resident("VmHWM") - before, "seconds": seconds, "output": logits[0].tolist()}


def written(config: str, folder: Path) -> int:
    """Two checkpoints of the same weights in float32, ours and transformers', each in some 8 shards; bytes of the weights."""
    net = peers.ours(config)
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    save_checkpoint(net, folder / "ours", max_shard_bytes=size // 7)
    peers.Theirs(net).whole.save_pretrained(folder / "theirs", max_shard_size=size // 7)
    return size


def loading(folder: str, way: str) -> dict[str, Any]:
    """`peak` in bytes above the empty process, which has imported what loads; `output`: the sum of some weights."""
    if way == "ours":

        def load() -> Any:
            return load_checkpoint(Path(folder) / "ours", dtype=torch.float32)
    else:
        from transformers import Kimi_K25ForConditionalGeneration

        def load() -> Any:
            return Kimi_K25ForConditionalGeneration.from_pretrained(
                str(Path(folder) / "theirs"), dtype=torch.float32, local_files_only=True
            )

    torch.zeros(1).sum()
    peers.forget_peak()
    before, start = peers.resident("VmRSS"), time.perf_counter()
    model = load()
    # a mapped file is read when it is first used
    total = sum(float(p.double().sum()) for p in model.parameters())
    seconds = time.perf_counter() - start
    return {"peak": peers.resident("VmHWM") - before, "seconds": seconds, "output": [total]}


def long(config: str, context: int, rounds: int) -> dict[str, Any]:
    """Ours alone: milliseconds of one step at that context (median), and the bytes its cache holds of a token and layer."""
    contest, times = stepping(config, [context], steps=1), []
    make_ready, work = contest.ours
    with torch.inference_mode():
        for _ in range(rounds + 1):
            cache = make_ready()
            start = time.perf_counter()
            work(cache)
            times.append(1000 * (time.perf_counter() - start))
    latent, key = cache.read(0)
    return {"context": context, "ms": statistics.median(times[1:]), "numbers": latent.shape[-1] + key.shape[-1]}


def one(work: str, config: str, size: int, way: str, folder: str, rounds: int) -> str:
    if work == "long":
        return json.dumps(long(config, size, rounds))
    with torch.inference_mode():
        return json.dumps(memory(config, size, way) if work == "memory" else loading(folder, way))
