"""A run as the viewer takes it: one dictionary of plain JSON types, its arrays quantised, compressed and base64-encoded.

Attention is stored in 256 steps of its square root, so that small shares survive: a stored p is off by at most
(2 sqrt(p) + 1/510) / 510, which is 0.12 percentage points at 9% and 0.2 at 25%.
"""

from __future__ import annotations

import base64
import html
import json
import re
import zlib
from collections.abc import Sequence
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..analyses.cues import classify, segments, split_sentences

if TYPE_CHECKING:
    from PIL.Image import Image

    from kimi_vl_ref.images import Picture

    from ..runs import Run

HERE = Path(__file__).parent
VERSION = 2
# in the order of their tabs; each is panels/NAME.js with panels/NAME.css
PANELS: tuple[str, ...] = ("route", "think", "change", "lens", "compare", "keep")
ATTENTION_BYTES = 4_000_000  # compressed; a longer run keeps the mean over heads, then over layers, and says so
SHOWN_SIDE = 1280  # pixels; a larger picture is shown smaller, its geometry stays that of the original


def payload(
    run: Run, *, id: str = "", truth: dict[str, Any] | None = None, note: str = "", attention_bytes: int = ATTENTION_BYTES
) -> dict[str, Any]:
    """Everything the viewer shows of a run. `truth` = {"answer": str, "right": bool} where the true answer is known.
    `id` is what the host calls this run when the viewer asks it for more.

    Rows are the positions from `first_row` on: the question and what was written. Visual tokens are not listed as words.
    `chosen` has the experts of the rows, `chosen_early` those of the words before them, `chosen_picture` those of all visual
    tokens; the last two with the largest weight first.
    """
    words = [at for at, role in enumerate(run.roles) if not role.startswith("image")]
    rows = slice(run.first_row, None)
    attention, averaged = _attention(run.picture_attention, attention_bytes)
    mass = np.asarray(run.role_mass, np.float32)
    if averaged:  # both panels must speak of the same heads
        mass = _like(mass, attention["shape"])
    ids = "uint8" if run.n_experts <= 256 else "uint16"
    return {
        "kind": "run",
        "id": id,
        "version": VERSION,
        "question": run.question,
        "thought": run.thought,
        "answer": run.answer,
        "finished": run.finished,
        "note": note,
        "truth": truth,
        "model": {
            "name": run.model_name,
            "device": run.device,
            "dtype": run.dtype,
            "versions": run.versions,
            "layers": int(run.picture_attention.shape[0]),
            "heads": int(run.picture_attention.shape[1]),
            "moe_layers": [int(layer) for layer in run.moe_layers],
            "experts": int(run.n_experts),
            "top_k": int(run.chosen.shape[2]),
        },
        "settings": {"seed": run.seed, **run.settings},
        "edits": list(run.edits),
        "pictures": _pictures(run.pictures),
        "prompt_length": int(run.prompt_length),
        "earlier": _earlier(run),
        "first_row": int(run.first_row),
        "rows": int(mass.shape[2]),
        "words": {
            "at": words,
            "text": [run.texts[at] for at in words],
            "role": [run.roles[at] for at in words],
            "logprob": [_number(run.logprobs[at]) for at in words],
            "entropy": [_number(run.entropies[at]) for at in words],
        },
        "segments": _segments(run, words),
        "role_names": list(run.role_names),
        "averaged": averaged,
        "attention": attention,
        "mass": pack_array(mass, "unit16"),
        "chosen": pack_array(run.chosen[:, rows], "uint16"),
        "chosen_early": pack_array(_by_weight(run, [at for at in words if at < run.first_row]), ids),
        "chosen_picture": pack_array(_by_weight(run, run.positions("image")), ids),
        "weights": pack_array(run.weights[:, rows], "float32"),
        "scores": pack_array(run.scores[:, rows], "unit16" if run.scores[:, rows].size < 400_000 else "unit8"),
        "bias": pack_array(run.bias, "float32"),
    }


def progress(
    pictures: Sequence[Picture], *, question: str, model: str, device: str, thought: str = "", answer: str = "", note: str = ""
) -> dict[str, Any]:
    """What the viewer shows while an answer is being written: the picture with its grid, and the text so far."""
    return {
        "kind": "progress",
        "version": VERSION,
        "question": question,
        "thought": thought,
        "answer": answer,
        "note": note,
        "model": {"name": model, "device": device},
        "pictures": _pictures(pictures),
    }


def steps(thought: str) -> list[list[str]]:
    """[text, kind] of the sentences of a thought, also of one that is being written; the texts join to the whole again."""
    return [[text, classify(text).kind] for text in split_sentences(thought)]


def standalone(run: Run | dict[str, Any], *, title: str = "Kimi-VL Workbench") -> str:
    """The viewer and one run (or its payload) as a single HTML file that opens from disk, without Python or a network."""
    data = run if isinstance(run, dict) else payload(run)
    # "<" would let a question end the script element; as an escape it is the same JSON
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")
    parts = {"TITLE": html.escape(title), "SCRIPT": source("viewer.js"), "DATA": text}
    return re.sub("@(TITLE|SCRIPT|DATA)@", lambda found: parts[found[1]], source("viewer.html"))


@cache
def source(name: str) -> str:
    """The text of one of the viewer's files; viewer.js comes with its parts, its panels and its styles inside it."""
    text = (HERE / name).read_text(encoding="utf-8")
    if name != "viewer.js":
        return text
    panels = [f"panels/{panel}" for panel in PANELS]
    # a panel's own names stay its own: a block of strict JavaScript is a scope
    text = text.replace("//@panels", "\n".join("{\n//@include " + panel + ".js\n}" for panel in panels))
    text = re.sub(r"//@include (\S+)", lambda found: (HERE / found[1]).read_text(encoding="utf-8"), text)
    style = "\n".join((HERE / f"{sheet}.css").read_text(encoding="utf-8") for sheet in ("viewer", *panels))
    return text.replace("@CSS@", style.replace("\\", "\\\\"), 1)


def pack_array(values: Any, kind: str) -> dict[str, Any]:
    """An array as {shape, kind, data}. Kinds: root8 (v = (q/255)^2), unit8 (q/255), unit16 (q/65535), uint8, uint16,
    float32.
    """
    values = np.asarray(values)
    wide = np.nan_to_num(values.astype(np.float32)) if not kind.startswith("uint") else values
    encode = {
        "root8": lambda: np.round(255 * np.sqrt(wide.clip(0, 1))).astype(np.uint8),
        "unit8": lambda: np.round(255 * wide.clip(0, 1)).astype(np.uint8),
        "unit16": lambda: np.round(65535 * wide.clip(0, 1)).astype("<u2"),
        "uint8": lambda: wide.astype(np.uint8),
        "uint16": lambda: wide.astype("<u2"),
        "float32": lambda: wide.astype("<f4"),
    }[kind]
    data = base64.b64encode(zlib.compress(encode().tobytes(), 6)).decode("ascii")
    return {"shape": list(values.shape), "kind": kind, "data": data}


def unpack_array(packed: dict[str, Any]) -> np.ndarray:
    """What the viewer makes of a packed array, for tests and for other readers."""
    raw = zlib.decompress(base64.b64decode(packed["data"]))
    kinds = {"root8": np.uint8, "unit8": np.uint8, "unit16": "<u2", "uint8": np.uint8, "uint16": "<u2", "float32": "<f4"}
    stored = np.frombuffer(raw, kinds[packed["kind"]]).reshape(packed["shape"])
    if packed["kind"] == "root8":
        return np.square(stored / np.float32(255))
    if packed["kind"] in ("unit8", "unit16"):
        return stored / np.float32(255 if packed["kind"] == "unit8" else 65535)
    return stored


def _earlier(run: Run) -> int:
    """How many positions belong to earlier turns of the conversation (and what stands before them); 0 in the first turn."""
    begins = [at for at in range(run.prompt_length) if run.texts[at] == "<|im_user|>" and run.roles[at] == "special"]
    return begins[-1] if len(begins) > 1 else 0


def _attention(attention: np.ndarray, limit: int) -> tuple[dict[str, Any], str]:
    """The (L or 1, H or 1, rows, M) array, packed, and in words what was averaged to stay small ("" for nothing)."""
    attention = np.asarray(attention, np.float32)
    packed, averaged = {}, ""
    for axes, averaged in (((), ""), ((1,), "heads"), ((0, 1), "layers and heads")):  # noqa: B007, it is returned
        packed = pack_array(attention.mean(axis=axes, keepdims=True) if axes else attention, "root8")
        if np.prod(packed["shape"]) <= limit or 3 * len(packed["data"]) <= 4 * limit:  # 4 letters a 3 bytes
            break
    return packed, averaged


def _segments(run: Run, words: list[int]) -> list[list[Any]]:
    """[first word, last word, kind] of each sentence of the thought, as `analyses.cues` cuts and names them."""
    number = {at: word for word, at in enumerate(words)}
    return [[number[one.start], number[one.stop - 1], one.cue.kind] for one in segments(run)]


def _by_weight(run: Run, positions: Sequence[int] | np.ndarray) -> np.ndarray:
    """(L_moe, N, K) experts of these positions, the one with the largest weight first; of equal ones the first chosen."""
    at = np.asarray(positions, np.int64)
    order = np.argsort(-run.weights[:, at].astype(np.float32), axis=-1, kind="stable")
    return np.take_along_axis(run.chosen[:, at], order, -1)


def _like(mass: np.ndarray, shape: Sequence[int]) -> np.ndarray:
    axes = tuple(axis for axis in (0, 1) if shape[axis] == 1)
    return mass.mean(axis=axes, keepdims=True)


def _pictures(pictures: Sequence[Picture]) -> list[dict[str, Any]]:
    first, listed = 0, []
    for picture in pictures:
        grid = picture.grid
        listed.append(
            {
                "src": picture_source(picture.image),
                "original": list(grid.original),
                "resized": list(grid.resized),
                "grid": list(grid.grid),
                "patch": grid.patch_size,
                "merge": grid.merge,
                "offset": list(grid.offset),
                "first": first,
                "tokens": grid.token_count,
            }
        )
        first += grid.token_count
    return listed


def picture_source(image: Image, side: int = SHOWN_SIDE) -> str:
    """A picture as the `src` of an <img>; one with more than `side` pixels on a side is made smaller."""
    if max(image.size) > side:
        image = image.copy()
        image.thumbnail((side, side))
    file, small = BytesIO(), image.width * image.height <= 300_000
    if small:
        image.save(file, "PNG", optimize=True)
    if not small or file.tell() > 300_000:
        file = BytesIO()
        image.save(file, "JPEG", quality=88)
        small = False
    return f"data:image/{'png' if small else 'jpeg'};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
