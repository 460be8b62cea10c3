"""The first page: give a picture and a question, watch the answer being written, and see where the model looked.

`build` lays the page out and wires it; the model's side is session.py, the linked view is workbench/viewer.
"""

from __future__ import annotations

import base64
import html
import os
import random
import tempfile
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: the page talks to nobody

import gradio as gr  # noqa: E402

from kimi_vl_ref import Reply  # noqa: E402
from kimi_vl_ref.images import ImageError, open_image  # noqa: E402
from workbench.runs import Run  # noqa: E402
from workbench.study.families import FAMILIES, Question, make  # noqa: E402
from workbench.study.scenes import LEVELS, Scene  # noqa: E402
from workbench.viewer import payload, progress, source, standalone  # noqa: E402

from .look import CSS, THEME  # noqa: E402
from .session import Session  # noqa: E402

# Family and seed of the scenes that are ready to ask about; the page opens on the first. All from seeds never trained on.
EXAMPLES = [("count", 2), ("point", 4), ("where", 1), ("read", 8), ("relation", 2), ("name", 0)]
SIZES = {
    "any size, up to 8 things": "full",
    "up to 168 px, 6 things": "third",
    "up to 140 px, 4 things": "second",
    "up to 112 px, 2 things": "first",
}
UPLOAD_LIMIT = "32mb"
FRAME = 0.05  # seconds between two updates of the text while it is being written

Drawn = tuple[str, int, str] | None  # family, seed and level of the scene in the picture box, if it is one


class Upload(gr.Image):
    """A picture box that hands over the file as it came: Gradio would open and convert it before our own checks."""

    def preprocess(self, payload: Any) -> str | None:
        return None if payload is None else payload.path


class Viewer(gr.HTML):
    """The linked viewer; its value is a payload of `workbench.viewer`."""

    def __init__(self, value: dict[str, Any] | None = None, **settings: Any):
        start = "\nconst viewer = kimiViewer(element.querySelector('.viewer'));\n"
        start += "watch('value', () => viewer.show(props.value));\nviewer.show(props.value);"
        settings |= {"html_template": '<div class="viewer"></div>', "js_on_load": source("viewer.js") + start}
        super().__init__(value, apply_default_css=False, **settings)

    def api_info(self) -> dict[str, Any]:
        return {"type": "object"}


def scene_of(drawn: Drawn) -> tuple[Scene, Question]:
    """The scene and its question again; drawing is repeatable, so a page need not keep the picture."""
    assert drawn is not None
    family, seed, level = drawn
    return make(family, seed, level=level)


def draw(family: str, seed: float | None, size: str) -> tuple[Any, str, Drawn]:
    """A drawn scene: its picture, its question, and what it takes to know the true answer later."""
    drawn = (family, int(seed or 0), SIZES[size])
    try:
        scene, question = scene_of(drawn)
    except ValueError as error:
        raise gr.Error(f"{sentence(error)}", title="No such scene", print_exception=False) from error
    return scene.image, question.text, drawn


def truth(drawn: Drawn, picture: str | None, asked: str, answer: str) -> dict[str, Any] | None:
    """Whether the answer is right; None if the question is no longer the scene's own, or the picture another."""
    if drawn is None or picture is None:
        return None
    scene, question = scene_of(drawn)
    same = open_image(Path(picture).read_bytes()).tobytes() == scene.image.tobytes()
    if not same or asked.strip() != question.text:
        return None
    return {"answer": question.answer, "right": question.check(answer)}


def sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


class Page:
    """What the events of one page do. Every method that answers an event yields or returns the values of its outputs."""

    def __init__(self, session: Session):
        self.session = session
        self._opening: dict[str, Any] | None = None

    def ask(
        self,
        picture: str | None,
        question: str,
        drawn: Drawn,
        temperature: float,
        budget: float | None,
        longest: float,
        seed: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Streams (viewer, ask button, stop button, keep button); any error becomes one sentence in a toast."""
        working = gr.Button(interactive=False), gr.Button(interactive=True), gr.skip()
        idle = gr.Button(interactive=True), gr.Button(interactive=False)
        try:
            seen = None if picture is None else self.session.picture(picture)
            text, shown = {"question": question.strip(), "note": "Reading the picture and the question…"}, 0.0
            first = progress("", [seen] if seen else [], model=self.session.model_name, device=self.session.device, note="")
            answering = self.session.answer(
                str(request.session_hash),
                seen,
                question,
                temperature=float(temperature),
                thought_budget=None if budget is None else int(budget),
                max_new_tokens=int(longest),
                seed=None if seed is None else int(seed),
            )
            if question.strip():
                yield first | text, *working
            for item in answering:
                if isinstance(item, Run):
                    note = "" if item.finished else "Not finished: stopped, or at the longest reply; this is what was written."
                    facts = {"truth": truth(drawn, picture, question, item.answer), "note": note}
                    with tempfile.TemporaryDirectory() as folder:
                        kept = Path(folder) / "kimi-vl-run.html"
                        kept.write_text(standalone(item, **facts), encoding="utf-8")
                        yield payload(item, **facts), *idle, gr.DownloadButton(value=kept, interactive=True)
                    return
                if isinstance(item, Reply):
                    text |= {"thought": item.thought, "answer": item.answer, "note": ""}
                else:
                    text["note"] = "Waiting: somebody else's answer is being written…"
                if time.monotonic() - shown > FRAME:
                    shown = time.monotonic()
                    yield first | text, *working
            yield {"kind": "none"}, *idle, gr.skip()  # stopped while waiting
        except Exception as error:
            yield {"kind": "none"}, *idle, gr.skip()  # the viewer goes back to the last finished run
            raise toast(error) from error

    def opening(self, request: gr.Request) -> Iterator[Any]:
        """The finished example that the page opens on, computed once for all visitors."""
        if self._opening is None:
            family, seed = EXAMPLES[0]
            drawn = family, seed, "full"
            scene, question = scene_of(drawn)
            file = BytesIO()
            scene.image.save(file, "PNG")
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "scene.png"
                path.write_bytes(file.getvalue())
                seen = self.session.picture(path)
                for item in self.session.answer(f"opening {request.session_hash}", seen, question.text, max_new_tokens=128):
                    if isinstance(item, Run):
                        self._opening = payload(item, truth=truth(drawn, str(path), question.text, item.answer))
        yield self._opening

    def stop(self, request: gr.Request) -> None:
        self.session.stop(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        self.session.stop(str(request.session_hash))


def toast(error: Exception) -> gr.Error:
    """One sentence for the visitor. What is no fault of theirs is printed here with its traceback as well."""
    if isinstance(error, ValueError):
        title = "This picture cannot be used" if isinstance(error, ImageError) else "This cannot be asked"
        return gr.Error(sentence(error), title=title, print_exception=False)
    message = f"The model could not answer ({sentence(error).rstrip('.')}); the page is still alive, try something smaller."
    return gr.Error(message, title="Something went wrong")
