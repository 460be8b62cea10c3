"""`kimi-vl analyse` without run files: every analysis by its name, asked of the study model with as few scenes as it takes."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from hand_made import drawn_words
from kimi_vl_ref import Chat, KimiVL, load
from tiny import picture, question, talking_model, tiny_chat
from workbench import cli
from workbench.analyses import ablations, command, given, part_sweeps, posing, probes
from workbench.analyses.given import WAYS, Asked, Entry, Options, Posed, flag
from workbench.analyses.lens import named_objects, shown_on
from workbench.analyses.occlusion import deletion, map_curves
from workbench.analyses.registry import ENTRIES
from workbench.analyses.trials import make_trial
from workbench.figures.attribution import map_curves_figure
from workbench.runs import Run, record
from workbench.study.evaluate import messages
from workbench.study.families import make

# What an analysis needs more than one short question
SMALL: dict[str, dict[str, Any]] = {
    "agreement": {"against": True},
    "difference": {"against": True},
    "domains": {"runs": 2},
    "vocabulary": {"runs": 3},
    "pruning": {"experts": [(2, 3)]},
    "localisation": {"scenes": 2},
    "probes": {"scenes": 3},
    "length-reward": {"samples": 2},
    "thought-budget": {"families": ["count"]},
    "answer-confidence": {"scenes": 2},
    "thinking-efficiency": {"families": ["count"]},
    "single-experts": {"layer": 1, "workers": 1},
    "single-heads": {"layer": 1, "workers": 1},
    "single-layers": {"workers": 1},
}


@pytest.fixture(scope="module")
def study() -> tuple[KimiVL, Chat]:
    return load("study")


@pytest.fixture(scope="module")
def files(study: tuple[KimiVL, Chat], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A run of a counting question, with its thought, and others."""
    folder, found = tmp_path_factory.mktemp("runs"), []
    for family in ("count", "where", "sum"):
        *_, run = record(*study, messages(*make(family, 0)), model_name="study model", max_new_tokens=60)
        assert isinstance(run, Run)
        run.save(folder / f"{family}-0.run")
        found.append(folder / f"{family}-0.run")
    return found


@pytest.fixture(autouse=True)
def loaded_once(study: tuple[KimiVL, Chat], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for module in (given, ablations, part_sweeps):
        monkeypatch.setattr(module, "load", lambda name: study if name == "study" else (talking_model(), tiny_chat()))
    yield


def smallest(name: str, entry: Entry, files: list[Path]) -> tuple[list[Path], dict[str, Any]]:
    options = dict(SMALL.get(name, {}))
    if entry.takes == "runs":
        paths = files[: options.pop("runs", 1)]
        return paths, {**options, "against": paths} if options.pop("against", False) else options
    if entry.takes == "weights":
        return [], {}
    families = [entry.families[-1] if name != "visual-token-ablation" else "where"]
    if "max_tokens" in entry.uses:
        options["max_tokens"] = 60
    return [], {"families": families, "scenes": 1, **options}


ASKING = {"families", "scenes", "images", "question"}  # what is asked, and read to find out which of WAYS it is
OPTIONS = {one.name for one in fields(Options)} - {"progress"} | {"against"}


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], set[str]]:
    """Of a name -> the options that its two functions read from then on."""
    read: set[str] = set()

    def watched(self: object, name: str) -> Any:
        read.update({name} & OPTIONS)
        return object.__getattribute__(self, name)

    def watch(name: str) -> set[str]:
        def afresh(asked: Asked | Posed) -> Any:
            read.clear()  # of what checking them has read
            return entry.analyse(asked)

        entry = ENTRIES[name]
        monkeypatch.setitem(ENTRIES, name, replace(entry, analyse=afresh))
        return read

    monkeypatch.setattr(Options, "__getattribute__", watched)
    return watch


@pytest.mark.parametrize("name", ENTRIES)
def test_every_name_writes_a_figure_its_numbers_and_what_they_came_from(
    name: str, files: list[Path], tmp_path: Path, read: Callable[[str], set[str]]
) -> None:
    paths, options = smallest(name, ENTRIES[name], files)
    way = "run files" if paths else "weights" if ENTRIES[name].takes == "weights" else "scenes"
    seen, heeded = read(name), set(ENTRIES[name].options(way))
    written = command.analyse(name, paths, tmp_path / "out", progress=True, **options)
    names = {path.name for path in written}
    assert {f"{name}.png", f"{name}.svg", "about.json"} <= names
    numbers = [path for path in written if path.suffix == ".csv"]
    assert numbers and all(path.stat().st_size for path in written)
    about = json.loads((tmp_path / "out" / "about.json").read_text())
    assert about["analysis"] == name
    assert about["about"]["weights"] == ("none: random gradients" if name == "muon-update" else "study model")
    assert about["about"]["weights"] in (tmp_path / "out" / f"{name}.svg").read_text() or name == "muon-update"
    assert seen - ASKING - set(WAYS[way]) == heeded - ASKING - set(WAYS[way])


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if entry.takes in ("questions", "pictures")])
def test_the_options_it_says_are_those_it_reads_about_a_picture_of_yours(
    name: str, tmp_path: Path, read: Callable[[str], set[str]]
) -> None:
    asked = {"images": [_saved(tmp_path)], "question": "How many?", "model": "tiny", "max_tokens": 4}
    asked = {option: value for option, value in asked.items() if option in ENTRIES[name].options("a picture of yours")}
    seen, heeded = read(name), set(ENTRIES[name].options("a picture of yours"))
    command.analyse(name, [], tmp_path / "out", **asked)
    known = ASKING | set(WAYS["a picture of yours"])
    assert seen - known == heeded - known


# ---- what is asked


def test_scenes_are_those_of_the_families_and_another_seed_has_others() -> None:
    asked = Posed(families=["count", "where"], scenes=2, seed=3)
    wanted = [make(family, number) for family in ("count", "where") for number in (6, 7)]
    assert [(scene.seed, one.text) for scene, one in asked.pairs] == [(scene.seed, one.text) for scene, one in wanted]
    assert not asked.located or all(asked.pairs[at][1].targets for at in asked.located)


def test_questions_about_nothing_in_the_picture_are_no_places() -> None:
    asked = Posed(families=["count"], scenes=12)
    nothing = [at for at, (_, one) in enumerate(asked.pairs) if one.answer == "0"]
    assert nothing and asked.located == [at for at in range(12) if at not in nothing]


def test_your_own_question_about_your_own_picture_is_asked(tmp_path: Path) -> None:
    picture(84, 56).save(tmp_path / "p.png")
    asked = {"images": [tmp_path / "p.png"], "question": "How many?", "model": "tiny", "max_tokens": 4}
    command.analyse("occlusion", [], tmp_path / "out", **asked)
    about = json.loads((tmp_path / "out" / "about.json").read_text())["about"]
    *_, run = record(talking_model(), tiny_chat(), question("How many?", picture(84, 56)), model_name="", max_new_tokens=4)
    assert isinstance(run, Run)
    assert about["prompts"] == ["How many?"] and about["replies"] == [run.answer] and about["weights"] == "tiny"


def test_an_analysis_of_runs_can_have_its_runs_recorded_from_scenes(tmp_path: Path) -> None:
    asked = {"families": ["where", "count"], "scenes": 1, "max_tokens": 3, "model": "tiny"}
    command.analyse("domains", [], tmp_path / "out", **asked)
    with open(tmp_path / "out" / "share.csv", newline="") as file:
        assert {row["domain"] for row in csv.DictReader(file)} == {"where", "count"}
    about = json.loads((tmp_path / "out" / "about.json").read_text())["about"]
    assert about["prompts"] == [make(family, 0)[1].text for family in ("where", "count")]
    own = {"images": [_saved(tmp_path)], "question": "How?", "max_tokens": 3, "model": "tiny"}
    command.analyse("attention-sinks", [], tmp_path / "sinks", **own)
    assert json.loads((tmp_path / "sinks" / "about.json").read_text())["about"]["prompts"] == ["How?"]


def _saved(folder: Path) -> Path:
    picture(84, 56).save(folder / "p.png")
    return folder / "p.png"


def test_a_patch_is_the_point_named_or_what_is_asked_about_or_the_middle(tmp_path: Path) -> None:
    scene, one = make("where", 0)
    asked = Posed(families=["where"], scenes=1, model="tiny")
    grid = tiny_chat().processor.grid(*scene.size)
    x0, y0, x1, y1 = one.targets[0]
    assert posing.patch(asked) == grid.patch_at((x0 + x1) / 2, (y0 + y1) / 2)
    assert posing.patch(Posed(families=["where"], scenes=1, model="tiny", at=(3, 20))) == grid.patch_at(3, 20)
    own = Posed(images=[_saved(tmp_path)], model="tiny")
    assert posing.patch(own) == tiny_chat().processor.grid(84, 56).patch_at(42, 28)


def test_probes_get_the_visual_tokens_that_show_something_and_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    given_to: dict[str, Any] = {}
    monkeypatch.setattr(probes, "linear_probes", lambda *parts, **more: given_to.update(more, parts=parts))
    posing.probed(Posed(families=["where"], scenes=2, model="tiny"))
    found, labels, group, _ = given_to["parts"]
    rows, wanted, of, cells = [], [], [], []
    for number in range(2):
        scene, one = make("where", number)
        prompt = tiny_chat().prompt(messages(scene, one))
        assert prompt.pixel_values is not None and prompt.image_grid_hws is not None
        grid = prompt.pictures[0].grid
        for token, name in enumerate(shown_on(grid, named_objects(scene))):
            if " " in name:
                rows.append(talking_model().see(prompt.pixel_values, prompt.image_grid_hws)[token].numpy())
                wanted.append(name.split()[0])
                of.append(number)
                cells.append(divmod(token, grid.token_grid[1]))
    np.testing.assert_allclose(found["projector"], np.stack(rows), rtol=1e-5, atol=1e-6)
    assert labels.tolist() == wanted and group.tolist() == of and given_to["types"].tolist() == [list(cell) for cell in cells]


def test_sampled_replies_differ_by_their_seeds_alone() -> None:
    asked = Posed(families=["count"], scenes=1, seed=2, samples=3, max_tokens=3, model="tiny")
    about = posing.length_reward(asked).about
    assert about["seeds"] == [6, 7, 8] and set(about["prompts"]) == {make("count", 2)[1].text}


def test_mirrored_pairs_are_of_answers_that_name_a_side() -> None:
    asked = Posed(families=["where"], scenes=2, model="tiny", layer=1)
    result = posing.patching(asked)
    assert result.about["pairs"] == 2 and result["denoise"].shape[0] == 1
    replies = result.about["replies"]
    assert all({"left", "right"} & set(reply.split()) for reply in replies) and len(set(replies[:2])) == 2


def test_shapes_are_of_one_matrix_each() -> None:
    model, text = talking_model(), talking_model().config.text
    found = posing.shapes(model)
    assert found["router"] == (text.n_routed_experts, text.hidden_size)
    assert found["experts"] == (text.moe_intermediate_size, text.hidden_size)  # of gate and up, which lie in one tensor


def test_curves_of_a_map_are_its_deletion_and_insertion_beside_the_controls() -> None:
    trial = make_trial(tiny_chat(), question("How many?", picture(84, 56)), "2")
    heat = np.arange(6.0).reshape(2, 3)
    result = map_curves(talking_model(), trial, {"rising": lambda _: heat}, model_name="tiny", points=4)
    assert result.axes["area"][1][1] == ["rising", "random", "centre"]
    for way, insert in enumerate((False, True)):
        shares, probabilities, area = deletion(talking_model(), trial, heat, insert=insert, points=4)
        np.testing.assert_allclose(result["probability"][way, 0], probabilities)
        assert result["area"][way, 0] == pytest.approx(area) and result.axes["probability"][2][1] == shares.tolist()
    assert "low is good" in drawn_words(map_curves_figure(result))


# ---- what is refused


# In each way, with what does not exist, so that loading it would be another error
Way = tuple[str, list[Path], dict[str, Any]]
FILES: Way = ("run files", [Path("no.run")], {})
SCENES: Way = ("scenes", [], {"families": ["nope"]})
YOURS: Way = ("a picture of yours", [], {"images": ["no.png"], "question": "how?"})
ASKED: dict[str, list[Way]] = {
    "runs": [FILES, SCENES, YOURS],
    "questions": [SCENES, YOURS],
    "pictures": [SCENES, (*YOURS[:2], {"images": ["no.png"]})],
    "scenes": [SCENES],
    "weights": [("weights", [], {})],
}


@pytest.mark.parametrize("name", ENTRIES)
def test_an_option_that_would_not_be_heeded_is_refused_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    for way, paths, asked in ASKED[ENTRIES[name].takes]:
        for option in OPTIONS - {"families", "images", "question"} - set(ENTRIES[name].options(way)):
            with pytest.raises(ValueError, match=f"{name} does not use {flag(option)}; leave it out"):
                command.analyse(name, paths, tmp_path / "out", **asked, **{option: ["x"]})


def test_what_is_none_or_empty_is_not_given(files: list[Path], tmp_path: Path) -> None:
    nothing: dict[str, Any] = {"layer": None, "at": None, "families": [], "experts": (), "question": "", "against": []}
    assert command.analyse("bias", files[:1], tmp_path / "out", **nothing)


def test_every_option_has_its_flag() -> None:
    parameters = typer.main.get_command(cli.app).commands["analyse"].params
    assert {flag(one) for one in OPTIONS} == {name for one in parameters for name in one.opts if name[:2] == "--"} - {"--out"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["rollout", "--family", "nothing"], "no family is called 'nothing'"),
        (["probes", "--image", "PIC"], "has to know what is true"),
        (["occlusion", "--image", "PIC"], "write what with --question"),
        (["occlusion", "--question", "how?"], "needs a picture of yours"),
        (["occlusion", "--image", "PIC", "--question", "how?", "--family", "count"], "choose --family or --image"),
        (["occlusion", "--scenes", "2"], "looks at one question, and 2 were given"),
        (["logit-lens", "--family", "count", "--scenes", "2"], "looks at one question, and 2 were given"),
        (["head-hits", "--scenes", "0"], "0 scenes leave nothing to ask"),
        (["head-hits", "--family", "compare", "--scenes", "1"], "is about a place in one picture"),
        (["weight-spectrum", "--family", "count"], "looks at weights alone"),
        (["patch-attention", "--at", "middle"], "write x,y in pixels"),
        (["patch-attention", "--at", "9999,1"], "outside the picture"),
        (["patch-attention", "--picture", "3"], "picture 3 does not exist"),
        (["rollout", "--picture", "3"], "picture 3 does not exist"),
        (["rollout", "--image", "none.png"], "none.png"),
        (["activation-patching", "--family", "count"], "a mirror changes no answer of count"),
        (["activation-patching", "--site", "patches", "--scenes", "2"], "with --scenes 1"),
        (["activation-patching", "--site", "eyes", "--scenes", "1"], "use one of residual"),
        (["probes", "--label", "size", "--scenes", "1"], "use one of colour"),
        (["probes", "--label", "character", "--scenes", "1"], "has a character"),
        (["localisation", "--scenes", "1"], "use --scenes 2 or more"),
        (["visual-token-dropping", "--layer", "9", "--scenes", "1"], "layer=9"),
        (["occlusion", "--layer", "99"], "occlusion does not use --layer; leave it out (with scenes it uses --model, "),
        (["occlusion", "--max-tokens", "160"], "does not use --max-tokens; leave it out"),
        (["occlusion", "--image", "none.png", "--question", "how?", "--scenes", "2"], "does not use --scenes; leave it out"),
        (["rollout", "--image", "none.png", "--question", "how?"], "does not use --question; leave it out"),
        (["weight-spectrum", "--scenes", "3", "--at", "1,2"], "does not use --scenes and --at; leave them out (with weights"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_nothing_is_written(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    at = _saved(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert cli.main(["analyse", *(str(at) if one == "PIC" else one for one in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kimi-vl: ") and err.count("\n") == 1 and says in err
    assert not list((tmp_path / "here").iterdir())
