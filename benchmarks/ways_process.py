"""What `benchmarks.speed` measures a process at a time: peak memory of a long prompt, loading, and length up to 131,072.

Peak memory is the largest resident size since just before the work, less what was resident then: torch, transformers and the
weights are not in it. For loading the weights are in it, and nothing else is asked.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks import peers
from benchmarks.ways_speed import our_prefill, prompt, stepping
from kimi_vl_ref import KimiVL
from kimi_vl_ref.chat import Inputs
from kimi_vl_ref.weights import find_shards, load_checkpoint, save_checkpoint


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
    """The same weights in float32 and some 8 shards twice: as ours, and its decoder alone under DeepSeek-V3's names, which
    are the released ones. The tower is a tiny one, to make the two nearly one size. Returns the bytes of ours.
    """
    sizes = replace(peers.ours(config).config, vision=peers.config("tiny").vision)
    torch.manual_seed(0)
    net = KimiVL(sizes).requires_grad_(False)
    size = sum(t.numel() * t.element_size() for t in net.state_dict().values())
    save_checkpoint(net, folder / "ours", max_shard_bytes=size // 7)
    (folder / "theirs").mkdir()
    for shard in find_shards(folder / "ours"):
        theirs = {n.removeprefix("language_model."): t for n, t in load_file(shard).items() if n.startswith("language_model.")}
        theirs = {name: tensor for name, tensor in theirs.items() if not name.endswith("inv_freq")}
        save_file(theirs, folder / "theirs" / shard.name, metadata={"format": "pt"})
    index = json.loads((folder / "ours" / "model.safetensors.index.json").read_text())
    names = {n.removeprefix("language_model."): file for n, file in index["weight_map"].items() if n.startswith("language_")}
    index["weight_map"] = {name: file for name, file in names.items() if not name.endswith("inv_freq")}
    (folder / "theirs" / "model.safetensors.index.json").write_text(json.dumps(index))
    text = sizes.to_dict()["text_config"] | {"architectures": ["DeepseekV3ForCausalLM"]}
    (folder / "theirs" / "config.json").write_text(json.dumps(text))
    return size


def loading(folder: str, way: str) -> dict[str, Any]:
    """`peak` in bytes above the empty process, which has imported what loads; `output`: the norm of the decoder's weights."""
    if way == "ours":

        def load() -> Any:
            return load_checkpoint(Path(folder) / "ours", dtype=torch.float32)
    else:
        from transformers import DeepseekV3ForCausalLM

        def load() -> Any:
            where = str(Path(folder) / "theirs")
            return DeepseekV3ForCausalLM.from_pretrained(where, dtype=torch.float32, local_files_only=True)

    torch.linalg.vector_norm(torch.ones(1))
    peers.forget_peak()
    before, start = peers.resident("VmRSS"), time.perf_counter()
    model = load()
    # a mapped file is read when it is first used, so use all
    norms = {name: float(torch.linalg.vector_norm(p.detach())) for name, p in model.named_parameters()}
    seconds, peak = time.perf_counter() - start, peers.resident("VmHWM") - before
    decoder = sum(norm**2 for name, norm in norms.items() if not name.startswith(("vision.", "projector.")))
    return {"peak": peak, "seconds": seconds, "output": [decoder**0.5]}


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
