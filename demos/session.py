"""The one loaded model of a page and its visitors: one answer at a time, stopped only by whoever asked for it."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from kimi_vl_ref import Chat, KimiVL, Reply, checkpoint_folder, choose_fit, load
from kimi_vl_ref.images import Picture, open_image
from kimi_vl_ref.sizes import parameters
from workbench.runs import Run, record

T = TypeVar("T")


class Session:
    """A model, its chat format and its name for the page."""

    def __init__(self, model: KimiVL, chat: Chat, name: str, against: Session | None = None):
        """against: other weights, which the page can ask the same question."""
        self.model, self.chat, self.against = model, chat, against
        millions = parameters(model.config) / 1e6  # of the model, however few bits it is kept in
        size = f"{millions / 1000:.1f} B" if millions >= 1000 else f"{millions:.1f} M"
        self.model_name = f"{name}, {size} parameters"
        self._line: deque[object] = deque()  # who is served, then who waits, in the order in which they came
        self._moved = threading.Condition()
        self._asking: dict[str, threading.Event] = {}  # visitor -> to be set when what they asked last should stop
        self._beside: dict[str, threading.Event] = {}  # the same for what needs no model

    @classmethod
    def load(cls, source: str = "study", against: str | None = None) -> Session:
        """From "study" or a checkpoint folder in the released layout, on a GPU if there is one, so that it fits. Raises
        ValueError.
        """
        if source == "study":
            model, chat = load(source, device="cuda" if torch.cuda.is_available() else "cpu")
            name = "study model"
        else:
            fit = choose_fit(checkpoint_folder(source))
            print(f"({fit.says})", file=sys.stderr)
            model, chat = load(source, fit=fit)
            name = checkpoint_folder(source).resolve().name
        return cls(model, chat, name, None if against is None else cls.load(against))

    @property
    def device(self) -> str:
        device = self.model.logits.weight.device
        return "CPU" if device.type == "cpu" else f"{device} ({torch.cuda.get_device_name(device)})"

    @property
    def dtype(self) -> str:
        return str(self.model.logits.weight.dtype).removeprefix("torch.")

    def picture(self, source: Any) -> Picture:
        """A file (given as a path) or a Pillow image, as the model will see it. Raises ImageError.

        A file is read here, so that no sentence to a visitor names where the server keeps uploads.
        """
        image = open_image(Path(source).read_bytes() if isinstance(source, str | Path) else source)
        return Picture(image, self.chat.processor.grid(*image.size))

    def answer(self, visitor: str, messages: list[dict[str, Any]], **settings: Any) -> Iterator[Reply | Run | None]:
        """Yields None while others are served, then the growing Reply, then the Run; settings as for `record`.

        Asking again stops what the same visitor asked before. Raises ValueError with a sentence for the visitor.
        """

        def recorded(should_stop: Callable[[], bool]) -> Iterator[Reply | Run]:
            yield from record(self.model, self.chat, messages, model_name=self.model_name, should_stop=should_stop, **settings)

        yield from self.serve(visitor, recorded)

    def serve(self, visitor: str, work: Callable[[Callable[[], bool]], Iterator[T]]) -> Iterator[T | None]:
        """Does work that needs the model: yields None while those who came before are served, then what the work yields.

        `work` is given should_stop(). Whatever the same visitor wanted before is stopped.
        """
        self.stop(visitor)
        with _stoppable(self._asking, visitor) as stopped:
            me = object()
            with self._moved:
                self._line.append(me)
            try:
                while not self._first(me):
                    if stopped.is_set():
                        return
                    yield None
                yield from work(stopped.is_set)
            finally:  # also when the visitor has left and this generator is dropped
                with self._moved:
                    self._line.remove(me)
                    self._moved.notify_all()

    def _first(self, me: object) -> bool:
        """Whether it is this one's turn, after waiting for it a moment."""
        with self._moved:
            return self._moved.wait_for(lambda: self._line[0] is me, timeout=0.2)

    def beside(self, visitor: str, work: Callable[[Callable[[], bool]], Iterator[T]]) -> Iterator[T]:
        """Does work that needs no model: at once, whoever is being answered. `stop` ends it too."""
        with _stoppable(self._beside, visitor) as stopped:
            yield from work(stopped.is_set)

    def stop(self, visitor: str) -> None:
        """What the visitor asked ends after the token that is being written, and keeps what was written."""
        for event in (self._asking.get(visitor), self._beside.get(visitor)):
            if event is not None:
                event.set()


@contextmanager
def _stoppable(known: dict[str, threading.Event], visitor: str) -> Iterator[threading.Event]:
    """What a visitor's work is stopped by; `known` has it while the work is done and the visitor wants nothing else."""
    stopped = known[visitor] = threading.Event()
    try:
        yield stopped
    finally:
        if known.get(visitor) is stopped:
            del known[visitor]
