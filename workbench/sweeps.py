"""Many independent cases, such as every expert of every layer: counted down with progress, on several cores, stopped and gone
on with, and the same table in the end whatever happened on the way.

    table = sweep(cases, setup="my_lab:prepare", work="my_lab:measure", settings={"model": "study"}, path="sweep.jsonl")

`prepare(**settings)` runs once in every worker and returns whatever the cases share (a loaded model, its trials);
`measure(shared, case)` returns a dictionary for one case. Both are named as "module:function", since each worker is a process
of its own and imports them. A case and its result are plain JSON. Results are written to `path`, one line a case: a line is
there whole or not at all, so a killed sweep is run again with the same call and only does what is missing.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from kimi_vl_ref.told import cause, short

try:
    import fcntl
except ImportError:  # Windows, where nothing keeps two sweeps off one file
    fcntl = None

FORMAT = 1


class SweepError(ValueError):
    """A sweep that cannot start, go on or use the file it was given."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep found: one result a case, in the order of the cases; None where it was stopped before."""

    cases: list[dict[str, Any]]
    results: list[dict[str, Any] | None]

    @property
    def finished(self) -> bool:
        return all(result is not None for result in self.results)

    def done(self) -> list[dict[str, Any]]:
        """All results. Raises SweepError unless the sweep is finished."""
        missing = sum(result is None for result in self.results)
        if missing:
            raise SweepError(f"{missing} of {len(self.cases)} cases are still to do; run the sweep again with the same path")
        return [result for result in self.results if result is not None]


def sweep(
    cases: Sequence[Mapping[str, Any]],
    *,
    setup: str,
    work: str,
    settings: Mapping[str, Any] | None = None,
    path: str | Path,
    workers: int = 2,
    progress: bool = True,
    should_stop: Callable[[], bool] | None = None,
) -> Sweep:
    """Runs `work` on every case that `path` does not hold yet; the module's docstring says what the arguments are.

    workers      processes, with one thread each: torch's sums then have one order, and the numbers do not depend on how
                 many there are. 1 stays in this process.
    should_stop  asked before each case; once it says True, what has been started is finished and the rest left for later.
    Ctrl-C stops at once and is raised again; finished cases are in the file. Raises SweepError for a file of another sweep,
    a damaged one, a case that fails (named), or a worker that dies.
    """
    cases = [dict(case) for case in cases]
    if workers < 1:
        raise SweepError(f"workers={workers} would do nothing; use 1 or more")
    for name in (setup, work):
        _check_name(name, workers)
    settings = dict(settings or {})
    with _Journal(Path(path), _head(cases, setup, work, settings)) as journal:
        missing = [number for number in range(len(cases)) if number not in journal.results]
        if missing and not (should_stop is not None and should_stop()):
            run = _here if workers == 1 else _in_pool
            with tqdm(total=len(cases), initial=len(cases) - len(missing), disable=not progress, unit="case") as bar:
                for number, result in run(cases, missing, setup, work, settings, workers, should_stop):
                    journal.add(number, result)
                    bar.update()
        return Sweep(cases, [journal.results.get(number) for number in range(len(cases))])


# --- the file ------------------------------------------------------------------------------------------------------------


class _Journal:
    """A first line that says which sweep this is, then a line a finished case."""

    def __init__(self, path: Path, head: dict[str, Any]):
        self.path, self.head = path, head
        self.results: dict[int, dict[str, Any]] = {}

    def __enter__(self) -> _Journal:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(self.path, "a+b", buffering=0)  # closed in __exit__
        try:
            self._lock()
            self._read()
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()

    def _lock(self) -> None:
        """Keeps a second sweep off the file; the system lets go of the lock when this process ends, however it does."""
        if fcntl is None:
            return
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise SweepError(f"{self.path} is being written by another sweep; wait for it, or give another path") from error

    def _read(self) -> None:
        self.file.seek(0)
        data = self.file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self.file.truncate(whole)  # the line that a kill cut off; its case is done again
        lines = data[:whole].splitlines()
        if not lines:
            self._write(self.head)
            return
        if self._parse(lines[0], 1) != self.head:
            raise SweepError(
                f"{self.path} holds another sweep (other cases, settings or functions); give another path, or delete it"
            )
        for at, line in enumerate(lines[1:], start=2):
            entry = self._parse(line, at)
            if not isinstance(entry.get("result"), dict) or entry.get("case") not in range(self.head["cases"]):
                raise SweepError(f"{self.path}, line {at}: not a result of this sweep; delete the line and run again")
            self.results[entry["case"]] = entry["result"]

    def _parse(self, line: bytes, at: int) -> dict[str, Any]:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise SweepError(f"{self.path}, line {at}: damaged ({short(error)}); delete the line and run again") from error
        if not isinstance(entry, dict):
            raise SweepError(f"{self.path}, line {at}: not a JSON object; delete the line and run again")
        return entry

    def add(self, number: int, result: Any) -> None:
        if not isinstance(result, dict):
            raise SweepError(f"the work on case {number} returned {type(result).__name__}; return a dictionary")
        self._write({"case": number, "result": result})
        self.results[number] = json.loads(json.dumps(result))  # what a later run will read

    def _write(self, entry: dict[str, Any]) -> None:
        try:
            line = json.dumps(entry, sort_keys=True).encode() + b"\n"
        except TypeError as error:
            raise SweepError(f"a result cannot be written as JSON ({error}); return plain numbers, texts and lists") from error
        try:
            whole = self.file.write(line) == len(line)
            os.fsync(self.file.fileno())
        except OSError as error:
            raise SweepError(
                f"{self.path} could not be written ({cause(error)}); make room on the disk and run again"
            ) from error
        if not whole:
            raise SweepError(f"{self.path} could not be written to its end; make room on the disk and run again")


def _head(cases: list[dict[str, Any]], setup: str, work: str, settings: dict[str, Any]) -> dict[str, Any]:
    try:
        text = json.dumps(cases, sort_keys=True)
        settings = json.loads(json.dumps(settings))
    except TypeError as error:
        raise SweepError(f"cases and settings have to be plain JSON ({error}); use numbers, texts, lists") from error
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"sweep": FORMAT, "setup": setup, "work": work, "settings": settings, "cases": len(cases), "digest": digest}


# --- the work ------------------------------------------------------------------------------------------------------------

Found = Iterator[tuple[int, Any]]


def _here(
    cases: list[dict], missing: list[int], setup: str, work: str, settings: dict, workers: int, stop: Callable[[], bool] | None
) -> Found:
    with _one_thread():
        shared, measure = _function(setup)(**settings), _function(work)
        for at, number in enumerate(missing):
            if at and stop is not None and stop():
                return
            yield number, _measured(measure, shared, number, cases[number])


def _in_pool(
    cases: list[dict], missing: list[int], setup: str, work: str, settings: dict, workers: int, stop: Callable[[], bool] | None
) -> Found:
    workers = min(workers, len(missing))
    # spawned, not forked: a copy of a process that holds torch's threads may hang
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _begin, (setup, work, settings))
    try:
        waiting, running = iter(missing), dict[Future[Any], int]()
        stopped = False
        while True:
            while not stopped and len(running) < 2 * workers and (number := next(waiting, None)) is not None:
                running[pool.submit(_work, number, cases[number])] = number
            if not running:
                return
            finished, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in finished:
                yield running.pop(future), future.result()
            stopped = stopped or (stop is not None and stop())
    except BrokenProcessPool as error:
        raise SweepError(
            "a worker died (out of memory?) or could not start; what was finished is kept, "
            "run again to go on, with workers=1 to see why"
        ) from error
    except BaseException:  # Ctrl-C, a failed case, or a full disk: nothing that is still running is waited for
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


_SHARED: list[Any] = []  # of a worker: what setup returned, and the work


def _begin(setup: str, work: str, settings: dict[str, Any]) -> None:
    """A worker's start: it ends with its parent, leaves Ctrl-C to it, and computes on one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"  # for a torch that is imported later, by setup
    prepare, measure = _function(setup), _function(work)
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)
    _SHARED[:] = [prepare(**settings), measure]


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(number: int, case: dict[str, Any]) -> Any:
    shared, measure = _SHARED
    return _measured(measure, shared, number, case)


def _measured(measure: Callable[..., Any], shared: Any, number: int, case: dict[str, Any]) -> Any:
    try:
        return measure(shared, case)
    except Exception as error:
        raise SweepError(f"case {number} {case} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _one_thread() -> Iterator[None]:
    """This process on one thread, as a worker computes; afterwards as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _check_name(name: str, workers: int) -> None:
    module, colon, function = name.partition(":")
    if not colon or not module or not function:
        raise SweepError(f"{name!r} does not name a function; write it as 'module:function'")
    if module == "__main__" and workers > 1:
        raise SweepError(f"{name!r} is in the running script, where no worker finds it; move it to a module, or use workers=1")
    _function(name)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SweepError(f"{name!r} cannot be imported ({error}); write it as 'module:function'") from error
