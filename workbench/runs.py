"""A recorded run: what happened inside the model in one turn of a conversation, in memory and on disk.

`record` answers like `kimi_vl_ref.stream_reply` and ends with a Run. A Run needs no model to be looked at, saved, loaded or
drawn. Letters: T positions, L decoder layers, H heads, E experts, K chosen, M visual tokens of all pictures, G roles.
"""

from __future__ import annotations

import json
import platform
import warnings
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kimi_vl_ref import Chat, KimiVL, Reply, stream_reply
from kimi_vl_ref.chat import reply_roles
from kimi_vl_ref.images import PatchGrid, Picture, open_image
from kimi_vl_ref.thought import split_thought
from kimi_vl_ref.told import short, shown

from .edits import Change, applied, in_force
from .edits.change import Applied
from .edits.routing import moe_layers
from .kept import DETAILS, from_steps, picture_kept, to_steps
from .recorder import Recorder, fingerprint
from .run_files import RunError, read, reason, write
from .tape import active_edits, attach, in_own_context

__all__ = ["ARRAYS", "Begin", "Run", "RunError", "fingerprint", "record"]

# Arrays of a Run: dtype and axes. The letters are the module's; R counts attention rows, L_moe the layers that route.
ARRAYS: dict[str, tuple[type, str]] = {
    "token_ids": (np.int32, "T"),
    "logprobs": (np.float32, "T"),
    "entropies": (np.float32, "T"),
    "chosen": (np.uint16, "L_moe T K"),
    "weights": (np.float16, "L_moe T K"),
    "scores": (np.float16, "L_moe T E"),
    "bias": (np.float32, "L_moe E"),
    "picture_attention": (np.float16, "L H R M"),
    "role_mass": (np.float16, "L H R G"),
}


@dataclass(frozen=True)
class Run:
    """One turn of a conversation. Position t of every array is token t of prompt and reply, the stop token included.

    A row of attention at position t is what the model read once token t was given, while it predicted token t+1: to see
    where it looked while *writing* token t, use row t-1. Rows begin at `first_row`, the text after the last picture.
    """

    question: str  # text of the last user message
    pictures: list[Picture]
    token_ids: np.ndarray  # int32 (T,)
    texts: list[str]  # (T,) for the eye
    roles: list[str]  # (T,) "special", "system", "user", "image 0", ..., "thought", "answer"
    prompt_length: int
    logprobs: np.ndarray  # float32 (T,) nats, nan in the prompt
    entropies: np.ndarray  # float32 (T,) nats, nan in the prompt
    thought: str
    answer: str
    finished: bool  # a stop token came; False: cut off by a limit or by the reader
    moe_layers: list[int]  # which decoder layers route
    n_experts: int
    chosen: np.ndarray  # uint16 (L_moe, T, K) expert ids
    weights: np.ndarray  # float16 (L_moe, T, K)
    scores: np.ndarray  # float16 (L_moe, T, E) without the bias
    bias: np.ndarray  # float32 (L_moe, E) what tips the choice
    first_row: int
    picture_attention: np.ndarray  # float16 (L, H, T - first_row, M) probabilities; H is 1 if only the mean was kept
    role_names: list[str]
    role_mass: np.ndarray  # float16 (L, H, T - first_row, G): probability on all positions of a role
    model_name: str
    device: str
    dtype: str
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    edits: list[str] = field(default_factory=list)  # in force while it was recorded: lines of changes, or "edit site"
    versions: dict[str, str] = field(default_factory=dict)  # "weights" is a fingerprint of the model's weights
    messages: list[dict[str, Any]] = field(default_factory=list)  # as asked; a picture is its number
    kept: dict[str, str] = field(default_factory=dict)  # arrays that are not exact float16: name -> "square root steps"

    def __repr__(self) -> str:
        pictures = f"{len(self.pictures)} picture{'' if len(self.pictures) == 1 else 's'}"
        written = len(self.texts) - self.prompt_length
        lines = [
            f"Run of {self.model_name}: {self.question!r} -> {self.answer!r}",
            f"{pictures}, {self.prompt_length} tokens of prompt, {written} written{'' if self.finished else ' (cut off)'}; "
            f"{len(self.moe_layers)} routing layers, {self.chosen.shape[-1]} of {self.n_experts} experts a token",
        ]
        return "\n".join(lines + [f"edits: {'; '.join(self.edits)}"] * bool(self.edits))

    def _repr_html_(self) -> str:
        """The viewer, in a notebook cell."""
        from .viewer.notebook import cell

        return cell(self)

    def tokens_of_picture(self, picture: int) -> slice:
        """Where the visual tokens of one picture lie among the M of all pictures."""
        if not 0 <= picture < len(self.pictures):
            raise RunError(f"picture {picture} does not exist; this run has {len(self.pictures)} pictures, counted from 0")
        counts = [p.grid.token_count for p in self.pictures]
        return slice(sum(counts[:picture]), sum(counts[: picture + 1]))

    def positions(self, *roles: str) -> np.ndarray:
        """Positions of these roles, in order; "image" stands for every picture."""
        return np.flatnonzero([role in roles or ("image" in roles and role.startswith("image ")) for role in self.roles])

    def heat(self, position: int, picture: int = 0, layer: int | None = None, head: int | None = None) -> np.ndarray:
        """Attention of one row on one picture, (rows, columns) of its visual tokens; the mean over what is not named."""
        tokens, rows = self.tokens_of_picture(picture), self.picture_attention
        if not self.first_row <= position < len(self.token_ids):
            raise RunError(
                f"position {position} has no attention row; this run has rows {self.first_row} to {len(self.token_ids) - 1}"
            )
        for name, at, count in (("layer", layer, rows.shape[0]), ("head", head, rows.shape[1])):
            if at is not None and not 0 <= at < count:
                kept = f" ({self.settings['heads']})" if name == "head" and "heads" in self.settings else ""
                raise RunError(f"{name} {at} does not exist; this run has {name}s 0 to {count - 1}{kept}")
        row = rows[:, :, position - self.first_row, tokens].astype(np.float32)
        row = row.mean(0) if layer is None else row[layer]
        row = row.mean(0) if head is None else row[head]
        return self.pictures[picture].grid.token_heat(row)

    def save(self, path: str | Path) -> None:
        """One safetensors file with everything inside, no pickle; it appears whole or not at all. Raises RunError."""
        self.check()
        arrays = {name: np.ascontiguousarray(getattr(self, name), dtype) for name, (dtype, _) in ARRAYS.items()}
        arrays |= {name: to_steps(arrays[name]) for name in self.kept}
        for number, picture in enumerate(self.pictures):
            png = BytesIO()
            picture.image.save(png, "PNG")
            arrays[f"picture {number}"] = np.frombuffer(png.getvalue(), np.uint8)
        story = {name: getattr(self, name) for name in _STORY}
        story["pictures"] = [{f.name: getattr(p.grid, f.name) for f in fields(PatchGrid)} for p in self.pictures]
        write(Path(path), json.dumps(story, ensure_ascii=True), arrays)  # a lone surrogate would not survive as UTF-8

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Reads a saved run; needs no model. Raises RunError naming the file and what is wrong with it."""
        text, arrays = read(Path(path))
        try:
            parts: dict[str, Any] = json.loads(text) | arrays
            _check_story(parts)
            for name in parts["kept"]:
                if name not in ARRAYS or parts[name].dtype != np.uint8:
                    raise ValueError(f"{name} is said to be kept in steps, and is not")
                parts[name] = from_steps(parts[name])
            pictures = []
            for number, grid in enumerate(parts["pictures"]):
                geometry: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in grid.items()}
                picture = Picture(open_image(parts.pop(f"picture {number}").tobytes()), PatchGrid(**geometry))
                _check_geometry(picture, number)
                pictures.append(picture)
            run = cls(**{**parts, "pictures": pictures})
            run.check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {short(reason(error), 200)}; copy or record it again") from error
        return run

    def check(self) -> None:
        """Raises RunError unless all parts fit each other."""
        sizes = {
            "T": len(self.texts),
            "L_moe": len(self.moe_layers),
            "E": self.n_experts,
            "R": len(self.texts) - self.first_row,
            "M": sum(picture.grid.token_count for picture in self.pictures),
            "G": len(self.role_names),
        }
        for name, (dtype, axes) in ARRAYS.items():
            array, letters = getattr(self, name), axes.split()
            # the first array with H or K says how many there are
            if array.ndim != len(letters) or any(
                size != sizes.setdefault(letter, size) for letter, size in zip(letters, array.shape, strict=True)
            ):
                expected = ", ".join(str(sizes.get(letter, letter)) for letter in letters)
                raise RunError(f"{name} has the shape {array.shape}, expected ({expected}) for the axes {axes}")
            if array.dtype != dtype:
                raise RunError(f"{name} is {array.dtype}, expected {np.dtype(dtype)}")
        if len(self.roles) != sizes["T"]:
            raise RunError(f"there are {len(self.roles)} roles for {sizes['T']} tokens")
        if not 0 <= self.first_row <= sizes["T"] or not 0 <= self.prompt_length <= sizes["T"]:
            raise RunError(f"first_row={self.first_row}, prompt_length={self.prompt_length} do not fit {sizes['T']} tokens")
        if self.chosen.size and int(self.chosen.max()) >= self.n_experts:
            raise RunError(f"expert {int(self.chosen.max())} was chosen, but there are {self.n_experts}")


_STORY = [one.name for one in fields(Run) if one.name not in ARRAYS and one.name != "pictures"]
_JSON: dict[str, Any] = {"str": str, "int": int, "bool": bool, "int | None": int | None, "list": list, "dict": dict}


def _check_story(parts: Mapping[str, Any]) -> None:
    """Raises ValueError for a value of another kind than the field's annotation says."""
    for one in fields(Run):
        outer, _, inner = str(one.type).rstrip("]").partition("[")
        if one.name not in _STORY or one.name not in parts:
            continue
        value = parts[one.name]
        fits = type(value) is not bool if outer == "int" else True
        items = value if isinstance(value, list) and outer == "list" else []
        within = _JSON[inner.partition("[")[0]] if outer == "list" else object
        if not fits or not isinstance(value, _JSON[outer]) or not all(isinstance(item, within) for item in items):
            raise ValueError(f"{one.name} is {shown(value)}, where {one.type} belongs")
    if not all(isinstance(value, str) for name in ("versions", "kept") for value in parts.get(name, {}).values()):
        raise ValueError("versions and kept should name texts")


def _check_geometry(picture: Picture, number: int) -> None:
    """Raises ValueError unless the geometry of a picture is one that a processor makes."""
    grid = picture.grid
    pairs = (grid.original, grid.resized, grid.grid, grid.offset)
    pair = all(isinstance(one, tuple) and len(one) == 2 and all(type(side) is int for side in one) for one in pairs)
    if not pair or type(grid.patch_size) is not int or type(grid.merge) is not int:
        raise ValueError(f"the geometry of picture {number} is not whole numbers")
    positive = min(*grid.original, *grid.resized, *grid.grid, grid.patch_size, grid.merge) > 0 and min(grid.offset) >= 0
    if not positive or any(side % grid.merge for side in grid.grid) or picture.image.size not in (grid.original, grid.resized):
        width, height = picture.image.size
        raise ValueError(f"the geometry of picture {number} does not fit its {width} x {height} pixels")


@dataclass(frozen=True)
class Begin:
    """A reply's first tokens, written in the model's place, and what a run says of them."""

    ids: Sequence[int]
    line: str  # for Run.edits
    settings: Mapping[str, Any] = field(default_factory=dict)  # JSON-able, for Run.settings["begin"]


def record(
    model: KimiVL,
    chat: Chat,
    messages: list[dict[str, Any]],
    *,
    model_name: str,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int | None = None,
    thought_budget: int | None = None,
    should_stop: Callable[[], bool] | None = None,
    changes: Sequence[Change] = (),
    begin: Begin | None = None,
    detail: str = "default",
) -> Iterator[Reply | Run]:
    """Answers one conversation; yields the same growing Reply after every token and, last, the Run. Changes no logit.

    should_stop is asked after every token; once it says True, what was written so far becomes the Run. The options from
    max_new_tokens to thought_budget are those of `stream_reply`. Costs one decoding step more, since the last token is
    read too.

    changes   put in force for this answer (`workbench.edits`). They, and those of an `applied` block around the call, are
              in `Run.edits` as lines and in `Run.settings["changes"]` with settings and counts of what they touched here.
              One that touched nothing is warned of (RuntimeWarning), so that what was written is not lost.
    begin     what the reply begins with, such as an edited thought: `workbench.thoughts`.
    detail    "default" keeps attention as far as a saved run stays small, "full" all of it as far as memory allows:
              `workbench.kept` has the sizes.
    """
    if detail not in DETAILS:
        raise RunError(f"detail={detail!r} is unknown; use one of {', '.join(DETAILS)}")
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "thought_budget": thought_budget,
    }
    job = _Recording(model, chat, messages, model_name, seed, options, should_stop, list(changes), begin, detail)
    return in_own_context(job.items())


@dataclass
class _Recording:
    """One call of `record`."""

    model: KimiVL
    chat: Chat
    messages: list[dict[str, Any]]
    model_name: str
    seed: int | None
    options: dict[str, Any]
    should_stop: Callable[[], bool] | None
    changes: list[Change]
    begin: Begin | None
    detail: str

    def items(self) -> Generator[Reply | Run, None, None]:
        answered: Reply | None = None
        with ExitStack() as stack:
            if self.changes:
                stack.enter_context(applied(self.model, self.changes, idle="report"))
            around = [one for one in in_force() if one.model is self.model]
            _refuse_uneven(self.model, around)
            before = [one.counts() for one in around]
            recorder = Recorder(self.model)
            stack.enter_context(attach(self.model, read=recorder.keeps()))
            begin = () if self.begin is None else self.begin.ids
            stream = stream_reply(self.model, self.chat, self.messages, seed=self.seed, begin=begin, **self.options)
            try:
                for answered in stream:
                    yield answered
                    if self.should_stop is not None and self.should_stop():
                        break
            finally:
                stream.close()  # type: ignore[attr-defined]
            assert answered is not None
            recorder.read_last(answered.token_ids[-1])
            run = self._run(answered, recorder, around, before)
        for change in run.settings.get("changes", ()):
            if not any(change["touched"].values()):
                warnings.warn(f"{change['change']}: touched nothing in this run", RuntimeWarning, stacklevel=2)
        yield run

    def _run(self, answered: Reply, recorder: Recorder, around: list[Applied], before: list[Any]) -> Run:
        prompt, written, tokenizer = answered.prompt, answered.token_ids, self.chat.tokenizer
        ids, roles = prompt.input_ids + written, prompt.roles + reply_roles(tokenizer, written)
        thought, answer = split_thought(tokenizer.decode(id for id in written if id not in self.chat.stop_ids))
        pictures = [picture_kept(picture, self.detail) for picture in prompt.pictures]
        routing = recorder.routing()
        other = sum(part.nbytes for part in routing.values() if isinstance(part, np.ndarray)) + 200 * len(ids)
        other += sum(3 * picture.image.width * picture.image.height for picture in pictures)
        attention, kept = recorder.attention(roles, len(prompt.input_ids), other, self.detail)
        unwritten = np.full(len(prompt.input_ids), np.nan, np.float32)
        weight = self.model.logits.weight
        settings: dict[str, Any] = {**self.options, "heads": kept.heads}
        edits = _other_edits(around)
        if around:
            changes = [change for one, counts in zip(around, before, strict=True) for change in one.report(since=counts)]
            settings["changes"], edits = changes, [change["change"] for change in changes] + edits
        if self.begin is not None:
            settings["begin"] = {"tokens": len(self.begin.ids), **self.begin.settings}
            edits.append(self.begin.line)
        run = Run(
            question=next((_text(m["content"]) for m in reversed(self.messages) if m["role"] == "user"), ""),
            pictures=pictures,
            token_ids=np.array(ids, np.int32),
            texts=[tokenizer.token_text(id) for id in ids],
            roles=roles,
            prompt_length=len(prompt.input_ids),
            logprobs=np.concatenate([unwritten, np.array(answered.logprobs, np.float32)]),
            entropies=np.concatenate([unwritten, np.array(answered.entropies, np.float32)]),
            thought=thought,
            answer=answer,
            finished=answered.finished,
            **routing,
            **attention,
            model_name=self.model_name,
            device=str(weight.device),
            dtype=str(weight.dtype).removeprefix("torch."),
            seed=self.seed,
            settings=settings,
            edits=edits,
            versions={
                "torch": torch.__version__.split("+")[0],
                "python": platform.python_version(),
                "weights": fingerprint(self.model),
            },
            messages=_plain(self.messages),
            kept={"picture_attention": "square root steps"} if kept.steps else {},
        )
        run.check()
        return run


def _refuse_uneven(model: KimiVL, around: list[Applied]) -> None:
    """A Run has one K for all layers."""
    top_k = {layer: model.config.text.num_experts_per_tok for layer in moe_layers(model)}
    for change in (change for one in around for change in one.changes if change.name == "set_top_k"):
        layers = top_k if change.settings["layers"] is None else change.settings["layers"]
        top_k |= {layer: change.settings["k"] for layer in layers}
    if len(set(top_k.values())) > 1:
        raise RunError(f"layers would choose {sorted(set(top_k.values()))} experts a token; record with one top-k for all")


def _other_edits(around: list[Applied]) -> list[str]:
    """What `active_edits` says, without what it says of changes."""
    found = active_edits()
    for line in (line for one in around for line in one.lines):
        found.remove(line)
    return found


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if isinstance(part.get("text"), str))


def _plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Messages without pixels: a picture is the number of its place in the conversation."""
    number, plain = 0, []
    for message in messages:
        content: Any = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if isinstance(part.get("text"), str):
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    parts.append({"type": "image", "image": number})
                    number += 1
            content = parts
        plain.append({"role": message["role"], "content": content})
    return plain
