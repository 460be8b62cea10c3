"""A table of bad inputs, beside those of the tests of each part: a proper exception, one short sentence, nothing lost.

docs/reliability-faults.md lists this table with the ones that stand elsewhere.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save_file

from demos.acts import ACTS, Asked
from demos.desk import Desk
from demos.page import SIZES, Page
from demos.session import Session
from kimi_vl_ref import TINY, KimiVL, checkpoint_folder, load_checkpoint, save_checkpoint
from kimi_vl_ref.chat import Chat, Tokenizer
from kimi_vl_ref.images import ImageProcessor, open_image
from kimi_vl_ref.told import LONGEST, shown
from tiny import picture, question, talking_model, tiny_chat
from workbench import cli, run_files
from workbench.runs import Run, RunError, record
from workbench.sweeps import SweepError, sweep
from workbench.viewer import payload

LIMIT = 400  # characters of a sentence
Act = Callable[[Path], Any]


def sentence_of(error: BaseException, *words: str) -> str:
    """The message, known to be one short sentence with a remedy after its semicolon."""
    told = str(error)
    assert told.strip() and "\n" not in told and len(told) < LIMIT and "Traceback" not in told, told
    assert re.search(r"[;,] \w", told), f"no remedy: {told}"
    for word in words:
        assert word in told, told
    return told


# --- pictures ------------------------------------------------------------------------------------------------------------


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IEND", b"")


def encoded(image: Image.Image, form: str = "PNG", **how: Any) -> bytes:
    file = BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def icon_with(data: bytes) -> bytes:
    """An icon that says 16 x 16 and holds another picture."""
    return struct.pack("<HHHBBBBHHII", 0, 1, 1, 16, 16, 0, 0, 1, 1, len(data), 22) + data


PIXEL = chunk(b"IDAT", zlib.compress(b"\0\1\2\3"))
BOMB = zlib.compress(bytes(80_000_000))
PICTURES: dict[str, tuple[Callable[[], Any], str]] = {
    "a PNG of no width": (lambda: png(0, 5), "not a picture"),
    "a PNG of 2**32 - 1 columns": (lambda: png(0xFFFFFFFF, 1), "over the limit"),
    "a PNG of 7,100 x 7,100 in a few bytes": (lambda: png(7100, 7100, chunk(b"IDAT", BOMB)), "over the limit"),
    "a PNG with a text of 80 MB in 80 kB": (lambda: png(1, 1, chunk(b"zTXt", b"a\0\0" + BOMB), PIXEL), "not a picture"),
    "a PNG with a profile of 80 MB in 80 kB": (lambda: png(1, 1, chunk(b"iCCP", b"a\0\0" + BOMB), PIXEL), "not a picture"),
    "a PNG whose pixels are missing": (lambda: png(40, 40), "damaged or cut off"),
    "a PNG with a wrong checksum": (lambda: png(2, 2)[:20] + b"\xff" + png(2, 2)[21:], "not a picture"),
    "a TIFF of 8,000 x 8,000 bits in 10 kB": (
        lambda: encoded(Image.new("1", (8000, 8000)), "TIFF", compression="tiff_deflate"),
        "over the limit",
    ),
    "a TIFF cut off": (lambda: encoded(picture(60, 60), "TIFF")[:-5000], "damaged or cut off"),
    "a GIF of 65,535 x 65,535": (
        lambda: b"GIF89a" + struct.pack("<HHBBBBHHHH", 65535, 65535, 0, 0, 0, 44, 0, 0, 65535, 65535) + b"\0\2;",
        "over the limit",
    ),
    "an icon that holds a larger picture": (lambda: icon_with(encoded(Image.new("1", (9000, 9000)))), "over the limit"),
    "a WebP cut off": (lambda: encoded(picture(60, 60), "WEBP")[:-30], "picture"),
    "a JPEG of a header alone": (lambda: encoded(picture(60, 60), "JPEG")[:300], "picture"),
    "PostScript, which another program would run": (
        lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n",
        "not a picture",
    ),
    "an SVG": (lambda: b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not a picture"),
    "a PDF": (lambda: b"%PDF-1.4\n%%EOF", "not a picture"),
    "a ZIP": (lambda: b"PK\3\4" + bytes(60), "not a picture"),
    "floating-point pixels": (lambda: encoded(Image.new("F", (3, 3)), "TIFF"), "floating-point"),
    "premultiplied grey": (lambda: Image.new("La", (3, 3)), "save it as RGB"),
    "a picture that was closed": (lambda: closed(), "damaged or cut off"),
    "no path": (lambda: "", "is empty"),
    "a path of 5,000 letters": (lambda: "x" * 5000 + ".png", "check the path"),
    "half a character in a path": (lambda: "\ud800.png", "check the path"),
    "the home of nobody": (lambda: "~nobody-at-all/x.png", "check the path"),
    "an endless device": (lambda: "/dev/zero", "0 bytes"),
    "a file address": (lambda: "file:///etc/hostname", "check the path"),
    "an FTP address": (lambda: "ftp://example.org/x.png", "check the path"),
    "a data address of letters that are not ASCII": (lambda: "data:image/png;base64,é", "base64"),
    "a data address of no bytes": (lambda: "data:image/png;base64,", "0 bytes"),
    "a data address of text": (lambda: "data:text/plain;base64," + base64.b64encode(b"hello").decode(), "not a picture"),
    "an array of a million by a million": (lambda: np.broadcast_to(np.uint8(0), (10**6, 10**6)), "over the limit"),
    "an array of objects": (lambda: np.array([["a"]], dtype=object), "uint8"),
    "a dictionary": (lambda: {"path": "x.png"}, "cannot be made from dict"),
}


def closed() -> Image.Image:
    image = Image.open(BytesIO(encoded(picture(9, 9))))
    image.close()
    return image


@pytest.mark.parametrize("name", PICTURES)
def test_a_bad_picture(name: str) -> None:
    make, words = PICTURES[name]
    with pytest.raises(ValueError, match=words) as caught:
        open_image(make())
    sentence_of(caught.value)


def test_no_other_program_is_started_for_a_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("started"))
    monkeypatch.setattr("os.system", lambda *_: pytest.fail("started"))
    for name in ("PostScript, which another program would run", "a PDF"):
        with pytest.raises(ValueError):
            open_image(PICTURES[name][0]())


PROCESSOR = ImageProcessor(14, (2, 2), 4096, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)).to_dict()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("image_processor_type", "x" * 9999),
        ("patch_size", 10**30),
        ("patch_size", "x" * 9999),
        ("merge_kernel_size", [10**9, 10**9]),
        ("in_token_limit", 10**400),
        ("image_mean", [10**400, 0, 0]),
        ("image_mean", [float("inf"), 0, 0]),
        ("image_std", [1e-300, 1, 1]),
        ("image_std", [[]] * 3),
    ],
    ids=lambda value: shown(value, 30),
)
def test_a_processor_file_that_makes_no_sense(key: str, value: Any, tmp_path: Path) -> None:
    file = tmp_path / "preprocessor_config.json"
    file.write_text(json.dumps(PROCESSOR | {key: value}))
    with pytest.raises(ValueError) as caught:
        ImageProcessor.from_json(file)
    sentence_of(caught.value, str(file), key)


BOMBS = {"lists": "[" * 100_000, "objects": '{"a":' * 100_000, "digits": "9" * 5000, "half a character": "\ud800"}


@pytest.mark.parametrize("name", ["preprocessor_config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_json_bomb_beside_the_weights(name: str, text: str, tmp_path: Path) -> None:
    tiny_chat().tokenizer.save(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    (tmp_path / name).write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError) as caught:
        Chat.from_folder(tmp_path)
    sentence_of(caught.value, name)


# --- checkpoints ---------------------------------------------------------------------------------------------------------

Q = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound")
    save_checkpoint(KimiVL(TINY), folder)
    return folder


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "checkpoint"))


def refused(folder: Path, *words: str) -> None:
    before = {file: file.lstat().st_mtime_ns for file in folder.iterdir()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(folder)
    sentence_of(caught.value, *words)
    assert before == {file: file.lstat().st_mtime_ns for file in folder.iterdir()}


def parts_of(file: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the body of a safetensors file."""
    data = file.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def put_together(file: Path, header: Any, body: bytes, size: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + body)


def told_of(header: dict[str, Any], **change: Any) -> dict[str, Any]:
    return header | {Q: header[Q] | change}


def moved(header: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    first, last = header[Q]["data_offsets"]
    return told_of(header, data_offsets=[first + start, last + stop])


HEADERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a length beyond the file": lambda h: (h, 1 << 30),
    "a length of 2**63": lambda h: (h, 1 << 63),
    "a length of 2**64 - 1": lambda h: (h, (1 << 64) - 1),
    "a length of 0": lambda h: (h, 0),
    "offsets outside the file": lambda h: moved(h, 0, 10**12),
    "offsets before the file": lambda h: told_of(h, data_offsets=[-4, 0]),
    "offsets that end before they begin": lambda h: told_of(h, data_offsets=h[Q]["data_offsets"][::-1]),
    "offsets that overlap": lambda h: moved(h, -4, -4),
    "offsets with a gap": lambda h: moved(h, 4, 0),
    "offsets that are texts": lambda h: told_of(h, data_offsets=["0", "4"]),
    "an unknown dtype": lambda h: told_of(h, dtype="F31"),
    "a dtype that is a list": lambda h: told_of(h, dtype=[]),
    "a shape whose product overflows": lambda h: told_of(h, shape=[1 << 62, 1 << 62]),
    "a negative shape": lambda h: told_of(h, shape=[-1, 52]),
    "a broken shape": lambda h: told_of(h, shape=[1.5]),
    "a shape of 100,000 axes": lambda h: told_of(h, shape=[1] * 100_000),
    "objects nested 50,000 deep": lambda h: b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "lists nested 100,000 deep": lambda h: b"[" * 100_000,
    "metadata that is no text": lambda h: h | {"__metadata__": {"a": 1}},
    "a name of 100,000 letters": lambda h: {"x" * 100_000: h[Q]} | h,
    "bytes that are not UTF-8": lambda h: b"\xff" * 50,
    "a header that is a list": lambda h: [],
    "a header of nothing": lambda h: {},
    "the same numbers under two names": lambda h: h | {"copy": h[Q]},
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_safetensors_header_that_lies(name: str, folder: Path) -> None:
    shard = folder / "model.safetensors"
    header, body = parts_of(shard)
    told = HEADERS[name](header)
    told, size = told if isinstance(told, tuple) else (told, None)
    put_together(shard, told, body, size)
    refused(folder, "model.safetensors" if told else str(folder))


def test_a_name_that_stands_twice_in_a_header_is_read_once(folder: Path) -> None:
    """The library keeps the last; what is read still fills the file exactly, or it is refused."""
    header, body = parts_of(folder / "model.safetensors")
    whole = {name: tensor.clone() for name, tensor in load_checkpoint(folder).state_dict().items()}
    double = json.dumps(told_of(header, dtype="I32")).encode()[:-1] + b"," + json.dumps({Q: header[Q]}).encode()[1:]
    put_together(folder / "model.safetensors", double, body)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load_checkpoint(folder).state_dict().items())


INDEXES: dict[str, Any] = {
    "a name of 5,000 letters": {Q: "x" * 5000},
    "a name with a NUL": {Q: "a\0b"},
    "half a character": {Q: "\ud800"},
    "the folder above": {Q: ".."},
    "the folder itself": {Q: "."},
    "a way out and in again": {Q: "checkpoint/../model.safetensors"},
    "a way out for Windows": {Q: "..\\secret.safetensors"},
    "an absolute path": {Q: "/etc/hostname"},
    "a name that is a number": {Q: 3},
    "no map": None,
    "an empty map": {},
}


@pytest.mark.parametrize("name", INDEXES)
def test_an_index_that_points_elsewhere(name: str, folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": INDEXES[name]}))
    refused(folder, str(folder))


LINKS: dict[str, Callable[[Path], Any]] = {
    "to itself": lambda shard: shard.symlink_to(shard),
    "to nothing": lambda shard: shard.symlink_to("nowhere"),
    "to a file of the system": lambda shard: shard.symlink_to("/etc/passwd"),
    "to an endless device": lambda shard: shard.symlink_to("/dev/zero"),
    "to a folder": lambda shard: shard.symlink_to("/etc"),
    "a folder itself": lambda shard: shard.mkdir(),
}


@pytest.mark.parametrize("name", LINKS)
def test_a_shard_that_is_a_link(name: str, folder: Path) -> None:
    """A link to weights elsewhere is how hub caches store them, so it is followed; what is there must be weights."""
    shard = folder / "model.safetensors"
    shard.unlink()
    LINKS[name](shard)
    refused(folder)


def test_a_shard_that_is_a_link_to_weights_is_read(folder: Path, tmp_path: Path) -> None:
    (folder / "model.safetensors").rename(tmp_path / "blob")
    (folder / "model.safetensors").symlink_to(tmp_path / "blob")
    load_checkpoint(folder)


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for _ in range(depth):
        found = {"a": found}
    return found


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config/vocab_size", 10**18),
        ("text_config/hidden_size", 10**9),
        ("text_config/num_hidden_layers", 10**6),
        ("vision_config/num_hidden_layers", 10**6),
        ("text_config/kv_lora_rank", 10**400),
        ("text_config/rope_theta", 10**400),
        ("text_config/rope_theta", 1e308),
        ("text_config/routed_scaling_factor", float("-inf")),
        ("text_config/max_position_embeddings", 10**15),
        ("text_config/model_type", "y" * 9999),
        ("vision_config/init_pos_emb_height", 2**30),
        ("vision_config/merge_kernel_size", [1] * 5000),
        ("quantization_config", {"a": ["x"] * 10_000}),
        ("quantization_config", nested(900)),
        ("torch_dtype", ["bfloat16"]),
        ("torch_dtype", None),
        ("vision_config", "moonvit"),
    ],
    ids=lambda value: shown(value, 30),
)
def test_a_config_that_asks_for_too_much(path: str, value: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    *section, key = path.split("/")
    (config[section[0]] if section else config)[key] = value
    (folder / "config.json").write_text(json.dumps(config))
    refused(folder, str(folder))


@pytest.mark.parametrize("key", ["x", "1" * 30, "-1", "²"])
def test_a_special_token_without_a_place(key: str, tmp_path: Path) -> None:
    tiny_chat().tokenizer.save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {key: {"content": "<|x|>"}}}))
    with pytest.raises(ValueError) as caught:
        Tokenizer.from_folder(tmp_path)
    sentence_of(caught.value, "token")


@pytest.mark.parametrize("name", ["", "~nobody-at-all/x"])
def test_a_model_without_a_name(name: str) -> None:
    with pytest.raises(ValueError) as caught:
        checkpoint_folder(name)
    sentence_of(caught.value)


# --- run files and sweeps ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run() -> Run:
    messages = question("count the circles", picture(56, 56))
    *_, run = record(talking_model(), tiny_chat(), messages, model_name="tiny", max_new_tokens=4)
    assert isinstance(run, Run)
    return run


def story(**values: Any) -> Callable[[dict, dict], Any]:
    return lambda story, _: story.update(values)


def each(name: str, value: Any) -> Callable[[dict, dict], Any]:
    return lambda story, _: story.update({name: [value] * len(story[name])})


def geometry(**values: Any) -> Callable[[dict, dict], Any]:
    return lambda story, _: story["pictures"][0].update(values)


RUNS: dict[str, Callable[[dict, dict], Any]] = {
    "a question that is a number": story(question=3),
    "texts that are numbers": each("texts", 1),
    "texts that are one text": lambda story, _: story.update(texts="x" * len(story["texts"])),
    "roles that are numbers": each("roles", 1),
    "settings that are a list": story(settings=[]),
    "edits that are a text": story(edits="x"),
    "versions that are a list": story(versions=[1]),
    "layers that are texts": each("moe_layers", "a"),
    "experts without number": story(n_experts="11"),
    "10**400 experts": story(n_experts=10**400),
    "a first row of 1.5": story(first_row=1.5),
    "a prompt as long as true": story(prompt_length=True),
    "a thought that is nothing": story(thought=None),
    "messages that are a text": story(messages="hello"),
    "a seed that is a text": story(seed="x"),
    "pictures that are a number": story(pictures=7),
    "pictures that are lists": story(pictures=[[1]]),
    "a merge of 0": geometry(merge=0),
    "patches of 0 pixels": geometry(patch_size=0),
    "a negative grid": geometry(grid=[-4, -4]),
    "a grid of 10**9 patches": geometry(grid=[10**9, 10**9]),
    "a grid of three sides": geometry(grid=[4, 4, 4]),
    "an original of no pixels": geometry(original=[0, 0]),
    "an original of texts": geometry(original=["a", "b"]),
    "no offset": geometry(offset=None),
    "a picture that is none": lambda _, arrays: arrays.update({"picture 0": np.zeros(5, np.uint8)}),
    "a picture of no bytes": lambda _, arrays: arrays.update({"picture 0": np.zeros(0, np.uint8)}),
    "kept that is nothing": story(kept=None),
    "kept of nothing known": story(kept={"colour": "square root steps"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_file_whose_checksum_is_right_and_contents_are_not(name: str, run: Run, tmp_path: Path) -> None:
    good, bad = tmp_path / "good.run", tmp_path / "bad.run"
    run.save(good)
    text, arrays = run_files.read(good)
    told = json.loads(text)
    RUNS[name](told, arrays)
    text = json.dumps(told)
    save_file(arrays, bad, {"kimi_vl_run": text, "format": "2", "sha256": run_files.digest(text, arrays)})
    with pytest.raises(RunError) as caught:
        Run.load(bad)
    sentence_of(caught.value, "bad.run", "damaged")


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3", "F8_E5M2", "I16"])
def test_a_run_file_with_numbers_that_numpy_may_not_know(dtype: str, run: Run, tmp_path: Path) -> None:
    file = tmp_path / "one.run"
    run.save(file)
    header, body = parts_of(file)
    first, last = header["weights"]["data_offsets"]
    header["weights"] |= {"dtype": dtype, "shape": [(last - first) // (1 if dtype.startswith("F8") else 2)]}
    put_together(file, header, body)
    with pytest.raises(RunError) as caught:
        Run.load(file)
    sentence_of(caught.value, str(file), dtype)


def test_a_run_file_that_claims_eight_terabytes(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "one.run"
    run.save(file)
    size = 8 * 10**12
    header, array = parts_of(file)[0], {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    put_together(file, {"__metadata__": header["__metadata__"], "a": array}, b"")
    try:
        os.truncate(file, file.stat().st_size + size)
    except OSError:
        pytest.skip("this file system has no files of that size")
    with pytest.raises(RunError) as caught:
        Run.load(file)
    sentence_of(caught.value, str(file))


@pytest.mark.parametrize("path", ["", "a\0b", "x" * 300, "/dev/null", "/dev/zero"])
def test_a_place_that_holds_no_run_and_takes_none(path: str, run: Run) -> None:
    kind = os.stat(path).st_mode if path.startswith("/dev") else None
    for what in (lambda: Run.load(path), lambda: run.save(path)):
        with pytest.raises(RunError) as caught:
            what()
        sentence_of(caught.value)
    assert kind is None or os.stat(path).st_mode == kind  # a device is not replaced by a file


@pytest.mark.parametrize("line", [b"[" * 100_000, b"3", b"\xff", b'{"case": [], "result": {}}', b'{"case": -1, "result": {}}'])
def test_a_damaged_line_of_a_sweep(line: bytes, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    asked: dict[str, Any] = {"setup": "test_sweeps:prepare", "work": "test_sweeps:measure", "path": path}
    sweep([{"number": 1}], **asked, workers=1, progress=False)
    before = path.read_bytes() + line + b"\n"
    path.write_bytes(before)
    with pytest.raises(SweepError) as caught:
        sweep([{"number": 1}], **asked, workers=1, progress=False)
    sentence_of(caught.value, str(path), "line 3")
    assert path.read_bytes() == before


# --- the command line ----------------------------------------------------------------------------------------------------

COMMANDS: list[tuple[str, str]] = [
    ("chat --max-tokens 0 hello", "max_new_tokens"),
    ("chat --temperature nan hello", "temperature"),
    ("chat --temperature inf hello", "temperature"),
    ("chat --thought-budget -1 hello", "--thought-budget"),
    ("chat --image {folder} hello", "is a folder"),
    ("chat --image {text} hello", "not a picture"),
    ("chat --image {wide} hello", "9000 x 28"),
    ("chat --model {text} hello", "not a folder"),
    ("chat --model ~nobody-at-all/x hello", "~nobody-at-all/x"),
    ("chat --seed 99999999999 hello", "--seed"),
    ("run hello", "--out"),
    ("run --out no/such/x.run hello", "no/such/x.run"),
    ("run --out {folder} hello", "--out"),
    ("run --out {kept} --image {text} hello", "not a picture"),
    ("analyse modality", "kimi-vl run"),
    ("analyse modality {text}", "not a run"),
    ("analyse modality nowhere.run", "nowhere.run"),
    ("analyse modality {kept} --out {text}", "is a file"),
    ("analyse occlusion --image {text} --question q", "not a picture"),
    ("analyse occlusion --image {wide}", "--question"),
    ("analyse head-hits --family nope", "nope"),
    ("analyse head-hits --scenes 0", "--scenes"),
    ("analyse occlusion --at 1,2,3 --image {wide}", "1,2,3"),
    ("analyse occlusion --expert 3 --image {wide}", "layer.expert"),
    ("analyse modality --workers 0", "--workers"),
    ("analyse modality nowhere.run --layer 99", "does not use --layer; leave it out"),
    ("analyse expert-load nowhere.run --seed 0", "does not use --seed; leave it out"),
    ("analyse occlusion --layer 99", "does not use --layer; leave it out"),
    ("analyse occlusion --image {wide} --question q --group all", "does not use --group; leave it out"),
    ("analyse weight-spectrum --max-tokens 5", "does not use --max-tokens; leave it out"),
    ("parity study nowhere", "nowhere"),
    ("parity study study --dtype int8", "int8"),
    ("sites nothing.**", "nothing.**"),
    ("study evaluate --split nope --scenes 1", "nope"),
    ("study evaluate --json no/such/x.json", "no/such/x.json"),
    ("study claim nope", "nope"),
    ("study claim landing --json no/such/x.json", "no/such/x.json"),
    ("study train --out {text}", "is a file"),
    ("study train --start nowhere --out {folder}", "nowhere"),
    ("study average study nowhere new", "nowhere"),
    ("study average study study {folder}", "is there already"),
    ("study average study study new --share 1.5", "share is 1.5"),
    ("demo --port x", "--port"),
    ("demo --host 999.1.1.1", "999.1.1.1"),
]


@pytest.mark.parametrize(("command", "says"), COMMANDS)
def test_a_bad_command(command: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    places = {name: tmp_path / name for name in ("folder", "text", "wide", "kept")}
    places["folder"].mkdir()
    places["text"].write_text("no picture")
    places["wide"].write_bytes(encoded(Image.new("RGB", (9000, 28))))
    places["kept"].write_text("an earlier run")
    monkeypatch.chdir(tmp_path)
    assert cli.main([part.format(**places) for part in command.split()]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("kimi-vl: ") and err.count("\n") == 1 and says in err and len(err) < LIMIT, err
    assert places["text"].read_text() == "no picture" and places["kept"].read_text() == "an earlier run"
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted(places)


# --- the page ------------------------------------------------------------------------------------------------------------

ANY = next(iter(SIZES))
ANNA: Any = SimpleNamespace(session_hash="anna")


@pytest.fixture
def made() -> Iterator[Page]:
    """A page with a tiny model, on which a visitor has asked one question."""
    page = Page(Session(talking_model(), tiny_chat(), "tiny"))
    page.desks.change("anna", lambda _: Desk.of([page.session.picture(picture(28, 28))]))
    assert ask(page)[-1][0]["kind"] == "run"
    yield page
    page.close()


def ask(page: Page, text: Any = "count the circles", *settings: Any) -> list[Any]:
    with torch.inference_mode():
        chosen: Any = settings or (0.0, -1, 4, 0)
        return list(page.ask(text, *chosen, request=ANNA))


def event(data: Any) -> Any:
    return SimpleNamespace(_data=data)


def still_there(page: Page) -> None:
    """Nothing earlier was lost, and the next question is answered."""
    assert len(page.shelf.own("anna")) == 1 and len(page.desks.get("anna").pictures) == 1
    assert ask(page, "How many red circles?")[-1][0]["kind"] == "run"


QUESTIONS: dict[str, tuple[Any, ...]] = {
    "nothing": (None, 0.0, -1, 4, 0),
    "blanks": (" \n ", 0.0, -1, 4, 0),
    "a million letters": ("x" * 1_000_000, 0.0, -1, 4, 0),
    "more than the context": ("what? " * 5000, 0.0, -1, 4, 0),
    "a temperature of text": ("hello", "warm", -1, 4, 0),
    "a negative temperature": ("hello", -1, -1, 4, 0),
    "a temperature that is not a number": ("hello", float("nan"), -1, 4, 0),
    "no budget": ("hello", 0.0, None, 4, 0),
    "a budget of text": ("hello", 0.0, "8", 4, 0),
    "a reply of no tokens": ("hello", 0.0, -1, 0, 0),
    "a reply of a billion tokens": ("hello", 0.0, -1, 10**9, 0),
    "a seed of text": ("hello", 0.0, -1, 4, "x"),
    "a seed of 10**30": ("hello", 0.0, -1, 4, 10**30),
    "a negative seed": ("hello", 0.0, -1, 4, -1),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_question_that_cannot_be_asked(name: str, made: Page) -> None:
    with pytest.raises(gr.Error) as caught:
        ask(made, *QUESTIONS[name])
    sentence_of(caught.value)
    still_there(made)


EVENTS: dict[str, Any] = {
    "nothing": None,
    "a text": "add",
    "an unknown deed": {"what": "burn"},
    "a deed that is a list": {"what": []},
    "a file of the server": {"what": "add", "files": [{"path": "/etc/passwd"}]},
    "a way out of the uploads": {"what": "add", "files": [{"path": f"{tempfile.gettempdir()}/gradio/../../etc/passwd"}]},
    "a file without a path": {"what": "add", "files": [{}]},
    "a file that is a number": {"what": "add", "files": [3]},
    "a file that could not be uploaded": {"what": "add", "failed": ["x" * 9999]},
}


@pytest.mark.parametrize("name", EVENTS)
def test_an_upload_that_is_none(name: str, made: Page) -> None:
    with pytest.raises(gr.Error) as caught:
        list(made.arrange(event(EVENTS[name]), ANNA))
    assert "passwd" not in str(caught.value) and "root" not in str(caught.value)
    still_there(made)


@pytest.mark.parametrize(
    "data", [{"what": "move"}, {"what": "move", "id": [], "by": {}}, {"what": "remove", "id": 7}, {"what": "add", "files": 5}]
)
def test_pictures_that_are_not_there_are_left_alone(data: Any, made: Page) -> None:
    list(made.arrange(event(data), ANNA))
    still_there(made)


@pytest.mark.parametrize(
    ("family", "seed", "size"),
    [("nope", 0, ANY), ("count", 0, "enormous"), ("count", "x", ANY), ("count", 1e300, ANY), ("count", float("nan"), ANY)],
)
def test_a_scene_that_cannot_be_drawn(family: str, seed: Any, size: str, made: Page) -> None:
    with pytest.raises(gr.Error) as caught:
        made.draw(family, seed, size, ANNA)
    sentence_of(caught.value)
    still_there(made)


CALLS: dict[str, Any] = {
    "nothing": None,
    "an empty call": {},
    "an unknown panel": {"name": "shell", "id": 1, "run": "1", "args": {}},
    "a name that is a list": {"name": [], "id": 1, "run": "1", "args": {}},
    "a run of somebody else": {"name": "runs", "id": 1, "run": "999", "args": {}},
    "a run that is a path": {"name": "runs", "id": 1, "run": "../../etc/passwd", "args": {}},
    "args that are a list": {"name": "runs", "id": 1, "run": "1", "args": []},
    "no args": {"name": "lens", "id": 1, "run": "1"},
    "a file of the server": {"name": "open_run", "id": 1, "run": "1", "args": {"path": "/etc/passwd"}},
    "a picture of the server": {"name": "ask_other", "id": 1, "run": "1", "args": {"path": "/etc/passwd"}},
    "a step of a thought that is none": {"name": "edit", "id": 1, "run": "1", "args": {"step": 0, "how": "stop"}},
    "10,000 changes": {"name": "change", "id": 1, "run": "1", "args": {"changes": [{}] * 10_000, "seed": 0}},
    "a change nested deep": {"name": "change", "id": 1, "run": "1", "args": {"changes": [nested(800)], "seed": 0}},
}


@pytest.mark.parametrize("name", CALLS)
def test_a_call_that_cannot_be_answered(name: str, made: Page) -> None:
    with torch.inference_mode():
        *_, told = made.act(event(CALLS[name]), ANNA)
    assert told["kind"] == "result" and "\n" not in told["error"] and len(told["error"]) < LIMIT
    assert "passwd" not in told["error"] and not told["error"].startswith("It failed"), told
    still_there(made)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
NAMES = "first last position picture patch step how text changes seed count id path name budgets answer layer".split()
ARGUMENTS = st.dictionaries(
    st.sampled_from(NAMES),
    JSON | st.integers(-3, 60),
    max_size=6,
)
CHEAP = sorted(ACTS.keys() - {"figures", "curve", "more controls", "limits"})  # these work long before they refuse


@given(name=st.sampled_from(CHEAP), args=ARGUMENTS)
@settings(deadline=None, max_examples=120)
def test_what_a_panel_is_sent_is_answered_or_refused(run: Run, name: str, args: dict[str, Any]) -> None:
    shelf, here = {"1": run}, Session(talking_model(), tiny_chat(), "tiny")
    asked = Asked(here, run, args, lambda: True, lambda _: "2", shelf=lambda: shelf, view=lambda _: payload(run, id="1"))
    try:
        with torch.inference_mode():
            list(ACTS[name](asked))
    except ValueError as error:
        assert "\n" not in str(error) and len(str(error)) < LIMIT


# --- values in sentences -------------------------------------------------------------------------------------------------


@given(value=JSON)
@settings(deadline=None, max_examples=60)
def test_a_value_in_a_sentence_is_short_and_in_one_line(value: Any) -> None:
    for one in (value, nested(2000), 10**9999, "x" * 9999, "a\nb"):
        told = shown(one)
        assert told and len(told) <= LONGEST and "\n" not in told
