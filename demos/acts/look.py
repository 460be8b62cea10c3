"""The look panel: what the picture was given anyway, what a word's logit owes to it, and where MoonViT looked."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.analyses.eyes import patch_attention, relevancy
from workbench.analyses.localise import relative_attention
from workbench.runs import Run, record
from workbench.viewer.payload import pack_array

from .act import Act, Asked, in_force

NEUTRAL = "describe the picture."
SENT = 2_000_000  # numbers of a map; a larger one is sent as its mean over heads


def neutral(asked: Asked) -> Iterator[dict[str, Any]]:
    """No args. What a neutral question about the same pictures looks at: {"question", "word", "prompt"}.

    word and prompt are (L, H, 1, M) packed: the rows of its last word, and of the last position of its prompt, which writes
    the first word. `workbench.analyses.localise.relative_attention` divides by them.
    """
    run = _unchanged(asked)
    if not run.pictures:
        raise ValueError("this run has no picture; ask about one to compare where two questions look")
    yield {"note": f"Asking “{NEUTRAL}” about the same picture…"}
    content: list[dict[str, Any]] = [{"type": "image", "image": picture.image} for picture in run.pictures]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": NEUTRAL}]}]
    session = asked.session
    *_, other = record(session.model, session.chat, messages, model_name=run.model_name, max_new_tokens=1)
    assert isinstance(other, Run)
    relative_attention(run, other, row="prompt")  # raises where the two cannot be compared
    words = [at for at in other.positions("user") if any(letter.isalnum() for letter in other.texts[at])]
    rows = {"word": int(words[-1]), "prompt": other.prompt_length - 1}
    kept = {}
    for name, at in rows.items():
        row = other.picture_attention[:, :, [at - other.first_row]].astype("float32")
        kept[name] = pack_array(row if row.size <= SENT else row.mean(1, keepdims=True), "float32")
    yield {"question": NEUTRAL, **kept}


def owed(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: position (of a written token). What its logit owes to each visual token and role, as shares of all it owes.

    Yields {"position", "picture" (M,) packed, "roles", "share", "chance"}.
    """
    run = _unchanged(asked)
    position = asked.whole("position", run.prompt_length, len(run.token_ids) - 1)
    yield {"note": "Following the gradient back…"}
    result = relevancy(asked.session.model, asked.session.chat.processor, run, position)
    row = result["relevancy"]
    yield {
        "position": position,
        "picture": pack_array(row[run.positions("image")] / (float(row.sum()) or 1.0), "float32"),
        "roles": list(result.axes["share"][0][1]),
        "share": result["share"].astype(float).round(5).tolist(),
        "chance": result.chance["share"].astype(float).round(5).tolist(),
    }


def eye(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: picture, patch. What this patch reads in MoonViT: {"picture", "patch", "attention": (L, H, 1, P) packed,
    "chance"}.
    """
    run = _unchanged(asked)
    if not run.pictures:
        raise ValueError("this run has no picture; ask about one to see where MoonViT looks")
    picture = asked.whole("picture", 0, len(run.pictures) - 1)
    patch = asked.whole("patch", 0, run.pictures[picture].grid.patch_count - 1)
    session, images = asked.session, [one.image for one in run.pictures]
    result = patch_attention(session.model, session.chat.processor, images, patch, picture, model_name=run.model_name)
    maps = result["attention"]  # (L, H, rows, columns)
    if maps.size > SENT:
        maps = maps.mean(1, keepdims=True)
    packed = pack_array(maps.reshape(*maps.shape[:2], 1, -1), "root8")
    yield {"picture": picture, "patch": patch, "attention": packed, "chance": result.chance["attention"]}


def _unchanged(asked: Asked) -> Run:
    """The run, if the model as it is now made it. Raises ValueError for a run with changes in force."""
    run = asked.run
    if changes := in_force(run):
        raise ValueError(
            f"this run was made with a change in force ({changes[0]}), which the model has not now; "
            "open the run without it to look further into the model"
        )
    return run


ACTS: dict[str, Act] = {"neutral": neutral, "relevancy": owed, "eye": eye}
