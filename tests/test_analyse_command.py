"""`kimi-vl run` and `kimi-vl analyse` with run files: from a question to a run file to a figure and numbers.

What analyses ask of a model themselves is in test_analyse_models.py.
"""

from __future__ import annotations

import csv
import inspect
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hand_made import NAME
from tiny import picture, question, talking_model, tiny_chat
from workbench import cli
from workbench.analyses import command, given
from workbench.analyses.given import Asked
from workbench.analyses.registry import ENTRIES, TAKES
from workbench.analyses.routing import expert_loads
from workbench.runs import Run, record


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """count-1.run and read-1.run of the random model."""
    at = tmp_path_factory.mktemp("runs")
    for seed, name in enumerate(("count-1", "read-1")):
        asked = question("How many red circles?", picture(90, 60, seed))
        *_, run = record(talking_model(), tiny_chat(), asked, model_name=NAME, max_new_tokens=4)
        assert isinstance(run, Run)
        run.save(at / f"{name}.run")
    return at


@pytest.fixture(autouse=True)
def the_tiny_model_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (command, given):
        monkeypatch.setattr(module, "load", lambda name: (talking_model(), tiny_chat()))


def test_an_analysis_writes_its_figure_and_the_numbers_behind_it(folder: Path, tmp_path: Path, capsys) -> None:
    runs, out = [str(folder / "count-1.run"), str(folder / "read-1.run")], tmp_path / "deep" / "load"
    assert cli.main(["analyse", "expert-load", *runs, "--out", str(out)]) == 0
    result = expert_loads([Run.load(path) for path in runs])
    with open(out / "load.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["group", "layer", "expert", "load"]
    np.testing.assert_allclose([float(row["load"]) for row in rows], result["load"].ravel())
    about = json.loads((out / "about.json").read_text())
    assert about["about"]["weights"] == NAME and about["about"]["runs"] == 2 and about["chance"]["load"] == 4 / 11
    assert (out / "expert-load.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (out / "expert-load.svg").read_text()
    assert sorted(capsys.readouterr().out.split()) == sorted(str(path) for path in out.iterdir())


def test_domains_are_the_names_of_the_files(folder: Path, tmp_path: Path) -> None:
    assert [command.label_of(Path(name)) for name in ("a/count-17.run", "read_2.run", "chart.run", "12.run")] == [
        "count", "read", "chart", "12",
    ]  # fmt: skip
    command.analyse("domains", sorted(folder.iterdir()), tmp_path, group="question")
    with open(tmp_path / "share.csv", newline="") as file:
        assert {row["domain"] for row in csv.DictReader(file)} == {"count", "read"}


def test_a_run_is_recorded_as_asked_and_shown_as_it_grows(tmp_path: Path, capsys) -> None:
    picture(60, 60).save(tmp_path / "p.png")
    arguments = ["run", "How many?", "--image", str(tmp_path / "p.png"), "--out", str(tmp_path / "a.run")]
    options = ["--temperature", "0.7", "--seed", "3", "--max-tokens", "5", "--thought-budget", "2"]
    assert cli.main(arguments + options) == 0
    run = Run.load(tmp_path / "a.run")
    assert run.question == "How many?" and run.seed == 3 and run.model_name == "study model"
    assert len(run.token_ids) - run.prompt_length <= 5
    wanted = {"temperature": 0.7, "max_new_tokens": 5, "thought_budget": 2}
    assert {name: run.settings[name] for name in wanted} == wanted
    out, err = capsys.readouterr()
    assert run.answer.strip() in out and f"{len(run.token_ids)} tokens" in err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["analyse", "expert-lode", "x.run"], "did you mean expert-load"),
        (["analyse", "nothing", "x.run"], "The names are: expert-load"),
        (["analyse", "bias"], "no runs to analyse"),
        (["analyse", "bias", "no/such.run"], "there is no file no/such.run"),
        (["analyse", "expert-map", "RUN", "OTHER"], "looks at one run, and 2 were given"),
        (["analyse", "expert-map", "RUN", "--layer", "0"], "layer 0 does not route"),
        (["analyse", "difference", "RUN"], "0 were given with --against"),
        (["analyse", "pruning", "RUN"], "--expert 3.7"),
        (["analyse", "pruning", "RUN", "--expert", "seven"], "write layer.expert"),
        (["analyse", "bias", "RUN", "--family", "count"], "leave out --family and --image"),
        (["analyse", "rollout", "RUN"], "rollout takes no run files"),
        (["analyse", "coactivation", "RUN", "--group", "words"], "no group of tokens"),
        (["analyse", "domains", "RUN"], "nothing to compare"),
        (["analyse", "bias", "RUN", "--out", "RUN"], "is a file; name a folder"),
        (["analyse", "bias", "RUN", "--model", "study"], "bias does not use --model; leave it out\n"),
        (["analyse", "modality", "RUN", "--max-tokens", "5"], "leave it out (with run files it uses --seed)"),
        (["analyse", "pruning", "RUN", "--against", "OTHER"], "does not use --against; leave it out"),
        (["run", "  ", "--out", "x.run"], "the question is empty"),
        (["run", "how many?", "--out", "no/such/folder/x.run"], "cannot be written to no/such/folder/x.run"),
        (["run", "how many?"], "--out"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(
    arguments: list[str], says: str, folder: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    files = {"RUN": str(folder / "count-1.run"), "OTHER": str(folder / "read-1.run")}
    assert cli.main([files.get(one, one) for one in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kimi-vl: ") and err.count("\n") == 1 and says in err
    assert not list(tmp_path.iterdir())


def test_the_list_has_a_group_for_each_kind_of_input_and_a_line_for_each_analysis(capsys) -> None:
    assert cli.main(["analyse", "list"]) == 0
    groups = [group.splitlines() for group in capsys.readouterr().out.split("\n\n")]
    assert [title for title, *_ in groups] == list(TAKES.values())
    listed = {takes: [line.split()[0] for line in lines] for takes, (_, *lines) in zip(TAKES, groups, strict=True)}
    assert listed == {takes: [name for name, entry in ENTRIES.items() if entry.takes == takes] for takes in TAKES}
    line = next(line for line in groups[0] if line.split()[0] == "expert-load")
    assert line.split()[1] == "R1" and line.endswith("how uneven that is")
    line = next(line for line in groups[0] if line.split()[0] == "expert-map")
    assert line.endswith("; one run (--layer, --picture)")


def test_options_reach_the_analysis(folder: Path, tmp_path: Path) -> None:
    run = Run.load(folder / "count-1.run")
    path = folder / "count-1.run"
    command.analyse("selection", [path], tmp_path / "s", position=3, layer=2)
    assert json.loads((tmp_path / "s" / "about.json").read_text())["about"]["position"] == 3
    command.analyse("coactivation", [path], tmp_path / "c", group="picture")
    assert json.loads((tmp_path / "c" / "about.json").read_text())["about"]["tokens_counted"] == len(run.positions("image"))
    command.analyse("agreement", [path], tmp_path / "a", against=[path])
    with open(tmp_path / "a" / "same.csv", newline="") as file:
        found = [float(row["same"]) for row in csv.DictReader(file) if row["group"] == "all"]
    assert found == [1, 1]
    command.analyse("pruning", [path], tmp_path / "p", experts=[(1, 4)])
    assert json.loads((tmp_path / "p" / "about.json").read_text())["about"]["sets"]["these"] == [[1, 4]]


def test_a_model_that_did_not_write_the_runs_is_refused(folder: Path) -> None:
    run = Run.load(folder / "count-1.run")
    assert Asked([run]).loaded[0] is talking_model()
    with pytest.raises(ValueError, match="name theirs with --model"):
        _ = Asked([replace(run, versions={**run.versions, "weights": "others"})]).loaded


def test_every_entry_names_functions_of_what_was_asked_for() -> None:
    for entry in ENTRIES.values():
        assert entry.line and len(inspect.signature(entry.analyse).parameters) == 1
        assert len(inspect.signature(entry.figure).parameters) == 2
