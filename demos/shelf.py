"""The runs that the page can be asked about: the last few of each visitor, and the example everybody starts from."""

from __future__ import annotations

import threading
from collections import OrderedDict

from workbench.runs import Run

EVERYBODY = ""
RUNS_EACH = 8
VISITORS = 64


class Shelf:
    """Run ids are "1", "2", ... over all visitors; nobody reaches another visitor's runs."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, OrderedDict[str, Run]] = OrderedDict()
        self._count = 0
        self._lock = threading.Lock()

    def put(self, visitor: str, run: Run) -> str:
        """Keeps a run and returns its id; a visitor's oldest run goes, and so does whoever was longest away."""
        with self._lock:
            self._count += 1
            own = self._runs.setdefault(visitor, OrderedDict())
            own[str(self._count)] = run
            if len(own) > RUNS_EACH:
                own.popitem(last=False)
            self._runs.move_to_end(visitor)
            while len(self._runs) > VISITORS:
                self._runs.pop(next(name for name in self._runs if name != EVERYBODY))
            return str(self._count)

    def get(self, visitor: str, id: str) -> Run:
        """Raises ValueError if this visitor has no such run (any more)."""
        with self._lock:
            for owner in (visitor, EVERYBODY):
                if id in self._runs.get(owner, {}):
                    return self._runs[owner][id]
        raise ValueError("This run is no longer kept by the page; ask the question again.")
