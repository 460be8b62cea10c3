"""What the kinds of changes share: where a text's parts stand, and where random controls are drawn from.

Letters: T positions, v channels of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from workbench.runs import Run


class NoControl(ValueError):
    """Nothing of the same size is left to draw a control from."""


@dataclass
class Draw:
    """Where controls are drawn from: what is not in `taken`, by kind."""

    rng: np.random.Generator
    run: Run
    taken: dict[str, set[Any]]

    def pick(self, kind: str, count: int, pools: Iterable[list[Any]]) -> list[Any]:
        """`count` of the first pool that has as many left, in order. Raises NoControl if none has."""
        taken = self.taken.setdefault(kind, set())
        for pool in pools:
            left = [one for one in pool if one not in taken]
            if len(left) >= count:
                found = [left[at] for at in sorted(self.rng.choice(len(left), count, replace=False))]
                taken.update(found)
                return found
        raise NoControl(f"there are not {count} other {kind} left to draw from")


def belongs(role: str, name: str) -> bool:
    """Whether a role of a run is the part of that name: "question", "picture" (any of them), "picture 1", ..."""
    wanted = "user" if name == "question" else name.replace("picture", "image")
    return role == wanted or role.startswith(f"{wanted} ")


@dataclass(frozen=True)
class Text:
    """Where the parts of a conversation stand. `answer` is the first position of the answer, None while it is unknown."""

    roles: Sequence[str]
    prompt: int
    answer: int | None

    def queries(self, name: str, keys: Any) -> Any:
        """Positions that look; a position that writes a word stands one before it. None: not known yet."""
        if name in ("thought", "answer"):
            if self.answer is None:
                return slice(self.prompt - 1, None) if name == "thought" else None
            return list(range(self.prompt - 1, self.answer - 1)) if name == "thought" else slice(self.answer - 1, None)
        if name == "reply":
            return slice(self.prompt - 1, None)
        return slice(max(keys) + 1, None) if name == "everything" else self.keys(name)

    def keys(self, name: str) -> list[int] | None:
        """Positions that are looked at."""
        if name == "thought":
            return None if self.answer is None else list(range(self.prompt, self.answer))
        return [at for at, role in enumerate(self.roles[: self.prompt]) if belongs(role, name)]


@dataclass(frozen=True)
class Making:
    """What it takes to make changes: the run they are about, where its text stands now, and means of heads."""

    run: Run
    text: Text
    head_means: Any  # (layer, heads) -> (len(heads), v)
