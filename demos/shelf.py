"""The runs that the page can be asked about: the last few of each visitor, and the example everybody starts from."""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

from workbench.runs import Run

EVERYBODY = ""
RUNS_EACH = 8
VISITORS = 64


class Shelf:
    """Run ids are "1", "2", ... over all visitors; nobody reaches another visitor's runs."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, OrderedDict[str, tuple[Run, Any]]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def put(self, visitor: str, run: Run, drawn: Any = None) -> str:
        """Keeps a run and returns its id; the one a visitor has not used for longest goes, and so does whoever was
        longest away.

        drawn: of which scene it speaks, so that the answers of runs made from it can be checked too; None if not known.
        """
        with self._lock:
            self._count += 1
            own = self._runs.setdefault(visitor, OrderedDict())
            own[str(self._count)] = run, drawn
            if len(own) > RUNS_EACH:
                own.popitem(last=False)
            self._runs.move_to_end(visitor)
            while len(self._runs) > VISITORS:
                self._runs.pop(next(name for name in self._runs if name != EVERYBODY))
            return str(self._count)

    def get(self, visitor: str, id: str) -> tuple[Run, Any]:
        """The run and what was given with it. Raises ValueError if this visitor has no such run (any more)."""
        with self._lock:
            for owner in (visitor, EVERYBODY):
                if id in self._runs.get(owner, {}):
                    self._runs[owner].move_to_end(id)  # what is looked at stays
                    return self._runs[owner][id]
        raise ValueError("This run is no longer kept by the page; ask the question again.")

    def own(self, visitor: str) -> dict[str, Run]:
        """What a visitor can choose among, by id, oldest first; the example is among them."""
        with self._lock:
            runs = {id: run for owner in (EVERYBODY, visitor) for id, (run, _) in self._runs.get(owner, {}).items()}
        return dict(sorted(runs.items(), key=lambda pair: int(pair[0])))

    def clear(self, visitor: str) -> None:
        with self._lock:
            self._runs.pop(visitor, None)
