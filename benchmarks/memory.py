"""How the memory of a recording grows with the tokens of a run: a table and benchmarks/recording-memory.png.

    python -m benchmarks.memory                      # 256 to 8,192 tokens of the study model, some minutes

A question about a picture is answered for as long as asked (no token stops it; what is written has no meaning), every head's
rows over the picture and all routing kept (detail="full"). Three measures: the memory of the tensors that the recorder holds,
counted exactly by their storages; the arrays of the Run made of them, exact as well; and the largest size of the process
beyond that of a process which wrote the same tokens unrecorded, each in a process of its own. The last includes the two others
at once, the work space of the rows, and what Python and the allocator add.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

TOKENS = (256, 512, 1024, 2048, 4096, 8192)
FIGURE = Path(__file__).with_name("recording-memory.png")
MEASURES = {
    "recorder": ("the recorder while it writes", "#0072B2", "o"),
    "run": ("the arrays of the run", "#E69F00", "s"),
    "process": ("the process at its largest, over one that does not record", "black", "^"),
}


def written(tokens: int, recorded: bool) -> dict[str, int]:
    """Bytes after a run of that many tokens, prompt included, in this process."""
    from kimi_vl_ref import load, reply
    from workbench import runs
    from workbench.recorder import Recorder
    from workbench.study.evaluate import messages
    from workbench.study.families import make

    net, chat = load("study")
    net.config = replace(net.config, text=replace(net.config.text, max_position_embeddings=2 * max(TOKENS)))
    chat.stop_ids = frozenset()
    asked, seen = messages(*make("sum", 3)), []

    class Watched(Recorder):
        def __init__(self, *given: Any):
            super().__init__(*given)
            seen.append(self)

    runs.Recorder = Watched  # type: ignore[misc]
    new = tokens - len(chat.prompt(asked).input_ids)
    held = {"recorder": 0, "run": 0}
    if recorded:
        *_, run = runs.record(net, chat, asked, model_name="study", max_new_tokens=new, detail="full")
        assert isinstance(run, runs.Run) and len(run.token_ids) == tokens and run.settings["heads"] == "each"
        held = {"recorder": seen[0].nbytes, "run": sum(getattr(run, name).nbytes for name in runs.ARRAYS)}
    else:
        reply(net, chat, asked, max_new_tokens=new)
    return held | {"process": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}  # KiB on Linux


def apart(tokens: int, recorded: bool) -> dict[str, int]:
    command = [sys.executable, "-m", "benchmarks.memory", "--one", str(tokens), *(["--recorded"] if recorded else [])]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().split("\n")[-1])


def line(tokens: Iterable[int], values: Iterable[int]) -> tuple[float, float, float]:
    """Bytes a token, bytes at no token, and the largest distance of a point from that line, in bytes: least squares."""
    x, y = np.asarray([*tokens], float), np.asarray([*values], float)
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(start), float(np.abs(slope * x + start - y).max())


def figure(found: dict[int, dict[str, int]]) -> Figure:
    """Measures over tokens, each with its straight line and how far the points lie from it."""
    drawn = Figure(figsize=(8, 4.6), layout="constrained")
    axes = drawn.subplots()
    for name, (what, colour, marker) in MEASURES.items():
        values = [one[name] for one in found.values()]
        slope, start, off = line(found, values)
        label = f"{what}: {slope / 1e3:.2f} kB a token, off the line by at most {off / max(values):.1%} of the largest"
        axes.plot([*found], [value / 1e6 for value in values], marker, color=colour, label=label)
        ends = np.array([0, max(found)])
        axes.plot(ends, (slope * ends + start) / 1e6, color=colour, linewidth=1)
    top = max(one[name] for one in found.values() for name in MEASURES) / 1e6
    axes.set(xlabel="tokens of the run, prompt included", ylabel="MB", xlim=(0, None), ylim=(0, 1.4 * top))  # room for names
    axes.set_xticks([*found][2:])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    title = "What recording holds grows by the same bytes for every token"
    axes.set_title(f"{title}\nstudy model: 5 layers of 6 heads, rows over 36 visual tokens", loc="left", fontsize=10)
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description="How the memory of a recording grows.")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--one", type=int, help="only a run of this many tokens, in this process")
    parser.add_argument("--recorded", action="store_true", help="with --one: record it")
    given = parser.parse_args()
    if given.one:
        print(json.dumps(written(given.one, given.recorded)))
        return
    print("| tokens | recorder, bytes | run, bytes | process, bytes |\n|---|---|---|---|")
    found: dict[int, dict[str, int]] = {}
    for tokens in given.tokens:
        plain, recorded = apart(tokens, False), apart(tokens, True)
        found[tokens] = recorded | {"process": recorded["process"] - plain["process"]}
        print(f"| {tokens} | " + " | ".join(f"{found[tokens][name]:,}" for name in MEASURES) + " |", flush=True)
    for name in MEASURES:
        values = [one[name] for one in found.values()]
        slope, start, off = line(found, values)
        share = off / max(values)
        print(f"{name}: {start:,.0f} + {slope:,.1f} bytes a token; at most {off:,.0f} off ({share:.2%} of the largest)")
    figure(found).savefig(FIGURE, dpi=120)


if __name__ == "__main__":
    main()
