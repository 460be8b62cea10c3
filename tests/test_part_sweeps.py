"""A head, or a part of a layer, that was planted to matter is the one whose loss counts; controls take away as much."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from hand_made import drawn_words
from kimi_vl_ref import KimiVL
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.ablations import expert_bench
from workbench.analyses.part_sweeps import Scattered, measure_head, measure_part, single_heads, without_one_a_token
from workbench.analyses.result import Result
from workbench.analyses.trials import Trial, make_trial, score
from workbench.figures.part_sweeps import single_heads_figure, single_layers_figure

MODEL = copy.deepcopy(talking_model()).double()
HEADS, DEPTH = MODEL.config.text.num_attention_heads, len(MODEL.decoder.layers)


def trial(seed: int, reply: str, domain: str) -> Trial:
    return make_trial(tiny_chat(), question("count the circles", picture(84, 56, seed)), reply, domain=domain)


TRIALS = [trial(0, "two", "count"), trial(1, "red", "name")]


def bench(model: KimiVL) -> dict:
    return expert_bench(model, TRIALS, seed=0)


def out_of(model: KimiVL, layer: int) -> torch.nn.Parameter:
    """(D, H v) what a layer's heads write with."""
    return model.get_parameter(f"decoder.layers.{layer}.attn.out.weight")


def test_a_head_counts_for_what_it_writes_and_the_others_for_nothing() -> None:
    model, layer, head = copy.deepcopy(MODEL), 1, 2
    out_of(model, layer).unflatten(1, (HEADS, -1))[:, [h for h in range(HEADS) if h != head]] = 0
    silent = copy.deepcopy(model)
    out_of(silent, layer).zero_()
    wanted = score(silent, TRIALS).nll - score(model, TRIALS).nll  # one trial a domain
    shared = bench(model)
    found = [measure_head(shared, {"layer": layer, "head": h}) for h in range(HEADS)]
    np.testing.assert_allclose(found[head]["loss"], wanted, rtol=1e-9, atol=1e-12)
    assert np.abs(wanted).min() > 1e-6
    assert all(np.abs(found[h]["loss"]).max() < 1e-12 for h in range(HEADS) if h != head)
    assert all(0 < np.abs(one["control"]).max() for one in found)
    assert measure_head(shared, {"layer": layer, "head": 0}) == found[0]  # the random control too


def test_the_control_of_a_head_is_one_head_a_token() -> None:
    core = without_one_a_token(4, torch.Generator().manual_seed(0))(torch.ones(3, 50, 4, 2), "")
    assert ((core == 0).all(-1).sum(-1) == 1).all() and ((core == 0).any(-1) == (core == 0).all(-1)).all()
    assert (core == 0).float().mean((0, 1, 3)).numpy() == pytest.approx(0.25, abs=0.12)


def test_a_part_that_writes_nothing_costs_nothing_and_another_what_zero_weights_cost() -> None:
    model = copy.deepcopy(MODEL)
    out_of(model, 1).zero_()
    silent = copy.deepcopy(model)
    out_of(silent, 2).zero_()
    shared = bench(model)
    assert np.abs(measure_part(shared, {"layer": 1, "part": "attn"})["loss"]).max() < 1e-12
    wanted = score(silent, TRIALS).nll - score(model, TRIALS).nll
    np.testing.assert_allclose(measure_part(shared, {"layer": 2, "part": "attn"})["loss"], wanted, rtol=1e-9, atol=1e-12)
    ffn = measure_part(shared, {"layer": 1, "part": "ffn"})
    assert np.abs(ffn["loss"]).min() > 1e-6 and np.abs(ffn["control"]).min() > 1e-6


def test_the_control_of_a_part_is_one_layer_a_token() -> None:
    scattered = Scattered(3, torch.Generator().manual_seed(0))
    gone = torch.stack([scattered.edit(layer)(torch.ones(2, 60, 5), "") == 0 for layer in range(3)])  # (L, B, T, D)
    assert (gone.sum(0) == 1).all() and gone.float().mean((1, 2, 3)).numpy() == pytest.approx(1 / 3, abs=0.12)


def test_a_layer_that_does_not_exist_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="layer 9 does not exist"):
        single_heads(path=tmp_path / "heads.jsonl", layers=[9], scenes=1)
    assert not list(tmp_path.iterdir())


def test_figures_name_the_weights_the_scenes_and_the_control() -> None:
    axes = [("layer", [0, 1]), ("head", [0, 1, 2]), ("domain", ["name", "read"])]
    about = {"weights": "made by hand", "scenes": 7}
    loss = np.linspace(-1, 2, 12).reshape(2, 3, 2)
    values = {"loss": loss, "control": loss / 4}
    heads = single_heads_figure(Result("single-heads", "Loss", values, dict.fromkeys(values, axes), {"loss": 0.0}, about))
    words = drawn_words(heads)
    assert "made by hand" in words and "7 scenes a family: name, read" in words and "control" in words
    assert "1.86" in words and "0.47" in words  # the last head's mean over domains, and its control
    parts = [axes[0], ("part", ["attention", "FFN"]), axes[2]]
    values = {name: value[:, :2] for name, value in values.items()}
    figure = single_layers_figure(Result("single-layers", "Loss", values, dict.fromkeys(values, parts), {"loss": 0.0}, about))
    assert "made by hand" in drawn_words(figure)
    (axes_of,) = figure.axes
    assert axes_of.get_legend_handles_labels()[1][:2] == ["attention", "attention of a random layer for each token"]
    heights = [bar.get_height() for bar in axes_of.containers[0]]  # type: ignore[union-attr]
    assert heights == pytest.approx(loss[:, 0].mean(-1).tolist())
