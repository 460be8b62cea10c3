"""Reading, editing and swapping what happens inside a model. The only file with a hook; the model knows nothing of it.

    with attach(model, read=["decoder.layers.*.ffn.router.chosen"]) as tape:
        model(input_ids)
    tape["decoder.layers.1.ffn.router.chosen"]     # a list, one tensor a forward call

    print(cost(model, ["decoder.layers.*"], prompt=1_100, new=500, tokens=[5, 1_099]))        # bytes, before they are spent
    with attach(model, read=["decoder.layers.*"], tokens=[5, 1_099], limit=10**8) as tape:
        reply(model, chat, messages)
    stream, where = tape.tokens("decoder.layers.3")          # (N, D) and the call, row and position of each of the N tokens

A session acts in the context (`contextvars`) that attached it and nowhere else: two threads or two users of one model never
see each other's hooks. A generator has no context of its own: one that attaches and then yields is iterated by
`in_own_context`, or its hooks would act for whoever takes its items.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from kimi_vl_ref.model import KimiVL

from .cost import Cost, RunSize, Spent, human, refuse
from .plan import Edit, Keep, Plan, Swap, Where
from .positions import Placed, Tokens
from .sites import Call, SiteError, match
from .stand_ins import ACTIVE, SWAPPED, Detour, Presence

Item = TypeVar("Item")

_LOCK = threading.Lock()
_NOT_READ: Any = object()


class Tape:
    """What was read: a list a site, one entry a forward call (the prompt first, then each new token)."""

    def __init__(self) -> None:
        self.planned: Cost | None = None  # what was expected to be kept, when attach knew how much would run
        self._read: dict[str, list[Any]] = {}
        self._where: dict[str, list[Tensor]] = {}
        self._spent = Spent(())

    def __getitem__(self, site: str) -> list[Any]:
        if site not in self._read:
            match(site, self._read)  # raises, naming near matches, unless `site` is a glob
            raise SiteError(f"{site!r} names several sites; take one of tape.sites, such as {next(iter(self._read))!r}")
        return self._read[site]

    def __contains__(self, site: str) -> bool:
        return site in self._read

    @property
    def sites(self) -> list[str]:
        """What was asked for, in the order of the model; inputs as `name@in`."""
        return list(self._read)

    @property
    def nbytes(self) -> int:
        """Bytes kept so far; memory that several entries share counts once."""
        return self._spent.total

    def last(self, site: str) -> Any:
        """The entry of the latest call."""
        if not self[site]:
            raise SiteError(f"{site} has not run yet")
        return self[site][-1]

    def tokens(self, site: str) -> tuple[Tensor, Tensor]:
        """Of a site read with `tokens=`: the tokens in the order in which they came (N, ...), and where each stands, (N, 3):
        the decoder call counted from 0, the row of the batch, the position in the whole sequence.
        """
        if not self[site]:
            raise SiteError(f"{site} has not run yet")
        if not self._where.get(site):
            raise SiteError(f"{site} was not read with tokens=, so that the positions of its entries are not known")
        return torch.cat(self[site]), torch.cat(self._where[site])


@contextmanager
def attach(
    model: nn.Module,
    read: Iterable[str] | Mapping[str, Keep | None] = (),
    edit: Mapping[str, Edit] | None = None,
    swap: Mapping[str, Swap] | None = None,
    *,
    keep: Keep | None = None,
    rows: slice | Sequence[int] | None = None,
    tokens: Tokens | None = None,
    limit: int | None = None,
    expect: RunSize | None = None,
) -> Iterator[Tape]:
    """Reads, edits and swaps sites, named by globs, while the block runs. Yields the Tape.

    read    globs; `site@in` reads the inputs of a site as a tuple. A mapping gives single globs a `keep` of their own, which
            takes the place of keep=, rows= and tokens= there.
    keep    fn(value, site) -> what to store in place of the value.
    rows    store these rows of the token axis of each call.
    tokens  store these positions of the whole sequence, whatever the call: a slice, a list, or a list with one of them for
            each row of the batch. They count from the start of each row over prefill, its chunks and every step; padding has
            none. An entry is then (N, ...), a call without any of them leaves none, and `tape.tokens` says where each stands.
    limit   bytes that may be kept. expect: how much will run; what would pass the limit is then refused here, before
            anything runs, and otherwise at the value that would pass it. `cost` answers the same without attaching.
    edit    glob -> fn(tensor, site) -> tensor of the same shape and dtype. The function gets a copy and may write in it.
    swap    glob -> a module, or fn(original) -> module, that runs in the place of the site; its own submodules can be read.

    A site that is read and edited is read after the edit. Raises SiteError for a name that does not exist, a compiled
    model, an edit that does not fit, more bytes than the limit and, at the end of the block, a site that never ran or at
    which none of the positions came.
    """
    refuse_compiled(model)
    session = _Session(Plan(model, read, edit or {}, swap or {}, keep, rows, tokens), expect, limit)
    try:
        session.install()
        ACTIVE.set((*ACTIVE.get(), session.presence))
        yield session.tape
        session.refuse_silent()
    finally:
        ACTIVE.set(tuple(one for one in ACTIVE.get() if one is not session.presence))
        session.remove()


def in_own_context(items: Generator[Item, None, Any]) -> Iterator[Item]:
    """The items of a generator that runs in a context of its own: what it attaches acts while it runs, not between items.

    Items may be taken from several threads, one after another, as web servers do.
    """
    context = copy_context()
    nothing = object()
    try:
        while (item := context.run(next, items, nothing)) is not nothing:
            yield item  # type: ignore[misc]
    finally:
        context.run(items.close)


def active_edits() -> list[str]:
    """The edits and swaps in force here, as "edit site" and "swap site"."""
    return [edit for presence in ACTIVE.get() for edit in presence.changes]


def refuse_compiled(model: nn.Module) -> None:
    """Raises SiteError for a compiled model or part: torch does not look at hooks that are added after compiling."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if (
            "_orig_mod" in module._modules
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            raise SiteError(
                f"{name or 'the model'} is compiled, and hooks on compiled code are silently ignored; "
                "attach to the model as it was before compiling"
            )


class _Session:
    """A plan at work: its hooks, and what they store."""

    def __init__(self, plan: Plan, expect: RunSize | None, limit: int | None):
        self.plan, self.limit = plan, limit
        self.tape = Tape()
        self.tape.planned = None if expect is None else plan.cost(expect, limit)
        self.tape._read = {name: [] for name in plan.keeps}
        self.tape._where = {name: [] for name in plan.by_position}
        self.weights_known = False
        self.calls = dict.fromkeys([*plan.swaps, *plan.watched], 0)
        self.presence = Presence([f"swap {name}" for name in plan.swaps] + [f"edit {name}" for name in plan.edits])
        self.handles: list[Any] = []
        self.batch, self.decoder_calls = 1, -1
        self.placed: Placed | None = None
        # the module runs before positions are known, and not in chunks: read what the decoder is given instead
        self.late = {"embedded"} & plan.by_position if isinstance(plan.model, KimiVL) else set[str]()

    def install(self) -> None:
        for name, module in self.plan.swaps.items():
            with _LOCK:
                self.handles.append(Detour.at(self.plan.modules[name]).add(self.presence, self._counted(name, module)))
        if self.plan.place is not None:
            module, where = self.plan.place
            self.handles.append(module.register_forward_pre_hook(self._placing(where), with_kwargs=True))
        for name in self.plan.watched:  # a swapped site is watched where it stood, so that what runs there is what is read
            module, view = self.plan.modules[name], self.plan.sites[name].view
            if view is not None and view.given is not None:
                self.handles.append(module.register_forward_pre_hook(self._before(name, view.given), with_kwargs=True))
            else:
                self.handles.append(module.register_forward_hook(self._hook(name), with_kwargs=True))

    def remove(self) -> None:
        with _LOCK:
            for handle in self.handles:
                handle.remove()
        self.handles.clear()

    def _counted(self, name: str, module: nn.Module) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return module(*args, **kwargs)

        return run

    def _placing(self, where: Where) -> Callable[..., None]:
        def place(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if self.presence not in ACTIVE.get():
                return
            starts, real, width = where(*args, **kwargs)
            self.batch, self.decoder_calls = len(starts), self.decoder_calls + 1
            if self.plan.asked is not None and self.plan.by_position:
                if real is None:
                    raise SiteError("tokens= cannot place padded rows in this implementation; give rows of equal length")
                given = next(one for one in (*args, *kwargs.values()) if isinstance(one, Tensor))
                self.placed = Placed(self.plan.asked, starts, real, width, given.device)
                for name in self.late:
                    self._store(name, given)

        return place

    def _hook(self, name: str) -> Callable[..., Any]:
        edits, view = self.plan.edits.get(name, ()), self.plan.sites[name].view
        stored = name in self.plan.keeps and name not in self.late
        at_input = f"{name}@in"
        inputs = self.plan.keeps.get(at_input, _NOT_READ)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
            if self.presence not in ACTIVE.get() or (module in SWAPPED.get()) != (name in self.plan.wrapped):
                return None
            self.calls[name] += 1
            call = Call(module, args, self.batch)
            tensor = value if view is None else view.take(value, call)
            for edit in edits:
                tensor = _edited(edit, tensor, name)
            if inputs is not _NOT_READ:
                given = (*args, *kwargs.values())
                self._append(at_input, given if inputs is None else inputs(given, at_input))
            if stored:
                self._store(name, tensor)
            if not edits:
                return None
            return tensor if view is None or view.put is None else view.put(value, tensor, call)

        return hook

    def _before(self, name: str, argument: str) -> Callable[..., Any]:
        """The same at the input of a module, of which this is the first or the one of that name."""
        hook = self._hook(name)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = hook(module, args, kwargs, args[0] if args else kwargs[argument])
            if changed is None:
                return None
            return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, argument: changed})

        return before

    def _store(self, name: str, value: Any) -> None:
        keep = self.plan.keeps[name]
        if not isinstance(value, Tensor) and (keep is None or name in self.plan.by_position):
            raise SiteError(f"{name} returns {type(value).__name__}, not one tensor; use keep= to pick it")
        if name in self.plan.by_position:
            if self.placed is None:
                raise SiteError(f"{name} ran outside the decoder's call, so that its positions are not known; use rows=")
            value, index = self.placed.pick(value, name)
            if not len(index):
                return
            call = torch.full((len(index), 1), self.decoder_calls)
            self.tape._where[name].append(torch.cat([call, index], dim=1))
        if keep is not None:
            value = keep(value, name)
        elif not value.requires_grad and value.untyped_storage().nbytes() > value.nbytes:
            value = value.clone()  # a view would keep all of it alive; where gradients flow it has to be the tensor itself
        self._append(name, value)

    def _append(self, name: str, value: Any) -> None:
        spent, entries = self.tape._spent, self.tape._read[name]
        if value is not None:  # a keep= that took it elsewhere leaves None
            if not self.weights_known and name.endswith("@in"):
                # only inputs hold weights, such as the up-projection that an attention core is given
                spent.seen |= Spent(self.plan.model.state_dict().values()).seen
                self.weights_known = True
            spent.add(value)
        if self.limit is not None and spent.total > self.limit:
            raise refuse(f"{self.plan.reading} comes to {human(spent.total)} at call {len(entries)} of {name}", self.limit)
        entries.append(value)

    def refuse_silent(self) -> None:
        silent = [name for name, calls in self.calls.items() if calls == 0]
        if silent:
            many = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
            raise SiteError(
                f"{silent[0]}{many} never ran while attached; "
                "was the model called inside the block, in this thread, and with a picture if the site needs one?"
            )
        missed = [name for name in self.plan.by_position if not self.tape._read[name]]
        if missed:
            assert self.plan.asked is not None
            raise SiteError(
                f"{missed[0]} ran, but never at the positions tokens={self.plan.asked.asked!r}; "
                "they count from the start of each row, padding apart, and scores exist only where the model was asked for them"
            )


def _edited(edit: Edit, value: Any, name: str) -> Tensor:
    if not isinstance(value, Tensor):
        raise SiteError(f"{name} returns {type(value).__name__}, and only a tensor can be edited; edit a part of it")
    result = edit(value.clone(), name)  # a copy: other sites may share the memory
    if not isinstance(result, Tensor):
        raise SiteError(f"the edit of {name} returned {type(result).__name__}; return the tensor")
    if (result.shape, result.dtype, result.device) != (value.shape, value.dtype, value.device):
        raise SiteError(
            f"the edit of {name} returned {_describe(result)} where {_describe(value)} is expected; keep shape and dtype"
        )
    return result


def _describe(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"
