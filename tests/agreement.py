"""Our model on a case, and the one comparison by which fidelity tests and negative controls judge it."""

from __future__ import annotations

import torch
from torch import Tensor

from kimi_vl_ref.config import KimiVLConfig
from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.moe import Choice
from kimi_vl_ref.weights import from_released
from peers import Case

# largest absolute difference, by output; the outputs themselves are of order one
FLOAT32 = {"vision_merged": 2e-5, "image_features": 2e-5, "logits": 5e-5, "decode_logits": 5e-5}
FLOAT64 = dict.fromkeys(FLOAT32, 1e-12)


def load_case(case: Case, dtype: torch.dtype = torch.float32) -> KimiVL:
    return from_released(KimiVLConfig.from_dict(case.config), case.tensors, dtype=dtype)


@torch.no_grad()
def vision_outputs(model: KimiVL, case: Case) -> dict[str, Tensor]:
    """`vision_merged` (M, 4, V) and `image_features` (M, D)."""
    grids = [(h, w) for h, w in case.image_grid_hws.tolist()]
    patches = model.vision(case.pixel_values, grids)
    return {
        "vision_merged": model.projector.merged(patches, grids),
        "image_features": model.see(case.pixel_values, case.image_grid_hws),
    }


@torch.no_grad()
def text_outputs(model: KimiVL, case: Case, *, pictures: bool) -> dict[str, Tensor]:
    """`logits` (B, T, vocabulary) of the prompt, `decode_logits` (B, n, vocabulary) of ids fed singly.

    Without `pictures` the placeholders are tokens like any other.
    """
    seen = (case.pixel_values, case.image_grid_hws) if pictures else ()
    cache = model.new_cache(len(case.input_ids))
    prompt = model.logits(model(case.input_ids, *seen, cache=cache))
    steps = [model.logits(model(ids, cache=cache)) for ids in case.decode_ids.split(1, dim=1)]
    return {"logits": prompt, "decode_logits": torch.cat(steps, dim=1)}


def our_outputs(model: KimiVL, case: Case) -> dict[str, Tensor]:
    """The four outputs of the tables above, named and shaped as `peers.peer_outputs` gives them."""
    case = case.to(model.logits.weight.dtype)
    return vision_outputs(model, case) | text_outputs(model, case, pictures=True)


def gap(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; a NaN on one side counts as infinite."""
    assert a.shape == b.shape, f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}"
    return (a.double() - b.double()).abs().nan_to_num(nan=torch.inf).max().item()


def assert_agree(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], limits: dict[str, float] = FLOAT32
) -> None:
    """Fails naming the first output, from the picture to the answer, that is further off than its limit."""
    assert theirs
    for name in theirs:
        distance = gap(ours[name], theirs[name])
        assert distance <= limits[name], f"{name} is off by {distance:.2e}, allowed {limits[name]:.0e}"


@torch.no_grad()
def closest_call(model: KimiVL, case: Case, *, pictures: bool) -> tuple[float, float]:
    """How near any token was to other experts, and for which share the selection bias changed the choice.

    Programs that round differently may choose differently where the margin is of the size of their rounding.
    """
    margins: list[float] = []
    changed: list[float] = []

    def watch(choice: Choice, inputs: tuple[Tensor], chosen: Tensor) -> None:
        (scores,) = inputs
        biased = scores + choice.bias
        if choice.topk_group < choice.n_group:
            groups = biased.unflatten(-1, (choice.n_group, -1))
            ranked = groups.topk(2).values.sum(-1).sort(descending=True)
            margins.append(
                (ranked.values[..., choice.topk_group - 1] - ranked.values[..., choice.topk_group])
                .min()
                .item()
            )
            competing = ranked.indices[..., : choice.topk_group, None].expand(
                *groups.shape[:-2], -1, groups.shape[-1]
            )
            biased = groups.gather(-2, competing).flatten(-2)
        best = biased.sort(descending=True).values
        margins.append((best[..., choice.top_k - 1] - best[..., choice.top_k]).min().item())
        unbiased = scores.topk(choice.top_k).indices
        changed.append((unbiased.sort().values != chosen.sort().values).any(-1).double().mean().item())

    handles = [m.register_forward_hook(watch) for m in model.modules() if isinstance(m, Choice)]
    text_outputs(model, case.to(model.logits.weight.dtype), pictures=pictures)
    for handle in handles:
        handle.remove()
    return min(margins), sum(changed) / len(changed)
