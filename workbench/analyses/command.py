"""What `kimi-vl run` and `kimi-vl analyse` do: a run recorded to a file, an analysis written to a folder."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kimi_vl_ref import Reply, load
from workbench.runs import Run, record
from workbench.tape import attach

from .given import Asked, Entry, Posed, flag, name_of
from .registry import find


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
    found: list[Run] = []

    def replies() -> Iterator[Reply]:
        for one in record(loaded, chat, messages, model_name=name_of(model), **options):
            if isinstance(one, Run):
                found.append(one)
            else:
                yield one

    show(replies())
    found[0].save(out)
    return found[0]


def analyse(name: str, paths: Sequence[Path], out: Path, *, against: Sequence[Path] = (), **options: Any) -> list[Path]:
    """Runs one analysis of ENTRIES and writes its figure (PNG and SVG) and numbers (CSV, about.json) into the folder `out`.

    paths are run files, for analyses that take them; options are fields of `given.Options`. Returns what was written. Raises
    ValueError for an unknown name, for an option that is given (neither None nor empty) and would not be heeded, for what
    else does not fit the analysis and whatever it refuses; nothing is written then, but for what a sweep had finished.

        analyse("modality", sorted(Path("runs").glob("*.run")), Path("modality"))
        analyse("head-hits", [], Path("hits"), families=["where"], scenes=40)
    """
    entry = find(name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; name a folder with --out")
    if paths or not (options.get("families") or options.get("images")) and entry.takes == "runs":
        given: Asked | Posed = _of_files(name, entry, paths, against, options)
    else:
        given = _posed(name, entry, out, against, options)
        if entry.takes == "runs":
            labels = [question.family for _, question in given.pairs] or ["picture"]
            given = Asked(given.runs, labels, [Run.load(path) for path in against], given, **options)
    with _shown(given, entry):
        result = entry.analyse(given)
    figure = entry.figure(result, given)
    written = result.save(out)
    for ending in ("png", "svg"):
        path = out / f"{name}.{ending}"
        figure.savefig(path, dpi=150)
        written.append(path)
    return written


def _of_files(name: str, entry: Entry, paths: Sequence[Path], against: Sequence[Path], options: dict[str, Any]) -> Asked:
    if entry.takes != "runs":
        raise ValueError(f"{name} takes no run files such as {paths[0]}; it asks the model itself, see `kimi-vl analyse list`")
    if not paths:
        raise ValueError(f"there are no runs to analyse; name run files after {name!r} (`kimi-vl run` records them)")
    if options.get("families") or options.get("images"):
        raise ValueError("run files and something to record were both given; leave out --family and --image, or the files")
    _heeded(name, entry, "run files", {**options, "against": against})
    runs = [Run.load(path) for path in paths]
    return Asked(runs, [label_of(path) for path in paths], [Run.load(path) for path in against], **options)


def _posed(name: str, entry: Entry, out: Path, against: Sequence[Path], options: dict[str, Any]) -> Posed:
    """What a model is asked for this entry. Raises ValueError before a model is loaded where it does not fit."""
    given, asked = Posed(**options, out=out), {**options, "against": against}
    if entry.takes == "weights":
        if given.families or given.images:
            raise ValueError(f"{name} looks at weights alone; leave out --family and --image")
        _heeded(name, entry, "weights", asked)
        return given
    if given.images and given.families:
        raise ValueError("scenes of a family and a picture of yours were both given; choose --family or --image")
    if given.images and entry.takes == "scenes":
        raise ValueError(f"{name} has to know what is true, as it is of scenes of the study; use --family without --image")
    if given.images and not given.question.strip() and entry.takes != "pictures":
        raise ValueError(f"{name} asks about the picture; write what with --question")
    if given.question and not given.images:
        raise ValueError("a question of yours needs a picture of yours; name one with --image")
    if given.images:
        _heeded(name, entry, "a picture of yours", asked)
        _ = given.pictures  # opened before a model is loaded
        return given
    _heeded(name, entry, "scenes", asked)
    scenes = given.scenes if given.scenes is not None else 1 if entry.one else entry.scenes
    given = replace(given, families=given.families or entry.families, scenes=scenes)
    if scenes < 1:
        raise ValueError(f"{scenes} scenes leave nothing to ask; use --scenes 1 or more")
    if entry.one and len(given.pairs) > 1:
        raise ValueError(f"{name} looks at one question, and {len(given.pairs)} were given; use one --family and --scenes 1")
    _ = given.pairs  # drawn before a model is loaded
    return given


def _heeded(name: str, entry: Entry, way: str, options: dict[str, Any]) -> None:
    """Raises ValueError if an option is given that this entry, asked in this way, does not heed."""
    heeds = entry.options(way)
    left = [flag(one) for one, value in options.items() if one not in (*heeds, "progress") and value not in (None, "", (), [])]
    if left:
        them = "it" if len(left) == 1 else "them"
        uses = f" (with {way} it uses {', '.join(map(flag, heeds))})" if heeds else ""
        raise ValueError(f"{name} does not use {' and '.join(left)}; leave {them} out{uses}")


@contextmanager
def _shown(given: Asked | Posed, entry: Entry) -> Iterator[None]:
    """Counts the passes through the model on a terminal while an analysis of a model works; sweeps have bars of their own."""
    if not given.progress or not isinstance(given, Posed) or entry.takes == "weights" or entry.sweeps:
        yield
        return
    site = "vision.norm" if entry.takes == "pictures" else "decoder.norm"
    with (
        tqdm(desc="asking the model", unit=" passes", leave=False) as bar,
        attach(given.net, read=[site], keep=lambda _value, _site: bar.update()),
    ):
        yield


def label_of(path: Path) -> str:
    """The domain of a run file: its name without ending and number, "count" for count-17.run."""
    return re.sub(r"[-_. ]*\d*$", "", path.stem) or path.stem


def expert(text: str) -> tuple[int, int]:
    """"3.7" -> (3, 7). Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+)\.(\d+)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} names no expert; write layer.expert, such as 3.7")
    return int(found[1]), int(found[2])


def point(text: str) -> tuple[float, float]:
    """"120,40" -> (120.0, 40.0), pixels from the left and from the top. Raises ValueError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*,\s*(\d+(?:\.\d+)?)", text.strip())
    if found is None:
        raise ValueError(f"{text!r} names no point of a picture; write x,y in pixels, such as 120,40")
    return float(found[1]), float(found[2])
