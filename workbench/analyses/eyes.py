"""Where MoonViT looks and what its patches are made of: head atlas (V1), one patch's attention, rollout (V2); and what a
written token owes to each position before it, by gradients (V3).

A model and pictures, or a model and a Run, in; `Result` out. Letters: L layers, H heads, P patches of one picture, Q of them
that ask, T tokens. Attention is not an explanation: compare with the chance lines, and with what happens when the patches
are taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import ExplicitCore
from kimi_vl_ref.images import ImageProcessor, ImageSource, Picture
from workbench.rows import vision_rows
from workbench.runs import fingerprint
from workbench.tape import Tape, active_edits, attach

from .replay import replayed
from .result import Result, about_runs

if TYPE_CHECKING:
    from workbench.runs import Run

SCRATCH = 1 << 24  # numbers of one (H, rows, P) block of attention
RELEVANCY_BYTES = 1 << 32  # probabilities and gradients of all layers, which the relevancy of one token holds at once

Measure = Callable[[tuple[Any, ...], list[Picture]], Any]
CORES = "vision.layers.*.attn.core@in"


# --- V1 ------------------------------------------------------------------------------------------------------------------


def head_atlas(model: KimiVL, processor: ImageProcessor, images: Sequence[ImageSource], *, model_name: str) -> Result:
    """V1: how far and how evenly each head of MoonViT looks. arXiv 2010.11929 (appendix D.8), 2108.08810.

    distance (L, H): mean over patches of the distance to where the patch looks, in pixels of the picture as it is cut
    (14 a patch; a picture that was too large has been shrunk). entropy (L, H): of a patch's attention, nats; 0 is one patch,
    log P all alike. Chance is attention spread evenly over the picture.

        result = head_atlas(model, chat.processor, [image], model_name="study")
        result["distance"][0]      # (H,) of the first layer, pixels
    """

    def measure(inputs: tuple[Any, ...], pictures: list[Picture]) -> Tensor:
        total = torch.zeros(2, inputs[0].shape[1], dtype=torch.float64)
        for number, picture in enumerate(pictures):
            for patches in _parts(picture.grid.patch_count, inputs[0].shape[1]):
                probs = vision_rows(inputs, number, patches)
                far = attention_distance(probs, picture.grid.grid, patches, picture.grid.patch_size).sum(-1)
                total += torch.stack([far, attention_entropy(probs).sum(-1)]).double().cpu()
        return total / len(inputs[0])

    pictures, tape = _see(model, processor, images, measure)
    distance, entropy = torch.stack([tape[site][0] for site in tape.sites], dim=1).numpy()  # (L, H) each
    even = _even(pictures)
    axes = [("layer", range(distance.shape[0])), ("head", range(distance.shape[1]))]
    return Result(
        "head-atlas",
        "How far (pixels) and how evenly (nats) each head of MoonViT looks",
        {"distance": distance, "entropy": entropy},
        {"distance": axes, "entropy": axes},
        chance=even,
        about=_about(model, model_name, pictures),
    )


def attention_distance(probs: Tensor, grid: tuple[int, int], queries: Sequence[int] | Tensor, patch_size: int) -> Tensor:
    """Mean distance in pixels between the centres of a patch and of what it reads: probs (..., Q, P) of the patches
    `queries` of a grid (rows, columns) -> (..., Q).
    """
    rows, columns = grid
    at = torch.stack([torch.arange(rows).repeat_interleave(columns), torch.arange(columns).repeat(rows)], dim=-1)
    at = at.to(probs) * patch_size  # (P, 2)
    return (probs * torch.cdist(at[torch.as_tensor(queries)], at)).sum(-1)


def attention_entropy(probs: Tensor) -> Tensor:
    """Entropy in nats: (..., P) -> (...)."""
    return torch.special.entr(probs).sum(-1)


def _even(pictures: Sequence[Picture]) -> dict[str, float]:
    """What attention spread evenly over each picture would give, averaged over all patches."""
    far, spread, count = 0.0, 0.0, 0
    for picture in pictures:
        patches = picture.grid.patch_count
        for part in _parts(patches, 1):
            even = torch.full((len(part), patches), 1 / patches, dtype=torch.float64)
            far += float(attention_distance(even, picture.grid.grid, part, picture.grid.patch_size).sum())
        spread, count = spread + patches * float(np.log(patches)), count + patches
    return {"distance": far / count, "entropy": spread / count}


def patch_attention(
    model: KimiVL, processor: ImageProcessor, images: Sequence[ImageSource], patch: int, picture: int = 0, *, model_name: str
) -> Result:
    """What one patch of a picture reads, in every layer and head: attention (L, H, rows, columns). Chance is 1/P.

    Raises ValueError for a patch or picture that does not exist.

        grid = processor.grid(*image.size)
        result = patch_attention(model, processor, [image], grid.patch_at(120, 40), model_name="study")
    """
    pictures, tape = _see(model, processor, images, lambda inputs, _: vision_rows(inputs, picture, [patch])[:, 0].cpu())
    grid = pictures[picture].grid
    maps = grid.patch_heat(torch.stack([tape[site][0] for site in tape.sites]).float().numpy())
    axes = zip(("layer", "head", "row", "column"), map(range, maps.shape), strict=True)
    return Result(
        "patch-attention",
        f"What patch {patch} of picture {picture} reads",
        {"attention": maps},
        {"attention": list(axes)},
        chance={"attention": 1 / grid.patch_count},
        about=_about(model, model_name, pictures, picture=picture, patch=patch),
    )


# --- V2 ------------------------------------------------------------------------------------------------------------------


def rollout(
    model: KimiVL,
    processor: ImageProcessor,
    images: Sequence[ImageSource],
    picture: int = 0,
    patches: Sequence[int] | None = None,
    *,
    model_name: str,
) -> Result:
    """V2, attention rollout: how much of each patch is in a patch that leaves MoonViT, if attention were all that mixes.

    R = product over layers of (A + I) / 2, A the mean over heads (Abnar & Zuidema, arXiv 2005.00928). MoonViT has no class
    token: give the `patches` that ask, or none for the mean over all. rollout (Q, rows, columns), each map sums to 1; chance
    is 1/P. A picture takes P x P numbers, 64 MiB for the largest one of a released checkpoint. Raises ValueError for a patch
    or picture that does not exist.

        result = rollout(model, chat.processor, [image], model_name="study")
        result["rollout"][0]       # (rows, columns)
    """

    def averaged(inputs: tuple[Any, ...], _pictures: list[Picture]) -> None:
        nonlocal total
        count = inputs[3].counts[picture] if 0 <= picture < len(inputs[3].counts) else 0
        parts = [vision_rows(inputs, picture, part).mean(0) for part in _parts(max(1, count), inputs[0].shape[1])]
        total = rolled(torch.cat(parts), total)

    total: Tensor | None = None
    pictures, tape = _see(model, processor, images, averaged)
    assert total is not None
    grid = pictures[picture].grid
    if wrong := [patch for patch in patches or () if not 0 <= patch < grid.patch_count]:
        raise ValueError(f"patch {wrong[0]} does not exist; picture {picture} has patches 0 to {grid.patch_count - 1}")
    maps = total.mean(0, keepdim=True) if patches is None else total[list(patches)]
    heat = grid.patch_heat(maps.float().cpu().numpy())
    labels = ["all"] if patches is None else list(patches)
    return Result(
        "rollout",
        f"Attention rollout of MoonViT over picture {picture}",
        {"rollout": heat},
        {"rollout": [("patch", labels), ("row", range(heat.shape[1])), ("column", range(heat.shape[2]))]},
        chance={"rollout": 1 / grid.patch_count},
        about=_about(model, model_name, pictures, picture=picture, layers=len(tape.sites)),
    )


def rolled(attention: Tensor, before: Tensor | None) -> Tensor:
    """One more layer of a rollout: attention (P, P), the mean over heads; before: the rollout up to here, None at first."""
    mixed = (attention + torch.eye(len(attention)).to(attention)) / 2
    mixed = mixed / mixed.sum(-1, keepdim=True)
    return mixed if before is None else mixed @ before


# --- V3 ------------------------------------------------------------------------------------------------------------------


def relevancy(model: KimiVL, processor: ImageProcessor, run: Run, token: int, target: int | None = None) -> Result:
    """V3, gradient-weighted relevancy: what the logit of a written token owes to each position before it.

    For every layer A = mean over heads of the positive part of (gradient x attention); R starts as the identity and becomes
    R + A R (Chefer et al., arXiv 2103.15679, section 3; LVLM-Interpret, 2404.03118). relevancy (T) is the row of R at the
    position that wrote `token`, without the 1 that R starts from; `picture i` the same on each picture (rows, columns);
    share (roles) adds up to 1, and its chance is the share of the positions.

    token: position of a token of the run, 1 or later. target: an id whose logit is asked for (default: the token itself; give
    another to see what spoke for *that*). All probabilities of all layers are held with their gradients: 8 L H T^2 bytes.
    Raises ValueError for a position that does not exist, a run of other weights, and a run too long for that.

        run = Run.load(path)
        result = relevancy(model, chat.processor, run, token=run.prompt_length + 3)
        result["picture 0"], result["share"]
    """
    first = int(run.positions("image")[-1]) + 1 if run.pictures else 1
    if not first <= token < len(run.token_ids):
        raise ValueError(f"token {token} cannot be asked about; give a position from {first} to {len(run.token_ids) - 1}")
    layers, heads = len(model.decoder.layers), model.config.text.num_attention_heads
    needed = 8 * layers * heads * token**2
    if needed > RELEVANCY_BYTES:
        raise ValueError(
            f"the relevancy of token {token} would hold {needed / 2**30:.1f} GiB of attention, and the limit is "
            f"{RELEVANCY_BYTES / 2**30:.1f} GiB; ask about an earlier token or a shorter run"
        )
    target = int(run.token_ids[token]) if target is None else target
    x = replayed(model, processor, run, token)
    cores = "decoder.layers.*.attn.core"
    with torch.enable_grad(), attach(model, read=[f"{cores}.probs"], swap={cores: lambda core: ExplicitCore()}) as tape:
        logit = model.logits(model.decoder(x.detach().requires_grad_())[0, -1])[target]
        probs = [tape[site][0] for site in tape.sites]
        grads = torch.autograd.grad(logit, probs)
    row = relevancy_row([p.detach()[0] for p in probs], [g[0] for g in grads], token - 1).float().cpu().numpy()
    names = list(dict.fromkeys("image" if role.startswith("image ") else role for role in run.roles[:token]))
    members = [run.positions(name)[run.positions(name) < token] for name in names]
    total = float(row.sum()) or 1.0
    values = {"relevancy": row, "share": np.array([row[at].sum() / total for at in members])}
    axes: dict[str, Any] = {"relevancy": [("position", range(token))], "share": [("role", names)]}
    for number, picture in enumerate(run.pictures):
        heat = values[f"picture {number}"] = picture.grid.token_heat(row[run.positions(f"image {number}")])
        axes[f"picture {number}"] = [("row", range(heat.shape[0])), ("column", range(heat.shape[1]))]
    return Result(
        "relevancy",
        f"What the logit of {_word(run, token, target)} owes to each position before it",
        values,
        axes,
        chance={"share": np.array([len(at) / token for at in members])},
        about=about_runs([run], token=token, target=target, logit=float(logit.detach())),
    )


def relevancy_row(probs: Sequence[Tensor], grads: Sequence[Tensor], row: int) -> Tensor:
    """One row of the relevancy matrix without its identity: probs and grads (H, T, T) of each layer, first to last -> (T,).

    Row t of (I + A_L) ... (I + A_1) is worked out from the left, so it takes T numbers and no T x T product.
    """
    r = torch.zeros_like(probs[0][0, row])
    r[row] = 1
    for p, g in zip(reversed(probs), reversed(grads), strict=True):
        r = r + r @ (p * g).clamp(min=0).mean(0)
    r[row] -= 1
    return r


# --- shared --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _see(model: KimiVL, processor: ImageProcessor, images: Sequence[ImageSource], measure: Measure) -> tuple[Any, Tape]:
    """The pictures as they were cut, and a tape with what `measure` made of each layer's core inputs."""
    if not images:
        raise ValueError("there are no pictures to look at; give at least one")
    pixel_values, grids, pictures = processor(images)
    weight = model.logits.weight
    with attach(model, read={CORES: lambda inputs, site: measure(inputs, pictures)}) as tape:
        model.vision(pixel_values.to(weight.device, weight.dtype), [(int(h), int(w)) for h, w in grids.tolist()])
    return pictures, tape


def _parts(patches: int, heads: int) -> list[Tensor]:
    return list(torch.arange(patches).split(max(1, SCRATCH // (heads * patches))))


def _about(model: KimiVL, model_name: str, pictures: Sequence[Picture], **more: Any) -> dict[str, Any]:
    sizes = [list(picture.grid.original) for picture in pictures]
    known = {"weights": model_name, "fingerprint": fingerprint(model), "pictures": len(pictures), "sizes": sizes}
    return {**known, "edits": active_edits(), **more}


def _word(run: Run, token: int, target: int) -> str:
    return f"{run.texts[token]!r} (token {token})" if target == run.token_ids[token] else f"id {target} at token {token}"
