"""What MoonViT looks at, and what a token owes to the positions before it, where both are known by construction."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kimi_vl_ref import Chat
from kimi_vl_ref.attention import ExplicitCore
from kimi_vl_ref.vision import ExplicitPackedCore
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.eyes import (
    attention_distance,
    attention_entropy,
    head_atlas,
    patch_attention,
    relevancy,
    relevancy_row,
    rolled,
    rollout,
)
from workbench.analyses.replay import replayed
from workbench.figures.eyes import head_atlas_figure, patch_attention_figure, relevancy_figure, rollout_figure
from workbench.figures.overlay import overlay
from workbench.runs import Run, record
from workbench.tape import attach

MODEL, CHAT = talking_model(), tiny_chat()
IMAGES = [picture(56, 84), picture(112, 28, seed=1)]  # 6 x 4 and 2 x 8 patches, none of it padding
NAME = {"model_name": "tiny model, random weights"}


@pytest.fixture(scope="module")
def run() -> Run:
    *_, run = record(MODEL, CHAT, question("How many?", *IMAGES), max_new_tokens=3, **NAME)
    assert isinstance(run, Run)
    return run


def alone(value: Tensor, site: str) -> Tensor:
    """Every patch gets a direction of its own, far longer than the rest: queries and keys meet in the same patch only."""
    generator = torch.Generator().manual_seed(0)
    own = torch.nn.functional.normalize(torch.randn(len(value), 1, 8, generator=generator), dim=-1)
    return 100 * own.expand_as(value).clone()


# --- V1 ------------------------------------------------------------------------------------------------------------------


def test_attention_to_oneself_has_no_distance_and_to_the_neighbour_one_patch() -> None:
    own = torch.eye(24)
    assert attention_distance(own, (6, 4), range(24), 14).abs().max() == 0
    assert attention_entropy(own).abs().max() == 0
    right, below = own[[1, 2, 3]], own[[4, 5, 6]]  # what patches 0, 1 and 2 of the first row read
    assert attention_distance(right, (6, 4), [0, 1, 2], 14).tolist() == [14, 14, 14]
    assert attention_distance(below, (6, 4), [0, 1, 2], 14).tolist() == [14, 14, 14]
    corner = own[[23]] / 2 + own[[0]] / 2  # half of patch 0's attention goes 5 rows down and 3 columns right
    assert attention_distance(corner, (6, 4), [0], 14).item() == pytest.approx(34**0.5 * 7)
    assert attention_entropy(corner).item() == pytest.approx(np.log(2))


def test_a_model_whose_patches_see_themselves_has_no_distance_and_one_without_queries_has_the_chance_lines() -> None:
    """Large equal directions make the identity, even rotated, as query and key turn alike; zero queries spread evenly."""
    same = {"vision.layers.*.attn.q": alone, "vision.layers.*.attn.k": alone}
    with attach(MODEL, edit=same):
        atlas = head_atlas(MODEL, CHAT.processor, IMAGES, **NAME)
    assert atlas["distance"].shape == (2, 7)
    assert atlas["distance"].max() < 1e-3 and atlas["entropy"].max() < 1e-3
    with attach(MODEL, edit={"vision.layers.*.attn.q": lambda q, site: torch.zeros_like(q)}):
        atlas = head_atlas(MODEL, CHAT.processor, IMAGES, **NAME)
    for name in ("distance", "entropy"):
        np.testing.assert_allclose(atlas[name], atlas.chance[name], rtol=1e-6)
    assert atlas.chance["entropy"] == pytest.approx((24 * np.log(24) + 16 * np.log(16)) / 40)
    assert atlas.about["edits"] == ["edit vision.layers.0.attn.q", "edit vision.layers.1.attn.q"]


def test_blocks_of_rows_do_not_change_the_atlas(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = head_atlas(MODEL, CHAT.processor, IMAGES, **NAME)
    monkeypatch.setattr("workbench.analyses.eyes.SCRATCH", 7 * 24 * 5)
    parts = head_atlas(MODEL, CHAT.processor, IMAGES, **NAME)
    np.testing.assert_allclose(parts["distance"], whole["distance"], rtol=1e-6)
    np.testing.assert_allclose(parts["entropy"], whole["entropy"], rtol=1e-6)


def test_the_attention_of_one_patch_is_its_row_on_its_own_picture() -> None:
    found = patch_attention(MODEL, CHAT.processor, IMAGES, 5, picture=1, **NAME)["attention"]
    single = patch_attention(MODEL, CHAT.processor, IMAGES[1:], 5, **NAME)["attention"]
    assert found.shape == (2, 7, 2, 8)
    np.testing.assert_allclose(found, single, atol=1e-6)
    np.testing.assert_allclose(found.sum((2, 3)), 1, rtol=1e-5)


# --- V2 ------------------------------------------------------------------------------------------------------------------


def test_rollout_of_two_known_layers() -> None:
    """Patch 0 reads 1, then 1 reads 2: half of each step stays, so a quarter of 2 reaches 0 only in the right order."""
    first, second = torch.eye(3), torch.eye(3)
    first[1], second[0] = torch.tensor([0.0, 0, 1]), torch.tensor([0.0, 1, 0])
    found = rolled(second, rolled(first, None))
    assert found.tolist() == [[0.5, 0.25, 0.25], [0, 0.5, 0.5], [0, 0, 1]]


def test_rollout_is_the_product_of_the_explicit_probabilities() -> None:
    site = "vision.layers.*.attn.core"
    pixels, grids, _ = CHAT.processor(IMAGES)
    with attach(MODEL, read=[f"{site}.probs"], swap={site: lambda core: ExplicitPackedCore()}) as tape, torch.no_grad():
        MODEL.vision(pixels, [tuple(grid) for grid in grids.tolist()])
    for number in (0, 1):
        product = torch.eye(IMAGES[number].width * IMAGES[number].height // 196)
        for layer in (0, 1):
            average = tape[f"vision.layers.{layer}.attn.core.probs"][number].mean(0)
            product = (0.5 * average + 0.5 * torch.eye(len(average))) @ product
        found = rollout(MODEL, CHAT.processor, IMAGES, number, [3, 7], **NAME)
        np.testing.assert_allclose(found["rollout"].reshape(2, -1), product[[3, 7]], atol=1e-6)
        mean = rollout(MODEL, CHAT.processor, IMAGES, number, **NAME)["rollout"]
        np.testing.assert_allclose(mean.reshape(-1), product.mean(0), atol=1e-6)
        assert mean.sum() == pytest.approx(1, abs=1e-5)


def test_nothing_flows_between_pictures() -> None:
    """The rollout of a picture is the same whatever is packed beside it."""
    plain = rollout(MODEL, CHAT.processor, IMAGES, 1, [0, 9], **NAME)["rollout"]
    other = rollout(MODEL, CHAT.processor, [picture(84, 84, seed=5), IMAGES[1]], 1, [0, 9], **NAME)["rollout"]
    np.testing.assert_allclose(plain, other, atol=1e-6)
    np.testing.assert_allclose(plain.sum((1, 2)), 1, atol=1e-5)


# --- V3 ------------------------------------------------------------------------------------------------------------------


def test_relevancy_of_two_layers_by_hand() -> None:
    """One head, three positions; a negative product counts for nothing, and the other head is averaged in."""
    probs = [torch.zeros(2, 3, 3), torch.zeros(2, 3, 3)]
    grads = [torch.ones(2, 3, 3), torch.ones(2, 3, 3)]
    probs[0][0, 1, 0], probs[1][0, 2, 1], probs[1][1, 2, 0] = 0.8, 0.6, 1.0
    grads[1][1, 2, 0] = -5
    # layer 1: position 2 takes 0.3 of what 1 is; layer 0: position 1 took 0.4 of what 0 is
    assert relevancy_row(probs, grads, 2).tolist() == pytest.approx([0.3 * 0.4, 0.3, 0])
    assert relevancy_row(probs[::-1], grads[::-1], 2).tolist() == pytest.approx([0, 0.3, 0])


def test_relevancy_is_the_row_of_the_whole_matrix_worked_out_naively(run: Run) -> None:
    """Its gradients by hand, on a graph that starts at the probabilities; R as a T x T matrix, layer after layer."""
    token = run.prompt_length + 1
    found = relevancy(MODEL, CHAT.processor, run, token)
    site, (pixels, grids, _) = "decoder.layers.*.attn.core", CHAT.processor(IMAGES)
    ids = torch.tensor(run.token_ids[None, :token].astype(np.int64))
    x = MODEL.embedded(ids, MODEL.see(pixels, grids)).requires_grad_()
    with attach(MODEL, read=[f"{site}.probs"], swap={site: lambda core: ExplicitCore()}) as tape:
        logits = MODEL.logits(MODEL.decoder(x))
    for name in tape.sites:
        tape[name][0].retain_grad()
    logits[0, token - 1, int(run.token_ids[token])].backward()
    matrix = torch.eye(token)
    for name in tape.sites:
        (probs,) = tape[name]
        matrix = matrix + (probs.grad * probs)[0].clamp(min=0).mean(0).detach() @ matrix
    expected = (matrix - torch.eye(token))[token - 1].numpy()
    np.testing.assert_allclose(found["relevancy"], expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found["picture 1"].ravel(), expected[run.positions("image 1")], rtol=1e-4, atol=1e-6)
    shares = dict(zip(found.axes["share"][0][1], found["share"], strict=True))
    assert shares["image"] == pytest.approx(expected[run.positions("image")].sum() / expected.sum(), rel=1e-4)
    assert sum(shares.values()) == pytest.approx(1) and sum(found.chance["share"]) == pytest.approx(1)


def test_a_token_that_can_read_one_position_only_owes_all_to_it(run: Run) -> None:
    """Every other position's latent is zero, so reading it adds nothing: no gradient reaches those probabilities."""
    chosen = int(run.positions("image 0")[2])

    def silence(latent: Tensor, site: str) -> Tensor:
        latent[:, torch.arange(latent.shape[1]) != chosen] = 0
        return latent

    with attach(MODEL, edit={"decoder.layers.*.attn.latent": silence}):
        both = [relevancy(MODEL, CHAT.processor, run, run.prompt_length, target) for target in range(6)]
    found = max(both, key=lambda one: one["relevancy"].sum())  # a logit that the position speaks for
    assert found["relevancy"].argmax() == chosen and found["relevancy"].sum() > 1e-3
    np.testing.assert_allclose(np.delete(found["relevancy"], chosen), 0, atol=1e-9)
    assert found["picture 0"].ravel().argmax() == 2
    assert dict(zip(found.axes["share"][0][1], found["share"], strict=True))["image"] == pytest.approx(1)


# --- refusals and figures ------------------------------------------------------------------------------------------------


def test_what_cannot_be_asked_is_refused(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there are no pictures to look at"):
        head_atlas(MODEL, CHAT.processor, [], **NAME)
    with pytest.raises(ValueError, match="picture 2 does not exist; this call saw pictures 0 to 1"):
        rollout(MODEL, CHAT.processor, IMAGES, 2, **NAME)
    with pytest.raises(ValueError, match="patch 16 does not exist; picture 1 has patches 0 to 15"):
        rollout(MODEL, CHAT.processor, IMAGES, 1, [16], **NAME)
    with pytest.raises(ValueError, match="token 3 cannot be asked about; give a position from"):
        relevancy(MODEL, CHAT.processor, run, 3)
    with pytest.raises(ValueError, match="recorded with other weights .* give the model that recorded it"):
        relevancy(MODEL, CHAT.processor, replace(run, versions={"weights": "another"}), run.prompt_length)
    with pytest.raises(ValueError, match="cut by another image processor"):
        relevancy(MODEL, replace(CHAT.processor, in_token_limit=8), run, run.prompt_length)
    monkeypatch.setattr("workbench.analyses.eyes.RELEVANCY_BYTES", 1000)
    with pytest.raises(ValueError, match="GiB of attention, and the limit is"):
        relevancy(MODEL, CHAT.processor, run, run.prompt_length)


def test_figures_name_the_weights_and_draw_chance(run: Run) -> None:
    atlas = head_atlas_figure(head_atlas(MODEL, CHAT.processor, IMAGES, **NAME))
    line = next(line for line in atlas.axes[0].lines if line.get_linestyle() == "--")
    assert line.get_ydata()[0] == pytest.approx(head_atlas(MODEL, CHAT.processor, IMAGES, **NAME).chance["distance"])
    first = run.pictures[0]
    one = patch_attention(MODEL, CHAT.processor, IMAGES, 5, **NAME)
    figures = [
        atlas,
        patch_attention_figure(one, first, layer=1),
        rollout_figure(rollout(MODEL, CHAT.processor, IMAGES, 0, [1, 2], **NAME), first),
        relevancy_figure(relevancy(MODEL, CHAT.processor, run, run.prompt_length), run),
    ]
    for figure in figures:
        assert figure.get_supxlabel() == "tiny model, random weights"
        figure.draw_without_rendering()
    heat = np.asarray(figures[1].axes[0].collections[-1].get_array())
    np.testing.assert_allclose(heat.ravel(), one["attention"][1].mean(0).ravel())
    with pytest.raises(ValueError, match="a heat of shape .3, 3. fits neither"):
        overlay(atlas.axes[0], first, np.ones((3, 3)), None)  # type: ignore[arg-type]


def test_a_run_that_keeps_its_picture_smaller_gives_the_same_stream() -> None:
    """A large picture may be kept as the model saw it; its geometry still speaks of the original."""
    small = Chat(CHAT.tokenizer, replace(CHAT.processor, in_token_limit=24))
    *_, run = record(MODEL, small, question("How many?", picture(300, 300)), max_new_tokens=1, **NAME)
    assert isinstance(run, Run)
    kept = run.pictures[0].image.resize(run.pictures[0].grid.resized, 3)
    less = replace(run, pictures=[replace(run.pictures[0], image=kept)])
    assert torch.equal(replayed(MODEL, small.processor, run), replayed(MODEL, small.processor, less))
