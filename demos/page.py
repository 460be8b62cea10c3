"""What happens on the page: drawing scenes, checking uploads, answering, and telling every error in one sentence."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr

from kimi_vl_ref import Reply
from kimi_vl_ref.images import ImageError, Picture
from kimi_vl_ref.told import cause, short, shown
from workbench.memory import ran_out
from workbench.runs import Run
from workbench.study.families import Question, make
from workbench.study.scenes import Scene
from workbench.study.views import Album
from workbench.viewer import payload, progress, standalone, steps

from .acts import ACTS, WITHOUT_MODEL, Asked
from .acts.act import number
from .desk import Desk, Desks, Drawn, uploaded
from .session import Session
from .shelf import EVERYBODY, Shelf

# Family and seed of the scenes that are ready to be asked about; the page opens on the first. The model was never
# trained on any of them.
EXAMPLES = [("count", 2), ("point", 4), ("where", 1), ("read", 10), ("sum", 4), ("chart", 1)]
SIZES = {
    "any, up to 8 things": "full",
    "up to 168 px, 6 things": "third",
    "up to 140 px, 4 things": "second",
    "up to 112 px, 2 things": "first",
}
LARGEST_SEED = 2**31 - 1
LONGEST_QUESTION = 100_000  # characters, all of which are made tokens before the model says that they are too many
LONGEST_REPLY = 2048  # tokens
FRAME = 0.05  # seconds between two updates of a text that is being written


def scene_of(drawn: Drawn) -> tuple[Scene | Album, Question]:
    family, seed, level = drawn
    return make(family, seed, level=level)


def truth(drawn: Drawn | None, pictures: Sequence[Picture], asked: str, answer: str) -> dict[str, Any] | None:
    """{"family", "answer", "right"}; None where the truth is not known: own pictures, or a question not the scene's own."""
    if drawn is None:
        return None
    scene, question = scene_of(drawn)
    shown = [picture.image.tobytes() for picture in pictures]
    if asked.strip() != question.text or shown != [image.tobytes() for image in scene.images]:
        return None
    return {"family": drawn[0], "answer": question.answer, "right": question.check(answer)}


def sentence(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text[0].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


NO_MEMORY = "Memory ran out while the model worked; ask about fewer or smaller pictures, or for a shorter reply."


def toast(error: Exception, more: str = "") -> gr.Error:
    """One sentence for the visitor. What is no fault of theirs also leaves its traceback in the terminal."""
    if ran_out(error):
        return gr.Error(NO_MEMORY, title="It failed")
    if isinstance(error, ImageError):
        return gr.Error(sentence(error) + more, title="This picture cannot be used", print_exception=False)
    if isinstance(error, ValueError):
        return gr.Error(sentence(error) + more, title="This cannot be done", print_exception=False)
    return gr.Error(f"The model could not answer: {sentence(error)} Ask again, or try a smaller picture.", title="It failed")


def _told(event: gr.EventData) -> dict[str, Any]:
    """What an event of ours carries; nothing where it carries something else."""
    return event._data if isinstance(event._data, dict) else {}


def _list(asked: dict[str, Any], name: str) -> list[Any]:
    found = asked.get(name)
    return found if isinstance(found, list) else []


class Page:
    """What the events of a page do with its session. Each method gives the values of its event's outputs."""

    def __init__(self, session: Session):
        self.session = session
        self.shelf = Shelf()
        self.desks = Desks()
        self._folder = tempfile.TemporaryDirectory(prefix="kimi-vl-")  # removed when the page's process ends
        self._kept = itertools.count()
        self._opening: tuple[Any, Any] | None = None
        self._opening_lock = threading.Lock()

    # ---- what is asked about

    def draw(self, family: str, seed: float | None, size: str, request: gr.Request) -> tuple[Any, ...]:
        """Draws a scene in place of the pictures that were there: (tray, turns, again button, question)."""
        try:
            if size not in SIZES:
                raise ValueError(f"the size {shown(size)} is unknown; choose one of the list")
            number_of_scene = int(number(seed or 0, "the scene seed", -LARGEST_SEED, LARGEST_SEED))
            desk, question = self._drawn((family, abs(number_of_scene), SIZES[size]))
        except ValueError as error:
            raise toast(error) from error
        return *self._shown(self.desks.change(str(request.session_hash), lambda _: desk)), question

    def _drawn(self, drawn: Drawn) -> tuple[Desk, str]:
        scene, question = scene_of(drawn)
        return Desk.of([self.session.picture(image) for image in scene.images], drawn), question.text

    @staticmethod
    def _shown(desk: Desk) -> tuple[Any, ...]:
        """(tray, turns, again button)"""
        return desk.tray(), desk.told(), gr.Button(visible=bool(desk.turns))

    def arrange(self, event: gr.EventData, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """Adds, moves or removes pictures: (tray, turns, again button). Of several files the good ones are kept, and one
        sentence tells of the others.
        """
        visitor, asked = str(request.session_hash), _told(event)
        found: list[Picture] = []
        refused: list[Exception] = []
        for name in _list(asked, "failed"):
            refused.append(ValueError(f"the file {short(name)} could not be uploaded; choose a file of at most 32 MB"))
        for file in _list(asked, "files"):
            try:
                found.append(self.session.picture(uploaded(file["path"])))
            except Exception as error:
                refused.append(error)
        changes: dict[str, Callable[[Desk], Desk]] = {
            "add": lambda desk: desk.add(found) if found else desk,
            "remove": lambda desk: desk.remove(asked.get("id", "")),
            "move": lambda desk: desk.move(asked.get("id", ""), asked.get("by", 0)),
        }
        try:
            if (what := str(asked.get("what"))) not in changes:
                raise ValueError(f"pictures can be added, moved and removed, not {shown(what)}; load the page again")
            yield self._shown(self.desks.change(visitor, changes[what]))
        except ValueError as error:
            yield self._shown(self.desks.get(visitor))
            refused.append(error)
        if refused:
            raise toast(refused[0], f" ({len(refused)} files could not be used.)" if len(refused) > 1 else "")

    def again(self, request: gr.Request) -> tuple[Any, ...]:
        """A new conversation about the same pictures: (tray, turns, again button)."""
        return self._shown(self.desks.change(str(request.session_hash), lambda desk: replace(desk, turns=())))

    # ---- answering

    def ask(
        self, question: str, temperature: float, budget: int, longest: float, seed: float | None, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Streams (viewer, ask button, stop button, keep button, turns, again button). On an error the viewer goes back to
        the last run.
        """
        same = gr.skip(), gr.skip(), gr.skip()
        working = gr.Button(interactive=False), gr.Button(interactive=True), *same
        idle = gr.Button(interactive=True), gr.Button(interactive=False)
        visitor = str(request.session_hash)
        desk = self.desks.get(visitor)
        try:
            question = str(question or "").strip()
            if len(question) > LONGEST_QUESTION:
                raise ValueError(f"the question has {len(question):,} characters; ask in at most {LONGEST_QUESTION:,}")
            limit = int(number(budget, "the thought budget", -1, LONGEST_REPLY))
            messages = desk.asking(question)
            answering = self.session.answer(
                visitor,
                messages,
                temperature=float(number(temperature, "the temperature", 0, 10)),
                thought_budget=None if limit < 0 else limit,
                max_new_tokens=int(number(longest, "the longest reply", 1, LONGEST_REPLY)),
                seed=int(number(seed or 0, "the sampling seed", 0, LARGEST_SEED)),
            )
            so_far = self._so_far(desk.pictures, question, "Reading the picture and the question…")
            yield so_far, *working
            shown = 0.0
            for item in answering:
                if isinstance(item, Run):
                    view, keep = self._finished(item, visitor, desk)
                    now = self.desks.change(visitor, lambda now: self._with_turn(now, desk, messages, item))  # noqa: B023
                    yield view, *idle, keep, *self._shown(now)[1:]
                    return
                if isinstance(item, Reply):
                    so_far |= {"thought": item.thought, "answer": item.answer, "note": ""}
                else:
                    so_far |= {"note": "Waiting while somebody else is being answered…"}
                if time.monotonic() - shown > FRAME:
                    shown = time.monotonic()
                    yield so_far | {"steps": steps(so_far["thought"])}, *working
            yield {"kind": "none"}, *idle, *same  # stopped while waiting
        except Exception as error:
            yield {"kind": "none"}, *idle, *same
            raise toast(error) from error

    def _with_turn(self, now: Desk, asked: Desk, messages: Sequence[dict[str, Any]], run: Run) -> Desk:
        """With one turn more, unless the pictures were changed while it was written."""
        if now.ids != asked.ids:
            return now
        chat = self.session.chat
        written = [int(id) for id in run.token_ids[run.prompt_length :] if int(id) not in chat.stop_ids]
        return now.answered(messages, chat.tokenizer.decode(written))

    def _so_far(self, pictures: Sequence[Picture], question: str, note: str) -> dict[str, Any]:
        known = {"model": self.session.model_name, "device": self.session.device}
        return progress(pictures, question=question, note=note, **known)

    def _finished(self, run: Run, visitor: str, desk: Desk) -> tuple[Any, Any]:
        """(viewer, keep button)"""
        shown = self._view(visitor, self.shelf.put(visitor, run, desk.drawn))
        return shown, self._keep(shown)

    def _view(self, visitor: str, id: str) -> dict[str, Any]:
        """What the viewer shows of a run on the visitor's shelf. Raises ValueError if it is not there."""
        run, drawn = self.shelf.get(visitor, id)
        note = "" if run.finished else "Cut off: it was stopped, or reached the longest reply."
        return payload(run, id=id, truth=truth(drawn, run.pictures, run.question, run.answer), note=note)

    def _keep(self, shown: dict[str, Any], name: str | None = None) -> gr.DownloadButton:
        """The button with the run as a file. Gradio copies the file at once, so that a few places are enough for all."""
        file = Path(self._folder.name) / (name or f"{next(self._kept) % 32}") / "kimi-vl-run.html"
        try:
            file.parent.mkdir(exist_ok=True)
            file.write_text(standalone(shown), encoding="utf-8")
        except OSError as error:  # a full disk: the answer is shown all the same
            gr.Warning(
                f"No file of this run could be made ({cause(error)}); tell whoever runs the page to make room on its disk."
            )
            return gr.DownloadButton(interactive=False)
        return gr.DownloadButton(value=file, interactive=True)

    @cached_property
    def example(self) -> tuple[Desk, str]:
        """The pictures and the question that everybody starts from."""
        return self._drawn((*EXAMPLES[0], "full"))

    def opening(self, request: gr.Request) -> Iterator[tuple[Any, ...]]:
        """(viewer, keep button, tray, question): a finished example, made once for all visitors."""
        desk, question = self.example
        self.desks.change(str(request.session_hash), lambda _: desk)
        if self._opening is None:
            note = "Answering an example first, so that there is something to look at…"
            yield self._so_far(desk.pictures, question, note), gr.skip(), desk.tray(), question
        yield *self.prepare(), desk.tray(), question

    def prepare(self) -> tuple[Any, Any]:
        """The example's (viewer, keep button); makes it if nobody has yet."""
        with self._opening_lock:
            if self._opening is None:
                desk, question = self.example
                for item in self.session.answer("the opening", desk.asking(question), max_new_tokens=128):
                    if isinstance(item, Run):
                        # a newcomer should first see a word that was read from the picture, whichever it is
                        shown = self._view(EVERYBODY, self.shelf.put(EVERYBODY, item, desk.drawn)) | {"start": "looking"}
                        self._opening = shown, self._keep(shown, "opening")
        assert self._opening is not None
        return self._opening

    def act(self, event: gr.EventData, request: gr.Request) -> Iterator[Any]:
        """Answers a question of a panel: {"kind": "result", "id", and "data" with "done", or "error"}.

        "stop" ends what the same visitor asked before, whose own last result says what came of it.
        """
        visitor, asked = str(request.session_hash), _told(event)
        name, args = str(asked.get("name")), asked.get("args")
        if name == "stop":
            self.session.stop(visitor)
            yield gr.skip()
            return
        result = {"kind": "result", "id": asked.get("id")}
        try:
            if name not in ACTS or not isinstance(args, dict):
                raise ValueError(f"the page knows no {shown(name)} with {shown(args)}; load it again")
            run, drawn = self.shelf.get(visitor, str(asked.get("run")))

            def work(should_stop: Callable[[], bool]) -> Iterator[dict[str, Any]]:
                keep = lambda new: self.shelf.put(visitor, new, drawn)  # noqa: E731
                check = lambda answer: truth(drawn, run.pictures, run.question, answer)  # noqa: E731
                shelf, view = lambda: self.shelf.own(visitor), lambda id: self._view(visitor, id)
                known = Asked(self.session, run, args, should_stop, keep, check, shelf, view)
                yield from ACTS[name](known)

            last: dict[str, Any] = {}
            serve = self.session.beside if name in WITHOUT_MODEL else self.session.serve
            for data in serve(visitor, work):
                last = {"note": "Waiting while somebody else is being answered…"} if data is None else data
                yield result | {"data": last, "done": False}
            yield result | {"data": last, "done": True}
        except ValueError as error:
            yield result | {"error": sentence(error)}
        except Exception as error:
            yield result | {"error": NO_MEMORY if ran_out(error) else "It failed. The terminal of the page says why."}
            raise toast(error) from error

    def stop(self, request: gr.Request) -> None:
        self.session.stop(str(request.session_hash))

    def leave(self, request: gr.Request) -> None:
        """The visitor is gone: nothing of theirs stays."""
        self.stop(request)
        self.desks.clear(str(request.session_hash))
        self.shelf.clear(str(request.session_hash))

    def close(self) -> None:
        """Removes the files that were made for downloads; the end of the process does so too."""
        self._folder.cleanup()
