"""Probes, similarity and spectra on arrays of which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from hand_made import levels
from tiny import picture, question, talking_model, tiny_chat, tiny_model
from workbench.analyses.probes import (
    GROUPS,
    features,
    last,
    linear_cka,
    linear_probes,
    modality_gap,
    muon_update,
    similarity,
    svd_entropy,
    visual,
    weight_spectrum,
)
from workbench.figures.lens import (
    modality_gap_figure,
    muon_update_figure,
    probes_figure,
    similarity_figure,
    weight_spectrum_figure,
)
from workbench.sites import SiteError

ABOUT = {"weights": "made by hand"}
RNG = np.random.default_rng(0)


# ---- P3


def test_a_label_planted_on_a_line_is_read_and_noise_is_not() -> None:
    labels, group = RNG.integers(0, 3, 300), np.repeat(np.arange(30), 10)
    noise = RNG.normal(size=(300, 8))
    planted = noise + 12 * np.eye(8)[labels]
    result = linear_probes({"planted": planted, "noise": noise}, labels, group, ABOUT, splits=3)
    assert result["accuracy"][0] == pytest.approx(1, abs=0.02)
    assert result["accuracy"][1].mean() < 0.5 and 0.25 < result.chance["accuracy"] < 0.5
    assert result["selectivity"][0] > 0.5 and abs(result["selectivity"][1]) < 0.2


def test_a_probe_that_only_knows_the_scene_learns_nothing_of_new_scenes() -> None:
    """Channels that tell the scene, and a label that each scene draws: split within scenes it would be read perfectly."""
    group = np.repeat(np.arange(40), 5)
    labels = RNG.permutation(np.arange(40) % 2)[group]
    result = linear_probes({"scene": np.eye(40)[group]}, labels, group, ABOUT)
    assert result["accuracy"].mean() < 0.75


def test_the_control_task_catches_a_probe_that_memorises_types() -> None:
    types = np.tile(np.arange(6), 40)
    labels, group = types % 2, np.repeat(np.arange(40), 6)
    result = linear_probes({"site": 5 * np.eye(6)[types]}, labels, group, ABOUT, types=types)
    assert result["accuracy"] == pytest.approx(1) and result["control"] == pytest.approx(1)
    assert result["selectivity"] == pytest.approx(0)


def test_samples_that_do_not_fit_are_refused() -> None:
    x, y = np.zeros((4, 2)), np.array([0, 1, 0, 1])
    with pytest.raises(ValueError, match="do not fit"):
        linear_probes({"site": x}, y[:3], y[:3], ABOUT)
    with pytest.raises(ValueError, match="two or more scenes"):
        linear_probes({"site": x}, y, np.zeros(4), ABOUT)


def test_features_are_the_streams_rows_at_the_places_asked_for() -> None:
    model, chat = talking_model(), tiny_chat()
    prompts = [chat.prompt(question("How many?", picture(90, 60, seed), picture(30, 60, seed))) for seed in range(2)]
    read = ["vision.norm", "projector", "embedded", "decoder.layers.2"]
    found, group = features(model, prompts, read)
    assert np.bincount(group).tolist() == [len(visual(prompt)) for prompt in prompts]
    assert np.array_equal(found["projector"], found["embedded"])  # visual tokens are put in place as they are
    prompt = prompts[1]
    assert prompt.pixel_values is not None and prompt.image_grid_hws is not None
    with torch.no_grad():
        patches = model.vision(prompt.pixel_values, [(int(h), int(w)) for h, w in prompt.image_grid_hws])
        stream = model.embedded(torch.tensor([prompt.input_ids]), model.see(prompt.pixel_values, prompt.image_grid_hws))
        where = model.decoder.place(stream, None)
        for layer in model.decoder.layers:
            stream = layer(stream, where)
    first, second = (one.grid for one in prompt.pictures)
    cells = [patches[first.patches_of_token(t)].mean(0) for t in range(first.token_count)]
    cells += [patches[[first.patch_count + p for p in second.patches_of_token(t)]].mean(0) for t in range(second.token_count)]
    assert found["vision.norm"][group == 1] == pytest.approx(torch.stack(cells).numpy(), abs=1e-5)
    assert found["decoder.layers.2"][group == 1] == pytest.approx(stream[0, visual(prompt)].numpy(), abs=1e-5)
    at_end, group = features(model, prompts, ["decoder.layers.2"], last)
    assert at_end["decoder.layers.2"][1] == pytest.approx(stream[0, -1].numpy(), abs=1e-5) and group.tolist() == [0, 1]


def test_sites_without_a_row_for_each_token_are_refused() -> None:
    prompt = tiny_chat().prompt(question("How many?", picture(30, 60)))
    with pytest.raises(SiteError, match="one row of channels"):
        features(talking_model(), [prompt], ["decoder.layers.0.attn.core"])
    with pytest.raises(SiteError, match="rows for pictures only"):
        features(talking_model(), [prompt], ["projector"], last)


# ---- P4


def test_cka_does_not_see_rotation_and_scale_but_sees_a_linear_map() -> None:
    x = RNG.normal(size=(50, 6)) * np.arange(1, 7)
    rotation = np.linalg.qr(RNG.normal(size=(6, 6)))[0]
    assert linear_cka(x, x @ rotation) == pytest.approx(1) and linear_cka(x, 3 * x + 5) == pytest.approx(1)
    assert linear_cka(x, x * np.array([1, 0, 0, 0, 0, 0])) < 0.5
    assert linear_cka(np.array([[1.0, 0], [-1, 0], [0, 0]]), np.array([[1.0], [1], [-2]])) == pytest.approx(0)


def test_cka_is_the_alignment_of_centred_gram_matrices() -> None:
    x, y = RNG.normal(size=(20, 4)), RNG.normal(size=(20, 7))
    centre = np.eye(20) - 1 / 20
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    assert linear_cka(x, y) == pytest.approx((k * m).sum() / np.sqrt((k * k).sum() * (m * m).sum()))


def test_similarity_compares_every_two_sites_and_its_chance_breaks_the_pairing() -> None:
    x = RNG.normal(size=(200, 3))
    result = similarity({"a": x, "b": -2 * x, "c": RNG.normal(size=(200, 3))}, ABOUT)
    assert result["cka"][0, 1] == pytest.approx(1) and result["cka"][0, 2] < 0.1
    assert result.chance["cka"][0, 1] < 0.1


def test_a_planted_gap_is_measured_and_labels_dealt_out_anew_have_none() -> None:
    is_picture = np.arange(400) < 150
    x = RNG.normal(size=(400, 5)) * 0.01
    x[is_picture, 0] += 3
    x[~is_picture, 1] += 4
    result = modality_gap({"apart": x, "together": np.ones((400, 5))}, is_picture, ABOUT)
    assert result["gap"] == pytest.approx([5, 0], abs=0.01)
    assert result["cosine"] == pytest.approx([0, 1], abs=0.01)
    assert result["relative"][0] == pytest.approx(5 / np.sqrt((150 * 9 + 250 * 16) / 400), rel=0.01)
    assert result.chance["gap"][0] < 1
    with pytest.raises(ValueError, match="of one kind"):
        modality_gap({"apart": x}, np.ones(400, bool), ABOUT)


# ---- P5


def test_spectrum_of_matrices_known_by_construction() -> None:
    assert svd_entropy(np.linalg.qr(RNG.normal(size=(8, 8)))[0]) == pytest.approx(1)
    assert svd_entropy(np.outer(np.arange(1.0, 5), np.arange(1.0, 7))) == pytest.approx(0, abs=1e-6)
    assert svd_entropy(np.diag([5.0, 5, 0, 0])) == pytest.approx(0.5)
    assert svd_entropy(np.diag([2.0, 1])) == pytest.approx(-0.8 * np.log2(0.8) - 0.2 * np.log2(0.2))
    assert np.isnan(svd_entropy(np.zeros((3, 3))))


def test_every_group_of_the_model_is_read_and_a_spoiled_expert_stands_out() -> None:
    model = tiny_model()
    model.get_parameter("decoder.layers.1.ffn.experts.down")[4] = torch.outer(torch.arange(1.0, 53), torch.arange(1.0, 19))
    result = weight_spectrum(model, "tiny")
    labels = result.axes["entropy"][0][1]
    assert {label.split(" | ")[0] for label in labels} == set(GROUPS.values())
    lowest = int(result["entropy"].argmin())
    assert labels[lowest] == "experts | decoder.layers.1.ffn.experts.down[4]" and result["entropy"][lowest] < 1e-3
    others = np.delete(result["entropy"], lowest)
    assert np.abs(others - np.delete(result.chance["entropy"], lowest)).max() < 0.05  # random weights are at chance
    experts = weight_spectrum(model, "tiny", ["experts"])
    assert len(experts["entropy"]) == 2 * 11 * 3  # layers, experts, gate up down
    with pytest.raises(ValueError, match="no weight matrix"):
        weight_spectrum(nn.Linear(2, 2), "a line")


def test_a_muon_step_has_the_rms_of_its_formula_and_adamw_that_of_signs() -> None:
    shapes = {"wide": (48, 96), "tall": (96, 32)}
    full = muon_update(shapes, draws=3)
    assert full["rms"][0] == pytest.approx(0.2, rel=0.2) and full["rms"][1] == pytest.approx(1, rel=0.01)
    assert full.chance["rms"][0] == pytest.approx(0.2)
    poor = muon_update(shapes, rank=8, draws=3)
    assert poor.chance["rms"][0] == pytest.approx([0.2 * (8 / 48) ** 0.5, 0.2 * (8 / 32) ** 0.5])
    assert poor["rms"][0] == pytest.approx(poor.chance["rms"][0], rel=0.3)


# ---- figures


def test_the_figure_of_probes_shows_accuracy_control_and_the_commonest_label() -> None:
    labels, group = RNG.integers(0, 2, 60), np.repeat(np.arange(12), 5)
    result = linear_probes({"a": RNG.normal(size=(60, 3)), "b": np.eye(2)[labels]}, labels, group, ABOUT, splits=2)
    figure = probes_figure({"colour": result})
    figure.canvas.draw()
    (axes,) = figure.axes
    assert figure.get_supxlabel() == "made by hand" and axes.get_title().startswith("colour: 2 labels, 60 samples")
    assert levels(axes) == [float(result.chance["accuracy"])]
    shown = {line.get_label(): np.asarray(line.get_ydata()) for line in axes.lines}
    for name in ("accuracy", "control"):
        assert shown[name] == pytest.approx(result[name].mean(1))


def test_the_figure_of_similarity_shows_every_pair_and_random_pairing() -> None:
    x = RNG.normal(size=(40, 3))
    result = similarity({"a": x, "b": 2 * x, "c": RNG.normal(size=(40, 3))}, ABOUT)
    figure = similarity_figure(result)
    figure.canvas.draw()
    matrix, bar = figure.axes
    assert figure.get_supxlabel() == "made by hand" and len(matrix.texts) == 9
    assert np.asarray(matrix.images[0].get_array()) == pytest.approx(result["cka"]) and matrix.images[0].get_clim() == (0, 1)
    assert float(np.nanmean(result.chance["cka"])) in levels(bar)


def test_the_figure_of_the_gap_shows_it_beside_labels_dealt_out_anew() -> None:
    is_picture = np.arange(40) < 15
    x = RNG.normal(size=(40, 5)) + 3 * is_picture[:, None]
    result = modality_gap({"a": x, "b": x + 1}, is_picture, ABOUT)
    figure = modality_gap_figure(result)
    figure.canvas.draw()
    assert figure.get_supxlabel() == "made by hand"
    drawn = [np.asarray(line.get_ydata(), float) for axes in figure.axes for line in axes.lines]
    for expected in (result["relative"], result["cosine"], result.chance["relative"], result.chance["cosine"]):
        assert any(len(line) == 2 and np.allclose(line, expected) for line in drawn)


def test_the_figure_of_spectra_has_a_place_for_each_group_with_its_gaussian() -> None:
    result = weight_spectrum(tiny_model(), "tiny", ["router", "experts"])
    figure = weight_spectrum_figure(result)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert figure.get_supxlabel() == "tiny"
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert sorted(names) == ["experts (66)", "router (2)"]
    assert {round(float(one), 4) for one in np.asarray(result.chance["entropy"])} <= {round(one, 4) for one in levels(axes)}


def test_the_figure_of_steps_shows_both_optimisers_and_their_formula() -> None:
    result = muon_update({"wide": (8, 16), "tall": (16, 4)}, draws=2)
    figure = muon_update_figure(result)
    figure.canvas.draw()
    (axes,) = figure.axes
    assert figure.get_supxlabel() == "none: random gradients"
    assert sorted(round(bar.get_height(), 6) for bar in axes.patches) == pytest.approx(sorted(result["rms"].ravel()), abs=1e-6)  # type: ignore[attr-defined]
    assert sorted(levels(axes)) == pytest.approx(sorted(np.ravel(result.chance["rms"])))
