"""One choice taken apart, what the bias did, near-ties, and two runs side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from hand_made import NAME, blank, drawn_words, hand_made, levels, random_choice
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.selection import bias_effect, router_margins, run_difference, token_selection
from workbench.figures.selection import bias_figure, difference_figure, margins_figure, selection_figure
from workbench.runs import Run, record
from workbench.tape import attach


def recorded(text: str = "How many red circles?", seed: int = 0) -> Run:
    asked = question(text, picture(90, 60, seed))
    *_, run = record(talking_model(), tiny_chat(), asked, model_name=NAME, max_new_tokens=5)
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def run() -> Run:
    return recorded()


def biased() -> Run:
    """Three tokens, 4 experts, 2 chosen; the bias gives expert 3 the place of expert 1 in the first two."""
    scores = [[0.75, 0.5, 0.25, 0.375], [0.75, 0.5, 0.25, 0.375], [0.75, 0.625, 0.25, 0.0]]
    return hand_made([[0, 3], [0, 3], [0, 1]], 4, ["user", "answer", "answer"], scores=[scores], bias=[[0, 0, 0, 0.1875]],
                     weights=[[[0.6, 0.4]] * 3])  # fmt: skip


# --- one choice ----------------------------------------------------------------------------------------------------------


def test_a_choice_shows_scores_bias_their_sum_and_the_weights() -> None:
    result = token_selection(biased(), 1, 1)
    assert result["score"].tolist() == [0.75, 0.5, 0.25, 0.375] and result["bias"].tolist() == [0, 0, 0, 0.1875]
    assert result["selection"].tolist() == [0.75, 0.5, 0.25, 0.5625]
    assert result["chosen"].tolist() == [1, 0, 0, 1] and result["chosen_without_bias"].tolist() == [1, 1, 0, 0]
    np.testing.assert_allclose(result["weight"], [0.6, 0, 0, 0.4], rtol=1e-3)
    assert "expert 3 in and put expert 1 out" in drawn_words(selection_figure(result))
    with pytest.raises(ValueError, match="position 3 does not exist"):
        token_selection(biased(), 3, 1)
    with pytest.raises(ValueError, match="layer 0 does not route"):
        token_selection(biased(), 0, 0)


def test_the_chosen_of_a_real_run_have_the_largest_selection_and_weights_from_scores_alone(run: Run) -> None:
    for position in (0, run.prompt_length + 1):
        result = token_selection(run, position, 2)
        chosen = result["chosen"] == 1
        assert result["selection"][chosen].min() >= result["selection"][~chosen].max()
        expected = result["score"][chosen] / result["score"][chosen].sum() * 2.446
        np.testing.assert_allclose(result["weight"][chosen], expected, rtol=2e-3)


# --- the bias ------------------------------------------------------------------------------------------------------------


def test_what_the_bias_gave_and_took_is_counted() -> None:
    result = bias_effect([biased()], ["all", "question", "answer"])
    np.testing.assert_allclose(result["flip_rate"][:, 0], [2 / 3, 1, 1 / 2])
    np.testing.assert_allclose(result["replaced"][:, 0], [1 / 3, 1 / 2, 1 / 4])
    np.testing.assert_allclose(result["gained"], [[0, 0, 0, 2 / 3]])
    np.testing.assert_allclose(result["lost"], [[0, 2 / 3, 0, 0]])
    assert result["unexplained"].tolist() == [0]


def test_without_a_bias_nothing_is_changed_and_a_pinned_choice_is_unexplained(run: Run) -> None:
    plain = bias_effect([replace(run, bias=np.zeros_like(run.bias))])
    assert not plain["flip_rate"][0].any() and not plain["gained"].any() and plain["unexplained"].max() > 0
    pinned = replace(biased(), chosen=np.array([[[0, 2], [0, 3], [0, 1]]], np.uint16))
    np.testing.assert_allclose(bias_effect([pinned], ["all"])["unexplained"], [1 / 3])


def test_the_bias_is_judged_as_the_model_itself_judges_without_it() -> None:
    """The choice with a bias of zero, made by the model, of the scores that it has at the same input."""
    model, run = talking_model(), recorded()
    result = bias_effect([run])
    choice = model.decoder.layers[1].ffn.router.chosen
    kept = choice.bias.clone()
    scores = torch.tensor(run.scores[0].astype(np.float32))
    choice.bias.zero_()
    try:
        plain = choice(scores[None])[0]
    finally:
        choice.bias.copy_(kept)
    flips = [set(a.tolist()) != set(b.tolist()) for a, b in zip(plain, run.chosen[0], strict=True)]
    assert result["unexplained"][0] == 0 and 0 < np.mean(flips) < 1
    assert result["flip_rate"][0, 0] == pytest.approx(np.mean(flips))


# --- margins -------------------------------------------------------------------------------------------------------------


def test_near_ties_are_those_that_were_planted() -> None:
    scores = np.tile([0.75, 0.5, 0.25, 0.125], (1, 10, 1))
    scores[0, :3] = [0.75, 0.5, 0.5 - 2**-11, 0.125]  # one step of float16 below
    run = hand_made(np.tile([0, 1], (10, 1)), 4, scores=scores)
    result = router_margins([run], ["all"])
    assert result["near_ties"][0, 0] == pytest.approx(0.3)
    np.testing.assert_allclose(result["margin"][0, 0], [2**-11, result["margin"][0, 0, 1], 0.25, 0.25, 0.25], atol=1e-9)
    assert router_margins([run], ["all"], near=0.3)["near_ties"][0, 0] == 1
    with pytest.raises(ValueError, match="all 2 experts are chosen for every token"):
        router_margins([hand_made(np.tile([0, 1], (3, 1)), 2)])


# --- two runs ------------------------------------------------------------------------------------------------------------


def test_a_run_does_not_differ_from_itself(run: Run) -> None:
    result = run_difference(run, run)
    assert (result["same"] == 1).all() and result["same"].shape == (2, len(run.token_ids))
    assert not result["score_change"].any() and not result["surprise"][run.prompt_length :].any()
    assert result.about["differs"] == [] and result.about["tokens_in_one_only"] == 0


def test_tokens_are_aligned_role_by_role_while_they_are_the_same() -> None:
    a = hand_made([[0], [1], [2], [3], [0], [1]], 4, ["image 0", "image 0", "user", "user", "special", "answer"],
                  token_ids=[9, 9, 5, 6, 8, 3], pictures=[blank(1, 2)], logprobs=[0, 0, 0, 0, -1, -2])  # fmt: skip
    b = hand_made([[0], [2], [3], [0], [2]], 4, ["image 0", "user", "special", "answer", "answer"],
                  token_ids=[9, 5, 8, 3, 4], pictures=[blank(1, 1)], question="which?", logprobs=[0, 0, -1, -5, 0])  # fmt: skip
    result = run_difference(a, b)
    assert result["position"].tolist() == [0, 2, 4, 5] and result["other_position"].tolist() == [0, 1, 2, 3]
    assert result["same"].tolist() == [[1, 1, 0, 0]] and result["surprise"].tolist() == [0, 0, 0, -3]
    assert result.about["tokens_in_one_only"] == 3
    assert [one.split(":")[0] for one in result.about["differs"]] == ["question", "picture 0"]


def test_another_picture_changes_what_comes_after_it_and_nothing_before(run: Run) -> None:
    result = run_difference(run, recorded(seed=1))
    first = int((result["role"] == "image 0").argmax())
    assert (result["same"][:, :first] == 1).all() and not result["score_change"][:, :first].any()
    assert result["score_change"][:, first:].max() > 0.01
    assert "picture 0" in result.about["differs"] and result.chance["same"] == 4 / 11


def test_an_edit_is_named_and_moves_only_the_layers_after_it(run: Run) -> None:
    with attach(talking_model(), edit={"decoder.layers.1": lambda stream, _: stream * 1.5 + 1}):
        edited = recorded()
    result = run_difference(run, edited)
    prompt = result["position"] < run.prompt_length
    assert not result["score_change"][0, prompt].any() and result["score_change"][1, prompt].min() > 0
    assert any(one.startswith("edits: [] / ['edit decoder.layers.1']") for one in result.about["differs"])


def test_runs_with_nothing_in_common_are_refused() -> None:
    a, b = hand_made([[0]], 4, token_ids=[1]), hand_made([[0]], 4, token_ids=[2])
    with pytest.raises(ValueError, match="no token in common"):
        run_difference(a, b)
    with pytest.raises(ValueError, match="run 1 has the layers, experts and top_k"):
        run_difference(a, hand_made([[0]], 5, token_ids=[1]))


def test_every_figure_of_a_choice_names_the_weights(run: Run) -> None:
    rng = np.random.default_rng(0)
    many = hand_made(random_choice(rng, 6, 64, 6, 26), 64, ["special", "user", "user", "thought", "answer", "special"])
    for shown in (run, many):
        figures = [
            selection_figure(token_selection(shown, 1, 2)),
            bias_figure(bias_effect([shown])),
            margins_figure(router_margins([shown])),
            difference_figure(run_difference(shown, replace(shown, seed=7))),
        ]
        for figure in figures:
            assert NAME in drawn_words(figure)
        assert bias_effect([shown]).chance["replaced"] in levels(figures[1].axes[0])
        chance = run_difference(shown, shown).chance["same"]
        assert any(list(line.get_xdata()) == [chance, chance] for line in figures[3].axes[2].lines)
    assert "the runs differ in: seed" in drawn_words(figures[3])
