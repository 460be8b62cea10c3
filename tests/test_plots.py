"""What a figure shows is what went in: planted heat and planted experts are where they were put, on the stated scale."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from PIL import Image

from kimi_vl_ref.images import ImageProcessor, Picture
from tiny import picture, question, talking_model, tiny_chat
from workbench.plots import attention_heat, expert_load, expert_share, picture_heat
from workbench.runs import Run, record

NAME = "tiny model, random weights"


@pytest.fixture(scope="module")
def run() -> Run:
    asked = question("How many?", picture(100, 60), picture(50, 90, seed=1))
    *_, run = record(talking_model(), tiny_chat(), asked, model_name=NAME, max_new_tokens=3)
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def planted(run: Run) -> Run:
    """Every visual token goes to experts 3, 4, 5, 6 in the first layer and to 7 .. 10 in the second; no other token does."""
    chosen = np.tile(np.array([0, 1, 2, 10], np.uint16), (*run.chosen.shape[:2], 1))
    chosen[1] = [0, 1, 2, 3]
    chosen[0, run.positions("image")] = [3, 4, 5, 6]
    chosen[1, run.positions("image")] = [7, 8, 9, 10]
    return replace(run, chosen=chosen)


def drawn(figure: Figure) -> np.ndarray:
    """The figure as pixels, (height, width, 3)."""
    png = BytesIO()
    figure.savefig(png, format="png", dpi="figure")  # so that transData speaks of these pixels
    return np.asarray(Image.open(png).convert("RGB"))


def words(figure: Figure) -> str:
    found = [figure.get_suptitle(), figure.get_supxlabel()]
    for axes in figure.axes:
        found += [axes.get_title(), axes.get_xlabel(), axes.get_ylabel()]
    return "\n".join(found)


def flat_picture(width: int, height: int) -> Picture:
    image = Image.new("RGB", (width, height), (128, 128, 128))
    return Picture(image, tiny_chat().processor.grid(width, height))


def test_planted_routing_shows_where_it_was_planted(planted: Run) -> None:
    share = expert_share(planted, planted.positions("image"))
    expected = np.zeros((2, 11), np.float32)
    expected[0, 3:7] = expected[1, 7:11] = 1
    assert np.array_equal(share, expected)
    others = np.setdiff1d(np.arange(len(planted.token_ids)), planted.positions("image"))
    assert (expert_share(planted, others) * expected).sum() == 0
    figure = expert_load(planted, planted.positions("image"))
    (image,) = figure.axes[0].images
    assert np.array_equal(image.get_array(), expected)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["1", "2"]


def test_a_layer_of_expert_load_adds_up_to_the_chosen_number(run: Run) -> None:
    np.testing.assert_allclose(expert_share(run).sum(-1), 4, rtol=1e-6)
    counts = np.bincount(run.chosen[1].ravel(), minlength=11) / len(run.token_ids)
    np.testing.assert_allclose(expert_share(run)[1], counts, rtol=1e-6)


def test_chance_is_marked_at_k_of_e(run: Run) -> None:
    figure = expert_load(run)
    assert "by chance 36.4% each (4 of 11)" in words(figure)
    bar = figure.axes[1]
    assert [4 / 11, 4 / 11] in [list(line.get_ydata()) for line in bar.lines]
    assert f"{len(run.token_ids)} tokens" in words(figure)


def test_a_hot_token_is_hot_in_the_picture_where_the_token_lies() -> None:
    """A wide picture whose last row and column are partly padding: the heat ends with the picture."""
    shown = flat_picture(130, 60)
    assert shown.grid.token_grid == (3, 5)
    heat = np.zeros((3, 5))
    heat[1, 3] = 0.2
    figure = picture_heat(shown, heat, vmax=0.2, model_name=NAME)
    pixels = drawn(figure).astype(int)
    _, hot, _ = figure.axes

    def at(x: float, y: float) -> int:
        column, row = hot.transData.transform((x, y))
        return pixels[pixels.shape[0] - 1 - int(row), int(column)].sum()

    x0, y0, x1, y1 = shown.grid.token_box(1 * 5 + 3) or pytest.fail("the token lies in the picture")
    inside = [at(x0 + a * (x1 - x0), y0 + b * (y1 - y0)) for a in (0.2, 0.8) for b in (0.2, 0.8)]
    around = [at(x0 - 5, y0 + 8), at(x1 + 5, y0 + 8), at(x0 + 8, y0 - 5), at(x0 + 8, y1 + 2), at(125, 58)]
    assert min(inside) > max(around) + 200
    assert hot.get_xlim() == (0, 130) and hot.get_ylim() == (60, 0)


def test_the_scale_starts_at_zero_and_ends_where_it_is_told() -> None:
    shown, heat = flat_picture(60, 60), np.full((3, 3), 0.1)

    def norm(vmax: float | None) -> Normalize:
        drawings = picture_heat(shown, heat, vmax=vmax, model_name=NAME).axes[1].collections
        (mesh,) = (drawing for drawing in drawings if drawing.get_array() is not None)
        return mesh.norm

    assert (norm(0.4).vmin, norm(0.4).vmax) == (0, 0.4)
    assert norm(None).vmax == pytest.approx(0.1)
    a, b = (drawn(picture_heat(shown, heat * factor, vmax=0.4, model_name=NAME)) for factor in (1, 2))
    assert (a != b).any(), "twice the heat on the same scale must look different"


def test_every_figure_names_its_model(run: Run) -> None:
    figures = [
        picture_heat(run.pictures[0], run.heat(run.first_row), title="one $ two $", model_name=run.model_name),
        attention_heat(run, run.first_row, picture=1, layer=2, head=4),
        expert_load(run, title="all"),
    ]
    for figure in figures:
        assert NAME in words(figure)
        assert drawn(figure).std() > 5
    assert "picture 1; layer 2, head 4" in words(figures[1])


@pytest.mark.parametrize("size", [(1, 1), (14, 3000), (3000, 14), (2000, 1500)], ids=str)
def test_pictures_of_any_shape_can_be_drawn(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, (200, 30, 30))
    processor = ImageProcessor(14, (2, 2), 4096, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    shown = Picture(image, processor.grid(*size))
    drawn(picture_heat(shown, np.zeros(shown.grid.token_grid), model_name=NAME))
    assert shown.image.size == size


def test_what_cannot_be_drawn_is_named(run: Run) -> None:
    with pytest.raises(ValueError, match=r"heat of shape \(2, 2\) does not fit a picture of \(3, 4\) visual tokens"):
        picture_heat(run.pictures[0], np.zeros((2, 2)), model_name=NAME)
    with pytest.raises(ValueError, match="vmax=0 leaves no scale"):
        picture_heat(run.pictures[0], run.heat(run.first_row), vmax=0, model_name=NAME)
    with pytest.raises(ValueError, match="no positions"):
        expert_load(run, [])
    with pytest.raises(ValueError, match="position 9999 does not exist"):
        expert_share(run, [9999])
