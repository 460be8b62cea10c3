"""Patching everything carries the answer over and patching nothing leaves it; what is planted at one place is found there."""

from __future__ import annotations

import copy
from io import BytesIO

import numpy as np
import pytest
import torch

from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import expand
from kimi_vl_ref.moe import MoE
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.causes import (
    SITES,
    activation_patching,
    attention_knockout,
    knocked_out,
    mirrored_trials,
    random_positions,
    role_groups,
)
from workbench.analyses.trials import Trial, make_trial, read, score
from workbench.figures.causes import knockout_figure, patching_figure
from workbench.study.families import make
from workbench.tape import attach

NAME = "tiny model, random weights"
MODEL = copy.deepcopy(talking_model()).double()
LAYERS = range(3)


def trial(seed: int = 0, reply: str = "two", text: str = "count the circles", **more) -> Trial:
    return make_trial(tiny_chat(), question(text, picture(56, 28, seed=seed)), reply, **more)


def pair() -> tuple[Trial, Trial]:
    return trial(0, "red", boxes=[(0, 0, 28, 28)]), trial(1, "two", boxes=[(0, 0, 28, 28)])


def everything(clean: Trial, corrupted: Trial) -> dict[str, range]:
    return {"all": range(len(clean.ids)), "nothing of the picture": range(2)}


def changed(model: KimiVL, layer: int, *, attention: bool) -> None:
    """Takes what a layer writes away: its attention, or its FFN."""
    block = model.decoder.layers[layer]
    if attention:
        block.attn.out.weight.zero_()
    elif isinstance(block.ffn, MoE):
        block.ffn.experts.down.zero_(), block.ffn.shared.down.weight.zero_()
    else:
        block.ffn.down.weight.zero_()


@pytest.fixture(scope="module")
def one_road() -> KimiVL:
    """Only the attention of layer 1 writes: what the last row learns of the picture, it learns there."""
    model = copy.deepcopy(MODEL)
    for layer in LAYERS:
        changed(model, layer, attention=False)
        if layer != 1:
            changed(model, layer, attention=True)
    return model


# --- I1 ------------------------------------------------------------------------------------------------------------------


def test_patching_all_positions_carries_the_answer_over_and_patching_shared_text_does_nothing() -> None:
    result = activation_patching(MODEL, [pair()], model_name=NAME, groups=everything)
    for direction in ("denoise", "noise"):
        np.testing.assert_allclose(result[direction][:, 0], 1, atol=1e-9)
        np.testing.assert_allclose(result[direction][:, 1], 0, atol=1e-9)  # before the picture both runs are alike


@pytest.mark.parametrize("site", ["attention", "experts", "routing"])
def test_positions_before_the_picture_are_alike_in_both_runs_at_every_site(site: str) -> None:
    units = {"before": range(2), "the rest": range(2, 99)}
    result = activation_patching(MODEL, [pair()], model_name=NAME, site=site, groups=lambda *_: units)
    for direction in ("denoise", "noise"):
        np.testing.assert_allclose(result[direction][:, 0], 0, atol=1e-9)
        assert np.abs(result[direction][:, 1]).max() > 1e-6


def test_runs_that_lean_alike_have_no_way_between_them() -> None:
    with pytest.raises(ValueError, match="lean alike"):
        activation_patching(MODEL, [(trial(0, "red"), trial(0, "two"))], model_name=NAME)


def test_the_only_road_is_found(one_road: KimiVL) -> None:
    """Before layer 1 the answer lies in the picture, after it in the last row; its attention there is all that counts."""
    clean, corrupted = pair()
    row, seen = clean.scored[0] - 1, clean.positions("picture")
    residual = activation_patching(one_road, [(clean, corrupted)], model_name=NAME, groups=role_groups)
    names = residual.axes["denoise"][1][1]
    by_name = {name: residual["denoise"][:, at] for at, name in enumerate(names)}
    assert list(names) == ["target", "rest of the picture", "question", "other text", "last row"]
    np.testing.assert_allclose(by_name["last row"], [0, 1, 1], atol=1e-9)
    for name in ("question", "other text"):
        np.testing.assert_allclose(by_name[name], 0, atol=1e-9)
    whole = activation_patching(
        one_road, [(clean, corrupted)], model_name=NAME, groups=lambda *_: {"picture": seen, "last": [row]}
    )
    np.testing.assert_allclose(whole["denoise"], [[1, 0], [0, 1], [0, 1]], atol=1e-9)
    written = activation_patching(
        one_road, [(clean, corrupted)], model_name=NAME, site="attention", groups=lambda *_: {"picture": seen, "last": [row]}
    )
    np.testing.assert_allclose(written["noise"], [[0, 0], [0, 1], [0, 0]], atol=1e-9)


def test_a_single_head_that_writes_is_the_whole_way(one_road: KimiVL) -> None:
    model = copy.deepcopy(one_road)
    kept = torch.zeros(5, 12, dtype=torch.float64)
    kept[3] = 1
    model.decoder.layers[1].attn.out.weight.mul_(kept.flatten())
    result = activation_patching(model, [pair()], model_name=NAME, site="heads")
    expected = np.zeros((3, 5))
    expected[1, 3] = 1
    np.testing.assert_allclose(result["denoise"], expected, atol=1e-9)


def test_one_unit_is_what_patching_it_by_hand_gives() -> None:
    clean, corrupted = pair()
    result = activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, layers=[1], batch=3)
    end, at = clean.scored[0], clean.positions("picture")[1]

    def lead(asked: Trial, **options) -> float:
        with torch.no_grad(), attach(MODEL, **options):
            logits = MODEL.logits(read(MODEL, asked)[0, end - 1])
        return float(logits[clean.ids[end]] - logits[corrupted.ids[end]])

    with torch.no_grad(), attach(MODEL, read=["decoder.layers.1"]) as tape:
        read(MODEL, clean)
    stream = tape.last("decoder.layers.1")

    def put(value: torch.Tensor, _site: str) -> torch.Tensor:
        value[0, at] = stream[0, at]
        return value

    patched = lead(corrupted, edit={"decoder.layers.1": put})
    by_hand = (patched - lead(corrupted)) / (lead(clean) - lead(corrupted))
    assert by_hand != 0
    assert result["denoise"][0, at] == pytest.approx(by_hand, abs=1e-9)
    assert result.axes["denoise"][1][1][at].startswith(f"{at} ")


def test_all_patches_together_are_the_clean_picture() -> None:
    """Patch embeddings come before everything: patching all of them, one after another, ends at the clean run."""
    clean, corrupted = pair()
    result = activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, site="patches")
    assert result["denoise"].shape == (1, 2)  # a picture of 56 x 28 has two visual tokens
    # undoing token 0 alone in one direction is leaving token 1 alone in the other
    np.testing.assert_allclose(result["denoise"][0, 0] + result["noise"][0, 1], 1, atol=1e-9)


def test_a_mirror_swaps_the_sides() -> None:
    for seed in range(20):
        scene, asked = make("where", seed)
        if "left" in asked.answer:
            break
    clean, corrupted = mirrored_trials(tiny_chat(), scene, asked)
    assert corrupted.reply == clean.reply.replace("left", "right") and corrupted.question == clean.question
    (x0, y0, x1, y1), (u0, v0, u1, v1) = clean.boxes[0], corrupted.boxes[0]
    assert (u0, v0, u1, v1) == (scene.size[0] - x1, y0, scene.size[0] - x0, y1)
    assert np.array_equal(np.asarray(clean.pictures[0].image)[:, ::-1], np.asarray(corrupted.pictures[0].image))
    with pytest.raises(ValueError, match="a mirror leaves the answer"):
        mirrored_trials(tiny_chat(), *make("name", 0))


def test_pairs_that_are_no_pairs_are_refused() -> None:
    clean, corrupted = pair()
    larger = make_trial(tiny_chat(), question("count the circles", picture(56, 56)), "two")
    for wrong, message in (
        ((clean, clean), "a pair needs two answers"),
        ((clean, larger), "use two of one size"),
        ((clean, trial(1, "two", text="Count the circles")), "differs before its answer"),
    ):
        with pytest.raises(ValueError, match=message):
            activation_patching(MODEL, [wrong], model_name=NAME)
    with pytest.raises(ValueError, match="site is 'mlp'"):
        activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, site="mlp")
    with pytest.raises(ValueError, match="layer 0 has no routing"):
        activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, site="routing", layers=[0])
    assert set(SITES) == {"residual", "attention", "heads", "experts", "routing", "patches"}


# --- I3 ------------------------------------------------------------------------------------------------------------------


class Masked(torch.nn.Module):
    """Attention as in the textbook: all scores, minus infinity where blocked, softmax, values."""

    def __init__(self, queries: list[int], keys: list[int]):
        super().__init__()
        self.queries, self.keys = queries, keys

    def forward(self, q_nope, q_rope, latent, k_rope, up, visible):
        q, k, v = expand(q_nope, q_rope, latent, k_rope, up)
        scores = torch.einsum("bthd,bshd->bhts", q, k) * q.shape[-1] ** -0.5
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        for query in self.queries:
            for key in self.keys:
                allowed[query, key] = False
        return torch.einsum("bhts,bshv->bthv", scores.masked_fill(~allowed, -torch.inf).softmax(-1), v)


def test_knockout_agrees_with_explicit_attention() -> None:
    asked = trial(reply="two", text="How many?")
    result = attention_knockout(MODEL, [asked], model_name=NAME, pairs=[("picture", "last"), ("question", "last")], window=2)
    before = score(MODEL, [asked]).logprob[0]
    seen = 0
    for at, group in enumerate(("picture", "question")):
        keys = asked.positions(group)
        for start in (0, 1):
            swap = {f"decoder.layers.{i}.attn.core": Masked(asked.positions("last"), keys) for i in (start, start + 1)}
            with attach(MODEL, swap=swap):
                after = score(MODEL, [asked]).logprob[0]
            expected = (np.exp(after) - np.exp(before)) / np.exp(before)
            assert result["change"][at, start] == pytest.approx(expected, abs=1e-9)
            seen += abs(expected) > 1e-3
    assert seen >= 3


def test_blocking_what_carries_nothing_changes_nothing(one_road: KimiVL) -> None:
    """Where only layer 1's attention writes, blocking any other layer is blocking nothing."""
    asked = trial()
    result = attention_knockout(one_road, [asked], model_name=NAME, pairs=[("picture", "last"), ("picture", "question")])
    assert not result["change"][:, [0, 2]].any() and not result["control"][:, [0, 2]].any()
    assert result["change"][0, 1] != 0
    assert result["change"][0, 1] == result["change everywhere"][0]
    assert not result["change"][1].any()  # no layer after it could hand on what the question read


def test_a_pair_without_a_thought_is_left_out_and_counted_otherwise() -> None:
    thinking = trial(1, "◁think▷ two circles◁/think▷ two")
    assert thinking.positions("thought")
    result = attention_knockout(MODEL, [trial(), thinking], model_name=NAME)
    assert result.about["trials_of_pair"] == {
        "picture to question": 2, "picture to last": 2, "question to last": 2, "thought to last": 1,
    }  # fmt: skip
    assert "thought to last" not in attention_knockout(MODEL, [trial()], model_name=NAME).axes["change"][0][1]
    with pytest.raises(ValueError, match="no trial has both groups"):
        attention_knockout(MODEL, [trial()], model_name=NAME, pairs=[("thought", "last")])
    with pytest.raises(ValueError, match="window=4"):
        attention_knockout(MODEL, [trial()], model_name=NAME, window=4)


def test_groups_are_the_positions_that_their_names_say() -> None:
    asked = trial(0, "◁think▷ two circles◁/think▷ two", text="How many?")
    chat = tiny_chat()
    assert {int(asked.ids[at]) for at in asked.positions("picture")} == {chat.tokenizer.special["<|media_pad|>"]}
    assert chat.tokenizer.decode(int(asked.ids[at]) for at in asked.positions("question")) == "How many?"
    assert chat.tokenizer.decode(int(asked.ids[at]) for at in asked.positions("thought")).strip() == "two circles"
    assert chat.tokenizer.decode(int(asked.ids[at]) for at in asked.positions("answer")).strip() == "two<|im_end|>"
    assert asked.positions("last") == [at - 1 for at in asked.positions("answer")]
    with pytest.raises(ValueError, match="no group of positions is called 'image'"):
        asked.positions("image")


def test_the_control_blocks_as_many_positions_that_the_queries_see() -> None:
    asked = trial()
    keys, queries = knocked_out(asked, "picture", "last")
    drawn = [random_positions(queries, len(keys), np.random.default_rng(seed)) for seed in range(50)]
    for one in drawn:
        assert len(set(one)) == len(keys) == 2 and max(one) < max(queries) and not set(one) & set(queries)
    assert len({tuple(one) for one in drawn}) > 20  # drawn, not fixed


def test_figures_name_the_weights_and_draw_their_controls() -> None:
    clean, corrupted = pair()
    knockout = attention_knockout(MODEL, [clean], model_name=NAME)
    figures = [
        patching_figure(activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, groups=role_groups)),
        patching_figure(activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, layers=[1])),
        patching_figure(activation_patching(MODEL, [(clean, corrupted)], model_name=NAME, site="heads")),
        knockout_figure(knockout),
    ]
    for figure in figures:
        assert figure.get_supxlabel() == NAME
        figure.savefig(BytesIO())
    for name in ("denoise", "noise"):  # one scale around zero for both directions, as far as the whole way at least
        (low, high), (image,) = figures[1].axes[0].images[0].get_clim(), figures[1].axes[name == "noise"].images
        assert image.get_clim() == (low, high) == (-high, high) and high >= 1
    shown = [np.asarray(line.get_ydata(), float) for line in figures[3].axes[0].lines]
    for name in ("change", "control"):
        assert any(np.array_equal(line, knockout[name][0]) for line in shown)
    assert any(np.array_equal(line, [0, 0]) for line in shown)  # nothing lost
