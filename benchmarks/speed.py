"""How fast, beside what people use: one command a kind of work, ratios of alternating rounds, outputs compared first.

    kimi-vl bench prefill            # decode, batch, vision, memory, load, long, all
    kimi-vl bench decode --config study --json decode.json
    python -m benchmarks.speed decode --sizes 128 1024 --rounds 3

Every row has a process of its own, in which ours and every peer run once, must agree, and then take turns, another one first
in each round; ms are medians, the ratio is the median of the rounds' ratios to the peer that was best. A row that fails, or
would take the last 2 GB of the machine's memory, gets a line that says so; so does a machine that was busy at the start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.recording import in_a_process, interval, spare_the_machine

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.ways_speed import Contest

SIZES = {
    "prefill": (512, 2048, 8192),
    "decode": (128, 1024, 4096, 16384),
    "batch": (8, 32),
    "vision": (1, 16),
    "memory": (16384,),
    "load": (0,),
    "long": (16384, 32768, 65536, 131072),
}
WHAT = {
    "prefill": "prompt of {} tokens",
    "decode": "a token at context {}",
    "batch": "a step of {} ragged rows",
    "vision": "{} picture(s)",
    "memory": "prompt of {} tokens, then 4",
    "load": "a checkpoint of shards",
    "long": "a token at context {}",
}
TARGETS = {"prefill": (1.5,) * 3, "decode": (3, 6, 20, 60), "batch": (2, 2), "vision": (1.2, 1.2)}
ROUNDS = 7
SECONDS = 600  # a process has
LONG = 15  # seconds
TOLERANCE = 2e-4  # of the largest output: float32 through four layers; a wrong mask or position is far beyond
FIGURE = Path(__file__).with_name("decode-length.png")


class Mismatch(ValueError):
    """Two ways whose outputs differ: their times say nothing."""


def agree(name: str, output: Tensor, expected: Tensor) -> None:
    if output.shape != expected.shape:
        raise Mismatch(f"{name} returns {tuple(output.shape)}, ours {tuple(expected.shape)}; nothing is timed")
    gap = float((output - expected).abs().max() / expected.abs().max())
    if not gap <= TOLERANCE:  # nan is no agreement
        raise Mismatch(f"{name} differs from ours by {gap:.1e} of the largest output; nothing is timed")


def race(contest: Contest, rounds: int) -> dict[str, Any]:
    """Every way once, compared; then the rounds, with the best peer and those that took at most half as long again. Where
    all of them together took more than LONG seconds: with the best alone.
    """
    import torch

    def timed(way: Any) -> tuple[float, Tensor]:
        given = way[0]()
        start = time.perf_counter()
        output = way[1](given)
        return 1000 * (time.perf_counter() - start), output

    with torch.inference_mode():
        _, expected = timed(contest.ours)
        first = {}
        for name, way in {**contest.others, **contest.aside}.items():
            first[name], output = timed(way)
            agree(name, output, expected)
            del output
        best = min(first[name] for name in contest.others)
        near = 1.5 if sum(first.values()) < 1000 * LONG else 1.0
        ways = {name: way for name, way in contest.others.items() if first[name] <= near * best}
        ways = {"ours": contest.ours, **ways, **contest.aside}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds):
            turn = number % len(ways)
            for name in [*ways][turn:] + [*ways][:turn]:
                times[name].append(timed(ways[name])[0])
    first = {name: once / contest.steps for name, once in first.items()}
    medians = {name: statistics.median(found) / contest.steps for name, found in times.items()}
    best_name = min((name for name in medians if name in contest.others), key=lambda name: medians[name])
    found = {
        "ours_ms": medians["ours"],
        "best": best_name,
        "best_ms": medians[best_name],
        "medians_ms": {**{name: once for name, once in first.items() if name not in medians}, **medians},
        "rate": 1000 * contest.amount / contest.steps / medians["ours"],
        "amount": contest.amount,
        "bound": contest.bound,
        "rounds": rounds,
    }
    found["ratio"], found["low"], found["high"] = ratio(times[best_name], times["ours"])
    for name in contest.aside:
        found["aside"] = {name: ratio(times[name], times["ours"])[0]}
    return found


def ratio(other: list[float], ours: list[float]) -> tuple[float, float, float]:
    """Median, and an interval that holds it (`benchmarks.recording.interval`)."""
    return interval([one / two for one, two in zip(other, ours, strict=True)])


def apart(*arguments: Any) -> dict[str, Any]:
    """A row in a process of its own, or what kept it from being measured."""
    return in_a_process("benchmarks.speed", SECONDS, *arguments)


def contested(work: str, config: str, sizes: list[int], rounds: int) -> list[dict[str, Any]]:
    print(f"### {work}, {config} configuration\n")
    print("| work | ours, ms | best peer, ms | ratio | 95% interval | asked | tokens or patches/s | bound |")
    print("|---|---|---|---|---|---|---|---|")
    rows = []
    for size in sizes:
        target = dict(zip(SIZES[work], TARGETS[work], strict=True)).get(size)
        found = apart(work, "--one", size, "--config", config, "--rounds", rounds)
        rows.append({"work": work, "config": config, "size": size, "target": target, **found})
        print(f"| {WHAT[work].format(f'{size:,}')} | {line(rows[-1])} |", flush=True)
    return rows


def line(row: dict[str, Any]) -> str:
    if "error" in row:
        return f"not measured: {row['error']} | | | | | | "
    asked = "" if row["target"] is None else f"{row['target']:g}"
    aside = "".join(f"; {ratio:.1f} x {name}" for name, ratio in row.get("aside", {}).items())
    figures = "{ours_ms:.1f} | {best_ms:.1f} ({best}) | {ratio:.2f}{aside} | {low:.2f} to {high:.2f} | {asked} | {rate:,.0f}"
    return figures.format(**row | {"aside": aside, "asked": asked}) + f" | {row['bound']}"


def pair(work: str, config: str, size: int, rounds: int) -> list[dict[str, Any]]:
    """Peak memory, or loading: each way in processes of its own, taking turns; medians."""
    asked = "0.7 of the peer's peak" if work == "memory" else "1.1 of the weights, the peer's time"
    print(f"### {work}, {config} configuration\n")
    print("| work | way | peak, MB | of the weights | of the peer's peak | seconds | asked |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        weights = apart("write", "--config", config, "--folder", folder) if work == "load" else {}
        turns = rounds if work == "load" else 1  # a peak hardly varies, and 16,384 tokens take a minute
        found: dict[str, list[dict[str, Any]]] = {"ours": [], "transformers": []}
        for turn in range(turns):
            for way in (*found,) if turn % 2 == 0 else (*found,)[::-1]:
                found[way].append(apart(work, "--one", size, "--config", config, "--way", way, "--folder", folder))
    rows = []
    errors = [one["error"] for ones in (*found.values(), [weights]) for one in ones if "error" in one]
    if errors:
        print(f"| {WHAT[work].format(f'{size:,}')} | not measured: {errors[0]} | | | | | |", flush=True)
        return [{"work": work, "config": config, "size": size, "error": errors[0]}]
    ours, other = ([one["output"] for one in found[way]][0] for way in found)
    gap = max(abs(a - b) for a, b in zip(ours, other, strict=True)) / max(map(abs, ours))
    if gap > TOLERANCE:
        raise Mismatch(f"transformers differs from ours by {gap:.1e} of the largest output; nothing is reported")
    peaks = {way: statistics.median(one["peak"] for one in ones) for way, ones in found.items()}
    for way, ones in found.items():
        of_weights = peaks[way] / weights["weights"] if weights else None
        row = {"work": work, "config": config, "size": size, "way": way, "peak": peaks[way], "of_weights": of_weights}
        row |= {"of_peer": peaks[way] / peaks["transformers"], "rounds": turns}
        rows.append(row | {"seconds": statistics.median(one["seconds"] for one in ones)})
        share = "" if of_weights is None else f"{of_weights:.2f}"
        figures = f"{row['peak'] / 1e6:.0f} | {share} | {row['of_peer']:.2f} | {rows[-1]['seconds']:.2f}"
        print(f"| {WHAT[work].format(f'{size:,}')} | {way} | {figures} | {asked if way == 'ours' else ''} |", flush=True)
    return rows


def lengths(config: str, sizes: list[int], rounds: int, figure: Path | None) -> list[dict[str, Any]]:
    """Ours alone, and how far from a straight line: a step and the cache over the context."""
    print(f"### long, {config} configuration\n")
    print("| context | a token, ms | ms over the line | cache, numbers a token and layer |\n|---|---|---|---|")
    found = [apart("long", "--one", size, "--config", config, "--rounds", rounds) for size in sizes]
    rows = [{"work": "long", "config": config, **one} for one in found]
    good = [row for row in rows if "error" not in row]
    slope, start = fitted([row["context"] for row in good], [row["ms"] for row in good])
    for size, row in zip(sizes, rows, strict=True):
        if "error" in row:
            print(f"| {size:,} | not measured: {row['error']} | | |")
            continue
        row["off"] = row["ms"] - (start + slope * size)
        print(f"| {size:,} | {row['ms']:.1f} | {row['off']:+.1f} | {row['numbers']} |")
    print(f"\nLine: {start:.2f} ms + {1000 * slope:.3f} ms for 1,000 tokens of context.")
    if figure is not None and len(good) > 1:
        drawn(good, slope, start).savefig(figure, dpi=120)
    return rows


def fitted(x: list[float], y: list[float]) -> tuple[float, float]:
    """Slope and start of the least-squares line; a flat one through fewer than two points."""
    if len(x) < 2:
        return 0.0, y[0] if y else 0.0
    line = statistics.linear_regression(x, y)
    return line.slope, line.intercept


def drawn(rows: list[dict[str, Any]], slope: float, start: float) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    longest = rows[-1]["context"]
    axes.plot([0, longest], [start, start + slope * longest], color="#0072B2", linewidth=1, label="straight line")
    axes.plot([row["context"] for row in rows], [row["ms"] for row in rows], "o", color="#0072B2", label="measured")
    axes.set(xlabel="tokens of context", ylabel="ms a token", xlim=(0, None), ylim=(0, None))
    axes.set_xticks([row["context"] for row in rows], [f"{row['context']:,}" for row in rows])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    title = f"One step of decoding over the length of its context ({rows[0]['config']} configuration)"
    axes.set_title(title, loc="left", fontsize=10)
    return figure


def about() -> dict[str, Any]:
    found: dict[str, Any] = {"machine": processor(), "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d")}
    found["threads"] = os.environ.get("OMP_NUM_THREADS", found["cores"])
    busy = " (busy: figures are provisional)" if os.getloadavg()[0] > 0.5 else ""
    found["load"] = f"{os.getloadavg()[0]:.1f} before{busy}"
    for name in ("torch", "transformers"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii") as file:
            return next(row.split(":")[1].strip() for row in file if row.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main(
    work: str, config: str = "issue", sizes: list[int] | None = None, rounds: int = ROUNDS, json_path: Path | None = None,
    figure: Path | None = None,
) -> list[dict[str, Any]]:
    """Prints the tables of one kind of work, or 'all'. Raises ValueError for a work, size or number of rounds there is not."""
    if work not in (*SIZES, "all"):
        raise ValueError(f"the benchmark {work!r} is not known; choose one of {', '.join(SIZES)}, all")
    if config not in ("issue", "study", "tiny"):
        raise ValueError(f"the configuration {config!r} is not known; choose one of issue, study, tiny")
    if rounds < 1 or any(size < 1 for size in sizes or []):
        raise ValueError("sizes and rounds count things; give 1 or more")
    started, machine, rows = time.time(), about(), []
    for one in SIZES if work == "all" else [work]:
        chosen = sizes or list(SIZES[one])
        if one in ("memory", "load"):
            for size in chosen:
                rows += pair(one, config, size, rounds)
        elif one == "long":
            rows += lengths(config, chosen, rounds, figure)
        else:
            rows += contested(one, config, chosen, rounds)
        print(flush=True)
    print(", ".join(f"{key} {value}" for key, value in machine.items()) + f"; {time.time() - started:.0f} s in all")
    if json_path is not None:
        json_path.write_text(json.dumps({"about": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    return rows


def in_this_process(given: argparse.Namespace) -> None:
    spare_the_machine()
    from benchmarks import ways_process, ways_speed

    if given.work == "write":
        print(json.dumps({"weights": ways_process.written(given.config, Path(given.folder))}))
    elif given.work in ways_speed.CONTESTS:
        print(json.dumps(race(ways_speed.CONTESTS[given.work](given.config, given.one), given.rounds)))
    else:
        print(ways_process.one(given.work, given.config, given.one, given.way, given.folder, given.rounds))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="How fast, beside what people use.")
    parser.add_argument("work", help=f"{', '.join(SIZES)}, all")
    parser.add_argument("--config", default="issue", help="issue, study or tiny")
    parser.add_argument("--sizes", type=int, nargs="+", help="in place of the usual ones")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--json", type=Path, help="also write the numbers to this file")
    parser.add_argument("--one", type=int, help="only this size, in this process; prints JSON")
    parser.add_argument("--way", default="ours", help="with --one")
    parser.add_argument("--folder", default="", help="with --one: where checkpoints lie")
    given = parser.parse_args()
    if given.one is not None or given.work == "write":
        in_this_process(given)
    else:
        main(given.work, given.config, given.sizes, given.rounds, given.json, FIGURE if given.config == "issue" else None)
