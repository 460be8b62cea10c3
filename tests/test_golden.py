"""A recorded case: a random checkpoint in the released layout, and what independent code made of its inputs.

Recorded with transformers 5.23 (Kimi-K2.5 with one frame and a DeepSeek-V3 decoder, eager, float32). The
`rotary_emb.inv_freq` stored in the checkpoint are NaN: whoever reads them fails.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from agreement import assert_agree, our_outputs
from kimi_vl_ref.weights import load_checkpoint
from peers import Case, peer_outputs

FOLDER = Path(__file__).parent / "golden" / "tiny"


@pytest.fixture(scope="module")
def golden() -> tuple[Case, dict[str, Tensor]]:
    """The recorded inputs as a case, and the recorded outputs, a batch axis added where ours have one."""
    recorded = load_file(FOLDER / "case.safetensors")
    tensors = {}
    for shard in FOLDER.glob("model-*.safetensors"):
        tensors |= load_file(shard)
    case = Case(
        config=json.loads((FOLDER / "config.json").read_text()),
        tensors=tensors,
        pixel_values=recorded["pixel_values"],
        image_grid_hws=recorded["image_grid_hws"],
        input_ids=recorded["input_ids"],
        decode_ids=recorded["decode_ids"][None],
    )
    expected = {name: recorded[name] for name in ("vision_merged", "image_features")}
    return case, expected | {name: recorded[name][None] for name in ("logits", "decode_logits")}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_checkpoint_gives_the_recorded_outputs(
    golden: tuple[Case, dict[str, Tensor]], dtype: torch.dtype
) -> None:
    case, expected = golden
    assert_agree(our_outputs(load_checkpoint(FOLDER, dtype=dtype), case), expected)


def test_record_is_what_the_peer_says_today(golden: tuple[Case, dict[str, Tensor]]) -> None:
    """The peer in float64: in float32 it is up to 3e-5 off itself, as this case amplifies rounding."""
    case, expected = golden
    assert_agree(peer_outputs(case, torch.float64), expected)


def test_stored_inv_freq_are_unusable(golden: tuple[Case, dict[str, Tensor]]) -> None:
    stored = [tensor for name, tensor in golden[0].tensors.items() if name.endswith("inv_freq")]
    assert len(stored) == 4 and all(tensor.isnan().all() for tensor in stored)
