"""What looking inside costs: time and peak memory of a forward pass, plain and recorded, beside what others offer; a whole
recorded answer beside the same answer; and a model that is not recorded beside one that never was.

    python -m benchmarks.recording --json benchmarks/recording.json     # prints the tables of benchmarks/README.md
    python -m benchmarks.recording --only answers off                   # some of them: forward, answers, off

Every way (`benchmarks.ways`) runs in a process of its own, which first measures a plain forward pass of the same
implementation and then alternates plain and recorded rounds: a ratio never mixes machines, moments or implementations. Peak
memory is how far the first recorded pass rose above the largest size that the process had in the plain pass before it. A way
that fails, or would need more memory or time than there is, gets a line that says so; so does a peer that is not installed.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from math import comb
from pathlib import Path
from typing import Any

from benchmarks.ways import WAYS, probabilities

ROUNDS = {512: 7, 2048: 3, 8192: 1}  # a length that is not here has 3
SECONDS = 240  # a way has at one length
SPARE = 2 << 30  # bytes of memory that a way must leave to others
FAMILIES = ("describe", "count", "sum")


# --- a forward pass ------------------------------------------------------------------------------------------------------


def measure(way: str, tokens: int, rounds: int) -> dict[str, Any]:
    """One way in this process. ms are medians of the rounds, `ratio` is the median of the rounds' ratios."""
    import torch

    spare_the_machine()
    with torch.inference_mode():
        plain, recorded = WAYS[way](tokens)
        plain()
        before, peaks = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []

        def noted() -> None:
            recorded()
            peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)

        pairs = alternate(plain, noted, rounds)
    one, other, ratio = (statistics.median(column) for column in zip(*pairs, strict=True))
    peak = max(0, peaks[0] - before) / 1024  # ru_maxrss counts KiB on Linux
    times = {"plain_ms": one, "recorded_ms": other, "ratio": ratio}
    return {"way": way, "tokens": tokens, **times, "peak_mb": peak, "rounds": rounds}


def available() -> int:
    """Bytes of memory that could be had now."""
    with open("/proc/meminfo", encoding="ascii") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))


def spare_the_machine() -> None:
    """Leaves SPARE bytes of memory to others: a process that wants more fails, and nothing else does."""
    room = available() - SPARE
    resource.setrlimit(resource.RLIMIT_DATA, (room, room))


def alternate(plain: Callable[[], Any], recorded: Callable[[], Any], rounds: int) -> list[tuple[float, float, float]]:
    """Milliseconds of each and their ratio, of rounds in which now the one and now the other goes first."""
    found = []
    for number in range(rounds):
        pair = [0.0, 0.0]
        for at in (0, 1) if number % 2 == 0 else (1, 0):
            start = time.perf_counter()
            (plain, recorded)[at]()
            pair[at] = 1000 * (time.perf_counter() - start)
        found.append((pair[0], pair[1], pair[1] / pair[0]))
    return found


def forward(lengths: list[int], rounds: int | None) -> list[dict[str, Any]]:
    print("| way | tokens | plain, ms | recorded, ms | ratio | peak memory, MB | rounds |\n|---|---|---|---|---|---|---|")
    rows = []
    for tokens in lengths:
        for way in WAYS:
            rows.append(one := apart(way, tokens, rounds or ROUNDS.get(tokens, 3)))
            figures = "{plain_ms:.0f} | {recorded_ms:.0f} | {ratio:.2f} | {peak_mb:.0f} | {rounds}"
            shown = f"not measured: {one['error']} | | | | " if "error" in one else figures.format(**one)
            print(f"| {way} | {tokens} | {shown} |", flush=True)
    return rows


def apart(way: str, tokens: int, rounds: int) -> dict[str, Any]:
    """`measure` in a process of its own, or what kept it from being measured."""
    found = in_a_process("benchmarks.recording", SECONDS, "--way", way, "--tokens", tokens, "--rounds", rounds)
    if "error" in found and (needed := probabilities(way, tokens)):
        found["error"] += f" (computed: the probabilities it keeps take {needed / 1e9:.1f} GB)"
    return {"way": way, "tokens": tokens, **found}


def in_a_process(module: str, seconds: float, *arguments: Any) -> dict[str, Any]:
    """The JSON that a module prints last, run by itself; or, as "error", what kept it from that."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, cwd=Path(__file__).parents[1])
    except subprocess.TimeoutExpired:
        return {"error": f"took longer than {seconds} s"}
    if done.returncode:
        return {"error": done.stderr.strip().split("\n")[-1][:160] if done.stderr else f"ended by signal {-done.returncode}"}
    return json.loads(done.stdout.strip().split("\n")[-1])


# --- an answer -----------------------------------------------------------------------------------------------------------


def answers(rounds: int) -> list[dict[str, Any]]:
    """Whole recorded answers of the study model beside the same answers unrecorded: rows of every generated token."""
    from kimi_vl_ref import load, reply
    from workbench.runs import record
    from workbench.study.evaluate import messages
    from workbench.study.families import make

    net, chat = load("study")
    rows, times = [], []
    for family in FAMILIES:
        asked = messages(*make(family, 3))

        def plain(asked: Any = asked) -> int:
            return len(reply(net, chat, asked).token_ids)

        def recorded(asked: Any = asked) -> int:
            *_, run = record(net, chat, asked, model_name="study")
            return len(run.token_ids)

        tokens = plain()
        recorded()
        times.append(alternate(plain, recorded, rounds))
        rows.append(generated(f"{family}, {tokens} tokens", times[-1]))
    whole = [[sum(column) for column in zip(*turn, strict=True)] for turn in zip(*times, strict=True)]  # a round of all three
    rows.append(generated("all three", [(one, other, other / one) for one, other, _ in whole]))
    print("| answer of the study model | plain, ms | recorded, ms | ratio | 95% interval | rounds |\n|---|---|---|---|---|---|")
    line = "| {what} | {plain_ms:.0f} | {recorded_ms:.0f} | {ratio:.2f} | {low:.2f} to {high:.2f} | {rounds} |"
    print(*(line.format(**row) for row in rows), sep="\n")
    return rows


def generated(what: str, pairs: list[tuple[float, float, float]]) -> dict[str, Any]:
    one, other, ratios = zip(*pairs, strict=True)
    ratio, low, high = interval(ratios)
    middle = {"plain_ms": statistics.median(one), "recorded_ms": statistics.median(other)}
    return {"what": what, **middle, "ratio": ratio, "low": low, "high": high, "rounds": len(pairs)}


def interval(values: Any) -> tuple[float, float, float]:
    """The median and an interval that holds it in at least 95% of cases whatever the distribution: two order statistics.

    The k-th smallest and k-th largest of n, with the largest k for which both miss it with a chance of at most 5%, by the
    binomial distribution. Under six values there is no such k, and it is all of them.
    """
    ordered, n = sorted(values), len(values)
    below, k = 0.0, 0  # the chance that fewer than k + 1 of n fall below the median
    while (below := below + comb(n, k) / 2**n) <= 0.025:
        k += 1
    k = max(k, 1)
    return statistics.median(ordered), ordered[k - 1], ordered[n - k]


# --- not recording -------------------------------------------------------------------------------------------------------


def off(rounds: int) -> list[dict[str, Any]]:
    """A model that was attached and left, and one inside an `attach` of nothing, beside a copy that never was; and, to show
    what noise looks like, a copy beside another copy.
    """
    import torch

    from kimi_vl_ref import load
    from workbench.tape import attach

    net, _ = load("study")
    never, left = copy.deepcopy(net), copy.deepcopy(net)
    ids = torch.randint(700, (1, 512), generator=torch.Generator().manual_seed(1))

    def prompt(model: Any) -> Any:
        return model.logits(model(ids))

    def steps(model: Any) -> Any:
        cache = model.new_cache(1)
        return torch.stack([model.logits(model(ids[:, at : at + 1], cache=cache)) for at in range(32)])

    def inside(model: Any, work: Callable[[Any], Any]) -> Any:
        with attach(model):
            return work(model)

    with torch.inference_mode():
        with attach(left, read=["decoder.**"], edit={"decoder.layers.*": lambda stream, site: stream}):
            prompt(left)
        rows = []
        for work, what in ((prompt, "a prompt of 512 tokens"), (steps, "32 single tokens")):
            others = {
                "a copy that never was": lambda work=work: work(never),
                "attached everywhere, and left": lambda work=work: work(left),
                "inside attach(model)": lambda work=work: inside(left, work),
            }
            expected = work(net)
            for name, run in others.items():
                bits = torch.equal(run(), expected)
                ratio, low, high = interval([one[2] for one in alternate(lambda work=work: work(net), run, rounds)])
                rows.append({"work": what, "what": name, "same_bits": bits, "ratio": ratio, "low": low, "high": high})
    print("| off | work | same bits | ratio | 95% interval |\n|---|---|---|---|---|")
    for row in rows:
        bits = "yes" if row["same_bits"] else "NO"
        print("| {what} | {work} | {bits} | {ratio:.3f} | {low:.3f} to {high:.3f} |".format(bits=bits, **row))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="What looking inside costs, as tables.")
    parser.add_argument("--only", nargs="+", choices=("off", "answers", "forward"), default=["off", "answers", "forward"])
    parser.add_argument("--way", help="only this way of a forward pass, in this process")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(ROUNDS))
    parser.add_argument("--rounds", type=int, help="of every way and length; default: fewer for longer texts")
    parser.add_argument("--json", help="also write the figures to this file")
    given = parser.parse_args()
    if given.way:
        print(json.dumps(measure(given.way, given.tokens[0], given.rounds or ROUNDS.get(given.tokens[0], 3))))
        return
    started = time.time()
    parts = {
        "off": lambda: off(given.rounds or 21),
        "answers": lambda: answers(given.rounds or 11),
        "forward": lambda: forward(given.tokens, given.rounds),
    }
    tables: dict[str, Any] = {}
    for name in given.only:
        tables[name] = parts[name]()
        print(flush=True)
    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    about["threads"] = os.environ.get("OMP_NUM_THREADS", about["cores"])
    for name in ("torch", "transformers", "nnsight", "transformer-lens"):
        try:
            about[name] = version(name)
        except PackageNotFoundError:
            about[name] = "not installed"
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f"; {time.time() - started:.0f} s in all")
    if given.json:
        with open(given.json, "w", encoding="utf-8") as file:
            json.dump({"about": about, **tables}, file, indent=2)
            file.write("\n")


if __name__ == "__main__":
    main()
