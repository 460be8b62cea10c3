"""Reading, editing and swapping what happens inside a model. The only file with a hook; the model knows nothing of it.

    with attach(model, read=["decoder.layers.*.ffn.router.chosen"]) as tape:
        model(input_ids)
    tape["decoder.layers.1.ffn.router.chosen"]     # a list, one tensor a forward call

A session acts in the context (`contextvars`) that attached it and nowhere else: two threads or two users of one model never
see each other's hooks. A generator has no context of its own: one that attaches and then yields is iterated by
`in_own_context`, or its hooks would act for whoever takes its items.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .sites import Site, SiteError, match, sites

Edit = Callable[[Tensor, str], Tensor]
Keep = Callable[[Any, str], Any]
Swap = nn.Module | Callable[[nn.Module], nn.Module]
Item = TypeVar("Item")

_LOCK = threading.Lock()


class Tape:
    """What was read: a list a site, one entry a forward call (the prompt first, then each new token)."""

    def __init__(self) -> None:
        self._read: dict[str, list[Any]] = {}

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

    def last(self, site: str) -> Any:
        """The entry of the latest call."""
        if not self[site]:
            raise SiteError(f"{site} has not run yet")
        return self[site][-1]


@contextmanager
def attach(
    model: nn.Module,
    read: Iterable[str] | Mapping[str, Keep | None] = (),
    edit: Mapping[str, Edit] | None = None,
    swap: Mapping[str, Swap] | None = None,
    *,
    keep: Keep | None = None,
    rows: slice | Sequence[int] | None = None,
) -> Iterator[Tape]:
    """Reads, edits and swaps sites, named by globs, while the block runs. Yields the Tape.

    read   globs; `site@in` reads the inputs of a site as a tuple. A mapping gives single globs a `keep` of their own.
    keep   fn(value, site) -> what to store in place of the value.  rows: store these rows of the token axis of each call.
    edit   glob -> fn(tensor, site) -> tensor of the same shape and dtype. The function gets a copy and may write in it.
    swap   glob -> a module, or fn(original) -> module, that runs in the place of the site; its own submodules can be read.

    A site that is read and edited is read after the edit. Raises SiteError for a name that does not exist, a compiled
    model, an edit that does not fit, and, at the end of the block, a site that never ran.
    """
    refuse_compiled(model)
    session = _Session(model, read, edit or {}, swap or {}, keep, rows)
    try:
        session.install()
        _ACTIVE.set((*_ACTIVE.get(), session.presence))
        yield session.tape
        session.refuse_silent()
    finally:
        _ACTIVE.set(tuple(one for one in _ACTIVE.get() if one is not session.presence))
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
    return [edit for presence in _ACTIVE.get() for edit in presence.changes]


def refuse_compiled(model: nn.Module) -> None:
    """Raises SiteError for a compiled model or part: torch does not look at hooks that are added after compiling."""
    for name, module in model.named_modules():
        forward = module.__dict__.get("forward")
        if (
            isinstance(getattr(module, "_orig_mod", None), nn.Module)
            or getattr(module, "_compiled_call_impl", None) is not None
            or hasattr(forward, "_torchdynamo_orig_callable")
        ):
            raise SiteError(
                f"{name or 'the model'} is compiled, and hooks on compiled code are silently ignored; "
                "attach to the model as it was before compiling"
            )


class _Presence:
    """Stands for a session in the contexts where it acts; holds no tensors, as a context may outlive the session."""

    def __init__(self, changes: list[str]):
        self.changes = changes


_ACTIVE: ContextVar[tuple[_Presence, ...]] = ContextVar("active", default=())
_SWAPPED: ContextVar[tuple[nn.Module, ...]] = ContextVar("swapped", default=())  # whose stand-ins are running now


class _Session:
    def __init__(
        self,
        model: nn.Module,
        read: Iterable[str] | Mapping[str, Keep | None],
        edit: Mapping[str, Edit],
        swap: Mapping[str, Swap],
        keep: Keep | None,
        rows: slice | Sequence[int] | None,
    ):
        self.tape = Tape()
        self.modules = dict(model.named_modules())
        self.sites = sites(model)
        self.swaps: dict[str, nn.Module] = {}
        self.wrapped: set[str] = set()  # names of originals inside what replaces them
        for glob, replacement in swap.items():
            self._plan_swap(glob, replacement)
        self.edits: dict[str, list[Edit]] = {}
        for glob, function in edit.items():
            if "@" in glob:
                raise SiteError(f"{glob!r} is an input, which can be read but not edited: the stream would not change with it")
            for name in match(glob, self.sites):
                self.edits.setdefault(name, []).append(function)
        self.keeps: dict[str, Keep | None] = {}  # by site, inputs with their @in
        globs = {read: None} if isinstance(read, str) else read if isinstance(read, Mapping) else dict.fromkeys(read)
        for glob, own in globs.items():
            self._plan_read(glob, own or keep, rows)
        order = {name: at for at, name in enumerate(self.sites)}
        self.tape._read = {name: [] for name in sorted(self.keeps, key=lambda name: order[name.removesuffix("@in")])}
        self.watched = [name for name in self.sites if name in self.edits or name in self.keeps or f"{name}@in" in self.keeps]
        self.calls = dict.fromkeys([*self.swaps, *self.watched], 0)
        self.presence = _Presence([f"swap {name}" for name in self.swaps] + [f"edit {name}" for name in self.edits])
        self.handles: list[Any] = []

    def _plan_swap(self, glob: str, replacement: Swap) -> None:
        names = match(glob, self.sites)
        if isinstance(replacement, nn.Module) and len(names) > 1:
            raise SiteError(
                f"{glob!r} names {len(names)} sites, and one module cannot stand in for all; give a function that makes one"
            )
        for name in names:
            if name in self.swaps:
                raise SiteError(f"{name} is swapped twice; leave one of the two")
            module = replacement if isinstance(replacement, nn.Module) else replacement(self.modules[name])
            if not isinstance(module, nn.Module):
                raise SiteError(f"the swap of {name} gave {type(module).__name__}, expected a torch module")
            self.swaps[name] = module
            for inner in [site for site in self.sites if site.startswith(f"{name}.")]:
                del self.sites[inner]  # what it replaces does not run
            for path, part in module.named_modules():
                if path:
                    if part is self.modules[name]:
                        self.wrapped.add(f"{name}.{path}")
                    self.modules[f"{name}.{path}"] = part
                    self.sites[f"{name}.{path}"] = Site(f"{name}.{path}", "", f"part of the swapped {type(module).__name__}")

    def _plan_read(self, glob: str, keep: Keep | None, rows: slice | Sequence[int] | None) -> None:
        if not isinstance(glob, str):
            raise SiteError(f"{glob!r} is not the name of a site; give a string such as 'decoder.layers.*.attn'")
        base = glob.removesuffix("@in")
        for name in match(base, self.sites):
            if rows is not None and keep is None:
                axis = self.sites[name].token_axis
                if axis is None or base != glob:
                    raise SiteError(f"rows= needs one token axis and {glob} has none; choose with keep= there")
                self.keeps[name] = _take(axis, rows)
            else:
                self.keeps[name if base == glob else f"{name}@in"] = keep

    def install(self) -> None:
        for name, module in self.swaps.items():
            with _LOCK:
                self.handles.append(_Detour.at(self.modules[name]).add(self.presence, self._counted(name, module)))
        for name in self.watched:  # a swapped site is watched where it stood, so that what runs there is what is read
            self.handles.append(self.modules[name].register_forward_hook(self._hook(name), with_kwargs=True))

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

    def _hook(self, name: str) -> Callable[..., Any]:
        edits = self.edits.get(name, ())
        output, inputs = (self.tape._read.get(key) for key in (name, f"{name}@in"))

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], value: Any) -> Any:
            if self.presence not in _ACTIVE.get() or (module in _SWAPPED.get()) != (name in self.wrapped):
                return None
            self.calls[name] += 1
            for edit in edits:
                value = _edited(edit, value, name)
            if inputs is not None:
                given, keep = (*args, *kwargs.values()), self.keeps[f"{name}@in"]
                inputs.append(given if keep is None else keep(given, f"{name}@in"))
            if output is not None:
                keep = self.keeps[name]
                if keep is None and not isinstance(value, Tensor):
                    raise SiteError(f"{name} returns {type(value).__name__}, not one tensor; use keep= to pick it")
                output.append(value if keep is None else keep(value, name))
            return value if edits else None

        return hook

    def refuse_silent(self) -> None:
        silent = [name for name, calls in self.calls.items() if calls == 0]
        if silent:
            many = f" and {len(silent) - 1} more" if len(silent) > 1 else ""
            raise SiteError(
                f"{silent[0]}{many} never ran while attached; "
                "was the model called inside the block, in this thread, and with a picture if the site needs one?"
            )


class _Detour:
    """Stands in for `module.forward` while any session swaps the module; the others still get the original."""

    def __init__(self, module: nn.Module):
        self.module, self.before = module, module.__dict__.get("forward")
        self.original = module.forward
        self.stands: list[tuple[_Presence, Callable[..., Any]]] = []

    @staticmethod
    def at(module: nn.Module) -> _Detour:
        detour = module.__dict__.get("forward")
        if not isinstance(detour, _Detour):
            detour = _Detour(module)
            module.__dict__["forward"] = detour
        return detour

    def add(self, presence: _Presence, run: Callable[..., Any]) -> _Stand:
        self.stands.append((presence, run))
        return _Stand(self, presence)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active, running = _ACTIVE.get(), _SWAPPED.get()
        run = next((run for presence, run in reversed(self.stands) if presence in active), None)
        if run is None or self.module in running:  # a stand-in may call what it replaces
            return self.original(*args, **kwargs)
        token = _SWAPPED.set((*running, self.module))
        try:
            return run(*args, **kwargs)
        finally:
            _SWAPPED.reset(token)


class _Stand:
    """What a session removes to end its swap, in whatever order sessions end."""

    def __init__(self, detour: _Detour, presence: _Presence):
        self.detour, self.presence = detour, presence

    def remove(self) -> None:
        detour = self.detour
        detour.stands = [stand for stand in detour.stands if stand[0] is not self.presence]
        if not detour.stands and detour.module.__dict__.get("forward") is detour:
            del detour.module.__dict__["forward"]
            if detour.before is not None:
                detour.module.__dict__["forward"] = detour.before


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


def _take(axis: int, rows: slice | Sequence[int]) -> Keep:
    def keep(value: Tensor, name: str) -> Tensor:
        if isinstance(rows, slice):
            return value[(slice(None),) * axis + (rows,)].clone()  # a view would keep all of it alive
        count = value.shape[axis]
        if outside := [row for row in rows if not -count <= row < count]:
            raise SiteError(f"row {outside[0]} is outside this call of {name}, which has {count}; use a slice or keep=")
        return value.index_select(axis, torch.tensor([row % count for row in rows], device=value.device))

    return keep
