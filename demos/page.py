"""What happens on the page: drawing scenes, checking uploads, answering, and telling every error in one sentence."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from kimi_vl_ref import Reply
from kimi_vl_ref.images import ImageError, Picture
from workbench.runs import Run
from workbench.study.families import Question, make
from workbench.study.scenes import Scene
from workbench.viewer import payload, progress, standalone

from .acts import ACTS, Asked
from .session import Session
from .shelf import EVERYBODY, Shelf

# Family and seed of the scenes that are ready to be asked about; the page opens on the first. The model was never
# trained on any of them.
EXAMPLES = [("count", 2), ("point", 4), ("where", 1), ("read", 5), ("sum", 4), ("chart", 1)]
SIZES = {
    "any, up to 8 things": "full",
    "up to 168 px, 6 things": "third",
    "up to 140 px, 4 things": "second",
    "up to 112 px, 2 things": "first",
}
LARGEST_SEED = 2**31 - 1
FRAME = 0.05  # seconds between two updates of a text that is being written

Drawn = tuple[str, int, str]  # family, seed and level: what it takes to draw a scene and its question again


def scene_of(drawn: Drawn) -> tuple[Scene, Question]:
    family, seed, level = drawn
    return make(family, seed, level=level)


def draw(family: str, seed: float | None, size: str) -> tuple[Any, str, Drawn]:
    """(picture, question, what was drawn); the true answer follows from the last."""
    drawn = family, min(abs(int(seed or 0)), LARGEST_SEED), SIZES[size]
    try:
        scene, question = scene_of(drawn)
    except ValueError as error:
        raise toast(error) from error
    return scene.image, question.text, drawn


def truth(drawn: Drawn | None, picture: Picture | None, asked: str, answer: str) -> dict[str, Any] | None:
    """{"answer", "right"}; None where the truth is not known: own pictures, and questions that are not the scene's own."""
    if drawn is None or picture is None:
        return None
    scene, question = scene_of(drawn)
    if asked.strip() != question.text or picture.image.tobytes() != scene.image.tobytes():
        return None
    return {"answer": question.answer, "right": question.check(answer)}


def sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def toast(error: Exception) -> gr.Error:
    """One sentence for the visitor. What is no fault of theirs also leaves its traceback in the terminal."""
    if isinstance(error, ImageError):
        return gr.Error(sentence(error), title="This picture cannot be used", print_exception=False)
    if isinstance(error, ValueError):
        return gr.Error(sentence(error), title="This cannot be done", print_exception=False)
    return gr.Error(f"The model could not answer: {sentence(error)} Ask again, or try a smaller picture.", title="It failed")


class Page:
    """What the events of a page do with its session. Each method gives the values of its event's outputs."""

    def __init__(self, session: Session):
        self.session = session
        self.shelf = Shelf()
        self._folder = tempfile.TemporaryDirectory(prefix="kimi-vl-")  # removed when the page's process ends
        self._kept = itertools.count()
        self._opening: tuple[Any, ...] | None = None
        self._opening_lock = threading.Lock()

    def check(self, upload: str | None) -> None:
        """Raises the toast for a file that no question could be asked about."""
        try:
            if upload is not None:
                self.session.picture(upload)
        except Exception as error:
            raise toast(error) from error

    def ask(
        self,
        upload: str | None,
        question: str,
        drawn: Drawn | None,
        temperature: float,
        budget: int,
        longest: float,
        seed: float | None,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Streams (viewer, ask button, stop button, keep button). On an error the viewer goes back to the last run."""
        working = gr.Button(interactive=False), gr.Button(interactive=True), gr.skip()
        idle = gr.Button(interactive=True), gr.Button(interactive=False)
        try:
            picture = None if upload is None else self.session.picture(upload)
            answering = self.session.answer(
                str(request.session_hash),
                picture,
                question,
                temperature=float(temperature),
                thought_budget=None if budget < 0 else budget,
                max_new_tokens=int(longest),
                seed=int(seed or 0),
            )
            so_far = self._so_far(picture, question.strip(), "Reading the picture and the question…")
            if question.strip():
                yield so_far, *working
            shown = 0.0
            for item in answering:
                if isinstance(item, Run):
                    yield self._finished(item, str(request.session_hash), drawn, picture, *idle)
                    return
                if isinstance(item, Reply):
                    so_far |= {"thought": item.thought, "answer": item.answer, "note": ""}
                else:
                    so_far |= {"note": "Waiting while somebody else is being answered…"}
                if time.monotonic() - shown > FRAME:
                    shown = time.monotonic()
                    yield so_far, *working
            yield {"kind": "none"}, *idle, gr.skip()  # stopped while waiting
        except Exception as error:
            yield {"kind": "none"}, *idle, gr.skip()
            raise toast(error) from error

    def _so_far(self, picture: Picture | None, question: str, note: str) -> dict[str, Any]:
        known = {"model": self.session.model_name, "device": self.session.device}
        return progress([picture] if picture else [], question=question, note=note, **known)

    def _finished(
        self, run: Run, visitor: str, drawn: Drawn | None, picture: Picture | None, *buttons: Any
    ) -> tuple[Any, ...]:
        note = "" if run.finished else "Cut off: it was stopped, or reached the longest reply."
        known = truth(drawn, picture, run.question, run.answer)
        shown = payload(run, id=self.shelf.put(visitor, run), truth=known, note=note)
        return shown, *buttons, self._keep(shown)

    def _keep(self, shown: dict[str, Any], name: str | None = None) -> gr.DownloadButton:
        """The button with the run as a file. Gradio copies the file at once, so that a few places are enough for all."""
        file = Path(self._folder.name) / (name or f"{next(self._kept) % 32}") / "kimi-vl-run.html"
        file.parent.mkdir(exist_ok=True)
        file.write_text(standalone(shown), encoding="utf-8")
        return gr.DownloadButton(value=file, interactive=True)

    def opening(self) -> Iterator[tuple[Any, ...]]:
        """(viewer, keep button, picture, question, what was drawn): a finished example, made once for all visitors."""
        drawn = (*EXAMPLES[0], "full")
        scene, question = scene_of(drawn)
        picture = self.session.picture(scene.image)
        if self._opening is None:
            note = "Answering an example first, so that there is something to look at…"
            yield self._so_far(picture, question.text, note), gr.skip(), scene.image, question.text, drawn
        with self._opening_lock:
            if self._opening is None:
                for item in self.session.answer("the opening", picture, question.text, max_new_tokens=128):
                    if isinstance(item, Run):
                        known = truth(drawn, picture, question.text, item.answer)
                        # a newcomer should first see a word that was read from the picture, whichever it is
                        kept = self.shelf.put(EVERYBODY, item)
                        shown = payload(item, id=kept, truth=known) | {"start": "looking"}
                        self._opening = shown, self._keep(shown, "opening"), scene.image, question.text, drawn
        assert self._opening is not None
        yield self._opening

    def act(self, event: gr.EventData, request: gr.Request) -> Iterator[dict[str, Any]]:
        """Answers a question of a panel: {"kind": "result", "id", and "data" with "done", or "error"}."""
        visitor, asked = str(request.session_hash), event._data
        result = {"kind": "result", "id": asked["id"]}
        try:
            run = self.shelf.get(visitor, asked["run"])

            def work(should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
                keep = lambda new: self.shelf.put(visitor, new)  # noqa: E731
                yield from ACTS[asked["name"]](Asked(self.session, run, asked["args"], should_stop, keep))

            last: dict[str, Any] = {}
            for data in self.session.serve(visitor, work):
                last = {"note": "Waiting while somebody else is being answered…"} if data is None else data
                yield result | {"data": last, "done": False}
            yield result | {"data": last, "done": True}
        except ValueError as error:
            yield result | {"error": sentence(error)}
        except Exception as error:
            yield result | {"error": "It failed. The terminal of the page says why."}
            raise toast(error) from error

    def prepare(self) -> None:
        """Makes the example before anybody comes."""
        for _ in self.opening():
            pass

    def stop(self, request: gr.Request) -> None:
        self.session.stop(str(request.session_hash))
