"""Faults: a kill at any moment loses nothing earlier, a full disk and a full memory are a sentence, the page lives on."""

# ruff: noqa: F811  (fixtures are imported by the name under which tests ask for them)
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import pytest
import torch

from demos.page import Page
from test_bad_input import ANNA, ask, event, made, sentence_of, still_there  # noqa: F401, a fixture among them
from workbench import cli
from workbench.memory import ran_out
from workbench.study import train

HERE = Path(__file__).parent


def in_a_process(script: str, *arguments: object) -> str:
    """What a script of this file prints; it forks, which is cheap there and would copy pytest here."""
    begin = f"import sys; sys.path[:0] = [{str(HERE.parent)!r}, {str(HERE)!r}]\nimport torch; torch.set_num_threads(1)\n"
    command = [sys.executable, "-c", begin + script, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# --- kills ---------------------------------------------------------------------------------------------------------------

KILL = """
import os, random, signal, time

def killed(work, least, most, ready=lambda: True):
    '''Does work in a child until it is killed, so many seconds after it is ready, or is done: whether it was killed.'''
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:
            print(repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    until = None
    while until is None or time.monotonic() < until:
        if until is None and ready():
            until = time.monotonic() + random.uniform(least, most)
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert status == 0, status
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True
"""

CHECKPOINTS = (
    KILL
    + """
from kimi_vl_ref import TINY, KimiVL, load_checkpoint, save_checkpoint
folder, seed, shard = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
random.seed(seed)
model = KimiVL(TINY).requires_grad_(False)

def saves(first):
    for number in range(first, first + 1000):  # all numbers of save n are n
        for tensor in model.state_dict().values():
            tensor.fill_(number % 128)
        save_checkpoint(model, folder, max_shard_bytes=shard)

model.eval()
for tensor in model.state_dict().values():
    tensor.fill_(0)
save_checkpoint(model, folder, max_shard_bytes=shard)
began = time.monotonic()
save_checkpoint(model, folder, max_shard_bytes=shard)
longest = max(0.06, 5 * (time.monotonic() - began))  # some saves end in it, also on a busy machine
seen = set()
for turn in range(25):
    killed(lambda: saves(turn), 0.0, longest)
    found = {float(value) for tensor in load_checkpoint(folder).state_dict().values() for value in tensor.unique()}
    assert len(found) == 1, f"weights of the saves {found} are mixed"
    seen |= found
print(len(seen))
"""
)


@pytest.mark.parametrize(("seed", "shard"), [(0, 100_000), (1, 30_000), (2, 10**9)])
def test_a_kill_while_weights_are_saved_leaves_the_earlier_or_the_new_ones(seed: int, shard: int, tmp_path: Path) -> None:
    assert int(in_a_process(CHECKPOINTS, tmp_path, seed, shard)) > 1  # some saves came to their end
    left = {file.name for file in tmp_path.iterdir() if not file.name.endswith(".part")}
    assert {"config.json"} < left


RUN = (
    KILL
    + """
from dataclasses import replace
from pathlib import Path
from tiny import picture, question, talking_model, tiny_chat
from workbench.runs import Run, record
random.seed(int(sys.argv[2]))
path = Path(sys.argv[1]) / "one.run"
*_, run = record(talking_model(), tiny_chat(), question("count", picture(280, 280)), model_name="t", max_new_tokens=2)

def saves():
    for number in range(1000):
        replace(run, model_name=f"save {number}", answer=f"save {number}").save(path)

replace(run, model_name="save 0", answer="save 0").save(path)
kills = 0
for turn in range(15):
    kills += killed(saves, 0.0, 0.08)
    back = Run.load(path)  # refuses what is not whole
    assert back.model_name == back.answer
print(kills)
"""
)


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_while_a_run_is_saved_leaves_the_earlier_run_or_the_new_one(seed: int, tmp_path: Path) -> None:
    assert int(in_a_process(RUN, tmp_path, seed)) > 10


SWEEP = (
    KILL
    + """
from pathlib import Path
from workbench.sweeps import sweep
path = Path(sys.argv[1]) / "sweep.jsonl"
random.seed(int(sys.argv[2]))
cases = [{"number": number} for number in range(60)]

def measure(shared, case):
    time.sleep(0.004)
    return {"square": case["number"] ** 2, "text": "x" * 5000}

def whole():
    return path.read_bytes().rpartition(b"\\n")[0].splitlines() if path.exists() else []

def prepare():
    return None

run = lambda: sweep(cases, setup="__main__:prepare", work="__main__:measure", path=path, workers=1, progress=False)
kills, before = 0, []
while killed(run, 0.0, 0.15):
    kills, now = kills + 1, whole()
    assert now[: len(before)] == before  # no finished case was lost or done again
    before = now
assert [result["square"] for result in run().done()] == [case["number"] ** 2 for case in cases]
assert len(whole()) == 61
print(kills)
"""
)


@pytest.mark.parametrize("seed", range(2))
def test_a_sweep_that_is_killed_again_and_again_loses_no_case_and_comes_to_its_end(seed: int, tmp_path: Path) -> None:
    assert int(in_a_process(SWEEP, tmp_path, seed)) > 0


TRAINING = (
    KILL
    + """
import shutil
from pathlib import Path
from safetensors.torch import load_file
from workbench.study import train
from workbench.study.batches import Mix
random.seed(int(sys.argv[2]))
quick = (train.Stage("all", 4, Mix({"any": 1.0}, {"name": 1}, ("first",)), batch=2, rate=1e-3, warm=1, dense=0.1),)
whole, parts = Path(sys.argv[1]) / "whole", Path(sys.argv[1]) / "parts"
whole.mkdir()
train.prepare(whole)
shutil.copytree(whole, parts)

def trained(out):
    train.Run(out, 0, 0, 1, quick).train(save_every=1)

began = time.monotonic()
assert not killed(lambda: trained(whole), 500, 500)
a_step, kills = (time.monotonic() - began) / 4, 0
for turn in range(1, 4):  # somewhere in each step after the first, however fast the machine has become
    saved = lambda: (parts / f"state-0-{turn}.safetensors").exists()
    kills += killed(lambda: trained(parts), 0.0, 0.3 * a_step, ready=saved)
assert not killed(lambda: trained(parts), 500, 500)
one, other = (load_file(out / "state-1-0.safetensors") for out in (whole, parts))
assert one.keys() == other.keys()
assert all(torch.equal(one[name], other[name]) for name in one)
print(kills)
"""
)


def test_training_that_is_killed_goes_on_to_the_same_weights(tmp_path: Path) -> None:
    assert int(in_a_process(TRAINING, tmp_path, 0)) > 0


# --- a full disk ---------------------------------------------------------------------------------------------------------

FULL = """
import json, resource
from pathlib import Path
from kimi_vl_ref import TINY, CheckpointError, KimiVL, load_checkpoint, save_checkpoint
from tiny import picture, question, talking_model, tiny_chat
from workbench.run_files import RunError
from workbench.runs import Run, record
from workbench.sweeps import SweepError, sweep
here = Path(sys.argv[1])

def measure(shared, case):
    return {"text": "x" * case["long"]}

def prepare():
    return None

def all_files():
    return {str(file): file.read_bytes() for file in here.rglob("*") if file.is_file() and not file.name.endswith(".jsonl")}

model = KimiVL(TINY).requires_grad_(False)
for tensor in model.state_dict().values():
    tensor.fill_(1)
save_checkpoint(model, here / "single")
save_checkpoint(model, here / "several", max_shard_bytes=100_000)
*_, run = record(talking_model(), tiny_chat(), question("count", picture(280, 280)), model_name="t", max_new_tokens=2)
run.save(here / "one.run")
before = all_files()
lines = {"setup": "__main__:prepare", "work": "__main__:measure", "path": here / "sweep.jsonl", "workers": 1, "progress": False}
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))  # no file grows beyond, as on a full disk
for tensor in model.state_dict().values():
    tensor.fill_(2)
cases = [{"long": 10}, {"long": 50_000}, {"long": 20}]
deeds = {
    "single": (CheckpointError, lambda: save_checkpoint(model, here / "single")),
    "several": (CheckpointError, lambda: save_checkpoint(model, here / "several", max_shard_bytes=100_000)),
    "one.run": (RunError, lambda: run.save(here / "one.run")),
    "sweep.jsonl": (SweepError, lambda: sweep(cases, **lines)),
}
told = {}
for name, (kind, deed) in deeds.items():
    try:
        deed()
    except kind as error:
        told[name] = str(error)
assert all_files() == before, all_files().keys() ^ before.keys()
for folder in ("single", "several"):
    assert all((tensor == 1).all() for tensor in load_checkpoint(here / folder).state_dict().values())
Run.load(here / "one.run")
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert [len(result["text"]) for result in sweep(cases, **lines).done()] == [10, 50_000, 20]
print(json.dumps(told))
"""


def test_a_full_disk_is_a_sentence_and_what_was_there_stays(tmp_path: Path) -> None:
    import json

    told = json.loads(in_a_process(FULL, tmp_path))
    assert told.keys() == {"single", "several", "one.run", "sweep.jsonl"}
    for name, sentence in told.items():
        sentence_of(ValueError(sentence), name, "room")


def test_a_page_without_room_for_files_shows_the_answer_all_the_same(made: Page, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    warned: list[str] = []
    monkeypatch.setattr(Path, "write_text", full)
    monkeypatch.setattr(gr, "Warning", warned.append)
    assert ask(made)[-1][0]["kind"] == "run"
    assert len(warned) == 1 and "No space left" in warned[0] and "make room" in warned[0]


def test_training_on_a_full_disk_keeps_its_last_state_and_says_how_to_go_on(tmp_path: Path, monkeypatch) -> None:
    """The state's own file is written first, so that the pointer never names one that is not whole."""

    def full(_tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    run, nothing = object.__new__(train.Run), SimpleNamespace(state_dict=dict, state=dict)
    vars(run).update(out=tmp_path, rank=0, progress=train.Progress(1, 5), heads=nothing, optimiser=nothing)
    monkeypatch.setattr(run, "weights", dict)
    monkeypatch.setattr(train, "save_file", full)
    (tmp_path / "state.json").write_text("the earlier one")
    with pytest.raises(ValueError) as caught:
        run.save()
    sentence_of(caught.value, str(tmp_path), "No space left", "the same command")
    assert [file.name for file in tmp_path.iterdir()] == ["state.json"]
    assert (tmp_path / "state.json").read_text() == "the earlier one"


# --- a full memory -------------------------------------------------------------------------------------------------------

NO_MEMORY: dict[str, BaseException] = {
    "a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 79 GiB."),
    "a CPU": RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you"),
    "a CPU, otherwise": RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
    "Python": MemoryError(),
}


def breaks(error: BaseException) -> Any:
    def call(*_: object, **__: object) -> Any:
        raise error

    return call


@pytest.mark.parametrize("name", NO_MEMORY)
def test_a_page_without_memory_says_the_remedy_and_answers_the_next_question(name: str, made: Page) -> None:
    model = made.session.model
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model.decoder), "forward", breaks(NO_MEMORY[name]))
        with pytest.raises(gr.Error) as caught:
            ask(made, "hello")
        sentence_of(caught.value, "smaller pictures")
    still_there(made)


@pytest.mark.parametrize("name", NO_MEMORY)
def test_a_panel_without_memory_says_the_remedy_and_the_page_lives_on(name: str, made: Page) -> None:
    run, told = next(iter(made.shelf.own("anna"))), {}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(gr.Error), torch.inference_mode():
        patch.setattr(type(made.session.model.decoder), "forward", breaks(NO_MEMORY[name]))
        for told in made.act(event({"name": "lens", "id": 7, "run": run, "args": {"first": 0, "last": 3}}), ANNA):  # noqa: B007
            pass
    sentence_of(ValueError(told["error"]), "smaller pictures")
    still_there(made)


@pytest.mark.parametrize("name", NO_MEMORY)
def test_a_command_without_memory_says_the_remedy(name: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("kimi_vl_ref.load", breaks(NO_MEMORY[name]))
    assert cli.main(["chat", "hello"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("kimi-vl: memory ran out; ") and err.count("\n") == 1


def test_other_faults_are_not_taken_for_a_full_memory() -> None:
    others = RuntimeError("shapes differ"), ValueError("out of memory cards"), OSError(28, "No space left")
    assert not any(map(ran_out, others))


# --- waiting -------------------------------------------------------------------------------------------------------------


def test_visitors_are_served_in_the_order_in_which_they_came_and_who_leaves_is_passed_over(made: Page) -> None:
    """A lock alone would be taken by whoever asks at the right moment, and somebody could wait for ever."""
    session, served = made.session, []

    def work(name: str) -> Any:
        def run(_stop: object) -> Iterator[str]:
            served.append(name)
            yield name

        return session.serve(name, run)

    first, *others = [work(name) for name in ("anna", "ben", "carl", "dora")]
    assert next(first) == "anna"
    assert [next(one) for one in others] == [None, None, None]
    others[1].close()  # carl leaves while he waits
    assert list(first) == []
    assert next(others[2]) is None  # ben came before
    assert next(others[0]) == "ben" and list(others[0]) == []
    assert next(others[2]) == "dora" and served == ["anna", "ben", "dora"]
