"""Attributions are complete, a logit is the sum of its parts, and a map that shows the planted target wins."""

from __future__ import annotations

import builtins
import copy
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from kimi_vl_ref import KimiVL
from kimi_vl_ref.images import PatchGrid
from kimi_vl_ref.moe import Choice
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.attribution import gradient_input, integrated_gradients, logit_attribution
from workbench.analyses.occlusion import (
    attention_map,
    centre_map,
    deletion,
    map_league,
    occlusion,
    overlap,
    pointing,
    target_tokens,
)
from workbench.analyses.trials import Trial, make_trial, read, score, see
from workbench.figures.attribution import attribution_maps, deletion_curves, league_table, logit_parts
from workbench.tape import attach

NAME = "tiny model, random weights"
MODEL = talking_model()
WIDE = copy.deepcopy(MODEL).double()
SIZE = (84, 56)  # 3 x 2 visual tokens


def trial(seed: int = 0, reply: str = "two", **more: Any) -> Trial:
    return make_trial(tiny_chat(), question("count the circles", picture(*SIZE, seed=seed)), reply, **more)


def words(figure: Figure) -> str:
    return "\n".join([figure.get_suptitle(), figure.get_supxlabel(), *(axes.get_title() for axes in figure.axes)])


@pytest.fixture(scope="module")
def one() -> Trial:
    return trial(boxes=[(28, 0, 56, 28)])


class LinearEye(torch.nn.Module):
    """Stands in for the whole decoder: the sum of all positions, so that the log-probability is known by hand."""

    def forward(self, x: torch.Tensor, lengths: Any = None, cache: Any = None) -> torch.Tensor:
        return x.cumsum(1)


# --- T1 ------------------------------------------------------------------------------------------------------------------


def test_integrated_gradients_are_complete_with_the_routing_pinned(one: Trial) -> None:
    coarse, fine = (integrated_gradients(WIDE, one, model_name=NAME, steps=steps) for steps in (3, 40))
    gaps = [abs(result.about["completeness_gap"]["routing pinned"]) for result in (coarse, fine)]
    bottom, top = fine.about["log_probability_of_baseline_and_input"]["routing pinned"]
    assert gaps[1] < 1e-3 < abs(top - bottom) and gaps[1] < gaps[0]
    assert fine["routing pinned"].sum() == pytest.approx(top - bottom, abs=2e-3)
    assert top == pytest.approx(score(WIDE, [one]).logprob[0])


def test_pinning_matters_where_the_baseline_is_routed_elsewhere(one: Trial) -> None:
    ends = integrated_gradients(WIDE, one, model_name=NAME, steps=2).about["log_probability_of_baseline_and_input"]
    assert ends["routing pinned"][1] == ends["routing free"][1]
    assert ends["routing pinned"][0] != ends["routing free"][0]


def test_where_the_logit_is_linear_every_attribution_is_known() -> None:
    """With the decoder a plain sum and two words in the vocabulary's direction, the logit's slope is one row for all tokens."""
    asked = trial()
    with attach(WIDE, swap={"decoder": LinearEye()}), torch.no_grad():
        x = see(WIDE, asked)
        rows = torch.tensor(asked.scored) - 1
        logits = WIDE.logits(read(WIDE, asked)[0, rows])
        probs = logits.softmax(-1)
        wanted = asked.ids[torch.tensor(asked.scored)]
        # d log p / d x of a visual token: the wanted row of the unembedding minus the expected one, over all scored rows
        slope = (WIDE.logits.weight[wanted] - probs @ WIDE.logits.weight).sum(0)
    with attach(WIDE, swap={"decoder": LinearEye()}):
        found = gradient_input(WIDE, asked)
    np.testing.assert_allclose(found, (x @ slope).numpy(), rtol=1e-9)


def test_pixels_and_tokens_explain_the_same_difference(one: Trial) -> None:
    """Both integrals run from the grey picture to the real one, so both sums are near the same number."""
    pixels = integrated_gradients(WIDE, one, model_name=NAME, on="pixels", steps=32)
    bottom, top = pixels.about["log_probability_of_baseline_and_input"]["routing pinned"]
    tokens = integrated_gradients(WIDE, one, model_name=NAME, steps=2)
    assert [bottom, top] == pytest.approx(tokens.about["log_probability_of_baseline_and_input"]["routing pinned"])
    assert pixels["routing pinned"].sum() == pytest.approx(top - bottom, abs=0.05 * abs(top - bottom) + 0.02)


def test_the_baseline_explains_nothing_of_itself(one: Trial) -> None:
    with torch.no_grad():
        found = integrated_gradients(WIDE, one, model_name=NAME, baseline=see(WIDE, one), steps=2)
    assert not found["routing pinned"].any() and not found["routing free"].any()


def test_without_captum_it_says_what_to_install(one: Trial, monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("captum"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"need captum.*pip install 'kimi-vl-workbench\[notebooks\]'"):
        integrated_gradients(WIDE, one, model_name=NAME)


def test_what_cannot_be_attributed_is_refused(one: Trial) -> None:
    with pytest.raises(ValueError, match="on is 'words'"):
        integrated_gradients(WIDE, one, model_name=NAME, on="words")
    with pytest.raises(ValueError, match="the baseline has the shape"):
        integrated_gradients(WIDE, one, model_name=NAME, baseline=torch.zeros(2, 3))
    two = make_trial(tiny_chat(), question("how?", picture(28, 28), picture(28, 28)), "two")
    with pytest.raises(ValueError, match="has 2 pictures"):
        gradient_input(WIDE, two)


# --- T2 ------------------------------------------------------------------------------------------------------------------

PARTS = ("embedding", "heads", "dense", "shared", "experts")


def test_the_parts_add_up_to_the_logit(one: Trial) -> None:
    result = logit_attribution(WIDE, one, model_name=NAME)
    row = one.scored[0] - 1
    with torch.no_grad():
        logits = WIDE.logits(WIDE.decoder(WIDE.embedded(one.ids[None], see(WIDE, one))))[0, row]
    assert sum(result[name].sum() for name in PARTS) == pytest.approx(float(logits[one.ids[row + 1]]), abs=1e-9)
    lead = logit_attribution(WIDE, one, model_name=NAME, target=5, against=9)
    assert sum(lead[name].sum() for name in PARTS) == pytest.approx(float(logits[5] - logits[9]), abs=1e-9)


def test_each_part_is_what_a_naive_computation_gives(one: Trial) -> None:
    """Every head by itself through its columns of the output projection, every expert as its own three matrices."""
    result = logit_attribution(WIDE, one, model_name=NAME, target=7)
    row, text = one.scored[0] - 1, WIDE.config.text
    with attach(WIDE, read=["decoder.**"]) as tape, torch.no_grad():
        WIDE.decoder(WIDE.embedded(one.ids[None], see(WIDE, one)))
    final = tape.last("decoder.layers.2")[0, row]
    scale = 1 / (final.square().mean() + text.rms_norm_eps).sqrt()
    direction = WIDE.logits.weight[7] * WIDE.decoder.norm.weight * scale
    for head in range(text.num_attention_heads):
        columns = slice(head * text.v_head_dim, (head + 1) * text.v_head_dim)
        written = WIDE.decoder.layers[1].attn.out.weight[:, columns] @ tape.last("decoder.layers.1.attn.core")[0, row, head]
        assert result["heads"][1, head] == pytest.approx(float(written @ direction), abs=1e-10)
    x = tape.last("decoder.layers.2.ffn_norm")[0, row]
    chosen = tape.last("decoder.layers.2.ffn.router.chosen")[0, row].tolist()
    for expert in range(text.n_routed_experts):
        gate, up = (WIDE.decoder.layers[2].ffn.experts.gate_up[expert] @ x).chunk(2)
        written = WIDE.decoder.layers[2].ffn.experts.down[expert] @ (gate * gate.sigmoid() * up)
        weight = 0.0
        if expert in chosen:
            weight = float(tape.last("decoder.layers.2.ffn.router.weights")[0, row, chosen.index(expert)])
        assert result["experts"][1, expert] == pytest.approx(weight * float(written @ direction), abs=1e-10)


def test_a_planted_expert_is_found(one: Trial) -> None:
    """Expert 3 of the last layer is made to write the word's own direction, and every token is sent to it."""
    model = copy.deepcopy(WIDE)
    ffn, target = model.decoder.layers[2].ffn, 11
    assert isinstance(ffn.router.chosen, Choice)
    ffn.router.chosen.bias[3] += 10
    ffn.experts.down[3] = 100 * model.logits.weight[target][:, None] * model.decoder.norm.weight[:, None]
    ffn.experts.gate_up[3] = ffn.experts.gate_up[3].abs() * torch.sign(_normed(model, one))
    result = logit_attribution(model, one, model_name=NAME, target=target)
    assert result["experts"].argmax() == 1 * model.config.text.n_routed_experts + 3
    assert result["experts"][1, 3] > 0.9 * result.about["logit"]


def _normed(model: KimiVL, asked: Trial) -> torch.Tensor:
    with attach(model, read=["decoder.layers.2.ffn_norm"]) as tape, torch.no_grad():
        read(model, asked)
    return tape.last("decoder.layers.2.ffn_norm")[0, asked.scored[0] - 1]


def test_positions_and_tokens_that_do_not_exist_are_refused(one: Trial) -> None:
    for wrong in ({"position": len(one.ids) - 1}, {"position": -1}, {"target": 10**6}, {"target": 1, "against": -1}):
        with pytest.raises(ValueError, match="predicts no token|does not exist"):
            logit_attribution(MODEL, one, model_name=NAME, **wrong)


# --- T3 ------------------------------------------------------------------------------------------------------------------


class OneToken(torch.nn.Module):
    """Stands in for the projector: visual token 1 of 6 carries its cell's brightness, the others carry nothing."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def forward(self, patches: torch.Tensor, grids: Any) -> torch.Tensor:
        count = len(patches) // 24
        bright = patches.view(count, 4, 6, -1)[:, :2, 2:4].abs().mean((1, 2, 3))  # rows 0 and 1, columns 2 and 3
        tokens = torch.zeros(count, 6, self.width, dtype=patches.dtype)
        tokens[:, 1] = bright[:, None] * torch.linspace(-3, 3, self.width)
        return tokens.flatten(0, 1)


class Raw(torch.nn.Module):
    """Stands in for MoonViT: pixels as they are."""

    def forward(self, pixels: torch.Tensor, grids: Any) -> torch.Tensor:
        return pixels.flatten(1)


def planted(asked: Trial) -> Any:
    return attach(MODEL, swap={"projector": OneToken(MODEL.config.text.hidden_size), "vision": Raw()})


def test_occlusion_finds_the_only_cell_that_counts(one: Trial) -> None:
    with planted(one):
        found = occlusion(MODEL, one, model_name=NAME, side=28, stride=28)["loss"]
    assert found.shape == (2, 3)
    assert found[0, 1] != 0 and not np.delete(found.ravel(), 1).any()
    with planted(one):
        whole, hidden = score(MODEL, [one]).logprob[0], deletion(MODEL, one, np.eye(1, 6, 1).reshape(2, 3), points=7)[1]
    assert found[0, 1] == pytest.approx(whole - np.log(hidden[1]), rel=1e-5)


def test_deletion_loses_everything_with_the_first_cell_of_the_right_map(one: Trial) -> None:
    right = np.array([[0.0, 9, 1], [1, 1, 1]])
    with planted(one):
        shares, probabilities, _ = deletion(MODEL, one, right, points=7)
        _, inserted, _ = deletion(MODEL, one, right, insert=True, points=7)
        _, last, _ = deletion(MODEL, one, -right, points=7)
    assert shares.tolist() == [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1]
    np.testing.assert_allclose(probabilities[1:], probabilities[1], rtol=1e-6)
    np.testing.assert_allclose(inserted[1:], probabilities[0], rtol=1e-6)
    np.testing.assert_allclose(last[:-1], probabilities[0], rtol=1e-6)
    assert inserted[0] == pytest.approx(probabilities[-1]) and abs(np.log(probabilities[0] / probabilities[1])) > 0.01


def test_the_area_is_that_under_the_curve(one: Trial) -> None:
    shares, probabilities, area = deletion(MODEL, one, np.arange(6.0).reshape(2, 3), points=4)
    assert area == pytest.approx(sum((probabilities[:-1] + probabilities[1:]) / 2 * np.diff(shares)))


def test_pointing_and_overlap_by_hand() -> None:
    target = np.array([[False, True, True], [False, False, False]])
    assert pointing(np.array([[0, 2, 1], [0, 0, 0]]), target) == 1
    assert pointing(np.array([[3, 2, 1], [0, 0, 0]]), target) == 0
    assert pointing(np.array([[2, 2, 1], [0, 0, 0]]), target) == 0.5
    assert overlap(np.array([[0, 2, 1], [0, 0, 0]]), target) == 1
    assert overlap(np.array([[3, 2, 1], [0, 0, 0]]), target) == pytest.approx(1 / 3)
    assert overlap(np.zeros((2, 3)), target) == pytest.approx((2 / 3) / (4 - 2 / 3))  # a flat map: 2 of 6 cells expected


def test_target_tokens_are_those_that_show_the_box() -> None:
    grid = PatchGrid((84, 56), (84, 56), (4, 6), 14, 2)
    assert np.argwhere(target_tokens(grid, [(28, 0, 56, 28)])).tolist() == [[0, 1]]
    assert np.argwhere(target_tokens(grid, [(14, 30, 42, 50)])).tolist() == [[1, 0], [1, 1]]
    assert np.argwhere(target_tokens(grid, [(27, 0, 56, 28)])).tolist() == [[0, 1]]  # one pixel of another token is not it
    assert np.argwhere(target_tokens(grid, [(1, 1, 5, 5), (80, 50, 84, 56)])).tolist() == [[0, 0], [1, 2]]
    with pytest.raises(ValueError, match="no target boxes"):
        target_tokens(grid, [])


def test_the_league_ranks_the_planted_map_first(one: Trial) -> None:
    def truth(asked: Trial) -> np.ndarray:
        return np.array([[0.0, 1, 0], [0, 0, 0]])

    with planted(one):
        worse = deletion(MODEL, one, truth(one))[1]
        league = map_league(MODEL, [one] * 3, {"truth": truth}, model_name=NAME)
    names = league.axes["score"][0][1]
    assert names == ["truth", "random", "centre"] and league.chance["pointing"] == pytest.approx(1 / 6)
    assert league["score"][0, 2:].tolist() == [1, 1]
    deletions, insertions = league["score"][:, 0], league["score"][:, 1]
    sign = 1 if worse[0] > worse[-1] else -1  # hiding the cell may help as well as hurt a random model's word
    assert (sign * deletions[0] <= sign * deletions[1:]).all() and (sign * insertions[0] >= sign * insertions[1:]).all()
    figure = league_table(league)
    assert NAME in words(figure)
    pointing_panel = figure.axes[2]
    assert any(list(line.get_xdata()) == [league.chance["pointing"]] * 2 for line in pointing_panel.lines)
    assert [bar.get_hatch() for bar in pointing_panel.patches] == [None, "//", "//"]  # the controls


def test_the_attention_map_is_the_mean_row_on_the_picture(one: Trial) -> None:
    found = attention_map(MODEL)(one)
    assert found.shape == (2, 3) and (found > 0).all() and found.sum() < 1


def test_the_centre_map_is_highest_in_the_middle() -> None:
    grid = PatchGrid((84, 84), (84, 84), (6, 6), 14, 2)
    found = centre_map(grid)
    assert found.argmax() == 4 and found[0, 0] == found[2, 2] == found.min()


def test_maps_that_do_not_fit_are_refused(one: Trial) -> None:
    for wrong, message in ((np.zeros((3, 2)), "does not fit"), (np.full((2, 3), np.nan), "not finite")):
        with pytest.raises(ValueError, match=message):
            deletion(MODEL, one, wrong)
    with pytest.raises(ValueError, match="side=100"):
        occlusion(MODEL, one, model_name=NAME, side=100)


# --- figures -------------------------------------------------------------------------------------------------------------


def test_every_figure_names_the_weights(one: Trial) -> None:
    shown = one.pictures[0]
    maps = integrated_gradients(MODEL, one, model_name=NAME, steps=2)
    curves = {"truth": deletion(MODEL, one, centre_map(shown.grid), points=3)[:2]}
    for figure in (
        attribution_maps(maps, shown, boxes=one.boxes),
        attribution_maps(occlusion(MODEL, one, model_name=NAME), shown),
        logit_parts(logit_attribution(MODEL, one, model_name=NAME)),
        deletion_curves(curves, model_name=NAME),
    ):
        assert NAME in words(figure)
        figure.savefig(BytesIO())
