"""What a session of `tape.attach` is asked to do, looked up and refused before a hook is placed: globs become sites, edits,
swaps and what is kept of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from kimi_vl_ref.model import KimiVL

from .cost import Cost, RunSize, cost, human, refuse
from .positions import Positions, Tokens, in_decoder
from .released import in_language_model, language_model
from .sites import Site, SiteError, match, sites

Edit = Callable[[Tensor, str], Tensor]
Keep = Callable[[Any, str], Any]
Swap = nn.Module | Callable[[nn.Module], nn.Module]
Where = Callable[..., tuple[list[int], list[int] | None, int]]


class Plan:
    """Arguments as in `attach`. Raises SiteError for what cannot be done."""

    def __init__(
        self,
        model: nn.Module,
        read: Iterable[str] | Mapping[str, Keep | None],
        edit: Mapping[str, Edit],
        swap: Mapping[str, Swap],
        keep: Keep | None,
        rows: slice | Sequence[int] | None,
        tokens: Tokens | None,
    ):
        if rows is not None and tokens is not None:
            raise SiteError("rows= counts within each call and tokens= over the whole sequence; give one of the two")
        self.model, self.keep, self.rows, self.tokens = model, keep, rows, tokens
        self.asked = None if tokens is None else Positions(tokens)
        self.sites = sites(model)
        own = dict(model.named_modules())
        self.modules = own | {name: own[site.module] for name, site in self.sites.items() if site.module}
        self.swaps: dict[str, nn.Module] = {}
        self.wrapped: set[str] = set()  # names of originals inside what replaces them
        for glob, replacement in swap.items():
            self._swap(glob, replacement)
        self.edits: dict[str, list[Edit]] = {}
        for glob, function in edit.items():
            self._edit(glob, function)
        self.read = {read: None} if isinstance(read, str) else dict(read) if isinstance(read, Mapping) else dict.fromkeys(read)
        self.keeps: dict[str, Keep | None] = {}  # by site, inputs with their @in
        self.by_position: set[str] = set()  # sites of which tokens= chooses
        for glob, its_own in self.read.items():
            self._read(glob, its_own)
        order = {name: at for at, name in enumerate(self.sites)}
        self.keeps = dict(sorted(self.keeps.items(), key=lambda item: order[item[0].removesuffix("@in")]))
        self.place = self._place()

    @property
    def watched(self) -> list[str]:
        """Sites that need a hook, in the order of the model."""
        return [name for name in self.sites if name in self.edits or name in self.keeps or f"{name}@in" in self.keeps]

    @property
    def reading(self) -> str:
        """What is read, for a sentence."""
        return f"reading {', '.join(self.read)} ({len(self.keeps)} sites)"

    def cost(self, expect: RunSize, limit: int | None) -> Cost:
        """Bytes that a run of this size keeps at most. Raises SiteError when they pass the limit."""
        globs = {glob: own or self.keep for glob, own in self.read.items()}
        planned = cost(self.model, globs, tokens=self.tokens, rows=self.rows, **asdict(expect))
        if limit is not None and planned.total > limit:
            raise refuse(f"{self.reading} would keep {human(planned.total)}", limit)
        return planned

    def _swap(self, glob: str, replacement: Swap) -> None:
        names = match(glob, self.sites)
        if isinstance(replacement, nn.Module) and len(names) > 1:
            raise SiteError(
                f"{glob!r} names {len(names)} sites, and one module cannot stand in for all; give a function that makes one"
            )
        for name in names:
            if name in self.swaps:
                raise SiteError(f"{name} is swapped twice; leave one of the two")
            if self.sites[name].view is not None:
                raise SiteError(f"{name} is no module of its own in this implementation and cannot be swapped; edit it instead")
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

    def _edit(self, glob: str, function: Edit) -> None:
        if "@" in glob:
            raise SiteError(f"{glob!r} is an input, which can be read but not edited: the stream would not change with it")
        for name in match(glob, self.sites):
            view = self.sites[name].view
            if view is not None and view.put is None:
                raise SiteError(f"{name} of {type(self.model).__name__} can be read but not edited: nothing there passes it on")
            self.edits.setdefault(name, []).append(function)

    def _read(self, glob: str, own: Keep | None) -> None:
        if not isinstance(glob, str):
            raise SiteError(f"{glob!r} is not the name of a site; give a string such as 'decoder.layers.*.attn'")
        base = glob.removesuffix("@in")
        for name in match(base, self.sites):
            key, site = (name if base == glob else f"{name}@in"), self.sites[name]
            if base != glob and site.module:
                raise SiteError(f"{key}: inputs differ from one implementation to another; read the sites before it instead")
            if own is None and self.rows is not None:
                if site.token_axis is None or base != glob:
                    raise SiteError(f"rows= needs one token axis and {glob} has none; choose with keep= there")
                own_rows = _take(site.token_axis, self.rows)
                self.keeps[key] = own_rows if self.keep is None else _both(own_rows, self.keep)
                continue
            if own is None and self.asked is not None:
                if site.axes[:1] != "B" or base != glob:
                    raise SiteError(f"tokens= counts the decoder's tokens, and {glob} has no such axis; use rows= or keep=")
                self.by_position.add(key)
            self.keeps[key] = own or self.keep

    def _place(self) -> tuple[nn.Module, Where] | None:
        """The module whose call tells, before anything else of it runs, which rows and positions it holds."""
        if isinstance(self.model, KimiVL):
            return (self.model.decoder, in_decoder) if self.by_position else None
        theirs = language_model(self.model)
        if theirs is None and self.by_position:
            raise SiteError(f"tokens= needs a known model, which {type(self.model).__name__} is not; use rows=")
        return None if theirs is None else (theirs, in_language_model)


def _both(first: Keep, then: Keep) -> Keep:
    return lambda value, name: then(first(value, name), name)


def _take(axis: int, rows: slice | Sequence[int]) -> Keep:
    def keep(value: Tensor, name: str) -> Tensor:
        if isinstance(rows, slice):
            return value[(slice(None),) * axis + (rows,)].clone()  # a view would keep all of it alive
        count = value.shape[axis]
        if outside := [row for row in rows if not -count <= row < count]:
            raise SiteError(f"row {outside[0]} is outside this call of {name}, which has {count}; use a slice or keep=")
        return value.index_select(axis, torch.tensor([row % count for row in rows], device=value.device))

    return keep
