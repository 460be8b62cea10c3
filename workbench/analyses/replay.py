"""A recorded run given to its model once more, in one pass: for analyses that need what a Run does not keep."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kimi_vl_ref import KimiVL
from kimi_vl_ref.images import ImageProcessor
from workbench.runs import fingerprint

if TYPE_CHECKING:
    from workbench.runs import Run


@torch.no_grad()
def replayed(model: KimiVL, processor: ImageProcessor, run: Run, length: int | None = None) -> Tensor:
    """The stream as it enters the decoder, (1, T, D), for the first `length` tokens of the run (default: all).

    Raises ValueError if the run is of other weights, or its pictures are cut differently here, or `length` ends before the
    pictures do.
    """
    if run.versions.get("weights") not in (None, fingerprint(model)):
        raise ValueError(
            f"the run was recorded with other weights ({run.model_name}, {run.versions['weights']}) than this model has "
            f"({fingerprint(model)}); give the model that recorded it"
        )
    weight = model.logits.weight
    ids = torch.tensor(run.token_ids[None, :length].astype("int64"), device=weight.device)
    if not run.pictures:
        return model.embedded(ids)
    pixel_values, grids, pictures = processor([picture.image for picture in run.pictures])
    # not the whole geometry: a run may keep a large picture only as large as the model saw it
    if [picture.grid.grid for picture in pictures] != [picture.grid.grid for picture in run.pictures]:
        raise ValueError("the run's pictures were cut by another image processor; give the one of the chat that recorded it")
    return model.embedded(ids, model.see(pixel_values.to(weight.device, weight.dtype), grids))
