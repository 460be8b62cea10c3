"""The benchmarks of speed at tiny sizes: every kind of work runs, and ways whose outputs differ are not timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import peers, speed, ways_process, ways_speed
from workbench import cli

pytest.importorskip("transformers")


@pytest.mark.parametrize(("work", "size"), [("prefill", 7), ("decode", 5), ("batch", 3), ("vision", 3)])
def test_a_contest_is_decided_between_equal_outputs(work: str, size: int) -> None:
    contest = ways_speed.CONTESTS[work]("tiny", size)
    found = speed.race(contest, rounds=2)
    assert found["best"] in contest.others
    assert found["low"] <= found["ratio"] <= found["high"]
    assert set(found["medians_ms"]) == {"ours", *contest.others, *contest.aside}
    assert found["rate"] == pytest.approx(1000 * contest.amount / contest.steps / found["ours_ms"])
    assert ("aside" in found) == (work == "vision")


@pytest.mark.parametrize("work", ["prefill", "decode", "batch", "vision"])
def test_another_output_is_refused(work: str) -> None:
    contest = ways_speed.CONTESTS[work]("tiny", 3)
    name, (make_ready, run) = next(iter(contest.others.items()))
    contest.others[name] = make_ready, lambda given: run(given) * 1.001
    with pytest.raises(speed.Mismatch, match="differs from ours by .*nothing is timed"):
        speed.race(contest, rounds=1)


@pytest.mark.parametrize("spoilt", [torch.full((2, 3), torch.nan), torch.ones(3, 2)])
def test_nan_and_another_shape_are_no_agreement(spoilt: torch.Tensor) -> None:
    with pytest.raises(speed.Mismatch):
        speed.agree("a peer", spoilt, torch.ones(2, 3))


def test_rows_of_a_ragged_batch_are_planted_alike() -> None:
    """The batch's steps, row by row alone, through the cache of one row."""
    net = peers.ours("tiny")
    planted, ids = peers.Planted(net, [2, 9, 5], 1), ways_speed.prompt(net, 3, 1)
    with torch.inference_mode():
        together = net(ids, cache=planted.ours())
        for row, length in enumerate((2, 9, 5)):
            alone = peers.Planted(net, [length], 1)
            alone.layers = [(latent[row : row + 1, :length], key[row : row + 1, :length]) for latent, key in planted.layers]
            torch.testing.assert_close(net(ids[row : row + 1], cache=alone.ours())[0], together[row])
    assert planted.mask(1).sum(1).tolist() == [3, 10, 6]


def test_a_row_runs_in_a_process_of_its_own_and_is_written_down(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = tmp_path / "decode.json"
    given = ["--config", "tiny", "--size", "6", "--rounds", "1", "--json", str(written)]
    assert cli.main(["bench", "decode", *given]) == 0
    (row,) = json.loads(written.read_text())["rows"]
    assert row["size"] == 6 and row["ours_ms"] > 0 and row["rounds"] == 1
    assert "| a token at context 6 |" in capsys.readouterr().out


def test_the_installed_command_works_from_any_folder(tmp_path: Path) -> None:
    command = Path(sys.executable).with_name("kimi-vl")
    given = ["bench", "prefill", "--config", "tiny", "--size", "6", "--rounds", "1"]
    done = subprocess.run([command, *given], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "| prompt of 6 tokens |" in done.stdout, done.stderr
    assert "not measured" not in done.stdout


def test_memory_and_loading_of_both_agree(tmp_path: Path) -> None:
    with torch.inference_mode():
        ours, other = (ways_process.memory("tiny", 20, way) for way in ("ours", "transformers"))
    assert ours["output"] == pytest.approx(other["output"], abs=1e-4) and ours["peak"] >= 0
    weights = ways_process.written("tiny", tmp_path)
    assert weights > 100_000 and len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    ours, other = (ways_process.loading(str(tmp_path), way) for way in ("ours", "transformers"))
    assert ours["output"] == pytest.approx(other["output"])


def test_a_longer_context_is_measured_to_the_line(tmp_path: Path) -> None:
    found = ways_process.long("tiny", 40, rounds=2)
    assert found["numbers"] == 22 + 6  # the latent and the rotary key of TINY
    rows = [{"context": x, "ms": 3.0 + 2.0 * x, "config": "tiny"} for x in (1, 2, 4)]
    assert speed.fitted([1, 2, 4], [5.0, 7.0, 11.0]) == pytest.approx((2.0, 3.0))
    speed.drawn(rows, 2.0, 3.0).savefig(tmp_path / "line.png")
    assert (tmp_path / "line.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [(["everything"], "the benchmark 'everything' is not known"), (["decode", "--config", "big"], "the configuration 'big'")],
)
def test_what_there_is_not_is_refused_in_a_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert sentence in error and "choose one of" in error and error.count("\n") == 1


def test_without_the_repository_the_command_says_where_it_works(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="benchmarks")

    monkeypatch.setattr(cli.importlib, "import_module", absent)
    assert cli.main(["bench", "decode"]) == 2
    assert "run this in a checkout" in capsys.readouterr().err
