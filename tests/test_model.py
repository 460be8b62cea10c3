"""What the whole model refuses, and that it does so in a sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kimi_vl_ref import TINY, ConfigError, KimiVLConfig
from tiny import tiny_inputs, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_pictures_and_their_grids_come_together(model):
    ids, pixels, grids = tiny_inputs()
    for given in ({"pixel_values": pixels}, {"image_grid_hws": grids}):
        with pytest.raises(ValueError, match="belong together"):
            model(ids, **given)


@pytest.mark.parametrize("grid", [[5, 8], [0, 4], [-2, -4], [4, 3]])
def test_a_grid_that_does_not_merge_is_refused(model, grid):
    with pytest.raises(ValueError, match="does not divide into cells"):
        model.see(torch.zeros(abs(grid[0] * grid[1]), 3, 14, 14), torch.tensor([grid]))


def test_grids_and_patches_must_agree(model):
    _, pixels, grids = tiny_inputs()
    with pytest.raises(ValueError, match=r"make 28 patches, but pixel_values holds 27"):
        model.see(pixels[:-1], grids)


def test_the_selection_bias_stays_exact_in_bf16(model):
    exact = tiny_model(dtype=torch.float32)
    rounded = tiny_model(dtype=torch.float32).to(torch.bfloat16)
    for layer in (1, 2):
        bias = rounded.decoder.layers[layer].ffn.router.chosen.bias
        assert bias.dtype == torch.float32
        assert torch.equal(bias, exact.decoder.layers[layer].ffn.router.chosen.bias)
        assert not torch.equal(bias, bias.bfloat16().float())  # the check can fail
    assert rounded.double().decoder.layers[1].ffn.router.chosen.bias.dtype == torch.float64


@pytest.mark.parametrize(("field", "value"), [("first_k_dense_replace", -1), ("hidden_size", 0), ("kv_lora_rank", -4)])
def test_sizes_below_zero_are_refused(field, value):
    data = replace(TINY).to_dict()
    data["text_config"][field] = value
    with pytest.raises(ConfigError, match=field):
        KimiVLConfig.from_dict(data)
