"""What `kimi-vl run` and `kimi-vl analyse` do: a run recorded to a file, an analysis written to a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from kimi_vl_ref import Reply, load
from workbench.runs import Run, record

from .registry import ENTRIES, Asked


def record_to_file(
    question: str,
    images: Sequence[Path],
    out: Path,
    *,
    model: str = "study",
    show: Callable[[Iterator[Reply]], Any] = list,
    **options: Any,
) -> Run:
    """Asks one question about pictures and saves what happened as a run file. `show` is given the growing replies.

    options are those of `workbench.runs.record`. Raises ValueError for an empty question, and before anything is answered
    for a place that cannot be written.

        record_to_file("how many red circles?", [Path("picture.png")], Path("count-1.run"), seed=0)
    """
    if not question.strip():
        raise ValueError("the question is empty; write what you want to know")
    if not out.parent.is_dir() or out.is_dir():
        raise ValueError(f"a run cannot be written to {out}; name a file in a folder that exists with --out")
    pictures = [{"type": "image", "image": path} for path in images]
    messages = [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]
    loaded, chat = load(model)
    name = "study model" if model == "study" else Path(model).name
    found: list[Run] = []

    def replies() -> Iterator[Reply]:
        for one in record(loaded, chat, messages, model_name=name, **options):
            if isinstance(one, Run):
                found.append(one)
            else:
                yield one

    show(replies())
    found[0].save(out)
    return found[0]


def analyse(name: str, paths: Sequence[Path], out: Path, *, against: Sequence[Path] = (), **options: Any) -> list[Path]:
    """Runs one analysis of ENTRIES on run files and writes its figure (PNG and SVG) and numbers (CSV, about.json).

    options are fields of `Asked`. Returns what was written. Raises ValueError for an unknown name and whatever the analysis
    refuses; nothing is written then.

        analyse("modality", sorted(Path("runs").glob("*.run")), Path("modality"))
    """
    if name not in ENTRIES:
        near = get_close_matches(name, ENTRIES, n=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"no analysis is called {name!r}; {hint}The names are: {', '.join(ENTRIES)}")
    if not paths:
        raise ValueError(f"there are no runs to analyse; name run files after {name!r} (`kimi-vl run` records them)")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    asked = Asked(
        [Run.load(path) for path in paths],
        [label_of(path) for path in paths],
        [Run.load(path) for path in against],
        **options,
    )
    entry = ENTRIES[name]
    result = entry.analyse(asked)
    figure = entry.figure(result, asked)
    written = result.save(out)
    for ending in ("png", "svg"):
        path = out / f"{name}.{ending}"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def label_of(path: Path) -> str:
    """The domain of a run file: its name without ending and number, "count" for count-17.run."""
    return re.sub(r"[-_. ]*\d*$", "", path.stem) or path.stem


def names() -> list[str]:
    """A line an analysis, for the eye."""
    width = max(map(len, ENTRIES))
    return [f"{name:{width}}  {entry.line}" for name, entry in ENTRIES.items()]


def expert(text: str) -> tuple[int, int]:
    """"3.7" -> (3, 7). Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)\.(\d+)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} names no expert; write layer.expert, such as 3.7")
    return int(found[1]), int(found[2])
