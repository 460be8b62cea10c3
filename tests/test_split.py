"""A model whose experts are spread over processes: gloo between processes of a CPU stands in for NCCL between GPUs."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kimi_vl_ref import TINY, KimiVL, checkpoint_folder, load_checkpoint, save_checkpoint
from kimi_vl_ref.chat import Inputs
from kimi_vl_ref.experts import SeparateExperts
from kimi_vl_ref.generate import generate
from kimi_vl_ref.group import in_processes
from kimi_vl_ref.split import SplitExperts, load_split
from tiny import tiny_inputs, tiny_model
from workbench import cli
from workbench.study.families import make


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("split")
    save_checkpoint(tiny_model(seed=5), folder)
    return folder


def written(model: KimiVL) -> tuple[torch.Tensor, list[list[int | None]]]:
    """The stream of a prompt with pictures, and eight sampled tokens of two rows."""
    ids, pixel_values, grids = tiny_inputs()
    inputs = Inputs(ids, torch.tensor([19, 12]), pixel_values, grids, [])
    with torch.inference_mode():
        stream = model(ids, pixel_values, grids)
    steps = generate(model, inputs, max_new_tokens=8, temperature=1.0, seed=3, prefill_chunk=5)
    return stream, [step.tokens for step in steps]


def work(rank: int, device: str, folder: Path, ranks: int, out: Path) -> None:
    model = load_split(folder, rank, ranks, device, torch.float32)
    experts = [module for module in model.modules() if isinstance(module, SplitExperts)]
    stream, tokens = written(model)
    save_file({"stream": stream.contiguous()}, out / f"{rank}.safetensors")
    held = [len(one.here.down) for one in experts]
    (out / f"{rank}.json").write_text(json.dumps({"tokens": tokens, "held": held, "first": experts[0].first}))


def refuse(rank: int, device: str) -> None:
    if rank == 1:
        raise ValueError("rank 1 does not like this")
    torch.distributed.barrier()


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_that_share_the_experts_write_what_one_writes(folder: Path, ranks: int, tmp_path: Path) -> None:
    in_processes(ranks, work, folder, ranks, tmp_path, on_gpus=False)
    stream, tokens = written(load_checkpoint(folder, dtype=torch.float32))
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    for rank in range(ranks):
        found = load_file(tmp_path / f"{rank}.safetensors")["stream"]
        torch.testing.assert_close(found, stream, rtol=1e-4, atol=1e-5)
        assert told[rank]["tokens"] == tokens
    # nobody holds more than a share, and together they hold every expert once
    experts, layers = TINY.text.n_routed_experts, len(told[0]["held"])
    assert [sum(one["held"][layer] for one in told) for layer in range(layers)] == [experts] * layers
    assert max(max(one["held"]) for one in told) <= -(-experts // ranks)
    assert [one["first"] for one in told] == [experts * rank // ranks for rank in range(ranks)]


def test_the_command_says_the_same_with_and_without(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    scene, question = make("count", 4)
    picture = tmp_path / "scene.png"
    scene.image.save(picture)
    given = ["chat", question.text, "--image", str(picture), "--max-tokens", "12"]
    assert cli.main(given) == 0
    alone = capfd.readouterr()
    assert cli.main([*given, "--split", "2"]) == 0
    split = capfd.readouterr()
    assert split.out == alone.out and alone.out.strip()
    assert "(cut off after 12 tokens)" in split.err and "(cut off after 12 tokens)" in alone.err


def test_a_refusal_in_one_process_is_one_sentence_here() -> None:
    with pytest.raises(ValueError, match="^rank 1 does not like this$"):
        in_processes(2, refuse, on_gpus=False)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["--split", "17"], "17 processes cannot share 16 experts; use 1 to 16"),
        (["--split", "2", "--fit", "int8"], "give one of them"),
        (["--split", "2", "--image", "nowhere.png"], "nowhere.png"),
        (["--split", "2", "--model", "nowhere"], "nowhere is not a folder"),
    ],
)
def test_bad_input_is_refused_before_any_process_starts(
    given: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workbench.together.in_processes", lambda *_, **__: pytest.fail("a process was started"))
    assert cli.main(["chat", "what is this?", *given]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_damaged_shard_is_one_sentence(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    broken = shutil.copytree(checkpoint_folder("study"), tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1000])
    assert cli.main(["chat", "what is this?", "--split", "2", "--model", str(broken)]) == 2
    assert "cannot be read as safetensors" in capfd.readouterr().err


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("kimi_vl_ref.group.spawn", lambda *_, args, nprocs: started.append(nprocs))
    started: list[int] = []
    in_processes(2, work, on_gpus=True)
    with pytest.raises(ValueError, match="3 processes need a GPU each and this computer has 2; use at most 2"):
        in_processes(3, work, on_gpus=True)
    assert started == [2]


def test_a_part_cannot_be_saved_as_the_whole(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ffn\.experts\.here is kept in part.*load it whole"):
        save_checkpoint(load_split(folder, 0, 2, "cpu", torch.float32), tmp_path / "out")


def test_an_expert_of_nobody_here_writes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """All tokens choose experts of other processes: zeros, until the others add theirs."""
    monkeypatch.setattr("torch.distributed.all_reduce", lambda tensor: None)
    experts = SeparateExperts(TINY.text)
    split = SplitExperts(experts, range(2, 4))
    x = torch.randn(1, 3, TINY.text.hidden_size)
    chosen = torch.tensor([[[0, 1], [1, 0], [0, 1]]])
    assert not split(x, chosen, torch.ones(1, 3, 2)).any()
    chosen[0, 1, 0] = 3
    expected = experts(x, torch.full((1, 3, 1), 3), torch.ones(1, 3, 1))
    found = split(x, chosen, torch.ones(1, 3, 2))
    torch.testing.assert_close(found[0, 1], expected[0, 1])
    assert not found[0, [0, 2]].any()


WAITING = """
import sys, time
from pathlib import Path
from kimi_vl_ref.group import in_processes

def wait(rank, device, folder):
    Path(folder, str(rank)).touch()
    time.sleep(600)

if __name__ == "__main__":
    in_processes(2, wait, sys.argv[1], on_gpus=False)
"""


def test_processes_do_not_outlive_the_one_that_started_them(tmp_path: Path) -> None:
    (tmp_path / "waiting.py").write_text(WAITING)
    # as a shell starts a command in its background: interrupts are ignored
    command = [sys.executable, str(tmp_path / "waiting.py"), str(tmp_path)]
    ignoring = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    started = subprocess.Popen([sys.executable, "-c", ignoring, *command], stdout=subprocess.PIPE)
    while not all((tmp_path / str(rank)).exists() for rank in (0, 1)):
        assert started.poll() is None
        time.sleep(0.1)
    started.kill()
    started.communicate(timeout=60)  # their common output ends only when the last of them does
