"""What an act is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from workbench.runs import Run

from ..session import Session


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
        value = self.args.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise ValueError(f"{name} is {value!r}; choose a number from {low:g} to {high:g}")
        return value

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """A whole number among the args, in low..high. Raises ValueError like `number`."""
        value = self.number(name, low, high, default)
        if value != int(value):
            raise ValueError(f"{name} is {value!r}; choose a whole number from {low} to {high}")
        return int(value)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        """One of a few words among the args. Raises ValueError for another."""
        value = self.args.get(name)
        if value not in choices:
            raise ValueError(f"{name} is {value!r}; choose one of {', '.join(choices)}")
        return value


Act = Callable[[Asked], Iterator[dict[str, Any]]]
