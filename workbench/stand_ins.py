"""Which sessions act here, and what runs in the place of a module for those that swap it. The mechanics behind `tape.attach`.

A session acts in the context (`contextvars`) that attached it and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from torch import nn


class Presence:
    """Stands for a session in the contexts where it acts; holds no tensors, as a context may outlive the session."""

    def __init__(self, changes: list[str]):
        self.changes = changes


ACTIVE: ContextVar[tuple[Presence, ...]] = ContextVar("active", default=())
SWAPPED: ContextVar[tuple[nn.Module, ...]] = ContextVar("swapped", default=())  # whose stand-ins are running now


class Detour:
    """Stands in for `module.forward` while any session swaps the module; the others still get the original."""

    def __init__(self, module: nn.Module):
        self.module, self.before = module, module.__dict__.get("forward")
        self.original = module.forward
        self.stands: list[tuple[Presence, Callable[..., Any]]] = []

    @staticmethod
    def at(module: nn.Module) -> Detour:
        detour = module.__dict__.get("forward")
        if not isinstance(detour, Detour):
            detour = Detour(module)
            module.__dict__["forward"] = detour
        return detour

    def add(self, presence: Presence, run: Callable[..., Any]) -> Stand:
        self.stands.append((presence, run))
        return Stand(self, presence)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        active, running = ACTIVE.get(), SWAPPED.get()
        stands = [run for presence, run in reversed(self.stands) if presence in active]  # innermost first
        depth = sum(module is self.module for module in running)
        if depth >= len(stands):  # a stand-in may call what it replaces: the stand-in around it, and last the original
            return self.original(*args, **kwargs)
        token = SWAPPED.set((*running, self.module))
        try:
            return stands[depth](*args, **kwargs)
        finally:
            SWAPPED.reset(token)


class Stand:
    """What a session removes to end its swap, in whatever order sessions end."""

    def __init__(self, detour: Detour, presence: Presence):
        self.detour, self.presence = detour, presence

    def remove(self) -> None:
        detour = self.detour
        detour.stands = [stand for stand in detour.stands if stand[0] is not self.presence]
        if not detour.stands and detour.module.__dict__.get("forward") is detour:
            del detour.module.__dict__["forward"]
            if detour.before is not None:
                detour.module.__dict__["forward"] = detour.before
