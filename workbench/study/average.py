"""The average of two sets of weights of one lineage, stored as the shipped ones are: what was learnt last, and what it cost."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import torch

from kimi_vl_ref import checkpoint_folder, load
from kimi_vl_ref.weights import save_checkpoint
from kimi_vl_ref.whole import whole_folder

DTYPE = torch.bfloat16


def main(new: str | Path, old: str | Path, out: str | Path, share: float) -> None:
    """Writes share * new + (1 - share) * old to `out`, in bfloat16, with the tokenizer and processor of `new`.

    The average is taken in float32 (arXiv 2203.05482). It makes sense for weights of which one set was trained from the
    other. Raises ValueError for a share outside 0..1, for configurations that differ, and where `out` is there already.
    """
    new, old, out = checkpoint_folder(new), checkpoint_folder(old), Path(out)
    if not 0 <= share <= 1:
        raise ValueError(f"share is {share}; choose 0 (all of the old weights) to 1 (all of the new)")
    if out.exists():
        raise ValueError(f"{out} is there already; name another folder, or move it away")
    (a, _), (b, _) = load(new, dtype=torch.float32), load(old, dtype=torch.float32)
    sizes = [dataclasses.replace(model.config, torch_dtype="") for model in (a, b)]
    if sizes[0] != sizes[1]:
        raise ValueError(f"{new} and {old} are of different sizes; average weights of one model")
    others = b.state_dict()
    a.load_state_dict({name: torch.lerp(others[name], value, share) for name, value in a.state_dict().items()})
    a = a.to(DTYPE)
    a.config = dataclasses.replace(a.config, torch_dtype=str(DTYPE).removeprefix("torch."))
    not_copied = shutil.ignore_patterns("*.safetensors*", "README.md", "evaluation.json", "log.jsonl")
    with whole_folder(out) as part:
        save_checkpoint(a, shutil.copytree(new, part, ignore=not_copied))
