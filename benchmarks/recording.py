"""What looking inside costs: time and peak memory of a forward pass, plain and recorded, beside what others offer.

    python -m benchmarks.recording --json benchmarks/recording.json     # prints the tables of benchmarks/README.md

Every way runs in a process of its own, which first measures a plain forward pass of the same implementation and then
alternates plain and recorded rounds: a ratio never mixes machines, moments or implementations. Peak memory is how far the
recorded pass rose above the largest size that the process had in the plain pass before it. The sizes are those of a small
DeepSeek-V3: hidden 512, 4 layers, 8 heads of 128 + 64 / 128, latent 512, 16 experts of which 4, float32. A peer that is not
installed is left out by name.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

LENGTHS = (512, 2048, 8192)
ROUNDS = 7
Way = tuple[Callable[[], Any], Callable[[], Any]]  # plain, recorded


@dataclass(frozen=True)
class Measured:
    way: str
    tokens: int
    plain_ms: float
    recorded_ms: float
    ratio: float  # median of the rounds' ratios
    peak_mb: float  # of the recorded passes, above the process before them


def model(context: int) -> Any:
    import torch

    from kimi_vl_ref import TINY, KimiVL

    text = replace(
        TINY.text,
        vocab_size=2048,
        hidden_size=512,
        num_hidden_layers=4,
        num_attention_heads=8,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        intermediate_size=1408,
        moe_intermediate_size=352,
        n_routed_experts=16,
        num_experts_per_tok=4,
        max_position_embeddings=context + 64,
    )
    torch.manual_seed(0)
    return KimiVL(replace(TINY, text=text, media_placeholder_token_id=2047)).eval().requires_grad_(False)


def prompt(tokens: int) -> Any:
    import torch

    return torch.randint(2000, (1, tokens), generator=torch.Generator().manual_seed(1))


def ours(read: list[str], keep: Callable[..., Any] | None = None) -> Callable[[int], Way]:
    def prepare(tokens: int) -> Way:
        from workbench.tape import attach

        net, ids = model(tokens), prompt(tokens)

        def recorded() -> Any:
            with attach(net, read=read, keep=keep) as tape:
                net(ids)
            return tape

        return lambda: net(ids), recorded

    return prepare


def last_rows(inputs: Any, _site: str) -> Any:
    """Attention rows of the last 64 queries over every key: what a recorded answer of 64 tokens needs."""
    from workbench.rows import decoder_rows

    count = inputs[0].shape[1]
    return decoder_rows(inputs, slice(count - 64, count))


def theirs(tokens: int) -> Any:
    """transformers' DeepSeek-V3 decoder with our weights, at its best: grouped experts and SDPA."""
    from workbench.released import as_transformers

    decoder = as_transformers_square(model(tokens), as_transformers).model.language_model
    decoder.config._attn_implementation, decoder.config._experts_implementation = "sdpa", "grouped_mm"
    return decoder


def as_transformers_square(net: Any, convert: Callable[[Any], Any]) -> Any:
    """The tiny MoonViT's position table is not square and transformers' is; the decoder does not use it."""
    import torch

    vision = replace(net.config.vision, init_pos_emb_width=net.config.vision.init_pos_emb_height)
    net.config = replace(net.config, vision=vision)
    table = net.vision.positions.weight
    net.vision.positions.weight = torch.nn.Parameter(table[:, : table.shape[0]].clone(), requires_grad=False)
    return convert(net)


def output_attentions(tokens: int) -> Way:
    decoder, ids = theirs(tokens), prompt(tokens)

    def recorded() -> Any:
        decoder.set_attn_implementation("eager")  # the only one that returns them
        try:
            out = decoder(ids, use_cache=False, output_attentions=True)
            assert len(out.attentions) == 4
            return out
        finally:
            decoder.set_attn_implementation("sdpa")

    return lambda: decoder(ids, use_cache=False), recorded


def nnsight_router(tokens: int) -> Way:
    from nnsight import NNsight  # type: ignore[import-not-found]

    decoder, ids = theirs(tokens), prompt(tokens)
    traced = NNsight(decoder)

    def recorded() -> Any:
        saved: list[Any] = []
        with traced.trace(ids, use_cache=False):
            for layer in traced.layers[1:]:
                saved.append(layer.mlp.gate.output.save())
        assert len(saved) == 3
        return saved

    return lambda: decoder(ids, use_cache=False), recorded


def lens_bridge(tokens: int) -> Way:
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        lens_checkpoint(tokens, folder)
        bridge, ids = TransformerBridge.boot_transformers(folder), prompt(tokens)

    def wanted(name: str) -> bool:
        return name.endswith(("hook_pattern", "gate.hook_out"))

    return lambda: bridge(ids), lambda: bridge.run_with_cache(ids, names_filter=wanted)


def lens_checkpoint(tokens: int, folder: str) -> None:
    """The bridge loads a causal language model by its folder, and wants a tokenizer there even if it is never asked."""
    from tokenizers import Tokenizer, models  # type: ignore[import-not-found]
    from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    inner = theirs(tokens)
    inner.config.architectures = ["DeepseekV3ForCausalLM"]
    whole = DeepseekV3ForCausalLM(inner.config).eval().requires_grad_(False)
    whole.model = inner
    whole.save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        **dict.fromkeys(("pad_token", "eos_token", "bos_token", "unk_token"), "<unk>"),
    )
    words.save_pretrained(folder)


WAYS: dict[str, Callable[[int], Way]] = {
    "ours, attached to nothing": lambda tokens: (lambda w: (w[0], w[0]))(ours([])(tokens)),
    "ours, routing of all tokens": ours(["decoder.layers.*.ffn.router.chosen", "decoder.layers.*.ffn.router.weights"]),
    "ours, rows of the last 64 tokens": ours(["decoder.layers.*.attn.core@in"], last_rows),
    "transformers, output_attentions=True": output_attentions,
    "nnsight, router outputs": nnsight_router,
    "TransformerLens bridge, patterns and routers": lens_bridge,
}


def measure(way: str, tokens: int, rounds: int) -> Measured:
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    with torch.inference_mode():
        plain, recorded = WAYS[way](tokens)
        plain()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        recorded()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        times = alternate(plain, recorded, rounds)
    return Measured(way, tokens, *times, max(0, peak - before) / 1024)  # ru_maxrss counts KiB on Linux


def alternate(plain: Callable[[], Any], recorded: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Milliseconds of each and their ratio, medians of rounds in which now the one and now the other goes first."""
    times: list[list[float]] = []
    for number in range(rounds):
        pair = [0.0, 0.0]
        for at in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (plain, recorded)[at]()
            pair[at] = 1000 * (time.perf_counter() - start)
        times.append([*pair, pair[1] / pair[0]])
    one, other, ratio = (statistics.median(column) for column in zip(*times, strict=True))
    return one, other, ratio


def generation(rounds: int) -> list[dict[str, Any]]:
    """A whole recorded answer of the study model beside the same answer unrecorded: rows of every generated token."""
    import torch

    from kimi_vl_ref import load, reply
    from workbench.runs import record
    from workbench.study.evaluate import messages
    from workbench.study.families import make

    torch.set_num_threads(os.cpu_count() or 1)
    net, chat = load("study")
    asked = [messages(*make(family, 3)) for family in ("describe", "count", "sum")]

    def plain() -> int:
        return sum(len(reply(net, chat, one).token_ids) for one in asked)

    def recorded() -> int:
        return sum(len([*record(net, chat, one, model_name="study")][-1].token_ids) for one in asked)  # type: ignore[union-attr]

    plain(), recorded()
    one, other, ratio = alternate(plain, recorded, rounds)
    return [{"what": "study model, three answers", "plain_ms": one, "recorded_ms": other, "ratio": ratio}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--way", help="only this way (in this process)")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(asdict(measure(given.way, given.tokens[0], given.rounds))))
        return
    rows: list[dict[str, Any]] = []
    print("| way | tokens | plain, ms | recorded, ms | ratio | peak memory, MB |\n|---|---|---|---|---|---|")
    for way in WAYS:
        for tokens in given.tokens:
            command = [sys.executable, "-m", "benchmarks.recording", "--way", way, "--tokens", str(tokens)]
            done = subprocess.run([*command, "--rounds", str(given.rounds)], capture_output=True, text=True)
            if done.returncode:
                last = done.stderr.strip().split("\n")[-1][:160] if done.stderr else f"ended by signal {-done.returncode}"
                print(f"| {way} | {tokens} | not measured: {last} | | | |", flush=True)
                rows.append({"way": way, "tokens": tokens, "error": last})
                continue
            one = json.loads(done.stdout.strip().split("\n")[-1])
            rows.append(one)
            figures = f"{one['plain_ms']:.0f} | {one['recorded_ms']:.0f} | {one['ratio']:.2f} | {one['peak_mb']:.0f}"
            print(f"| {way} | {tokens} | {figures} |", flush=True)
    whole = generation(given.rounds)
    print("\n| generation | plain, ms | recorded, ms | ratio |\n|---|---|---|---|")
    for one in whole:
        print(f"| {one['what']} | {one['plain_ms']:.0f} | {one['recorded_ms']:.0f} | {one['ratio']:.2f} |")
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    for name in ("torch", "transformers", "nnsight", "transformer-lens"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = "not installed"
    print("\n" + ", ".join(f"{key} {value}" for key, value in about.items()))
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, "forward": rows, "generation": whole}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
