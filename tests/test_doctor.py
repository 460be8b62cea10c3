"""`kimi-vl doctor`: a sound checkpoint passes, and each fault planted in one is named in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kimi_vl_ref import load_checkpoint
from kimi_vl_ref.config import KIMI_VL_A3B
from workbench import cli
from workbench.checkup import checkup
from workbench.checkup.headers import HeaderError, read_header
from workbench.checkup.standin import SMALL, write_standin
from workbench.checkup.standin import main as standin_main
from workbench.checkup.weights import INDEX

Q = "language_model.model.layers.1.self_attn.q_proj.weight"
EXPERT = "language_model.model.layers.2.mlp.experts.7.up_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "Kimi-VL-small-Instruct"
    write_standin(folder, SMALL)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / sound.name))


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The released names, shapes, vocabulary and file sizes; the data are holes."""
    folder = tmp_path_factory.mktemp("full") / "Kimi-VL-A3B-Instruct"
    write_standin(folder, KIMI_VL_A3B, empty=True)
    return folder


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def shard_with(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def edit_shard(folder: Path, name: str, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(shard_with(folder, name))
    change(tensors)
    save_file(tensors, shard_with(folder, name))


def edit_header(shard: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = shard.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    shard.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def the_line(folder: Path, state: str, *words: str) -> None:
    """There is a line of this state that holds all the words, and no other failure than of its kind."""
    report = checkup(str(folder), machine=False)
    lines = [finding for finding in report.findings if finding.state == state]
    found = [finding for finding in lines if all(word in finding.says for word in words)]
    assert found, report.lines()
    if state == "FAIL":
        assert report.failed and {finding.check for finding in lines} == {found[0].check}, report.lines()
    else:
        assert not report.failed, report.lines()
    assert all("\n" not in line and len(line) < 500 for line in report.lines())


# --- what is sound ------------------------------------------------------------------------------------------


def test_the_study_model_passes(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "study"]) == 0
    out = capsys.readouterr().out
    assert "not a released size" in out and "FAIL" not in out and "0 warnings" in out and len(out.splitlines()) < 25


def test_a_stand_in_passes_and_loads(sound: Path) -> None:
    report = checkup(str(sound), machine=False)
    assert not report.failed and not [f for f in report.findings if f.state == "warn"], report.lines()
    model = load_checkpoint(sound)
    assert model.logits.weight.shape == (SMALL.text.vocab_size, SMALL.text.hidden_size)
    assert float(model.decoder.layers[1].ffn.experts.down.float().std()) > 0.01  # numbers, not holes


def test_the_released_layout_at_full_size_passes(full_size: Path) -> None:
    report = checkup(str(full_size), machine=False)
    says = {finding.check: finding for finding in report.findings}
    assert not report.failed, report.lines()
    assert says["tensors"].says.startswith("5,679 names and shapes")
    assert says["shards"].says.startswith("7 of 7 there, 32.8 GB")
    assert says["config.json"].says == "every value as in Kimi-VL-A3B"
    assert says["special tokens"].state == "ok" and says["chat template"].state == "ok"
    # its ranks are made up, and that is seen
    assert [f.check for f in report.findings if f.state == "warn"] == ["tokenizer"]
    assert sum(file.stat().st_blocks for file in full_size.iterdir()) * 512 < 20e6


def test_json_and_exit_codes(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", str(folder), "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert data["usable"] and {"check", "state", "says"} == data["findings"][0].keys()
    assert {"memory", "fit", "speed", "context"} <= {finding["check"] for finding in data["findings"]}
    (folder / "config.json").unlink()
    assert cli.main(["doctor", str(folder), "--json"]) == 1
    assert not json.loads(capsys.readouterr().out)["usable"]
    for wrong in (["doctor"], ["doctor", "no/such"], ["doctor", "no/such/folder"], ["doctor", "study", "--report", "x"]):
        assert cli.main(wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_a_hub_id_is_found_in_the_cache(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache of the hub: a snapshot of links into the blobs of its repository, which lead nowhere else."""
    repository = tmp_path / "models--moonshotai--Kimi-VL-A3B-Instruct"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(sound, repository / "blobs")
    for file in (repository / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    report = checkup("moonshotai/Kimi-VL-A3B-Instruct", machine=False)
    assert not report.failed and not [f for f in report.findings if f.state == "warn"], report.lines()
    with pytest.raises(ValueError, match="kimi-vl download moonshotai/Kimi-VL-A3B-Thinking"):
        checkup("moonshotai/Kimi-VL-A3B-Thinking")


def test_a_stand_in_is_not_written_over_anything_nor_onto_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kept").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        write_standin(tmp_path, SMALL)
    monkeypatch.setattr("sys.argv", ["standin", str(tmp_path), "--size", "small"])
    with pytest.raises(SystemExit) as ended:
        standin_main()
    assert ended.value.code == 2 and "not empty" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=20_000_000_000))
    with pytest.raises(ValueError, match="20.0 GB free, the checkpoint takes 32.8 GB"):
        write_standin(tmp_path / "new", KIMI_VL_A3B)
    assert [path.name for path in (tmp_path / "new").iterdir()] == []


# --- planted faults -----------------------------------------------------------------------------------------


def test_missing_shard(folder: Path) -> None:
    shard = shard_with(folder, Q)
    shard.unlink()
    the_line(folder, "FAIL", shard.name, "missing")


@pytest.mark.parametrize("keep", [0, 5, 300, -1, -4096])
def test_cut_shard(folder: Path, keep: int) -> None:
    shard = shard_with(folder, Q)
    shard.write_bytes(shard.read_bytes()[:keep])
    the_line(folder, "FAIL", shard.name, "fetch it again")


def test_shard_that_is_too_long(folder: Path) -> None:
    shard = shard_with(folder, Q)
    shard.write_bytes(shard.read_bytes() + b"more")
    the_line(folder, "FAIL", shard.name, "longer than its header says")


def test_wrong_shape(folder: Path) -> None:
    edit_shard(folder, EXPERT, lambda t: t.update({EXPERT: t[EXPERT].T.contiguous()}))
    the_line(folder, "FAIL", EXPERT, "[96, 64]", "[64, 96]")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights(folder: Path, dtype: torch.dtype) -> None:
    edit_shard(folder, Q, lambda t: t.update({Q: t[Q].to(dtype)}))
    the_line(folder, "FAIL", Q, "not quantised")


def test_another_float_type(folder: Path) -> None:
    edit_shard(folder, Q, lambda t: t.update({Q: t[Q].float()}))
    the_line(folder, "warn", Q, "config.json says BF16", "F32")


def test_rounded_selection_bias(folder: Path) -> None:
    name = "language_model.model.layers.1.mlp.gate.e_score_correction_bias"
    edit_shard(folder, name, lambda t: t.update({name: t[name].bfloat16()}))
    the_line(folder, "note", "selection biases", "BF16", "near ties")


def test_missing_and_unknown_tensors(folder: Path) -> None:
    edit_shard(folder, Q, lambda t: t.update({"extra.weight": t.pop(Q)}))
    edit(folder / INDEX, lambda d: d["weight_map"].update({"extra.weight": d["weight_map"].pop(Q)}))
    the_line(folder, "FAIL", "1 are missing", Q)
    the_line(folder, "FAIL", "1 do not belong here", "extra.weight")


def test_index_that_names_another_shard(folder: Path) -> None:
    other = shard_with(folder, EXPERT).name
    assert other != shard_with(folder, Q).name
    edit(folder / INDEX, lambda d: d["weight_map"].update({Q: other}))
    the_line(folder, "FAIL", Q, other, "where it is not")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda h: h[Q].update(shape=[9999, 9999]), ("lies about", Q)),
        (lambda h: h[Q].update(data_offsets=[0, 1 << 40]), ("lies about", Q)),
        (lambda h: h[Q].update(data_offsets=[5, 2]), (Q, "offsets")),
        (lambda h: h[Q].update(shape=[-1, 2]), (Q, "shape")),
        (lambda h: h[Q].update(dtype="F3"), (Q, "F3")),
        (lambda h: h.update({Q: 3}), (Q, "no description")),
        (lambda h: h.update({Q: dict(h[Q], data_offsets=[o + 2 for o in h[Q]["data_offsets"]])}), ("lies about where",)),
    ],
    ids=["size", "end", "backwards", "negative", "type", "nothing", "shifted"],
)
def test_header_that_lies(folder: Path, change: Callable[[dict[str, Any]], Any], words: tuple[str, ...]) -> None:
    shard = shard_with(folder, Q)
    edit_header(shard, change)
    the_line(folder, "FAIL", shard.name, *words)


def test_header_longer_than_the_file(folder: Path) -> None:
    shard = shard_with(folder, Q)
    shard.write_bytes((1 << 62).to_bytes(8, "little") + shard.read_bytes()[8:])
    the_line(folder, "FAIL", shard.name, "4,611,686,018,427,387,904 bytes")


@pytest.mark.parametrize(
    ("path", "value"),
    [("text_config/scoring_func", "softmax"), ("text_config/rope_scaling", {"type": "yarn"}), ("model_type", "llava")],
)
def test_unknown_config_value(folder: Path, path: str, value: Any) -> None:
    *section, key = path.split("/")
    edit(folder / "config.json", lambda d: (d[section[0]] if section else d).update({key: value}))
    the_line(folder, "FAIL", "config.json", key)


def test_unknown_config_key(folder: Path) -> None:
    edit(folder / "config.json", lambda d: d["text_config"].update(logit_softcap=30.0))
    the_line(folder, "warn", "text_config: logit_softcap", "ignored")


def test_other_base_of_the_rotation(full_size: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(full_size, tmp_path / full_size.name, copy_function=lambda a, b: Path(b).symlink_to(a)))
    (copy / "config.json").unlink()
    config = KIMI_VL_A3B.to_dict()
    config["text_config"] |= {"rope_theta": 50000.0}
    (copy / "config.json").write_text(json.dumps(config))
    the_line(copy, "warn", "rope_theta=50000.0 and not 800000.0")


@pytest.mark.parametrize("limit", [16384, 1024])
def test_wrong_in_token_limit(folder: Path, limit: int) -> None:
    edit(folder / "preprocessor_config.json", lambda d: d.update(in_token_limit=limit))
    the_line(folder, "FAIL", f"in_token_limit={limit}, expected 4096")


def test_the_later_release_sees_larger_pictures(sound: Path, tmp_path: Path) -> None:
    later = Path(shutil.copytree(sound, tmp_path / "Kimi-VL-small-Thinking-2506"))
    the_line(later, "FAIL", "in_token_limit=4096, expected 16384")


@pytest.mark.parametrize(("key", "value"), [("image_mean", [0.48, 0.46, 0.41]), ("pad_input", False), ("patch_size", 16)])
def test_wrong_picture_settings(folder: Path, key: str, value: Any) -> None:
    edit(folder / "preprocessor_config.json", lambda d: d.update({key: value}))
    the_line(folder, "FAIL", "preprocessor_config.json", key)


def test_special_token_with_a_wrong_id(folder: Path) -> None:
    def swap(data: Any) -> None:
        names = data["added_tokens_decoder"]
        names["4098"]["content"], names["4099"]["content"] = names["4099"]["content"], names["4098"]["content"]

    edit(folder / "tokenizer_config.json", swap)
    the_line(folder, "FAIL", "<|im_end|> has id 4099, a release has it at 4098")


def test_special_token_with_another_name(folder: Path) -> None:
    """What later models of the family call it."""
    edit(
        folder / "tokenizer_config.json",
        lambda d: d["added_tokens_decoder"]["4114"].update(content="<|media_begin|>"),
    )
    report = checkup(str(folder), machine=False)
    assert any("<|media_start|> is missing" in f.says for f in report.findings if f.state == "FAIL"), report.lines()


def test_wrong_end_token_in_the_config(folder: Path) -> None:
    edit(folder / "config.json", lambda d: d["text_config"].update(eos_token_id=4098))
    the_line(folder, "FAIL", "eos_token_id=4098", "[EOS]")


def test_ranks_of_another_model(folder: Path) -> None:
    lines = (folder / "tiktoken.model").read_bytes().splitlines(keepends=True)
    (folder / "tiktoken.model").write_bytes(b"".join(lines[:-1]))
    report = checkup(str(folder), machine=False)
    assert any(f.check == "tokenizer" and f.state == "FAIL" for f in report.findings), report.lines()


def test_changed_chat_template(folder: Path) -> None:
    edit(
        folder / "tokenizer_config.json",
        lambda d: d.update(chat_template=d["chat_template"].replace("helpful assistant", "helpful assistant.")),
    )
    the_line(folder, "FAIL", "differs from the released one", "'.<|im_end|>")


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__ }}",
        "{{ 'x' * 3000000000 }}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% include '/etc/hostname' %}",
        "{% if %}",
    ],
    ids=["climbs", "fills memory", "does not end", "opens a file", "no template"],
)
def test_hostile_chat_template(folder: Path, template: str) -> None:
    edit(folder / "tokenizer_config.json", lambda d: d.update(chat_template=template))
    report = checkup(str(folder), machine=False)
    assert any(f.check == "chat template" and f.state == "FAIL" for f in report.findings), report.lines()


def test_end_token_that_does_not_exist(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 99999}')
    the_line(folder, "FAIL", "generation_config.json", "99999")


@pytest.mark.parametrize("outside", ["../secret.safetensors", "/etc/hostname", "a/b.safetensors"])
def test_climbing_path_in_the_index(folder: Path, outside: str) -> None:
    (folder.parent / "secret.safetensors").write_bytes(b"")
    edit(folder / INDEX, lambda d: d["weight_map"].update({Q: outside}))
    the_line(folder, "FAIL", INDEX, "outside")


def test_link_out_of_the_folder(folder: Path) -> None:
    shard = shard_with(folder, Q)
    moved = shard.rename(folder.parent / "elsewhere.safetensors")
    shard.symlink_to(moved)
    the_line(folder, "warn", shard.name, "leads out of the folder", "elsewhere.safetensors")


@pytest.mark.parametrize("name", ["config.json", INDEX, "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("bomb", ["deep", "large", "number", "nothing"])
def test_json_bomb(folder: Path, name: str, bomb: str) -> None:
    path = folder / name
    if bomb == "deep":
        path.write_bytes(b'{"a":' + b"[" * 200_000)
    elif bomb == "number":
        path.write_bytes(b'{"a": ' + b"9" * 5_000_000 + b"}")
    elif bomb == "nothing":
        path.write_bytes(b"")
    else:
        with path.open("r+b") as file:
            file.truncate(1 << 40)  # a hole: no space on the disk
    report = checkup(str(folder), machine=False)
    assert any(f.state == "FAIL" and name in f.says for f in report.findings), report.lines()


def test_code_and_pickles_are_named_and_never_opened(folder: Path) -> None:
    (folder / "modeling_kimi_vl.py").write_text("raise SystemExit(3)")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    the_line(folder, "note", "never opened", "modeling_kimi_vl.py", "pytorch_model.bin")


def test_control_characters_of_a_file_do_not_reach_the_terminal(folder: Path) -> None:
    edit(folder / "config.json", lambda d: d["text_config"].update({"\x1b[2J\nok    all fine": 1}))
    lines = checkup(str(folder), machine=False).lines()
    assert not any("\x1b" in line or "\n" in line for line in lines)


# --- headers against any bytes ------------------------------------------------------------------------------


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_header_is_read_or_refused_in_words(tmp_path: Path, data: st.DataObject) -> None:
    offsets = st.lists(st.integers(-2, 40) | st.none(), min_size=1, max_size=3)
    entry = st.fixed_dictionaries(
        {},
        optional={
            "dtype": st.sampled_from(["F32", "BF16", "I8", "F3"]) | st.integers(),
            "shape": st.lists(st.integers(-1, 5), max_size=3) | st.text(max_size=3),
            "data_offsets": offsets,
        },
    )
    header = data.draw(st.dictionaries(st.text(max_size=5), entry | st.integers(), max_size=4) | st.binary(max_size=30))
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path = tmp_path / "any.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data.draw(st.binary(max_size=40)))
    try:
        found = read_header(path)
    except HeaderError as error:
        assert "fetch it again" in str(error)
        return
    # what passes is what the library itself reads, names and shapes alike
    assert {name: list(tensor.shape) for name, tensor in load_file(path).items()} == {
        name: list(stored.shape) for name, stored in found.items()
    }
