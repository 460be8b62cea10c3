"""The sites of a model: what can be read, edited or swapped, by name. A site is a submodule that returns one tensor and lies
on the path to the answer; its name is its module path, so there is no register to keep in step with the model. In another
implementation of the model (`released.py`) the same names mean the same tensors, wherever they are seen there.

Axes: B rows, T tokens, Q rows asked for, P patches of all pictures, M visual tokens, C the 4 patches of a visual token,
H heads, n/r/v/d channels of a head, R latent, D decoder stream, V MoonViT stream, F inner width, E experts, K chosen,
W vocabulary. Globs: `*` and `[0-3]` stay inside one part of a name, `**` crosses dots.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from itertools import groupby, product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kimi_vl_ref import checkpoint_folder
from kimi_vl_ref.config import KimiVLConfig
from kimi_vl_ref.model import KimiVL


class SiteError(ValueError):
    """A site that does not exist or did not run, or something that cannot be done at it."""


class Call(NamedTuple):
    """One call of a module: what a View may need besides the value."""

    module: nn.Module
    args: tuple[Any, ...]
    batch: int  # B of the decoder's call


@dataclass(frozen=True)
class View:
    """How a tensor of ours is seen in what a module of another implementation returns, or is given."""

    take: Callable[[Any, Call], Tensor]  # that module's value -> our tensor
    put: Callable[[Any, Tensor, Call], Any] | None  # the value with our tensor in it; None: it can only be read
    given: str | None = None  # seen in the input of this name (the first one) instead of in what is returned


@dataclass(frozen=True)
class Site:
    name: str
    axes: str  # letters of the module docstring, outermost first
    what: str
    module: str = ""  # where it is seen in another implementation; ours bear the name of the site
    view: View | None = None

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
    """Every site of a model by name, in the order of TABLE.

    A released implementation has the sites that `released.released_sites` finds in it; any other model its submodules, axes
    unknown.

        [site.axes for site in sites(model).values()]
    """
    modules = dict(model.named_modules())
    if isinstance(model, KimiVL):
        named = names(len(model.vision.layers), len(model.decoder.layers))
        return {name: Site(name, *TABLE[template]) for name, template in named if name in modules}
    from .released import released_sites  # it is made of this file's parts

    return released_sites(model) or {name: Site(name, "", type(part).__name__) for name, part in modules.items() if name}


def names(vision_layers: int, decoder_layers: int) -> Iterator[tuple[str, str]]:
    """(name, template) of TABLE for every layer, in their order. Not all are in a model: layer 0 has no router, the others no
    dense FFN.
    """
    counts = {"vision.layers.": vision_layers, "decoder.layers.": decoder_layers}
    for start, templates in groupby(TABLE, lambda template: template.partition("{i}")[0]):
        for i, template in product(range(counts.get(start, 1)), list(templates)):
            yield template.format(i=i), template


def sizes(config: KimiVLConfig, site: Site) -> tuple[int | str, ...]:
    """How long each axis of a site is; a letter where that depends on what is asked (B T Q P M).

        sizes(model.config, sites(model)["decoder.layers.1.ffn.router.weights"])      # ("B", "T", 2)
    """
    vision, text = config.vision, config.text
    shared, dense = text.n_shared_experts * text.moe_intermediate_size, text.intermediate_size
    inner = {"vision": vision.intermediate_size, "projector": vision.merged_size}
    side = site.name.partition(".")[0]
    known = {
        "V": vision.hidden_size, "3V": 3 * vision.hidden_size, "C": vision.merge_kernel_size[0] * vision.merge_kernel_size[1],
        "d": vision.head_dim, "D": text.hidden_size, "1": 1, "R": text.kv_lora_rank, "r": text.qk_rope_head_dim,
        "R+r": text.kv_lora_rank + text.qk_rope_head_dim, "H(n+r)": text.num_attention_heads * text.qk_head_dim,
        "v": text.v_head_dim, "E": text.n_routed_experts, "K": text.num_experts_per_tok, "W": text.vocab_size,
        "H": vision.num_attention_heads if side == "vision" else text.num_attention_heads,
        "F": inner.get(side, shared if ".shared." in site.name else dense),
    }  # fmt: skip
    return tuple(known.get(letter, letter) for letter in site.axes.split())


def skeleton(source: str | Path) -> KimiVL:
    """The model of a checkpoint folder, or of "study", without its weights: what its sites are, at no cost.

    Reads config.json only. Raises ConfigError for one that is missing or not Kimi-VL's.

        len(sites(skeleton("study")))
    """
    with torch.device("meta"):
        return KimiVL(KimiVLConfig.from_json(checkpoint_folder(source) / "config.json"))


def listing(model: KimiVL, glob: str | None = None) -> list[str]:
    """Lines for a person: name, axes, sizes and what it is. Without a glob one line for the same site of all layers, named by
    the glob that means them all. Raises SiteError when a glob means none.

        print(*listing(skeleton("study"), "decoder.layers.1.ffn.**"), sep="\\n")
    """
    found = sites(model)
    if glob:
        shown = {name: found[name] for name in match(glob, found)}
    else:
        same = {re.sub(r"\.layers\.\d+", ".layers.{i}", name): site for name, site in found.items()}
        shown = {template.replace("{i}", "*"): same[template] for template in TABLE if template in same}
    rows = [(name, site.axes, " x ".join(map(str, sizes(model.config, site))), site.what) for name, site in shown.items()]
    rows = [("site", "axes", "sizes", "what it is"), *rows]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return ["  ".join([*(part.ljust(width) for part, width in zip(row, widths, strict=False)), row[3]]) for row in rows]


def match(glob: str, names: Iterable[str]) -> list[str]:
    """The names that a glob means, in their order. Raises SiteError with near matches when there are none.

        match("decoder.layers.*.attn.core", sites(model))
    """
    names, parts = list(names), glob.split(".")
    end = "" if _wild(parts[-1]) else parts[-1]  # tells most names apart at once: attaching asks for many globs
    if found := [name for name in names if name.endswith(end) and _matches(name.split("."), parts)]:
        return found
    pool = dict.fromkeys(re.sub(r"\.\d+(?=\.|$)", ".*", name) if _wild(glob) else name for name in names)
    near = get_close_matches(glob, pool, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}?" if near else "workbench.sites.sites(model) lists them"
    raise SiteError(f"no site of this model is called {glob!r}; {hint}")


def _wild(glob: str) -> bool:
    return any(letter in glob for letter in "*?[")


def _matches(name: list[str], glob: list[str]) -> bool:
    if not glob:
        return not name
    if glob[0] == "**":
        return any(_matches(name[skip:], glob[1:]) for skip in range(len(name) + 1))
    return bool(name) and fnmatchcase(name[0], glob[0]) and _matches(name[1:], glob[1:])
