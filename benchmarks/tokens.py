"""How long a rank file of the released size takes to load, and how fast text is encoded beside tiktoken itself.

    python -m benchmarks.tokens

The ranks are made up (`workbench.checkup.standin`), 163,584 of them in the released layout. Rounds alternate; the ratio is the
median of the rounds' ratios. The ids of both are compared first, on texts that neither cuts.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken

from kimi_vl_ref.chat import SPLIT_PATTERN, Tokenizer
from kimi_vl_ref.config import KIMI_VL_A3B
from workbench.checkup.standin import write_tokens

ROUNDS = 9
CUT = 390_000  # characters; a longer text is cut as the released wrapper cuts it, and tiktoken alone does not


def timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def texts() -> dict[str, str]:
    """Prose and code from this repository, and characters from everywhere."""
    root = Path(__file__).parent.parent
    prose = "\n".join(path.read_text(encoding="utf-8") for path in sorted(root.rglob("*.md")) if ".venv" not in path.parts)
    code = "\n".join(path.read_text(encoding="utf-8") for path in sorted((root / "workbench").rglob("*.py")))
    anywhere = "".join(chr(32 + at * 7919 % 60_000) for at in range(CUT) if not 0xD800 <= 32 + at * 7919 % 60_000 < 0xE000)
    return {name: text[:CUT] for name, text in {"prose": prose, "code": code, "any characters": anywhere}.items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_tokens(Path(folder), KIMI_VL_A3B)
        loads = [timed(lambda: Tokenizer.from_folder(folder)) for _ in range(ROUNDS)]
        tokenizer = Tokenizer.from_folder(folder)
    print(f"load, {len(tokenizer.ranks):,} ranks: median {statistics.median(loads):.2f} s, longest {max(loads):.2f} s")
    plain = tiktoken.Encoding("plain", pat_str=SPLIT_PATTERN, mergeable_ranks=tokenizer.ranks, special_tokens={})
    print("| text | characters | ours, ms | tiktoken, ms | ratio |\n|---|---|---|---|---|")
    for name, text in texts().items():
        if tokenizer.encode(text) != plain.encode_ordinary(text):
            raise ValueError(f"{name}: the ids differ from tiktoken's; nothing is timed")
        pairs = [(timed(lambda: tokenizer.encode(text)), timed(lambda: plain.encode_ordinary(text))) for _ in range(ROUNDS)]  # noqa: B023
        ours, theirs = (1000 * statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"| {name} | {len(text):,} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
