"""What an act is given, and what several of them do with a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from kimi_vl_ref import KimiVL, Reply
from kimi_vl_ref.told import shown
from workbench.runs import Run, fingerprint

from ..session import Session

FRAME = 0.2  # seconds between two notes of progress
SAMPLING = ("max_new_tokens", "temperature", "top_p", "thought_budget")


def number(value: Any, name: str, low: float, high: float) -> float:
    """A value as it came from a browser. Raises ValueError for what is no number from low to high."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"{name} is {shown(value)}; choose a number from {low:g} to {high:g}")
    return value


@dataclass(frozen=True)
class Asked:
    """A question of a panel: about which run, with which settings. `args` come from a browser: check them."""

    session: Session
    run: Run
    args: dict[str, Any]
    should_stop: Callable[[], bool]
    keep: Callable[[Run], str]  # puts a new run on the visitor's shelf and returns its id
    # an answer to the run's own question -> {"family", "answer", "right"}; None where the truth is not known
    truth: Callable[[str], dict[str, Any] | None] = lambda _answer: None
    shelf: Callable[[], Mapping[str, Run]] = dict  # the visitor's runs by id
    view: Callable[[str], dict[str, Any]] = lambda id: {"id": id}  # what the viewer shows of one of them

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A number among the args. Raises ValueError if it is missing (and has no default), no number or out of range."""
        return number(self.args.get(name, default), name, low, high)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number among the args, in low..high. Raises ValueError like `number`."""
        value = self.number(name, low, high, default)
        if value != int(value):
            raise ValueError(f"{name} is {shown(value)}; choose a whole number from {low} to {high}")
        return int(value)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        """One of a few words among the args. Raises ValueError for another."""
        value = self.args.get(name)
        if value not in choices:
            raise ValueError(f"{name} is {shown(value)}; choose one of {', '.join(choices)}")
        return value


Act = Callable[[Asked], Iterator[dict[str, Any]]]


def sampling(run: Run) -> dict[str, Any]:
    """How a run was sampled, as options of `record`."""
    return {"seed": run.seed, **{name: run.settings[name] for name in SAMPLING if name in run.settings}}


def same_weights(model: KimiVL, run: Run) -> None:
    """Raises ValueError for a run of other weights than the model has."""
    recorded, here = run.versions.get("weights"), fingerprint(model)
    if recorded not in (None, here):
        raise ValueError(f"this run was recorded with other weights ({recorded}, here {here}); ask its question here first")


def in_force(run: Run) -> list[str]:
    """The lines of what was changed while a run was recorded. A reply that was begun by hand changes no weight."""
    return run.edits[:-1] if "begin" in run.settings else run.edits  # its line is the last


def noted(writing: Iterator[Reply | Run], note: str) -> Generator[dict[str, Any], None, Run]:
    """Yields {"note"} now and then while `record` writes, `note` with the number of tokens for {}; returns the Run."""
    shown, run = 0.0, None
    for item in writing:
        if isinstance(item, Run):
            run = item
        elif time.monotonic() - shown > FRAME:
            shown = time.monotonic()
            yield {"note": note.format(len(item.token_ids))}
    assert run is not None
    return run
