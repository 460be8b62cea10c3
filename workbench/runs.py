"""A recorded run: what happened inside the model in one turn of a conversation, in memory and on disk.

`record` answers like `kimi_vl_ref.stream_reply` and ends with a Run. A Run needs no model to be looked at, saved, loaded or
drawn. Letters: T positions, L decoder layers, H heads, E experts, K chosen, M visual tokens of all pictures, G roles.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors
from torch import Tensor, nn

from kimi_vl_ref import Chat, KimiVL, Reply, stream_reply
from kimi_vl_ref.chat import reply_roles
from kimi_vl_ref.images import PatchGrid, Picture, open_image
from kimi_vl_ref.moe import MoE
from kimi_vl_ref.thought import split_thought

from .rows import decoder_rows
from .tape import Keep, active_edits, attach, in_own_context

FORMAT = 1
PROMPT_ROWS = 1024  # attention rows kept of the prompt's end; a longer question keeps its last ones
ATTENTION_BYTES = 1 << 30  # more picture_attention than this becomes the mean over heads, then its last rows
SCRATCH = 1 << 24  # numbers of one (H, rows, S) block while rows are computed

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


class RunError(ValueError):
    """A run file that cannot be read or written, or a question that this run cannot answer."""


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
    edits: list[str] = field(default_factory=list)  # in force while it was recorded, as "edit site" or "swap site"
    versions: dict[str, str] = field(default_factory=dict)  # "weights" is a fingerprint of the model's weights
    messages: list[dict[str, Any]] = field(default_factory=list)  # as asked; a picture is its number

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
        for number, picture in enumerate(self.pictures):
            png = BytesIO()
            picture.image.save(png, "PNG")
            arrays[f"picture {number}"] = np.frombuffer(png.getvalue(), np.uint8)
        story = {name: getattr(self, name) for name in _STORY}
        story["pictures"] = [{f.name: getattr(p.grid, f.name) for f in fields(PatchGrid)} for p in self.pictures]
        text = json.dumps(story, ensure_ascii=True)  # a lone surrogate would not survive as UTF-8
        metadata = {"kimi_vl_run": text, "format": str(FORMAT), "sha256": _digest(text, arrays)}
        _write(Path(path), to_safetensors(arrays, metadata))

    @classmethod
    def load(cls, path: str | Path) -> Run:
        """Reads a saved run; needs no model. Raises RunError naming the file and what is wrong with it."""
        text, arrays = _read(Path(path))
        try:
            parts: dict[str, Any] = json.loads(text) | arrays
            pictures = []
            for number, grid in enumerate(parts["pictures"]):
                geometry: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in grid.items()}
                pictures.append(Picture(open_image(parts.pop(f"picture {number}").tobytes()), PatchGrid(**geometry)))
            run = cls(**{**parts, "pictures": pictures})
            run.check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise RunError(f"{path} is damaged: {_reason(error)}; copy or record it again") from error
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
) -> Iterator[Reply | Run]:
    """Answers one conversation; yields the same growing Reply after every token and, last, the Run. Changes no logit.

    should_stop is asked after every token; once it says True, what was written so far becomes the Run. The options are
    those of `stream_reply`. Costs one decoding step more, since the last token is read too.
    """
    options = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "thought_budget": thought_budget,
    }
    return in_own_context(_record(model, chat, messages, model_name, seed, options, should_stop))


def _record(
    model: KimiVL,
    chat: Chat,
    messages: list[dict[str, Any]],
    model_name: str,
    seed: int | None,
    options: dict[str, Any],
    should_stop: Callable[[], bool] | None,
) -> Generator[Reply | Run, None, None]:
    recorder, edits = _Recorder(model), active_edits()
    answered: Reply | None = None
    with attach(model, read=recorder.keeps()) as tape:
        stream = stream_reply(model, chat, messages, seed=seed, **options)
        try:
            for answered in stream:
                yield answered
                if should_stop is not None and should_stop():
                    break
        finally:
            stream.close()  # type: ignore[attr-defined]
        assert answered is not None
        recorder.read_last(answered.token_ids[-1])
    prompt, written = answered.prompt, answered.token_ids
    ids, roles = prompt.input_ids + written, prompt.roles + reply_roles(chat.tokenizer, written)
    attention = recorder.attention(roles, len(prompt.input_ids))
    thought, answer = split_thought(chat.tokenizer.decode(id for id in written if id not in chat.stop_ids))
    unwritten = np.full(len(prompt.input_ids), np.nan, np.float32)
    weight = model.logits.weight
    run = Run(
        question=next((_text(m["content"]) for m in reversed(messages) if m["role"] == "user"), ""),
        pictures=list(prompt.pictures),
        token_ids=np.array(ids, np.int32),
        texts=[chat.tokenizer.token_text(id) for id in ids],
        roles=roles,
        prompt_length=len(prompt.input_ids),
        logprobs=np.concatenate([unwritten, np.array(answered.logprobs, np.float32)]),
        entropies=np.concatenate([unwritten, np.array(answered.entropies, np.float32)]),
        thought=thought,
        answer=answer,
        finished=answered.finished,
        **recorder.routing(tape),
        **attention,
        model_name=model_name,
        device=str(weight.device),
        dtype=str(weight.dtype).removeprefix("torch."),
        seed=seed,
        settings={**options, "heads": "each" if attention["picture_attention"].shape[1] > 1 else "mean over heads"},
        edits=edits,
        versions={
            "torch": torch.__version__.split("+")[0],
            "python": platform.python_version(),
            "weights": fingerprint(model),
        },
        messages=_plain(messages),
    )
    run.check()
    yield run


class _Recorder:
    """Keeps all routing, and of attention the queries and the latents, which together are every row there could be.

    Rows are computed at the end: only then is it known which token belongs to the thought and which to the answer.
    """

    def __init__(self, model: KimiVL):
        self.model = model
        self.routers = {i: layer.ffn.router for i, layer in enumerate(model.decoder.layers) if isinstance(layer.ffn, MoE)}
        self.first_row: int | None = None
        self.given = {site: 0 for site in self._cores()}  # tokens each core has been given
        self.queries: dict[str, list[tuple[Tensor, Tensor]]] = {site: [] for site in self.given}
        self.keys: dict[str, tuple[Tensor, Tensor, Tensor]] = {}  # latent, k_rope of all tokens so far; up
        self.cache: Any = None

    def _cores(self) -> list[str]:
        return [f"decoder.layers.{i}.attn.core@in" for i in range(len(self.model.decoder.layers))]

    def keeps(self) -> dict[str, Keep | None]:
        parts: dict[str, Keep] = {"scores": _as(torch.float16), "chosen": _as(torch.int16), "weights": _as(torch.float16)}
        routing = {f"decoder.layers.{i}.ffn.router.{part}": keep for i in self.routers for part, keep in parts.items()}
        cores = dict.fromkeys(self.given, self._keep_core)
        return {"embedded@in": self._keep_prompt, "decoder@in": self._keep_cache, **cores, **routing}

    def _keep_prompt(self, inputs: tuple[Any, ...], _site: str) -> None:
        if self.first_row is None:
            ids = inputs[0][0]
            pictures = (ids == self.model.config.media_placeholder_token_id).nonzero()
            self.first_row = max(int(pictures[-1]) + 1 if len(pictures) else 0, len(ids) - PROMPT_ROWS, 0)

    def _keep_cache(self, inputs: tuple[Any, ...], _site: str) -> None:
        self.cache = inputs[2]

    def _keep_core(self, inputs: tuple[Any, ...], site: str) -> None:
        q_nope, q_rope, latent, k_rope, up, _ = inputs
        assert self.first_row is not None
        skipped = max(0, self.first_row - self.given[site])
        self.given[site] += q_nope.shape[1]
        self.keys[site] = (latent, k_rope, up)
        q_nope, q_rope = q_nope[:, skipped:], q_rope[:, skipped:]
        # a view would keep the queries of the whole prompt alive
        self.queries[site].append((q_nope.clone(), q_rope.clone()) if skipped else (q_nope, q_rope))

    @torch.inference_mode()
    def read_last(self, token: int) -> None:
        """Gives the model the token it wrote last, so that every token has its routing and its row."""
        self.model(torch.tensor([[token]], device=self.model.logits.weight.device), cache=self.cache)

    def routing(self, tape: Mapping[str, list[Tensor]] | Any) -> dict[str, Any]:
        def part(name: str, dtype: type) -> np.ndarray:
            layers = [torch.cat(tape[f"decoder.layers.{i}.ffn.router.{name}"], dim=1)[0] for i in self.routers]
            return torch.stack(layers).cpu().numpy().astype(dtype)

        bias = torch.stack([router.chosen.bias for router in self.routers.values()]).float().cpu().numpy()
        return {
            "moe_layers": list(self.routers),
            "n_experts": bias.shape[1],
            "chosen": part("chosen", np.uint16),
            "weights": part("weights", np.float16),
            "scores": part("scores", np.float16),
            "bias": bias,
        }

    @torch.inference_mode()
    def attention(self, roles: list[str], prompt_length: int) -> dict[str, Any]:
        assert self.first_row is not None
        asked = [t for t in range(self.first_row, prompt_length) if roles[t] == "user"]
        first_row = asked[0] if asked else self.first_row
        visual = [t for t, role in enumerate(roles) if role.startswith("image ")]
        per_row = 2 * len(self.given) * len(visual)  # bytes of one head
        heads = next(iter(self.queries.values()))[0][0].shape[2]
        each = per_row * heads * (len(roles) - first_row) <= ATTENTION_BYTES
        if not each and per_row:
            first_row = max(first_row, len(roles) - ATTENTION_BYTES // per_row)
        names = list(dict.fromkeys(roles))
        numbers = {name: at for at, name in enumerate(names)}
        device = self.model.logits.weight.device
        role_of = torch.tensor([numbers[role] for role in roles], device=device)
        columns = torch.tensor(visual, dtype=torch.long, device=device)
        layers = [self._layer(site, first_row, columns, role_of, each) for site in self.given]
        return {
            "first_row": first_row,
            "picture_attention": np.stack([seen for seen, _ in layers]),
            "role_names": names,
            "role_mass": np.stack([mass for _, mass in layers]),
        }

    def _layer(self, site: str, first_row: int, visual: Tensor, role_of: Tensor, each: bool) -> tuple[np.ndarray, np.ndarray]:
        """(H, rows, M) and (H, rows, G) of one layer, in blocks of rows."""
        assert self.first_row is not None
        skip = first_row - self.first_row
        q_nope, q_rope = (torch.cat(parts, dim=1)[:, skip:] for parts in zip(*self.queries[site], strict=True))
        latent, k_rope, up = self.keys[site]
        count, keys = q_nope.shape[1], latent.shape[1]
        member = nn.functional.one_hot(role_of)
        block = max(1, SCRATCH // (q_nope.shape[2] * keys))
        seen, mass = [], []
        for start in range(0, count, block):
            rows = torch.arange(start, min(start + block, count), device=latent.device)
            visible = torch.arange(keys, device=latent.device) <= (first_row + rows)[:, None]
            probs = decoder_rows((q_nope[:, rows], q_rope[:, rows], latent, k_rope, up, visible[None]))[0]  # (H, rows, S)
            probs = probs if each else probs.mean(0, keepdim=True)
            seen.append(probs[..., visual].to(torch.float16).cpu())
            mass.append((probs @ member.to(probs.dtype)).to(torch.float16).cpu())
        return torch.cat(seen, dim=1).numpy(), torch.cat(mass, dim=1).numpy()


def fingerprint(model: nn.Module) -> str:
    """12 hex digits that tell weights apart: names, shapes and 64 values spread over every tensor."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // 64)].double().cpu().numpy()
        digest.update(f"{name} {tuple(tensor.shape)}".encode() + sample.tobytes())
    return digest.hexdigest()[:12]


def _as(dtype: torch.dtype) -> Keep:
    return lambda tensor, _site: tensor.to(dtype)


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


def _digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _write(path: Path, data: bytes) -> None:
    part = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            part = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        if part is not None:
            part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path} ({error.strerror or error}); choose a folder that exists and has room") from error


def _read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The JSON text and the arrays of a run file, known to be as they were written."""
    if not path.is_file():
        raise RunError(f"there is no file {path}; check the path of the run")
    try:
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if not {"kimi_vl_run", "format", "sha256"} <= metadata.keys():
                raise RunError(f"{path} is a safetensors file but not a run; give a file that Run.save has written")
            if metadata["format"] != str(FORMAT):
                raise RunError(
                    f"{path} is a run of format {metadata['format']}, and this version reads format {FORMAT}; "
                    "open it with the version that wrote it"
                )
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except (SafetensorError, OSError) as error:
        raise RunError(f"{path} is cut off, damaged or not a run ({_reason(error)}); copy or record it again") from error
    if _digest(metadata["kimi_vl_run"], arrays) != metadata["sha256"]:
        raise RunError(f"{path} is damaged: its contents do not match its checksum; copy or record it again")
    return metadata["kimi_vl_run"], arrays


def _reason(error: BaseException) -> str:
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error).split("\n")[0].rstrip(".;")
