"""The sites of a model: what can be read, edited or swapped, by name. A site is a submodule that returns one tensor and lies
on the path to the answer; its name is its module path, so there is no register to keep in step with the model.

Axes: B rows, T tokens, Q rows asked for, P patches of all pictures, M visual tokens, C the 4 patches of a visual token,
H heads, n/r/v/d channels of a head, R latent, D decoder stream, V MoonViT stream, F inner width, E experts, K chosen,
W vocabulary. Globs: `*` and `[0-3]` stay inside one part of a name, `**` crosses dots.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby, product

from torch import nn

from kimi_vl_ref.model import KimiVL


class SiteError(ValueError):
    """A site that does not exist or did not run, or something that cannot be done at it."""


@dataclass(frozen=True)
class Site:
    name: str
    axes: str  # letters of the module docstring, outermost first
    what: str

    @property
    def token_axis(self) -> int | None:
        """Which axis counts tokens, patches or visual tokens."""
        return next((at for at, letter in enumerate(self.axes.split()) if letter in "TPM"), None)


# {i} is a layer. In the order in which they run; a layer's sites run before the next layer's.
TABLE = {
    "vision.patches": ("P V", "patch vectors"),
    "vision.positions": ("P V", "the position table stretched to each grid, as it is added"),
    "vision.layers.{i}.attn_norm": ("P V", "what attention sees"),
    "vision.layers.{i}.attn.qkv": ("P 3V", "queries, keys and values, side by side"),
    "vision.layers.{i}.attn.q": ("P H d", "queries before rotation"),
    "vision.layers.{i}.attn.k": ("P H d", "keys before rotation"),
    "vision.layers.{i}.attn.v": ("P H d", "values"),
    "vision.layers.{i}.attn.core": ("P H d", "what each head read"),
    "vision.layers.{i}.attn.out": ("P V", "the same as the layer's attn"),
    "vision.layers.{i}.attn": ("P V", "what attention writes"),
    "vision.layers.{i}.resid_mid": ("P V", "the stream between attention and FFN"),
    "vision.layers.{i}.ffn_norm": ("P V", "what the FFN sees"),
    "vision.layers.{i}.ffn.fc0": ("P F", "the FFN's inner channels, before the GELU"),
    "vision.layers.{i}.ffn.fc1": ("P V", "the same as the layer's ffn"),
    "vision.layers.{i}.ffn": ("P V", "what the FFN writes"),
    "vision.layers.{i}": ("P V", "the stream after the layer"),
    "vision.norm": ("P V", "leaving MoonViT"),
    "vision": ("P V", "the same as vision.norm"),
    "projector.merged": ("M C V", "the four patches of each visual token"),
    "projector.norm": ("M C V", "the same, each patch normed"),
    "projector.linear_1": ("M F", "the projector's inner channels, before the GELU"),
    "projector.linear_2": ("M D", "the same as projector"),
    "projector": ("M D", "visual tokens, in the decoder's width"),
    "embedded": ("B T D", "text with visual tokens in place: the stream at its start"),
    "decoder.layers.{i}.attn_norm": ("B T D", "what attention sees"),
    "decoder.layers.{i}.attn.q": ("B T H(n+r)", "queries before rotation, heads side by side"),
    "decoder.layers.{i}.attn.down": ("B T R+r", "latent before its norm, and rotary key before rotation"),
    "decoder.layers.{i}.attn.latent": ("B T R", "the normed latent: what the cache holds"),
    "decoder.layers.{i}.attn.q_rope": ("B T H r", "rotated part of the queries"),
    "decoder.layers.{i}.attn.k_rope": ("B T 1 r", "rotated part of the keys, one for all heads"),
    "decoder.layers.{i}.attn.core": ("B T H v", "what each head read"),
    "decoder.layers.{i}.attn.out": ("B T D", "the same as the layer's attn"),
    "decoder.layers.{i}.attn": ("B T D", "what attention writes"),
    "decoder.layers.{i}.resid_mid": ("B T D", "the stream between attention and FFN"),
    "decoder.layers.{i}.ffn_norm": ("B T D", "what the router and the experts see"),
    "decoder.layers.{i}.ffn.gate": ("B T F", "gate channels of a dense FFN"),
    "decoder.layers.{i}.ffn.up": ("B T F", "inner channels of a dense FFN"),
    "decoder.layers.{i}.ffn.down": ("B T D", "the same as a dense layer's ffn"),
    "decoder.layers.{i}.ffn.router.scores": ("B T E", "sigmoid score of every expert, without the selection bias"),
    "decoder.layers.{i}.ffn.router.chosen": ("B T K", "ids of the chosen experts, highest biased score first"),
    "decoder.layers.{i}.ffn.router.weights": ("B T K", "what each chosen expert counts for"),
    "decoder.layers.{i}.ffn.experts": ("B T D", "what the chosen experts write"),
    "decoder.layers.{i}.ffn.shared.gate": ("B T F", "gate channels of the shared expert"),
    "decoder.layers.{i}.ffn.shared.up": ("B T F", "inner channels of the shared expert"),
    "decoder.layers.{i}.ffn.shared.down": ("B T D", "the same as the layer's shared"),
    "decoder.layers.{i}.ffn.shared": ("B T D", "what the shared expert writes"),
    "decoder.layers.{i}.ffn": ("B T D", "what the FFN writes"),
    "decoder.layers.{i}": ("B T D", "the stream after the layer"),
    "decoder.norm": ("B T D", "the stream at its end, normed"),
    "decoder": ("B T D", "the same as decoder.norm"),
    "logits": ("B Q W", "scores of the next token; (B, W) while generating"),
}


def sites(model: nn.Module) -> dict[str, Site]:
    """Every site of a model by name, in the order of TABLE. Another model than KimiVL has its submodules, axes unknown."""
    modules = dict(model.named_modules())
    if not isinstance(model, KimiVL):
        return {name: Site(name, "", type(module).__name__) for name, module in modules.items() if name}
    found: dict[str, Site] = {}
    for start, templates in groupby(TABLE, lambda template: template.partition("{i}")[0]):
        layers = len(modules[start.strip(".")]) if start.endswith("layers.") else 1  # type: ignore[arg-type]
        names = list(templates)
        for i, template in product(range(layers), names):
            name = template.format(i=i)
            if name in modules:  # layer 0 has no router, the others no dense FFN
                found[name] = Site(name, *TABLE[template])
    return found


def match(glob: str, names: Iterable[str]) -> list[str]:
    """The names that a glob means, in their order. Raises SiteError with near matches when there are none."""
    names = list(names)
    if found := [name for name in names if _matches(name.split("."), glob.split("."))]:
        return found
    wildcards = any(letter in glob for letter in "*?[")
    pool = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) if wildcards else name for name in names)
    near = get_close_matches(glob, pool, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "workbench.sites.sites(model) lists them"
    raise SiteError(f"no site of this model is called {glob!r}; {hint}")


def _matches(name: list[str], glob: list[str]) -> bool:
    if not glob:
        return not name
    if glob[0] == "**":
        return any(_matches(name[skip:], glob[1:]) for skip in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], glob[0]) and _matches(name[1:], glob[1:])
