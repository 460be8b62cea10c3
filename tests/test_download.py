"""`kimi-vl download` against a stand-in hub: what is needed and nothing else, resumed where cut, faults in a sentence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from hub import COMMIT, Hub, serving
from kimi_vl_ref import load_checkpoint
from kimi_vl_ref.weights import CheckpointError
from workbench import cli
from workbench.checkup.download import fetch
from workbench.checkup.standin import SMALL, write_standin

ID = "moonshotai/Kimi-VL-small"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    write_standin(folder, SMALL)
    for name in ("modeling_kimi_vl.py", "pytorch_model.bin", "training_args.bin", "weights.pt", "model.py"):
        (folder / name).write_bytes(b"raise SystemExit(3)")
    return folder


@pytest.fixture
def hub(repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is kept of a transfer that was cut
    with serving(repository) as served:
        yield served


def get(hub: Hub, to: Path) -> Path:
    return fetch(ID, to, endpoint=hub.address)


def refused(hub: Hub, to: Path, *words: str, hub_id: str = ID, revision: str = "main") -> None:
    with pytest.raises(ValueError) as caught:
        fetch(hub_id, to, endpoint=hub.address, revision=revision)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message and len(message) < 400, message


def test_what_is_needed_comes_and_nothing_else(hub: Hub, tmp_path: Path) -> None:
    folder = get(hub, tmp_path / "to")
    names = {path.name for path in folder.iterdir() if path.is_file()}
    assert names == {path.name for path in hub.folder.iterdir() if path.suffix not in (".py", ".bin", ".pt")}
    assert hub.fetched() == names
    for name in names:
        assert (folder / name).read_bytes() == (hub.folder / name).read_bytes()
    load_checkpoint(folder)


def test_what_is_there_is_not_fetched_again(hub: Hub, tmp_path: Path) -> None:
    get(hub, tmp_path / "to")
    hub.asked.clear()
    get(hub, tmp_path / "to")
    assert hub.fetched() == set()


def test_into_the_cache_from_the_command_line(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["download", ID, "--endpoint", hub.address]) == 0
    first, then = capsys.readouterr().out.splitlines()
    assert Path(first).name == COMMIT and then == f"next: kimi-vl doctor {first}"
    load_checkpoint(first)


def test_a_cut_connection_goes_on_where_it_stopped(hub: Hub, tmp_path: Path) -> None:
    shard = "model-00003-of-00007.safetensors"
    half = (hub.folder / shard).stat().st_size // 2
    hub.cut[shard] = half
    folder = get(hub, tmp_path / "to")
    assert (folder / shard).read_bytes() == (hub.folder / shard).read_bytes()
    ranges = [asked for method, name, asked in hub.asked if method == "GET" and name == shard]
    assert ranges == [None, f"bytes={half // 1000 * 1000}-"]


@pytest.mark.parametrize("name", ["model-/../../evil-of-1.safetensors", "LICENSE/../../evil", "model-a/b-of-c.safetensors"])
def test_a_name_that_climbs_is_not_asked_for(hub: Hub, tmp_path: Path, name: str) -> None:
    hub.listed = [name]
    folder = get(hub, tmp_path / "to")
    assert hub.fetched() == {path.name for path in folder.iterdir() if path.is_file()}
    assert {path.name for path in tmp_path.iterdir()} <= {"to", "cache"}


def test_wrong_size(hub: Hub, tmp_path: Path) -> None:
    hub.announced["tiktoken.model"] = 123
    refused(hub, tmp_path / "to", ID, "another size")
    assert not (tmp_path / "to" / "tiktoken.model").exists()


@pytest.mark.parametrize(
    ("status", "words"),
    [(401, "hf auth login"), (403, "hf auth login"), (404, "does not exist"), (400, "HTTP 400")],
)
def test_an_answer_that_refuses(hub: Hub, tmp_path: Path, status: int, words: str) -> None:
    hub.status = status
    refused(hub, tmp_path / "to", ID, words)


def test_another_repository_and_another_revision(hub: Hub, tmp_path: Path) -> None:
    refused(hub, tmp_path / "to", "moonshotai/none", "does not exist", hub_id="moonshotai/none")
    refused(hub, tmp_path / "to", "no revision 'v9'", revision="v9")


def test_a_repository_that_is_no_checkpoint(hub: Hub, tmp_path: Path) -> None:
    hub.folder = tmp_path / "other"
    hub.folder.mkdir()
    (hub.folder / "config.json").write_text("{}")
    refused(hub, tmp_path / "to", "no preprocessor_config.json", "released layout")


def test_nobody_answers(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be reached"):
        fetch(ID, tmp_path / "to", endpoint="http://127.0.0.1:1")


def test_offline_and_an_id_that_is_none(hub: Hub, tmp_path: Path, monkeypatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE|cannot be reached"):
        get(hub, tmp_path / "to")
    for wrong in ("Kimi-VL", "../../etc", "a/b/c", ""):
        assert cli.main(["download", wrong]) == 2
        assert "hub id" in capsys.readouterr().err
