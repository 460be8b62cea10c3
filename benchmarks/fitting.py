"""What fewer bits cost: the study model as it is, in bfloat16, mapped from disk, and with its decoder in 8 and 4 bits.

    python -m benchmarks.fitting --scenes 100                # prints a table of docs/reliability.md

Right answers are of the same scenes for every way. A choice is flipped where a token, in the prompt or in the answer that
the model gives as it is, is served by another set of experts. Times are of one answer, in rounds that alternate with the model
as it is; the ratio is the median of the rounds' ratios. All compute in float32 but bfloat16.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kimi_vl_ref import Chat, KimiVL, checkpoint_folder, load, load_checkpoint, reply
from kimi_vl_ref.chat import collate
from kimi_vl_ref.mapped import map_checkpoint
from kimi_vl_ref.quantise import held_bytes, quantise
from workbench.study.evaluate import ask, count_right, messages, wilson
from workbench.study.families import make
from workbench.tape import attach

FAMILIES = ("name", "count", "sum")
STUDY = checkpoint_folder("study")
WAYS: dict[str, Callable[[], KimiVL]] = {
    "float32": lambda: load_checkpoint(STUDY, dtype=torch.float32),
    "bfloat16": lambda: load_checkpoint(STUDY),
    "mapped, bfloat16": lambda: map_checkpoint(STUDY),
    "8 bits": lambda: quantise(map_checkpoint(STUDY, torch.float32), 8),
    "4 bits": lambda: quantise(map_checkpoint(STUDY, torch.float32), 4),
}


def choices(model: KimiVL, chat: Chat, given: Sequence[tuple[list[dict[str, Any]], list[int]]]) -> list[Tensor]:
    """Experts chosen, (T, K) sorted, of each layer of each conversation with its answer."""
    found = []
    for conversation, answer in given:
        prompt = chat.prompt(conversation)
        inputs = collate([prompt], pad_id=0).to(dtype=model.logits.weight.dtype)
        ids = torch.cat([inputs.input_ids, torch.tensor([answer], dtype=torch.long)], dim=1)
        with torch.inference_mode(), attach(model, ["decoder.layers.*.ffn.router.chosen"]) as tape:
            model(ids, inputs.pixel_values, inputs.image_grid_hws)
        routed = range(model.config.text.first_k_dense_replace, model.config.text.num_hidden_layers)
        found += [tape[f"decoder.layers.{i}.ffn.router.chosen"][0][0].sort(-1).values for i in routed]
    return found


def milliseconds(model: KimiVL, chat: Chat, conversation: list[dict[str, Any]]) -> float:
    start = time.perf_counter()
    reply(model, chat, conversation)
    return 1000 * (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fitting")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=list(WAYS), help="some of the ways")
    given = parser.parse_args()
    _, chat = load("study")
    whole = WAYS["float32"]()
    pairs = {family: [make(family, seed, "report") for seed in range(given.scenes)] for family in FAMILIES}
    asked = [messages(*pairs[family][at]) for family in FAMILIES for at in range(min(10, given.scenes))]
    written = [(one, reply(whole, chat, one).token_ids) for one in asked]
    plain = choices(whole, chat, written)
    shares = " | ".join(f"{family}, % right" for family in FAMILIES)
    print(f"| way | MB held | {shares} | choices flipped | time of an answer |")
    print("|---" * (4 + len(FAMILIES)) + "|")
    for name in given.only:
        model = WAYS[name]()
        with torch.inference_mode():
            right = {family: count_right(pairs[family], ask(model, chat, pairs[family])) for family in FAMILIES}
        other = choices(model, chat, written)
        flipped = sum(int((a != b).any(-1).sum()) for a, b in zip(plain, other, strict=True))
        total = sum(len(a) for a in plain)
        ratios = [milliseconds(model, chat, asked[0]) / milliseconds(whole, chat, asked[0]) for _ in range(given.rounds)]
        shares = [f"{100 * n / given.scenes:.0f} ({_interval(n, given.scenes)})" for n in right.values()]
        cells = [name, f"{held_bytes(model) / 1e6:.1f}", *shares, f"{flipped} of {total}", f"{statistics.median(ratios):.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)


def _interval(right: int, scenes: int) -> str:
    low, high = wilson(right, scenes)
    return f"{100 * low:.0f} to {100 * high:.0f}"


if __name__ == "__main__":
    main()
