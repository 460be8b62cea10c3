"""A visitor's list of changes: each kind checked, said in plain words, made, and given a random twin of the same size.

Every kind is a small class: `line` says it, `changes` makes it of `workbench.edits` (`makes` names them), and `twin` draws as
much of what was not chosen. Letters: T positions, L layers, E experts, K chosen, M visual tokens of all pictures, v channels
of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image

from workbench.edits import (
    Change,
    ablate_experts,
    ablate_heads,
    ablate_layer,
    ablate_visual_tokens,
    block_attention,
    pin_routing,
    set_top_k,
    shift_bias,
)
from workbench.runs import Run

from .change_places import Draw, Making, NoControl

Box = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the original picture


@dataclass(frozen=True)
class Experts:
    """Experts of one layer switched off."""

    layer: int
    experts: tuple[int, ...]
    how: str

    HOW = {
        "contribution": "what they write counts as zero",
        "renormalise": "dropped, the others scaled up",
        "route around": "cannot be chosen, the next best is",
    }

    def line(self) -> str:
        return f"{_listed('expert', self.experts)} of layer {self.layer} off ({self.HOW[self.how]})"

    def parts(self) -> list[tuple[str, Any]]:
        return [("experts", (self.layer, expert)) for expert in self.experts]

    def makes(self) -> list[str]:
        return ["ablate_experts"]

    def changes(self, making: Making) -> list[Change]:
        return [ablate_experts(self.layer, list(self.experts), self.how)]

    def twin(self, draw: Draw) -> list[Any]:
        found = draw.pick("experts", len(self.experts), _expert_pools(draw.run, self.layer))
        return [Experts(layer, ids, self.how) for layer, ids in _by_layer(found)]


@dataclass(frozen=True)
class Bias:
    """The selection bias of experts of one layer shifted."""

    layer: int
    experts: tuple[int, ...]
    by: float

    def line(self) -> str:
        return f"selection bias of {_listed('expert', self.experts)} of layer {self.layer} {self.by:+.2g}"

    def parts(self) -> list[tuple[str, Any]]:
        return [("experts to shift", (self.layer, expert)) for expert in self.experts]

    def makes(self) -> list[str]:
        return ["shift_bias"]

    def changes(self, making: Making) -> list[Change]:
        return [shift_bias(self.layer, list(self.experts), self.by)]

    def twin(self, draw: Draw) -> list[Any]:
        found = draw.pick("experts to shift", len(self.experts), _expert_pools(draw.run, self.layer))
        return [Bias(layer, ids, self.by) for layer, ids in _by_layer(found)]


@dataclass(frozen=True)
class Heads:
    """Attention heads of one layer switched off: what they read becomes zero, or their mean over this run."""

    layer: int
    heads: tuple[int, ...]
    how: str

    def line(self) -> str:
        return f"{_listed('head', self.heads)} of layer {self.layer} set to {'zero' if self.how == 'zero' else 'the mean'}"

    def parts(self) -> list[tuple[str, Any]]:
        return [("heads", (self.layer, head)) for head in self.heads]

    def makes(self) -> list[str]:
        return ["ablate_heads"]

    def changes(self, making: Making) -> list[Change]:
        values = None if self.how == "zero" else making.head_means(self.layer, list(self.heads))
        return [ablate_heads(self.layer, list(self.heads), self.how, values)]

    def twin(self, draw: Draw) -> list[Any]:
        layers, heads = draw.run.role_mass.shape[0], draw.run.role_mass.shape[1]
        pools = [[(layer, head) for layer in wanted for head in range(heads)] for wanted in ([self.layer], range(layers))]
        return [Heads(layer, ids, self.how) for layer, ids in _by_layer(draw.pick("heads", len(self.heads), pools))]


@dataclass(frozen=True)
class Layer:
    """What a layer's attention, its experts (FFN) or both write becomes zero."""

    layer: int
    part: str

    def line(self) -> str:
        what = {"attn": "attention", "ffn": "experts (FFN)", "both": "attention and experts (FFN)"}[self.part]
        return f"{what} of layer {self.layer} off"

    def parts(self) -> list[tuple[str, Any]]:
        return [("layers", self.layer)]

    def makes(self) -> list[str]:
        return ["ablate_layer"]

    def changes(self, making: Making) -> list[Change]:
        return [ablate_layer(self.layer, self.part)]

    def twin(self, draw: Draw) -> list[Any]:
        return [Layer(draw.pick("layers", 1, [list(range(len(draw.run.role_mass)))])[0], self.part)]


@dataclass(frozen=True)
class Tokens:
    """Visual tokens replaced by the mean one, or by zero."""

    tokens: tuple[int, ...]
    how: str

    def line(self) -> str:
        what = _listed("picture token", self.tokens) if len(self.tokens) <= 8 else f"{len(self.tokens)} picture tokens"
        return f"{what} replaced by {'zero' if self.how == 'zero' else 'the mean token'}"

    def parts(self) -> list[tuple[str, Any]]:
        return [("picture tokens", token) for token in self.tokens]

    def makes(self) -> list[str]:
        return ["ablate_visual_tokens"]

    def changes(self, making: Making) -> list[Change]:
        return [ablate_visual_tokens(list(self.tokens), self.how)]

    def twin(self, draw: Draw) -> list[Any]:
        everywhere = list(range(draw.run.picture_attention.shape[3]))
        return [Tokens(tuple(draw.pick("picture tokens", len(self.tokens), [everywhere])), self.how)]


@dataclass(frozen=True)
class Region:
    """A rectangle of a picture painted over with the picture's mean colour, before anything reads it."""

    picture: int
    box: Box

    def line(self) -> str:
        x0, y0, x1, y1 = self.box
        return f"picture {self.picture + 1} blank from x {x0} to {x1}, y {y0} to {y1}"

    def parts(self) -> list[tuple[str, Any]]:
        return [("regions", (self.picture, self.box))]

    def changes(self, making: Making) -> list[Change]:
        return []

    def twin(self, draw: Draw) -> list[Any]:
        """A rectangle of the same width and height that touches none of those taken."""
        (width, height), (x0, y0, x1, y1) = draw.run.pictures[self.picture].grid.original, self.box
        free = np.ones((height - (y1 - y0) + 1, width - (x1 - x0) + 1), bool)  # by the upper left corner
        for picture, (a, b, c, d) in draw.taken["regions"]:
            if picture == self.picture:
                free[max(0, b - (y1 - y0) + 1) : d, max(0, a - (x1 - x0) + 1) : c] = False
        corners = np.flatnonzero(free)
        if not len(corners):
            raise NoControl("no other rectangle of that size fits beside it in the picture")
        y, x = divmod(int(draw.rng.choice(corners)), free.shape[1])
        box = (x, y, x + x1 - x0, y + y1 - y0)
        draw.taken["regions"].add((self.picture, box))
        return [Region(self.picture, box)]


@dataclass(frozen=True)
class TopK:
    """Another number of experts a token, in all layers. With a seed, as many of the token's own drawn at random (or, if
    there are more of them now, its own and others drawn at random)."""

    k: int
    seed: int | None = None

    def line(self) -> str:
        return f"{self.k} experts a token{'' if self.seed is None else ', drawn at random instead of the best'}"

    def parts(self) -> list[tuple[str, Any]]:
        return [("top-k", 0)]

    def makes(self) -> list[str]:
        return ["set_top_k"] if self.seed is None else ["set_top_k", "pin_routing"]

    def changes(self, making: Making) -> list[Change]:
        if self.seed is None:
            return [set_top_k(None, self.k)]
        run, rng = making.run, np.random.default_rng(self.seed)
        keys = rng.random((*run.chosen.shape[:2], run.n_experts))
        own = np.zeros(keys.shape, bool)
        np.put_along_axis(own, run.chosen.astype(int), True, -1)
        order = np.argsort(keys - own, axis=-1)[..., : self.k]  # the token's own first, in random order
        return [set_top_k(None, self.k), pin_routing(dict(zip(run.moe_layers, order, strict=True)))]

    def twin(self, draw: Draw) -> list[Any]:
        return [TopK(self.k, int(draw.rng.integers(2**31)))]


@dataclass(frozen=True)
class Block:
    """Positions of one role do not see those of another, in all layers. With a seed, as many other keys at random."""

    source: str
    target: str
    seed: int | None = None

    NAMES = {"everything": "everything after it", "reply": "all that is written"}

    def line(self) -> str:
        looker = self.NAMES.get(self.source, spoken(self.source))
        what = spoken(self.target) if self.seed is None else f"as many random other positions as in {spoken(self.target)}"
        return f"{looker} cannot look at {what}"

    def parts(self) -> list[tuple[str, Any]]:
        return [("blocks", (self.source, self.target))]

    def split(self) -> bool:
        """Whether it matters where the thought ends, which is known only once it is written."""
        return bool({self.source, self.target} & {"thought", "answer"})

    def makes(self) -> list[str]:
        return ["block_attention"]

    def changes(self, making: Making) -> list[Change]:
        keys = making.text.keys(self.target)
        queries = making.text.queries(self.source, keys) if keys else None
        if not queries:
            return []
        assert keys is not None
        return [block_attention(queries, keys if self.seed is None else self._others(making, queries, keys))]

    def _others(self, making: Making, queries: Any, keys: list[int]) -> list[int]:
        """As many positions before the first query as there are keys; the very first stays visible, so that none is blind."""
        first = queries.start if isinstance(queries, slice) else queries[0]
        before = list(range(1, first))
        others = [at for at in before if at not in set(keys)]
        pool = others if len(others) >= len(keys) else before  # a large picture leaves too few others
        if len(pool) < len(keys):
            raise NoControl(f"there are not {len(keys)} other positions to hide")
        return sorted(np.random.default_rng(self.seed).choice(pool, len(keys), replace=False).tolist())

    def twin(self, draw: Draw) -> list[Any]:
        return [Block(self.source, self.target, int(draw.rng.integers(2**31)))]


Kind = Experts | Bias | Heads | Layer | Tokens | Region | TopK | Block


def control(kinds: Sequence[Kind], run: Run, seed: int) -> list[Kind]:
    """A random twin of each change, all drawn from what none of them chose. Raises NoControl.

    control([Experts(3, (7,), "contribution")], run, seed=1)     # [Experts(3, (2,), "contribution")]
    """
    taken: dict[str, set[Any]] = {}
    for kind, part in (part for one in kinds for part in one.parts()):
        taken.setdefault(kind, set()).add(part)
    draw = Draw(np.random.default_rng(seed), run, taken)
    return [twin for one in kinds for twin in one.twin(draw)]


def blanked(run: Run, kinds: Iterable[Kind]) -> list[Image.Image]:
    """The pictures of a run, with the regions among the changes painted over in the picture's mean colour."""
    images = [picture.image for picture in run.pictures]
    for one in kinds:
        if isinstance(one, Region):
            picture = run.pictures[one.picture]
            # a run may keep a large picture only as large as the model saw it
            across, down = (kept / was for kept, was in zip(picture.image.size, picture.grid.original, strict=True))
            x0, y0, x1, y1 = (round(side * scale) for side, scale in zip(one.box, (across, down) * 2, strict=True))
            mean = tuple(int(c) for c in np.asarray(picture.image, np.float64).mean((0, 1)).round())
            image = images[one.picture].copy()
            image.paste(mean, (x0, y0, max(x1, x0 + 1), max(y1, y0 + 1)))
            images[one.picture] = image
    return images


def spoken(role: str) -> str:
    """A role as it is said: "the question", "picture 2"."""
    if role == "picture":
        return "the pictures"
    return f"picture {int(role.split()[1]) + 1}" if role.startswith("picture ") else f"the {role}"


def merged(kinds: Iterable[Kind]) -> list[Kind]:
    """Changes of one kind and place made together, repeats once: the mean token is then the mean of the picture as it was."""
    found: dict[Any, Kind] = {}
    for one in kinds:
        name = {Experts: "experts", Bias: "experts", Heads: "heads", Tokens: "tokens"}.get(type(one))
        if name is None:
            found.setdefault(one, one)
            continue
        key = replace(one, **{name: ()})
        before = getattr(found.get(key, key), name)
        found[key] = replace(one, **{name: tuple(dict.fromkeys((*before, *getattr(one, name))))})
    return list(found.values())


def _listed(what: str, numbers: Sequence[int]) -> str:
    return f"{what}{'' if len(numbers) == 1 else 's'} {', '.join(map(str, numbers))}"


def _by_layer(found: Iterable[tuple[int, int]]) -> list[tuple[int, tuple[int, ...]]]:
    layers: dict[int, list[int]] = {}
    for layer, one in found:
        layers.setdefault(layer, []).append(one)
    return [(layer, tuple(ones)) for layer, ones in layers.items()]


def _expert_pools(run: Run, layer: int) -> list[list[tuple[int, int]]]:
    """Experts of the same layer, and if it has too few left, of all."""
    return [[(at, expert) for at in layers for expert in range(run.n_experts)] for layers in ([layer], run.moe_layers)]
