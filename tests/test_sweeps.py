"""A sweep gives the same table whatever happens on the way: workers, a stop, Ctrl-C, a kill, half a line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from workbench.sweeps import Sweep, SweepError, sweep

HERE = Path(__file__).parent
CASES = [{"number": number} for number in range(24)]
DONE = [{"square": number**2 + 1} for number in range(24)]


# --- what the workers run: they import this file -------------------------------------------------------------------------


def prepare(add: int = 1, pids: str = "") -> dict[str, Any]:
    return {"add": add, "pids": pids}


def measure(shared: dict[str, Any], case: dict[str, Any]) -> dict[str, Any]:
    if shared["pids"]:
        (Path(shared["pids"]) / str(os.getpid())).touch()
        time.sleep(0.05)
    if case["number"] < 0:
        raise ValueError("a negative number")
    if case["number"] > 1000:
        os._exit(9)
    return {"square": case["number"] ** 2 + shared["add"]}


def prepare_model() -> Any:
    from tiny import tiny_inputs, tiny_model

    return tiny_model(), tiny_inputs()


def measure_model(shared: Any, case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from workbench.tape import attach

    model, inputs = shared
    site = f"decoder.layers.{case['layer']}.ffn.router.weights"
    with torch.no_grad(), attach(model, edit={site: lambda weights, _: weights * case["by"]}):
        logits = model.logits(model(*inputs)).log_softmax(-1)
    return {"logprobs": logits[0, -1].tolist(), "threads": torch.get_num_threads()}


def run(path: Path, workers: int = 1, cases: list[dict] = CASES, **options: Any) -> Sweep:
    names = {"setup": "test_sweeps:prepare", "work": "test_sweeps:measure"}
    return sweep(cases, **{**names, "path": path, "workers": workers, "progress": False, **options})


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


# --- the facts -----------------------------------------------------------------------------------------------------------


def test_every_case_has_its_result_in_order(tmp_path: Path) -> None:
    found = run(tmp_path / "a" / "sweep.jsonl")
    assert found.finished and found.done() == DONE and found.cases == CASES
    assert len(lines(tmp_path / "a" / "sweep.jsonl")) == 25


def test_two_workers_give_the_bits_of_one(tmp_path: Path) -> None:
    cases = [{"layer": layer, "by": by} for layer in (1, 2) for by in (0.0, 0.5, 2.0)]
    names = {"setup": "test_sweeps:prepare_model", "work": "test_sweeps:measure_model"}
    one, two = (run(tmp_path / str(n), n, cases, **names).done() for n in (1, 2))
    assert one == two and all(result["threads"] == 1 for result in one)
    assert one[0]["logprobs"] != one[1]["logprobs"]


def test_a_finished_sweep_is_read_and_not_done_again(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run(path)
    entry = json.loads(lines(path)[3])
    entry["result"]["square"] = -5  # no work would give this
    path.write_bytes(b"".join([*lines(path)[:3], json.dumps(entry).encode() + b"\n", *lines(path)[4:]]))
    assert run(path).results[entry["case"]] == {"square": -5}


@pytest.mark.parametrize("cut", [1, 5, 17])
def test_a_line_that_was_cut_off_is_done_again(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "sweep.jsonl"
    run(path)
    path.write_bytes(path.read_bytes()[:-cut])
    assert run(path).done() == DONE
    assert len(lines(path)) == 25 and all(json.loads(line) for line in lines(path))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_stop_keeps_what_is_done_and_the_rest_follows(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "sweep.jsonl"
    stopped = run(path, workers, should_stop=lambda: len(lines(path)) > 5)
    assert not stopped.finished and 5 <= sum(result is not None for result in stopped.results) < 24
    with pytest.raises(SweepError, match=r"of 24 cases are still to do; run the sweep again"):
        stopped.done()
    assert run(path).done() == DONE


@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_leaves_whole_lines(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "sweep.jsonl"

    def interrupt() -> bool:
        if path.exists() and len(lines(path)) > 5:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        run(path, workers, should_stop=interrupt)
    assert 6 <= len(lines(path)) < 25
    assert run(path).done() == DONE


def test_a_killed_sweep_leaves_no_worker_and_ends_with_the_same_table(tmp_path: Path) -> None:
    path, pids = tmp_path / "sweep.jsonl", tmp_path / "pids"
    pids.mkdir()
    script = (
        f"import sys; sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]\n"
        "from pathlib import Path; from test_sweeps import run\n"
        f"if __name__ == '__main__': run(Path({str(path)!r}), 2, settings={{'pids': {str(pids)!r}}})\n"
    )
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen([sys.executable, str(tmp_path / "script.py")])
    while process.poll() is None and not (path.exists() and len(lines(path)) > 4):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL  # it was not done yet
    assert len(lines(path)) < 25
    workers = [int(one.name) for one in pids.iterdir()]
    assert workers and os.getpid() not in workers
    until = time.monotonic() + 30
    while (alive := [pid for pid in workers if running(pid)]) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive
    with open(path, "ab") as file:
        file.write(b'{"case": 23, "resu')  # as if the kill had come in the middle of a line
    assert run(path, settings={"pids": str(pids)}).done() == DONE


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] != "Z"


# --- what is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_a_case_that_fails_is_named(tmp_path: Path, workers: int) -> None:
    path = tmp_path / "sweep.jsonl"
    with pytest.raises(SweepError, match=r"case 1 \{'number': -3\} failed: ValueError: a negative number"):
        run(path, workers, [{"number": 2}, {"number": -3}])


def test_a_worker_that_dies_is_reported(tmp_path: Path) -> None:
    with pytest.raises(SweepError, match="a worker died"):
        run(tmp_path / "sweep.jsonl", 2, [{"number": 2}, {"number": 2000}])


def test_a_file_of_another_sweep_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run(path)
    before = path.read_bytes()
    for changes in ({"settings": {"add": 2}}, {"cases": CASES[:5]}, {"work": "test_sweeps:prepare"}):
        with pytest.raises(SweepError, match="holds another sweep"):
            run(path, **changes)
    assert path.read_bytes() == before


def test_a_damaged_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    run(path)
    whole = lines(path)
    path.write_bytes(b"".join([*whole[:4], b"{nonsense\n", *whole[5:]]))
    with pytest.raises(SweepError, match="line 5: damaged"):
        run(path)
    path.write_bytes(b"".join([*whole[:4], b'{"case": 99, "result": {}}\n', *whole[5:]]))
    with pytest.raises(SweepError, match="line 5: not a result of this sweep"):
        run(path)


def test_two_sweeps_do_not_write_one_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"

    def second() -> bool:
        with pytest.raises(SweepError, match="is being written by another sweep"):
            run(path)
        return False

    assert run(path, should_stop=second).done() == DONE


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"workers": 0}, "workers=0"),
        ({"work": "measure"}, "write it as 'module:function'"),
        ({"work": "test_sweeps:nothing"}, "cannot be imported"),
        ({"work": "__main__:measure", "workers": 2}, "move it to a module"),
        ({"cases": [{"number": {1, 2}}]}, "plain JSON"),
        ({"work": "test_sweeps:give_a_set"}, "cannot be written as JSON"),
        ({"work": "test_sweeps:give_a_list"}, "return a dictionary"),
    ],
)
def test_what_cannot_be_swept_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SweepError, match=message):
        run(tmp_path / "sweep.jsonl", **changes)


def give_a_set(shared: Any, case: Any) -> dict[str, Any]:
    return {"numbers": {1, 2}}


def give_a_list(shared: Any, case: Any) -> list[int]:
    return [1]
