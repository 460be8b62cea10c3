"""The keep panel: runs listed, shown, saved and opened, and the figures of one. Nothing here needs the model."""

from __future__ import annotations

import base64
import re
import tempfile
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from workbench.analyses.command import analyse
from workbench.runs import Run, RunError
from workbench.viewer import standalone

from ..desk import uploaded
from .act import Act, Asked

# Analyses that say something of a single run and need no model.
FIGURES = (
    "attention-timeline",
    "modality-mass",
    "localisation-heads",
    "expert-load",
    "routing-confidence",
    "modality",
    "expert-map",
    "kinds",
    "coactivation",
    "repetition",
    "selection",
    "bias",
    "margins",
    "thought-classes",
    "token-entropy",
    "image-reliance",
)


def runs(asked: Asked) -> Iterator[dict[str, Any]]:
    """Yields {"runs": what the visitor can choose among, oldest first, "against": the name of the other weights, or ""}."""
    listed = [
        {
            "id": id,
            "question": run.question,
            "answer": run.answer,
            "weights": run.model_name,
            "edits": list(run.edits),
            "pictures": len(run.pictures),
            "tokens": len(run.token_ids),
        }
        for id, run in asked.shelf().items()
    ]
    yield {"runs": listed, "against": asked.session.against.model_name if asked.session.against else ""}


def show_run(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: id. Yields {"payload"}."""
    yield {"payload": asked.view(str(asked.args.get("id")))}


def open_run(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: path of an uploaded file, and its name. Keeps the run on the shelf and yields {"payload"}."""
    file, name = uploaded(asked.args.get("path")), str(asked.args.get("name") or "the file")
    try:
        run = Run.load(file)
    except RunError as error:
        # where the server keeps uploads is nobody's business
        raise ValueError(str(error).replace(str(file), f"the file {name}")) from error
    yield {"payload": asked.view(asked.keep(run))}


def run_file(asked: Asked) -> Iterator[dict[str, Any]]:
    """Yields {"name", "data"}: the run as `Run.save` writes it, base64."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.run"
        asked.run.save(path)
        yield {"name": f"{_slug(asked.run)}.run", "data": _text(path.read_bytes())}


def viewer_file(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: id of this run. Yields {"name", "data"}: the single-file viewer, base64."""
    shown = asked.view(str(asked.args.get("id")))
    yield {"name": f"{_slug(asked.run)}.html", "data": _text(standalone(shown).encode())}


def figures(asked: Asked) -> Iterator[dict[str, Any]]:
    """The default figure (PNG, SVG) and the numbers (CSV, JSON) of each of FIGURES, as `kimi-vl analyse` writes them.

    Yields {"note"} for each, and {"name", "data", "left"}: a ZIP file, base64, and what an analysis refused, in its own words.
    """
    left: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        path = here / f"{_slug(asked.run)}.run"
        asked.run.save(path)
        for number, name in enumerate(FIGURES, start=1):
            if asked.should_stop():
                yield {"note": "Stopped; nothing was kept."}
                return
            yield {"note": f"{number} of {len(FIGURES)}: {name}"}
            try:
                analyse(name, [path], here / "out" / name)
            except ValueError as error:
                left.append(f"{name}: {error}")
        told = [f"{asked.run.question}\nweights: {asked.run.model_name}\n", *left]
        (here / "out" / "README.txt").write_text("\n".join(told) + "\n", encoding="utf-8")
        packed = BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            for one in sorted((here / "out").rglob("*")):
                if one.is_file():
                    file.write(one, one.relative_to(here / "out"))
    yield {"name": f"{_slug(asked.run)}.zip", "data": _text(packed.getvalue()), "left": left}


def _slug(run: Run) -> str:
    words = re.sub(r"[^a-z0-9]+", "-", run.question.lower()).strip("-")
    return f"kimi-vl-{words[:40].strip('-') or 'run'}"


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


ACTS: dict[str, Act] = {
    "runs": runs,
    "show_run": show_run,
    "open_run": open_run,
    "run_file": run_file,
    "viewer_file": viewer_file,
    "figures": figures,
}
