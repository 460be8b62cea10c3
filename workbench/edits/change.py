"""What all changes share: the Change, where in the text a call stands, and `applied`, which puts a list of them in force.

A change names positions as they are counted from the start of the text. A hook sees one call only: the prompt, a chunk of
it, or one new token. So the decoder gets a stand-in that notes, before each call, where its columns stand (from the cache's
lengths), and then calls the decoder itself. Letters: B rows, T columns of a call, K chosen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kimi_vl_ref import KimiVL
from kimi_vl_ref.cache import LatentCache
from kimi_vl_ref.decoder import Decoder

from ..positions import FAR, Positions
from ..tape import Edit, Keep, Swap, Tape, active_edits, attach


class EditError(ValueError):
    """A change that does not fit the model or the call, or one that touched nothing."""


@dataclass(frozen=True)
class Now:
    """Where the columns of the decoder's present call stand."""

    positions: Tensor  # (B, T), counted from the start of each row
    real: Tensor  # (B, T) False for padding


@dataclass
class Plan:
    """One change made ready for one model: functions by the place where they act. Fresh for every use."""

    sites: dict[str, Callable[[Tensor, Now | None], Tensor]] = field(default_factory=dict)  # edits of what a site returns
    entry: Callable[[Tensor, Now], Tensor] | None = None  # the stream (B, T, D) as it enters the decoder
    choose: dict[int, Callable[..., None]] = field(default_factory=dict)  # layer -> fn(Selection, Now), see experts.py
    weigh: dict[int, Callable[..., Tensor]] = field(default_factory=dict)  # layer -> fn(weights, chosen, Now)
    blocks: dict[int, Any] = field(default_factory=dict)  # layer -> Block, see attention.py
    patch_blocks: dict[int, Any] = field(default_factory=dict)  # layer of MoonViT -> PatchBlock, see there
    touched: dict[str, Any] = field(default_factory=dict)  # counts; tensors until they are reported

    def count(self, **counts: Tensor | int) -> None:
        for name, count in counts.items():  # left on its device: asking for it now would make every call wait
            self.touched[name] = self.touched.get(name, 0) + count

    def counts(self) -> dict[str, int]:
        return {name: int(count) for name, count in self.touched.items()}


@dataclass(frozen=True)
class Change:
    """One change to a running model. `str(change)` is a line for people, `settings` what JSON keeps of it."""

    name: str
    settings: dict[str, Any]
    line: str = field(repr=False)
    prepare: Callable[[KimiVL], Plan] = field(repr=False, compare=False)

    def __str__(self) -> str:
        return self.line

    def build(self, model: KimiVL) -> Plan:
        """The change made ready, with counts at zero. Raises EditError where it does not fit the model."""
        return self.prepare(model)


class Applied:
    """Changes in force. `tape` holds what was read, after the changes."""

    tape: Tape

    def __init__(self, model: KimiVL, changes: Sequence[Change]):
        self.model, self.changes = model, list(changes)
        self.plans = [change.build(model) for change in self.changes]
        self.around = [one for one in in_force() if one.model is model]
        self.now: Now | None = None
        self.lines: list[str] = []  # what `active_edits` says of these changes
        self.blocked: dict[int, Any] = {}  # layer -> Blocked, see attention.py
        self.blocked_patches: dict[int, Any] = {}  # layer of MoonViT -> BlockedPatches, see there
        self.selecting: dict[int, Any] = {}  # layer -> Selecting, see routing.py

    def counts(self) -> list[dict[str, int]]:
        """For each change what it touched so far."""
        return [plan.counts() for plan in self.plans]

    def report(self, since: Sequence[Mapping[str, int]] | None = None) -> list[dict[str, Any]]:
        """For each change its line, its settings, and counts of what it touched, all or since `counts` were taken."""
        now = self.counts()
        then = [{}] * len(now) if since is None else since
        touched = [{name: n - old.get(name, 0) for name, n in new.items()} for new, old in zip(now, then, strict=True)]
        return [
            {"change": str(change), "settings": {"name": change.name, **change.settings}, "touched": counts}
            for change, counts in zip(self.changes, touched, strict=True)
        ]

    def idle(self) -> list[str]:
        """Lines of the changes that have touched nothing so far."""
        return [one["change"] for one in self.report() if not any(one["touched"].values())]

    def _edits(self) -> dict[str, Edit]:
        names = dict.fromkeys(name for plan in self.plans for name in plan.sites)
        return {name: self._edit([plan.sites[name] for plan in self.plans if name in plan.sites]) for name in names}

    def _edit(self, functions: list[Callable[[Tensor, Now | None], Tensor]]) -> Edit:
        def edit(tensor: Tensor, site: str) -> Tensor:
            for function in functions:
                tensor = function(tensor, self.here() if site.startswith("decoder") else None)
            return tensor

        return edit

    def _swaps(self) -> dict[str, Swap]:
        from .attention import Blocked, BlockedPatches
        from .experts import Weighing
        from .routing import Selecting

        swaps: dict[str, Swap] = {}
        rerouted = dict.fromkeys(layer for plan in self.plans for layer in (*plan.choose, *plan.weigh))
        for layer in rerouted:
            router = f"decoder.layers.{layer}.ffn.router"
            outer = next((one.selecting[layer] for one in reversed(self.around) if layer in one.selecting), None)
            steps = [plan.choose[layer] for plan in self.plans if layer in plan.choose]
            selecting = self.selecting[layer] = Selecting(self.here, steps, outer)
            weighing = Weighing(self.here, [plan.weigh[layer] for plan in self.plans if layer in plan.weigh], selecting)
            swaps |= {f"{router}.chosen": selecting.around, f"{router}.weights": weighing.around}
        for layer in dict.fromkeys(layer for plan in self.plans for layer in plan.blocks):
            outer = next((one.blocked[layer] for one in reversed(self.around) if layer in one.blocked), None)
            blocks = [plan.blocks[layer] for plan in self.plans if layer in plan.blocks]
            self.blocked[layer] = Blocked(self.here, blocks, outer)
            swaps[f"decoder.layers.{layer}.attn.core"] = self.blocked[layer].around
        for layer in dict.fromkeys(layer for plan in self.plans for layer in plan.patch_blocks):
            outer = next((one.blocked_patches[layer] for one in reversed(self.around) if layer in one.blocked_patches), None)
            blocks = [plan.patch_blocks[layer] for plan in self.plans if layer in plan.patch_blocks]
            self.blocked_patches[layer] = BlockedPatches(blocks, outer)
            swaps[f"vision.layers.{layer}.attn.core"] = self.blocked_patches[layer].around
        return swaps

    def here(self) -> Now:
        if self.now is None:
            raise EditError("a layer ran outside the decoder, so its positions are unknown; call the model or model.decoder")
        return self.now


@contextmanager
def applied(
    model: KimiVL,
    changes: Sequence[Change],
    *,
    read: Iterable[str] | Mapping[str, Keep | None] = (),
    keep: Keep | None = None,
    idle: str = "raise",
    **reading: Any,
) -> Iterator[Applied]:
    """Puts changes in force while the block runs, and reads sites beside them, as `attach` does (read, keep, and in
    `reading` rows, tokens, limit, expect).

    Changes at the same place act in the order given; routing.py says what comes first inside a router. One block inside
    another changes what the outer one left. idle: what becomes of a change that touched nothing by the end of the block,
    such as an expert that no token chose: "raise" EditError, or only "report" it with counts of 0, for sweeps where that
    is a result. Raises EditError for a change that does not fit the model.

        with applied(model, [ablate_experts(3, [7])], read=["logits"]) as done:
            model.logits(model(input_ids))
        done.tape["logits"], done.report()[0]["touched"]     # {"tokens": 12, "slots": 12}
    """
    if not isinstance(model, KimiVL):
        raise EditError(f"changes are made to a KimiVL, not to {type(model).__name__}; use attach(edit=) for other models")
    if idle not in ("raise", "report"):
        raise EditError(f'idle={idle!r} is unknown; use "raise" or "report"')
    done, before = Applied(model, changes), len(active_edits())
    edits, swaps = done._edits(), done._swaps()
    with ExitStack() as stack:
        if any(plan.entry for plan in done.plans) or any(name.startswith("decoder") for name in (*edits, *swaps)):
            # a session of its own: in one session, what stands inside a swapped part cannot be edited
            stack.enter_context(attach(model, swap={"decoder": lambda decoder: _Entrance(decoder, done)}))
        done.tape = stack.enter_context(attach(model, read, edits, swaps, keep=keep, **reading))
        done.lines = active_edits()[before:]
        _IN_FORCE.set((*_IN_FORCE.get(), done))
        try:
            yield done
        finally:
            _IN_FORCE.set(tuple(one for one in _IN_FORCE.get() if one is not done))
    if idle == "raise" and (lines := done.idle()):
        raise EditError(f"{lines[0]}: touched nothing; check positions and experts, or pass idle='report' if that may be")


def in_force() -> tuple[Applied, ...]:
    """The `applied` blocks that this code stands in, outermost first."""
    return _IN_FORCE.get()


_IN_FORCE: ContextVar[tuple[Applied, ...]] = ContextVar("in_force", default=())


class _Entrance(nn.Module):
    """Notes where the columns of a call stand, makes the changes to the stream at its start, and calls the decoder."""

    def __init__(self, decoder: nn.Module, done: Applied):
        super().__init__()
        assert isinstance(decoder, Decoder)
        self.decoder, self.done = decoder, done

    def forward(self, x: Tensor, lengths: Tensor | None = None, cache: LatentCache | None = None) -> Tensor:
        columns = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        positions = columns if cache is None else cache.lengths[:, None] + columns
        real = torch.ones_like(columns, dtype=torch.bool) if lengths is None else columns < lengths[:, None]
        told = [one for one in (*self.done.around, self.done) if one.now is None]
        if not told:  # the entrance of a block inside this one has done all there is to do
            return self.decoder(x, lengths, cache)
        now = Now(positions, real)
        for one in told:
            one.now = now
        try:
            for entry in (plan.entry for one in told for plan in one.plans if plan.entry is not None):
                x = entry(x, now)
            return self.decoder(x, lengths, cache)
        finally:
            for one in told:
                one.now = None


class Where:
    """The positions a change is about: None for all, and else as `workbench.positions` reads `tokens=`."""

    def __init__(self, tokens: Any):
        self.every = tokens is None
        tokens = tokens.tolist() if isinstance(tokens, (np.ndarray, Tensor)) else tokens
        if isinstance(tokens, range) and tokens.step > 0:
            tokens = slice(tokens.start, tokens.stop, tokens.step)
        if not self.every:
            whole = slice if isinstance(tokens, slice) else Sequence
            self.asked = Positions(tokens if isinstance(tokens, whole) else list(tokens))
            self.given = tokens

    @property
    def row(self) -> range | list[int]:
        """The positions of a choice that is the same for all rows. Raises EditError for any other."""
        if self.every or not self.asked.shared:
            raise EditError("positions have to be the same for all rows here; give one list or slice(start, stop)")
        return self.asked.rows[0]

    def rank(self, positions: Tensor) -> Tensor:
        """positions (B, T) or (T,) -> which of the named ones each is, counted in ascending order; -1: not named."""
        if self.every:
            return positions
        if positions.ndim == 1 or self.asked.shared:
            return _rank(self.row, positions)
        self.asked.check(len(positions))
        return torch.stack([_rank(choice, row) for choice, row in zip(self.asked.rows, positions, strict=True)])

    @property
    def json(self) -> Any:
        """As JSON keeps it: "all", {"from": 3, "to": null, "step": 1}, or lists."""
        if self.every:
            return "all"
        kept = [one if isinstance(one, list) else _open(one) for one in self.asked.rows]
        return kept[0] if self.asked.shared else kept

    def __str__(self) -> str:
        if self.every:
            return ""
        if not self.asked.shared:
            return f" at positions named for each of {len(self.asked.rows)} rows"
        row = self.row
        if isinstance(row, list):
            return f" at {listed(row, 'position')}"
        every = "" if row.step == 1 else f", every {row.step}"
        return f" at positions {row.start} to {'the end' if row.stop == FAR else row.stop - 1}{every}"


def _open(row: range) -> dict[str, int | None]:
    return {"from": row.start, "to": None if row.stop == FAR else row.stop, "step": row.step}


def _rank(row: range | list[int], positions: Tensor) -> Tensor:
    if isinstance(row, range):
        inside = (positions >= row.start) & (positions < row.stop) & ((positions - row.start) % row.step == 0)
        return torch.where(inside, (positions - row.start) // row.step, -1)
    if not row:
        return torch.full_like(positions, -1)
    named = torch.tensor(row, device=positions.device)
    at = torch.searchsorted(named, positions.contiguous()).clamp(max=len(row) - 1)
    return torch.where(named[at] == positions, at, -1)


def mask(where: Where, now: Now | None, tensor: Tensor) -> Tensor:
    """The tokens (B, T) that a change is about, padding left out; (P,) or (M,) at a site of the picture's side."""
    named = where.rank(places(now, tensor)) >= 0
    return named if now is None else named & now.real


def places(now: Now | None, tensor: Tensor) -> Tensor:
    """Positions of a call: (B, T) in the decoder, (P,) or (M,) on the picture's side."""
    return torch.arange(len(tensor), device=tensor.device) if now is None else now.positions


def values_of(values: Any, shape: tuple[int, ...], what: str) -> Tensor:
    """Numbers given for a change, as a tensor (N, *shape); N is 1 if they were given without. Raises EditError."""
    tensor = torch.as_tensor(values)
    tensor = tensor[None] if tensor.ndim == len(shape) else tensor
    if tensor.shape[1:] != shape or not len(tensor) or not tensor.is_floating_point():
        expected = f"{shape} or (n, {', '.join(map(str, shape))})"
        raise EditError(f"values of {what} are {tensor.dtype} of shape {tuple(tensor.shape)}, expected floats of {expected}")
    return tensor


def digest(values: Any) -> dict[str, Any] | None:
    """What JSON keeps of numbers: their shape and a fingerprint."""
    if values is None:
        return None
    array = np.ascontiguousarray(torch.as_tensor(values).detach().cpu().to(torch.float64).numpy())
    return {"shape": list(array.shape), "sha256": hashlib.sha256(array.tobytes()).hexdigest()[:12]}


def layer_of(model: KimiVL, layer: int) -> nn.Module:
    """A decoder layer. Raises EditError for one that does not exist."""
    layers = model.decoder.layers
    if not isinstance(layer, int) or not 0 <= layer < len(layers):
        raise EditError(f"layer {layer!r} does not exist; this decoder has layers 0 to {len(layers) - 1}")
    return layers[layer]


def indices(given: Any, what: str) -> list[int]:
    """One number or several, as a list without repeats. Raises EditError for none and for what is no number."""
    given = given.tolist() if isinstance(given, (np.ndarray, Tensor)) else given
    values = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
    if not values:
        raise EditError(f"there are no {plural(what)} in {given!r}; name at least one")
    return list(dict.fromkeys(_whole(one, what) for one in values))


def inside(numbers: Sequence[int], count: int, what: str) -> None:
    if outside := [one for one in numbers if one >= count]:
        raise EditError(f"{what} {outside[0]} does not exist; here are {plural(what)} 0 to {count - 1}")


def listed(numbers: Sequence[int], what: str) -> str:
    """"head 3", "heads 1, 4", or "31 tokens": short enough for a line."""
    if len(numbers) == 1:
        return f"{what} {numbers[0]}"
    return f"{plural(what)} {', '.join(map(str, numbers))}" if len(numbers) <= 8 else f"{len(numbers)} {plural(what)}"


def plural(what: str) -> str:
    return what + ("es" if what.endswith("h") else "s")


def _whole(number: Any, what: str) -> int:
    if isinstance(number, bool) or not isinstance(number, (int, np.integer)) or number < 0:
        raise EditError(f"{number!r} is not the number of a {what}; give whole numbers counted from 0")
    return int(number)
