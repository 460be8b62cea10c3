"""Heads that were made to point at a spot are found, and their box is the spot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kimi_vl_ref.images import Picture
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.localise import (
    components,
    head_hits,
    iou,
    knee,
    localisation,
    localisation_heads,
    localise,
    relative_attention,
    smoothed,
    spatial_entropy,
)
from workbench.figures.localise import (
    head_hits_figure,
    localisation_figure,
    localisation_heads_figure,
    pointing_figure,
    relative_attention_figure,
)
from workbench.runs import Run, record

NAME = "tiny model, random weights"
FINDERS = [(2, 3), (3, 0)]
SPOTS = [(1, 1), (2, 4), (4, 2), (3, 0)]  # row, column of the upper left of 2 x 2 visual tokens


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """Four runs about a picture of 6 x 6 visual tokens, of a made-up model of 4 layers with 5 heads."""
    asked = question("find the thing.", picture(60, 60))
    *_, run = record(talking_model(), tiny_chat(), asked, model_name=NAME, max_new_tokens=2)
    assert isinstance(run, Run)
    image = picture(168, 168)
    grid = tiny_chat().processor.grid(168, 168)
    rng = np.random.default_rng(0)
    made = []
    for spot in SPOTS:
        maps = np.abs(rng.standard_normal((4, 5, len(run.token_ids) - run.first_row, 6, 6)))
        maps /= maps.sum((3, 4), keepdims=True)
        maps *= 0.3  # what is left falls on text
        maps[0, 1] = 0  # a sharp head of a layer that is skipped
        maps[0, 1, :, 0, 0] = 0.9
        for layer, head in FINDERS:
            maps[layer, head] *= 0.1
            maps[layer, head, :, spot[0] : spot[0] + 2, spot[1] : spot[1] + 2] = 0.2
        scattered = maps[3, 4]  # as much attention as the finders give, all over the picture
        scattered[:] = 0
        scattered[:, ::2, ::2] = 0.09
        attention = maps.reshape(4, 5, -1, 36).astype(np.float16)
        made.append(replace(run, pictures=[Picture(image, grid)], picture_attention=attention))
    return made


def box(spot: tuple[int, int]) -> tuple[float, float, float, float]:
    return spot[1] * 28.0, spot[0] * 28.0, spot[1] * 28.0 + 56, spot[0] * 28.0 + 56


def test_planted_heads_are_found_and_a_scattered_one_and_an_early_one_are_not(runs: list[Run]) -> None:
    result = localisation_heads(runs, keep=2)
    assert sorted(result.about["heads"]) == FINDERS
    assert result["candidate"].sum() == 3 and result["candidate"][3, 4] == 1
    assert result["candidate"][0, 1] == 0
    for layer, head in FINDERS:
        assert result["entropy"][layer, head] == 0 and result["mass"][layer, head] > 0.8
    assert result["entropy"][3, 4] == pytest.approx(np.log(9))
    assert sum(result["picked"][at] for at in FINDERS) == result["picked"].sum() == result.about["lowest"] == 1
    assert result.chance["picked"] == pytest.approx(1 / 3)


def test_the_box_of_the_planted_heads_is_the_spot(runs: list[Run]) -> None:
    for run, spot in zip(runs, SPOTS, strict=True):
        heat, found = localise(run, FINDERS, sigma=0)
        assert found == box(spot)
        assert heat.shape == (6, 6)
        assert iou(localise(run, FINDERS, sigma=0.5)[1], box(spot)) >= 0.25
    result = localisation(runs, [box(spot) for spot in SPOTS], FINDERS, sigma=0)
    assert result["accuracy"][0] == 1 and result["hit"].tolist() == [1] * 4
    assert result["accuracy"][1] < 0.2 and result["hit_random"].mean() < 0.5
    assert result.chance["hit"] == pytest.approx(4 / 36)
    again = localisation(runs, [box(spot) for spot in SPOTS], FINDERS, sigma=0)
    assert again["iou_random"].tolist() == result["iou_random"].tolist()


def test_hits_count_the_heads_whose_peak_is_in_the_box(runs: list[Run]) -> None:
    result = head_hits(runs, [box(spot) for spot in SPOTS])
    assert all(result["hit"][at] == 1 for at in FINDERS)
    assert result["hit"][0, 1] == 0  # always the corner
    elsewhere = head_hits(runs, [box((0, 0))] * 4)
    assert elsewhere["hit"][0, 1] == 1 and elsewhere["hit"][3, 4] == 1
    # the finders point at tokens that only touch this box from inside its own cells
    assert all(elsewhere["hit"][at] == 0.25 for at in FINDERS)  # the spot of run 0 shares one token with it


def test_the_row_is_that_of_the_word_the_question_or_the_prompt(runs: list[Run]) -> None:
    run = runs[0]
    asked = [at for at, role in enumerate(run.roles) if role == "user"]
    word = next(at for at in reversed(asked) if any(letter.isalnum() for letter in run.texts[at]))
    rows = {"word": word, "question": asked[-1], "prompt": run.prompt_length - 1}
    assert len(set(rows.values())) == 3
    for row, position in rows.items():
        attention = np.zeros_like(run.picture_attention)
        attention[:, :, position - run.first_row, 7] = 1
        heat, _ = localise(replace(run, picture_attention=attention), [(0, 0)], row=row, sigma=0)
        assert heat.ravel().argmax() == 7 and heat.max() == 1


def test_relative_attention_is_the_factor_by_which_the_question_changed_it(runs: list[Run]) -> None:
    neutral = replace(runs[0], picture_attention=np.full_like(runs[0].picture_attention, 0.01))
    asked = neutral.picture_attention.copy()
    asked[2, :, :, 9] *= 4
    neutral.picture_attention[1, :, :, 5] = 0
    found = relative_attention(replace(neutral, picture_attention=asked), neutral)["relative"]
    assert found[2].ravel()[9] == pytest.approx(4, rel=1e-2)
    assert np.isnan(found[1].ravel()[5])
    others = np.delete(found.reshape(4, -1), [5, 9], axis=1)
    np.testing.assert_allclose(others, 1)


def test_pieces_touch_at_corners_and_are_numbered_in_reading_order() -> None:
    mask = np.array([[1, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 1], [1, 0, 0, 1]], bool)
    assert components(mask).tolist() == [[1, 0, 0, 2], [0, 1, 0, 0], [0, 0, 0, 3], [4, 0, 0, 3]]


def test_spatial_entropy_of_one_spot_two_halves_and_nothing() -> None:
    heat = np.zeros((5, 5))
    heat[1, 1] = 1
    assert spatial_entropy(heat) == 0
    heat[3:5, 3:5] = 1  # four tokens beside one
    assert spatial_entropy(heat) == pytest.approx(-(0.2 * np.log(0.2) + 0.8 * np.log(0.8)))
    assert spatial_entropy(np.ones((5, 5))) == pytest.approx(np.log(25))


def test_the_knee_is_the_last_value_before_the_bend() -> None:
    assert knee(np.array([0.1, 0.9, 0.0, 1.0, 0.05, 0.02, 0.01])) == 0.9  # few are high
    assert knee(np.array([0.1, 0.9, 0.95, 1.0, 0.92, 0.97])) == 0.9  # few are low
    assert knee(np.full(4, 0.5)) == 0.5


def test_smoothing_keeps_the_total_and_the_middle() -> None:
    heat = np.zeros((9, 9))
    heat[4, 4] = 1
    blurred = smoothed(heat, 1.0)
    assert blurred.sum() == pytest.approx(1) and blurred.argmax() == heat.argmax()
    assert blurred[4, 5] / blurred[4, 4] == pytest.approx(np.exp(-0.5)) and blurred[5, 4] == pytest.approx(blurred[4, 5])
    edge = np.zeros((3, 4))
    edge[0, 0] = 1
    assert smoothed(edge, 2.0).sum() == pytest.approx(1)


def test_overlap_of_boxes() -> None:
    assert iou((0, 0, 2, 2), (1, 1, 3, 3)) == pytest.approx(1 / 7)
    assert iou((0, 0, 2, 2), (0, 0, 2, 2)) == 1 and iou((0, 0, 1, 1), (1, 0, 2, 1)) == 0


def test_what_cannot_be_asked_is_refused(runs: list[Run]) -> None:
    with pytest.raises(ValueError, match="there are no heads to localise with"):
        localise(runs[0], [])
    with pytest.raises(ValueError, match="head 5 of layer 0 does not exist; the run has 4 x 5"):
        localise(runs[0], [(0, 5)])
    with pytest.raises(ValueError, match="row='middle' is not in the run .* give 'word', 'question' or 'prompt'"):
        localise(runs[0], FINDERS, row="middle")
    with pytest.raises(ValueError, match="1 boxes for 4 runs"):
        localisation(runs, [box((0, 0))], FINDERS)
    with pytest.raises(ValueError, match="1 boxes for 4 runs"):
        head_hits(runs, [box((0, 0))])
    with pytest.raises(ValueError, match="leave too few others for a control"):
        localisation(runs[:1], [box((0, 0))], [(layer, head) for layer in range(4) for head in range(4)])
    with pytest.raises(ValueError, match="no head past layer 4 looks at picture 0 enough"):
        localisation_heads(runs, skip=4)
    with pytest.raises(ValueError, match="pictures of different sizes"):
        other = Picture(picture(56, 56), tiny_chat().processor.grid(56, 56))
        relative_attention(runs[0], replace(runs[1], pictures=[other]))
    with pytest.raises(ValueError, match="has not kept single heads or not this row; record it with detail='full'"):
        localise(replace(runs[0], settings={"heads": "mean over heads"}), FINDERS)


def test_figures_show_the_planted_heads_chance_and_the_weights(runs: list[Run]) -> None:
    boxes = [box(spot) for spot in SPOTS]
    heads = localisation_heads_figure(localisation_heads(runs, keep=2))
    assert sorted(text.get_text() for text in heads.axes[0].texts) == ["2.3", "3.0"]
    result = localisation(runs, boxes, FINDERS)
    bars = localisation_figure(result)
    assert bars.axes[0].patches[0].get_height() == 1  # hits of the finders
    assert bars.axes[0].lines[0].get_ydata()[0] == result.chance["hit"]
    neutral = replace(runs[0], picture_attention=np.full_like(runs[0].picture_attention, 0.01))
    figures = [
        heads,
        bars,
        head_hits_figure(head_hits(runs, boxes)),
        pointing_figure(runs[0], FINDERS, boxes[0]),
        relative_attention_figure(relative_attention(runs[0], neutral), runs[0].pictures[0], layer=2),
    ]
    for figure in figures:
        assert figure.get_supxlabel() == NAME
        figure.draw_without_rendering()
