"""What each visitor has before them: the pictures in their order, and the conversation about them so far."""

from __future__ import annotations

import base64
import itertools
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Any

from gradio.utils import get_upload_folder
from PIL import Image

from kimi_vl_ref.images import Picture
from kimi_vl_ref.thought import split_thought

Drawn = tuple[str, int, str]  # family, seed and level: what it takes to draw a scene and its question again

VISITORS = 64
MOST_PICTURES = 32
THUMB = 112  # pixels
_numbers = itertools.count(1)


@dataclass(frozen=True)
class Desk:
    """One visitor's. The conversation is about exactly these pictures, so that changing them ends it."""

    pictures: tuple[Picture, ...] = ()
    ids: tuple[str, ...] = ()  # of the pictures, for the browser
    drawn: Drawn | None = None  # the scene that these are the pictures of
    turns: tuple[dict[str, Any], ...] = field(default=(), repr=False)  # messages: user, assistant, user, assistant, ...

    @classmethod
    def of(cls, pictures: Sequence[Picture], drawn: Drawn | None = None) -> Desk:
        return cls(tuple(pictures), tuple(str(next(_numbers)) for _ in pictures), drawn)

    def add(self, pictures: Sequence[Picture]) -> Desk:
        """Raises ValueError for more than MOST_PICTURES."""
        if len(self.pictures) + len(pictures) > MOST_PICTURES:
            raise ValueError(f"a question takes up to {MOST_PICTURES} pictures; remove some first")
        more = Desk.of(pictures)
        return Desk(self.pictures + more.pictures, self.ids + more.ids)

    def remove(self, id: str) -> Desk:
        kept = [at for at, one in enumerate(self.ids) if one != id]
        return Desk(tuple(self.pictures[at] for at in kept), tuple(self.ids[at] for at in kept))

    def move(self, id: str, by: int) -> Desk:
        """The picture changes places with its neighbour, `by` = -1 or 1; at an end nothing happens."""
        order = list(range(len(self.ids)))
        at = self.ids.index(id) if id in self.ids else -1
        if at < 0 or by not in (-1, 1) or not 0 <= at + by < len(order):
            return self
        order[at], order[at + by] = order[at + by], order[at]
        return Desk(tuple(self.pictures[n] for n in order), tuple(self.ids[n] for n in order))

    def asking(self, question: str) -> list[dict[str, Any]]:
        """The messages that ask this next. The question that was asked last replaces its own turn. Raises ValueError for an
        empty one.
        """
        if not question:
            raise ValueError("The question is empty; write what you want to know about the picture.")
        turns = self.turns
        if turns and _text(turns[-2]) == question:
            turns = turns[:-2]
        pictures = [] if turns else [{"type": "image", "image": picture.image} for picture in self.pictures]
        return [*turns, {"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]

    def answered(self, messages: Sequence[dict[str, Any]], reply: str) -> Desk:
        """With these messages and the reply to them, as it was written, thought included."""
        return replace(self, turns=(*messages, {"role": "assistant", "content": reply}))

    def told(self) -> list[dict[str, str]]:
        """[{"question", "answer"}, ...] of the conversation, for the eye."""
        pairs = zip(self.turns[::2], self.turns[1::2], strict=True)
        return [{"question": _text(asked), "answer": split_thought(reply["content"])[1]} for asked, reply in pairs]

    def tray(self) -> dict[str, Any]:
        """The pictures for the browser. The number makes every answer to the browser another one."""
        both = zip(self.ids, self.pictures, strict=True)
        return {"number": next(_numbers), "pictures": [{"id": id, "src": thumb(picture)} for id, picture in both]}


class Desks:
    """By visitor; whoever was longest away loses theirs."""

    def __init__(self) -> None:
        self._desks: OrderedDict[str, Desk] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, visitor: str) -> Desk:
        with self._lock:
            return self._desks.get(visitor, Desk())

    def change(self, visitor: str, change: Callable[[Desk], Desk]) -> Desk:
        with self._lock:
            desk = self._desks[visitor] = change(self._desks.get(visitor, Desk()))
            self._desks.move_to_end(visitor)
            while len(self._desks) > VISITORS:
                self._desks.popitem(last=False)
            return desk

    def clear(self, visitor: str) -> None:
        with self._lock:
            self._desks.pop(visitor, None)


def uploaded(path: Any) -> Path:
    """A file that came through the page's own upload. Raises ValueError for every other path."""
    file = Path(str(path)).resolve()
    if Path(get_upload_folder()).resolve() not in file.parents or not file.is_file():
        raise ValueError("this file is not among those that were uploaded; choose it again")
    return file


def thumb(picture: Picture) -> str:
    small = picture.image.copy()
    small.thumbnail((THUMB, THUMB))
    return address(small)


def address(image: Image.Image) -> str:
    """The image itself as an address for the browser."""
    file = BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _text(message: dict[str, Any]) -> str:
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")
