"""Two implementations, or two checkpoints, side by side: the same inputs, compared site by site in the order of the forward
pass, so that the first site that differs is where to look.

    report = walk(ours, theirs, probe(ours.config))
    print(*report.lines(), sep="\\n")          # a table, and last the first site that differs
    report.first                              # None, or its site, the step, the largest and the relative difference

Either may be a KimiVL or a model of transformers (`released.py`). Letters: B rows, T tokens, P patches, E experts, K chosen.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import inf, isfinite

import torch
from torch import Tensor, nn

from kimi_vl_ref import checkpoint_folder
from kimi_vl_ref.config import KimiVLConfig
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.weights import load_checkpoint

from .released import WITHOUT, as_transformers, language_model
from .sites import SiteError, sites
from .tape import Tape, attach

# relative differences that are rounding, by the coarser of the two dtypes; measured in tests/test_parity.py
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in TOLERANCE}
LIMIT = 8 << 30  # bytes that are kept of each model
TRANSFORMERS = "transformers:"


@dataclass(frozen=True)
class Probe:
    """What both models are given: prompts with pictures, and tokens that follow one by one with the cache."""

    input_ids: Tensor  # (B, T), rows of equal length
    decode_ids: Tensor  # (B, steps)
    pixel_values: Tensor  # (P, 3, 14, 14)
    image_grid_hws: Tensor  # (pictures, 2)


@dataclass(frozen=True)
class Difference:
    """One site in one call. Chosen experts and their weights are compared by expert, whatever their order."""

    site: str
    step: int  # 0: the prompt, n: the n-th token after it
    largest: float  # absolute
    relative: float  # root mean square of the difference over that of the larger side

    def __str__(self) -> str:
        when = "in the prompt" if self.step == 0 else f"at step {self.step}"
        return f"{self.site} {when}: largest difference {self.largest:.1e}, relative {self.relative:.1e}"


@dataclass(frozen=True)
class Walk:
    """What a walk has found, in the order of the forward pass."""

    names: tuple[str, str]
    tolerance: float
    steps: Sequence[Sequence[Difference]]  # by call, then by site
    without: Sequence[str]  # sites that only one of the two shows

    @property
    def first(self) -> Difference | None:
        """The first site that differs by more than the tolerance; None if none does."""
        return next((one for step in self.steps for one in step if not one.relative <= self.tolerance), None)

    def lines(self) -> list[str]:
        """A table with the worst step of each site, and the verdict as its last line."""
        worst: dict[str, Difference] = {}
        for one in (one for step in self.steps for one in step):
            if one.site not in worst or one.relative > worst[one.site].relative:
                worst[one.site] = one
        width = max(map(len, worst))
        table = [f"{'site':<{width}}  step  largest   relative   ({self.names[0]} | {self.names[1]})"]
        for name, one in worst.items():
            flag = "" if one.relative <= self.tolerance else "   <- differs"
            table.append(f"{name:<{width}}  {one.step:>4}  {one.largest:.1e}   {one.relative:.1e}{flag}")
        if self.without:
            globs = dict.fromkeys(re.sub(r"\.layers\.\d+", ".layers.*", name) for name in self.without)
            table.append(f"not compared, as only one of the two shows them: {', '.join(globs)}")
        if self.first is None:
            return [*table, f"all {len(worst)} sites agree in {len(self.steps)} calls, to {self.tolerance:.0e} of their size"]
        if self.first.site.endswith(".chosen"):  # its scores agree
            table.append("where two experts nearly tie, rounding may choose: compare in a wider dtype before looking further")
        return [*table, f"the first site that differs is {self.first}"]


def probe(config: KimiVLConfig, seed: int = 0, steps: int = 3) -> Probe:
    """Two prompts of random tokens about two random pictures, and `steps` tokens to follow. Needs no tokenizer."""
    generator = torch.Generator().manual_seed(seed)
    (down, across), patch = config.vision.merge_kernel_size, config.vision.patch_size
    grids = torch.tensor([[2 * down, 3 * across], [3 * down, across]])
    placeholder, vocabulary = config.media_placeholder_token_id, config.text.vocab_size
    ids = torch.randint(vocabulary - 1, (2, 14 + steps), generator=generator)
    ids += ids >= placeholder  # every token but the placeholder
    ids[0, 3:9] = ids[1, 5:8] = placeholder  # 6 and 3 visual tokens
    pixels = torch.rand(int(grids.prod(1).sum()), 3, patch, patch, generator=generator) * 2 - 1
    return Probe(ids[:, :14], ids[:, 14:], pixels, grids)


def walk(
    a: nn.Module,
    b: nn.Module,
    given: Probe,
    *,
    tolerance: float | None = None,
    names: tuple[str, str] = ("a", "b"),
    limit: int = LIMIT,
) -> Walk:
    """Runs both on the same inputs, with cached steps after the prompt, and compares every site that both show.

    tolerance: relative difference that passes; by default what rounding makes of the coarser dtype. If one of the two has no
    tower (DeepSeek-V3), both run without pictures, and placeholders are tokens like any other. limit: bytes kept of each.
    Raises SiteError for a model that is not known, or two of different shape.
    """
    shown = [sites(model) for model in (a, b)]
    for model, found in zip((a, b), shown, strict=True):
        if "embedded" not in found:
            raise SiteError(f"{type(model).__name__} is not known; give a KimiVL, or transformers' Kimi-K2.5 or DeepSeek-V3")
    pictures = all("vision" in found for found in shown)
    used = [[name for name in found if pictures or not name.startswith(("vision", "projector"))] for found in shown]
    both = [name for name in used[0] if name in used[1]]
    without = [name for one, other in (used, used[::-1]) for name in one if name not in other]
    known = [template.replace("{i}", "*") for template in WITHOUT]
    if extra := [name for name in without if not any(fnmatchcase(name, glob) for glob in known)]:
        raise SiteError(
            f"only one of the two models has {extra[0]} and {len(extra) - 1} more sites; compare models of one architecture"
        )
    first, second = (_run(model, given, both, pictures, limit) for model in (a, b))
    steps = [
        [_compare(first, second, name, step) for name in both if len(first[name]) > step]  # a picture is seen once
        for step in range(1 + given.decode_ids.shape[1])
    ]
    if tolerance is None:
        tolerance = max(TOLERANCE[_dtype(model)] for model in (a, b))
        if not isinstance(a, KimiVL) or not isinstance(b, KimiVL):  # theirs casts to float32 within, whatever the weights are
            tolerance = max(tolerance, TOLERANCE[torch.float32])
    return Walk(names, tolerance, steps, without)


def compare(a: str, b: str, dtype: str = "float32") -> Walk:
    """The walk of two models by name: "study", a checkpoint folder, or "transformers:FOLDER" for its weights in
    transformers' modules. Both compute in one dtype, so that what differs is not their rounding.

    Raises ValueError for a dtype that is none, CheckpointError for a folder that cannot be read.

        print(*compare("study", "transformers:study").lines(), sep="\\n")
    """
    if dtype not in DTYPES:
        raise ValueError(f"the dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    folders = [checkpoint_folder(name.removeprefix(TRANSFORMERS)) for name in (a, b)]
    ours = [load_checkpoint(folder, dtype=DTYPES[dtype]) for folder in folders]
    models = [as_transformers(m) if n.startswith(TRANSFORMERS) else m for n, m in zip((a, b), ours, strict=True)]
    return walk(models[0], models[1], probe(ours[0].config), names=(a, b))


@torch.no_grad()
def _run(model: nn.Module, given: Probe, read: Sequence[str], pictures: bool, limit: int) -> Tape:
    device = next(model.parameters()).device
    ids, decode, grids = (part.to(device) for part in (given.input_ids, given.decode_ids, given.image_grid_hws))
    pixels = given.pixel_values.to(device, _dtype(model))
    with attach(model, read, limit=limit) as tape:
        if isinstance(model, KimiVL):
            cache = model.new_cache(len(ids))
            model.logits(model(ids, *((pixels, grids) if pictures else ()), cache=cache))
            for column in decode.split(1, dim=1):
                model.logits(model(column, cache=cache))
        else:
            seen = {"pixel_values": pixels, "image_grid_thw": nn.functional.pad(grids, (1, 0), value=1)} if pictures else {}
            past = model(input_ids=ids, use_cache=True, **seen).past_key_values
            for column in decode.split(1, dim=1):
                past = model(input_ids=column, past_key_values=past, use_cache=True).past_key_values
    return tape


def _compare(a: Tape, b: Tape, name: str, step: int) -> Difference:
    x, y = (_by_expert(tape, name, step) for tape in (a, b))
    if x.shape != y.shape:
        raise SiteError(f"{name} is {tuple(x.shape)} in one and {tuple(y.shape)} in the other; compare models of one size")
    gap = (x - y).abs()
    size = max(float(x.square().mean().sqrt()), float(y.square().mean().sqrt()))
    largest, rms = float(gap.max()), float(gap.square().mean().sqrt())
    if not isfinite(rms):
        return Difference(name, step, inf, inf)
    return Difference(name, step, largest, rms / size if size else 0.0)


def _by_expert(tape: Tape, name: str, step: int) -> Tensor:
    """A value in float64; chosen experts (B, T, K) as 1 and 0, and their weights, in a column an expert (B, T, E)."""
    value = tape[name][step].detach().double().cpu()
    router, _, part = name.rpartition(".")
    if not router.endswith(".router") or part == "scores":
        return value
    chosen = tape[f"{router}.chosen"][step].cpu()
    experts = tape[f"{router}.scores"][step].shape[-1]
    value = torch.ones_like(value) if part == "chosen" else value
    return value.new_zeros(*value.shape[:-1], experts).scatter(-1, chosen, value)


def _dtype(model: nn.Module) -> torch.dtype:
    """That of the weights; the selection biases are wider."""
    module = model if isinstance(model, KimiVL) else language_model(model)
    assert module is not None
    return next(module.parameters()).dtype
