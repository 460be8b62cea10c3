"""Kimi-VL-A3B sizes in bfloat16 on one GPU: shares of what the device can do, measured first, and ratios to transformers.

    python -m benchmarks.gpu --json gpu.json                   # random weights of the released sizes, made on the device
    python -m benchmarks.gpu --no-graph --only rates decode    # the eager step; some of the rows
    python -m benchmarks.gpu --small --device cpu              # the whole script on a small model, to see that it runs

Rows: rates, decode, prefill, vision, packed (pictures of many sizes), long, recording. A share is the least time that the bytes
or the arithmetic of the work take at the measured rate, over the time that it took. The graph's outputs are compared with the
eager step's before anything is timed, transformers' with ours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import peers, ways_speed
from benchmarks.graphs import FixedStep
from benchmarks.varlen import VarlenCore
from benchmarks.ways_speed import active_weights, prompt, swapped
from kimi_vl_ref import KIMI_VL_A3B, KimiVL
from kimi_vl_ref.chat import Inputs
from kimi_vl_ref.generate import prefill as our_prefill
from kimi_vl_ref.weights import empty_model

ROUNDS = 7
CLOSE = 0.05  # of the largest logit, in bfloat16: another order of sums, and near-tied experts; the share beyond is printed
SIZES = {"decode": (1024, 32768, 131072), "prefill": 8192, "vision": 128, "long": 131072, "matrix": 8192, "copy": 1 << 30}
SIZES["packed"] = ways_speed.MIXED
SMALL = {"decode": (64, 128), "prefill": 96, "vision": 8, "long": 160, "matrix": 128, "copy": 1 << 16}
SMALL["packed"] = ways_speed.SMALL


class Bench:
    def __init__(self, device: str, small: bool, graph: bool, rounds: int):
        self.device, self.graph, self.rounds = torch.device(device), graph, rounds
        self.dtype = torch.float32 if small else torch.bfloat16
        self.sizes: dict[str, Any] = SMALL if small else SIZES
        self.net = random_model(peers.config("tiny") if small else KIMI_VL_A3B, self.device, self.dtype)
        self.rows: list[dict[str, Any]] = []
        self.copy_rate, self.matrix_rate = self.rates()
        self._theirs: peers.Theirs | None = None

    @property
    def theirs(self) -> peers.Theirs:
        if self._theirs is None:
            before = torch.get_default_dtype()
            torch.set_default_dtype(self.dtype)
            try:
                with self.device:  # built where it runs; its weights are then ours
                    self._theirs = peers.Theirs(self.net)
            finally:
                torch.set_default_dtype(before)
        return self._theirs

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def times(self, ready: Callable[[], Any] = lambda: None, **works: Callable[[], Any]) -> dict[str, float]:
        """Median milliseconds of works that take turns, each run once before; `ready` goes before each, untimed."""
        found: dict[str, list[float]] = {name: [] for name in works}
        for number in range(-1, self.rounds):
            for name, work in works.items():
                ready()
                self.wait()
                start = time.perf_counter()
                work()
                self.wait()
                if number >= 0:
                    found[name].append(1000 * (time.perf_counter() - start))
        return {name: statistics.median(all_) for name, all_ in found.items()}

    def rates(self) -> tuple[float, float]:
        """Bytes a second of a copy, read and written; operations a second of one large matrix product."""
        side, source = self.sizes["matrix"], torch.zeros(self.sizes["copy"], dtype=torch.uint8, device=self.device)
        target, a = torch.empty_like(source), torch.randn(side, side, device=self.device).to(self.dtype)
        found = self.times(copy=lambda: target.copy_(source), matrix=lambda: a @ a)
        rates = 2000 * len(source) / found["copy"], 2000 * side**3 / found["matrix"]
        self.note("rates", "copy", {"ms": found["copy"], "GB/s": rates[0] / 1e9})
        self.note("rates", "matrix product", {"ms": found["matrix"], "TFLOP/s": rates[1] / 1e12})
        return rates

    def note(self, work: str, what: str, figures: dict[str, Any]) -> None:
        self.rows.append({"work": work, "what": what, **figures})
        shown = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
        print(f"| {work} | {what} | {shown} |", flush=True)

    def decode(self) -> None:
        for context in self.sizes["decode"]:
            self.decode_at(context)

    def decode_at(self, context: int) -> None:
        steps = 4
        planted, ids = peers.Planted(self.net, [context], steps), prompt(self.net, 1, steps).to(self.device)
        eager, fixed_cache = planted.ours(), planted.ours()
        fixed = FixedStep(self.net, fixed_cache, context + steps) if self.graph else None

        def our_step(at: int) -> Tensor:
            return self.net.logits(self.net(ids[:, at : at + 1], cache=eager)[:, -1])

        def ours() -> Tensor:
            eager.lengths, eager.filled = planted.lengths, context
            return torch.stack([our_step(at) for at in range(steps)])

        def graphed() -> Tensor:
            assert fixed is not None
            fixed.rewind()
            return torch.stack([fixed(ids[:, at : at + 1]).clone() for at in range(steps)])

        given: list[Any] = []

        def plant_theirs() -> None:  # their cache cannot be wound back as ours can
            given[:] = [planted.theirs()]

        def transformers() -> Tensor:
            cache, found = given.pop(), []
            for at in range(steps):
                logits, cache = self.theirs.forward("grouped_mm", ids[:, at : at + 1], past_key_values=cache)
                found.append(logits)
            return torch.stack(found)

        expected = ours()
        works: dict[str, Callable[[], Any]] = {"eager": ours, "transformers": transformers}
        if fixed is not None:
            works["graph"] = graphed
        plant_theirs()
        gaps = {name: gap(work(), expected) for name, work in works.items()}
        found = {name: ms / steps for name, ms in self.times(plant_theirs, **works).items()}
        text = self.net.config.text
        numbers = active_weights(self.net) + self.net.logits.weight.numel()
        numbers += context * (text.kv_lora_rank + text.qk_rope_head_dim) * text.num_hidden_layers
        least = 1000 * numbers * self.net.logits.weight.element_size() / self.copy_rate
        best = min(found.get("graph", found["eager"]), found["eager"])
        figures = {f"{name} ms": ms for name, ms in found.items()} | {f"{name} gap": one for name, one in gaps.items()}
        figures |= {"least ms": least, "share of the copy rate": least / best, "x transformers": found["transformers"] / best}
        self.note("decode", f"a token at context {context:,}", figures)

    def prefill(self) -> None:
        tokens = self.sizes["prefill"]
        ids = prompt(self.net, 1, tokens).to(self.device)
        inputs = Inputs(ids, torch.tensor([tokens], device=self.device), None, None, [])

        def ours() -> Tensor:
            return self.net.logits(our_prefill(self.net, inputs, self.net.new_cache(1), chunk=tokens))

        def transformers() -> Tensor:
            return self.theirs.forward("grouped_mm", ids)[0]

        apart = gap(transformers(), ours())
        found = self.times(ours=ours, transformers=transformers)
        text = self.net.config.text
        pairs = tokens * (tokens + 1) * text.num_attention_heads * (text.qk_head_dim + text.v_head_dim) * text.num_hidden_layers
        least = 1000 * (2 * active_weights(self.net) * tokens + pairs) / self.matrix_rate
        figures = {"ours ms": found["ours"], "transformers ms": found["transformers"], "gap": apart}
        figures |= {"share of the matrix rate": least / found["ours"], "x transformers": found["transformers"] / found["ours"]}
        self.note("prefill", f"{tokens:,} tokens", figures)

    def vision(self) -> None:
        side, sizes = self.sizes["vision"], self.net.config.vision
        hws, patches = torch.tensor([[side, side]]), side * side
        pixels = torch.randn(patches, 3, sizes.patch_size, sizes.patch_size, device=self.device).to(self.dtype)
        apart = gap(self.theirs.see(pixels, hws.to(self.device)), self.net.see(pixels, hws))
        found = self.times(
            ours=lambda: self.net.see(pixels, hws), transformers=lambda: self.theirs.see(pixels, hws.to(self.device))
        )
        weights = sum(p.numel() for p in self.net.vision.layers.parameters())
        flops = 2 * weights * patches + 4 * patches**2 * sizes.hidden_size * sizes.num_hidden_layers
        least = 1000 * flops / self.matrix_rate
        figures = {"ours ms": found["ours"], "transformers ms": found["transformers"], "gap": apart}
        figures |= {"share of the matrix rate": least / found["ours"], "x transformers": found["transformers"] / found["ours"]}
        self.note("vision", f"a picture of {patches:,} patches", figures)

    def packed(self) -> None:
        """Pictures of several sizes at once: a call for each size, on a GPU one call for all, and transformers."""
        grids = self.sizes["packed"]
        patch, hws = self.net.config.vision.patch_size, torch.tensor(grids)
        pixels = torch.randn(int(hws.prod(1).sum()), 3, patch, patch, device=self.device).to(self.dtype)

        def varlen() -> Tensor:
            with swapped(self.net, VarlenCore()):
                return self.net.see(pixels, hws)

        works: dict[str, Callable[[], Tensor]] = {"ours": lambda: self.net.see(pixels, hws)}
        works["transformers"] = lambda: self.theirs.see(pixels, hws.to(self.device))
        if self.device.type == "cuda":
            works["varlen"] = varlen
        expected = works["ours"]()
        figures = {f"{name} gap": gap(work(), expected) for name, work in works.items() if name != "ours"}
        figures |= {f"{name} ms": ms for name, ms in self.times(**works).items()}
        self.note("packed", f"{len(grids)} pictures of {len(pixels):,} patches", figures)

    def long(self) -> None:
        new = min(256, self.sizes["long"] // 2)
        tokens = self.sizes["long"] - new
        ids = prompt(self.net, 1, tokens + new).to(self.device)
        inputs = Inputs(ids[:, :tokens], torch.tensor([tokens], device=self.device), None, None, [])
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.wait()
        start = time.perf_counter()
        cache = self.net.new_cache(1)
        our_prefill(self.net, inputs, cache, chunk=8192)
        self.wait()
        filled = time.perf_counter()
        for at in range(tokens, tokens + new):
            self.net.logits(self.net(ids[:, at : at + 1], cache=cache)[:, -1])
        self.wait()
        seconds = {"prefill s": filled - start, f"{new} tokens s": time.perf_counter() - filled}
        peak = torch.cuda.max_memory_allocated(self.device) / 1e9 if self.device.type == "cuda" else float("nan")
        self.note("long", f"a prompt of {tokens:,} tokens", seconds | {"cache GB": cache.nbytes / 1e9, "peak GB": peak})

    def recording(self) -> None:
        from workbench.tape import attach

        read = ["decoder.layers.*.ffn.router.chosen", "decoder.layers.*.ffn.router.weights"]
        ids = prompt(self.net, 1, self.sizes["decode"][0]).to(self.device)

        def recorded() -> None:
            with attach(self.net, read=read):
                self.net(ids)

        found = self.times(plain=lambda: self.net(ids), recorded=recorded)
        figures = {"plain ms": found["plain"], "recorded ms": found["recorded"], "ratio": found["recorded"] / found["plain"]}
        self.note("recording", f"routing of {ids.shape[1]:,} tokens", figures)


def gap(output: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest output. Raises ValueError when it is none that rounding makes."""
    found = float((output.float() - expected.float()).abs().max() / expected.float().abs().max())
    limit = CLOSE if expected.dtype == torch.bfloat16 else 2e-4
    if not found <= limit:
        raise ValueError(f"two ways differ by {found:.1e} of the largest output, more than {limit:g}; nothing is timed")
    return found


def random_model(config: Any, device: torch.device, dtype: torch.dtype) -> KimiVL:
    """Weights made on the device: matrices of variance 1 over their inputs, so that the stream keeps its size; norms of 1."""
    model = empty_model(replace(config), device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.ndim < 2:
            tensor.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            inputs = tensor.shape[-1] if "positions" in name or tensor.ndim == 3 else tensor[0].numel()
            tensor.normal_(std=1.0 if name == "embedded.weight" else inputs**-0.5, generator=generator)
    return model


ROWS = ("decode", "prefill", "vision", "packed", "long", "recording")


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    parser = argparse.ArgumentParser(description="Kimi-VL-A3B sizes on a GPU.")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="a small model in float32 and short lengths")
    parser.add_argument("--no-graph", action="store_true", help="only the eager decode step")
    parser.add_argument("--only", nargs="+", choices=("rates", *ROWS), default=list(ROWS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    if given.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU that torch can use; run it on a machine with one, or with --small --device cpu")
    print("| work | what | figures |\n|---|---|---|")
    with torch.inference_mode():
        bench = Bench(given.device, given.small, not given.no_graph, given.rounds)
        for row in ROWS:
            if row in given.only:
                getattr(bench, row)()
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU"
    about = {"device": name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "small": given.small}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    if given.json:
        given.json.write_text(json.dumps({"about": about, "rows": bench.rows}, indent=2) + "\n", encoding="utf-8")
    return bench.rows


if __name__ == "__main__":
    main()
