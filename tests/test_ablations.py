"""An expert that was planted to matter is the one whose loss counts, a picture that was planted to matter likewise."""

from __future__ import annotations

import copy
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch

from kimi_vl_ref import KimiVL
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.ablations import (
    drawn_experts,
    dropped_slots,
    expert_bench,
    expert_masking,
    masked_experts,
    measure_expert,
    single_experts,
    top_k_sweep,
)
from workbench.analyses.picture_ablations import (
    attention_received,
    grown,
    other_picture,
    visual_token_ablation,
    visual_token_dropping,
)
from workbench.analyses.trials import Trial, batches, make_trial, read, run_trial, score, score_batches
from workbench.figures.causes import (
    dropping_figure,
    masking_figure,
    single_experts_figure,
    token_ablation_figure,
    top_k_figure,
)
from workbench.rows import decoder_rows
from workbench.runs import Run, record
from workbench.sweeps import SweepError
from workbench.tape import attach

NAME = "tiny model, random weights"
MODEL = copy.deepcopy(talking_model()).double()
EXPERTS, K = MODEL.config.text.n_routed_experts, MODEL.config.text.num_experts_per_tok


def trial(seed: int = 0, reply: str = "two", domain: str = "count", size: tuple[int, int] = (84, 56), **more) -> Trial:
    return make_trial(tiny_chat(), question("count the circles", picture(*size, seed=seed)), reply, domain=domain, **more)


TRIALS = [trial(0), trial(1, "red", "name"), trial(2, "two red", size=(56, 28))]


@pytest.fixture(scope="module")
def seeing() -> KimiVL:
    """A model whose decoder only hands on: the last row gets the mean of what it sees, so each visual token counts alike."""
    model = copy.deepcopy(MODEL)
    for layer in model.decoder.layers:
        layer.attn.q.weight.zero_()
    return model


# --- trials --------------------------------------------------------------------------------------------------------------


def test_scores_are_those_of_a_plain_forward_pass_alone_or_in_a_batch() -> None:
    alone, together = score(MODEL, TRIALS), score(MODEL, TRIALS, batch=3)
    np.testing.assert_allclose(alone.logprob, together.logprob, atol=1e-9)
    for at, one in enumerate(TRIALS):
        with torch.no_grad():
            logits = MODEL.logits(MODEL(one.ids[None], one.pixel_values.double(), one.grids))[0].log_softmax(-1)
        expected = [float(logits[place - 1, one.ids[place]]) for place in one.scored]
        assert alone.logprob[at] == pytest.approx(sum(expected))
        assert alone.nll[at] == pytest.approx(-np.mean(expected))


def test_what_a_run_wrote_is_right_by_its_own_greedy_decoding() -> None:
    asked = question("count the circles", picture(84, 56))
    *_, run = record(talking_model(), tiny_chat(), asked, model_name=NAME, max_new_tokens=4)
    assert isinstance(run, Run)
    scores = score(talking_model(), [run_trial(tiny_chat(), run, score="reply")])
    assert scores.right.all() and scores.logprob[0] == pytest.approx(np.nansum(run.logprobs), abs=1e-3)
    assert not score(talking_model(), [trial(reply="two red circles")]).right.any()


# --- I4 ------------------------------------------------------------------------------------------------------------------


def test_masking_takes_the_best_scored_and_the_next_best_are_chosen() -> None:
    names = [f"decoder.layers.{layer}.ffn.router.{part}" for layer in (1, 2) for part in ("scores", "chosen")]
    with torch.no_grad(), masked_experts(MODEL, 3), attach(MODEL, read=names) as tape:
        read(MODEL, TRIALS[0])
    for layer in (1, 2):
        scores, chosen = (tape.last(f"decoder.layers.{layer}.ffn.router.{part}")[0] for part in ("scores", "chosen"))
        bias = MODEL.decoder.layers[layer].ffn.router.chosen.bias
        for token, ids in enumerate(chosen.tolist()):
            left = sorted(range(EXPERTS), key=lambda e: -float(scores[token, e]))[3:]
            assert ids == sorted(left, key=lambda e: -float(scores[token, e] + bias[e]))[:K]


def test_masking_none_is_the_model_as_it_is() -> None:
    result = expert_masking(MODEL, TRIALS, model_name=NAME, shares=(0, 3 / EXPERTS))
    nll = score(MODEL, TRIALS).nll
    np.testing.assert_allclose(result["loss"][0], [(nll[0] + nll[2]) / 2, nll[1]], atol=1e-9)
    np.testing.assert_allclose(result["control"][0], result["loss"][0], atol=1e-9)
    assert (result["loss"][1] != result["loss"][0]).all() and (result["control"][1] != result["loss"][1]).all()
    assert result.axes["loss"] == [("masked", [0, 3]), ("domain", ["count", "name"])]
    with pytest.raises(ValueError, match="leave fewer than K=4 experts"):
        expert_masking(MODEL, TRIALS, model_name=NAME, shares=(0.9,))


def test_the_top_k_sweep_passes_through_the_model_as_it_is() -> None:
    result = top_k_sweep(MODEL, TRIALS, model_name=NAME, ks=(1, K, K + 1))
    nll = score(MODEL, TRIALS).nll
    np.testing.assert_allclose(result["loss"][1, 0], [(nll[0] + nll[2]) / 2, nll[1]], atol=1e-9)
    with attach(MODEL, edit={"decoder.layers.*.ffn.shared": lambda written, _: written * 0}):
        without = score(MODEL, TRIALS).nll
    np.testing.assert_allclose(result["loss"][1, 1], [(without[0] + without[2]) / 2, without[1]], atol=1e-9)
    assert (result["loss"][0] != result["loss"][1]).all() and (result["loss"][2] != result["loss"][1]).all()
    with pytest.raises(ValueError, match="K=12 experts a token cannot be chosen; use 1 to 11"):
        top_k_sweep(MODEL, TRIALS, model_name=NAME, ks=(12,))


def test_the_top_k_control_has_the_size_of_what_it_stands_beside() -> None:
    """With every expert chosen there is nothing to draw, and a shared expert as wide as all that are chosen takes all."""
    result = top_k_sweep(MODEL, TRIALS, model_name=NAME, ks=(1, 2, EXPERTS))
    control = result["control"]
    np.testing.assert_allclose(control[2, 0], result["loss"][2, 0], atol=1e-9)
    assert (control[:2, 0] != result["loss"][:2, 0]).all()
    with attach(MODEL, edit={"decoder.layers.*.ffn.experts": lambda written, _: written * 0}):
        without = score(MODEL, TRIALS).nll
    assert MODEL.config.text.n_shared_experts == 2
    for k in (0, 1):  # K = 1 and 2: nothing of the routed experts is left
        np.testing.assert_allclose(control[k, 1], [(without[0] + without[2]) / 2, without[1]], atol=1e-9)
    assert (control[2, 1] != control[1, 1]).all()
    assert result.chance["loss"] == pytest.approx(np.log(MODEL.config.text.vocab_size)) and result.about["seed"] == 0


def test_dropped_slots_are_as_many_for_every_token_and_drawn_anew_for_each() -> None:
    names = [f"decoder.layers.{layer}.ffn.router.weights" for layer in (1, 2)]
    with torch.no_grad(), dropped_slots(MODEL, 2, seed=0), attach(MODEL, read=names) as tape:
        read(MODEL, TRIALS[0])
    gone = torch.stack([tape.last(name)[0] == 0 for name in names])
    assert (gone.sum(-1) == 2).all() and len(gone.flatten(0, 1).unique(dim=0)) == 6  # of the 6 pairs of 4 slots, all


def test_drawn_experts_are_different_ones_in_any_place() -> None:
    with torch.no_grad(), drawn_experts(MODEL, 3, seed=0), attach(MODEL, read=["decoder.layers.1.ffn.router.chosen"]) as tape:
        read(MODEL, TRIALS[0])
    chosen = tape.last("decoder.layers.1.ffn.router.chosen")[0]
    assert chosen.shape[1] == 3 and all(len(set(ids)) == 3 for ids in chosen.tolist())
    assert len(chosen.unique()) == EXPERTS


def test_only_the_planted_expert_costs_anything() -> None:
    """All experts of layer 2 write nothing, except number 7, which everyone chooses and which writes the right word."""
    model, word = copy.deepcopy(MODEL), "two"
    one = trial(reply=word)
    ffn = model.decoder.layers[2].ffn
    ffn.experts.down.zero_()
    ffn.shared.down.weight.zero_()
    ffn.router.chosen.bias[7] += 10
    target = model.logits.weight[one.ids[one.scored[0]]]
    ffn.experts.down[7] = 1e3 * target[:, None] * model.decoder.norm.weight[:, None] / len(ffn.experts.down[7])
    with attach(model, read=["decoder.layers.2.ffn_norm"]) as tape, torch.no_grad():
        read(model, one)
    x = tape.last("decoder.layers.2.ffn_norm")[0, one.scored[0] - 1]
    ffn.experts.gate_up[7] = x.sign() * ffn.experts.gate_up[7].abs()  # so that it writes along the word there
    bench = expert_bench(model, [one], seed=0)
    found = [measure_expert(bench, {"layer": 2, "expert": expert}) for expert in range(EXPERTS)]
    losses = np.array([result["loss"][0] for result in found])
    assert losses.argmax() == 7 and losses[7] > 1
    assert not np.delete(losses, 7).any()
    shares = [result["slots"] for result in found]
    assert sum(shares) == pytest.approx(1) and shares[7] == pytest.approx(1 / K)
    assert found[7]["control"][0] < losses[7]  # as many random slots hit it now and then


def test_an_experts_loss_is_that_of_its_contribution_taken_away_by_hand() -> None:
    chosen = []
    for one in TRIALS:
        with torch.no_grad(), attach(MODEL, read=["decoder.layers.1.ffn.router.chosen"]) as tape:
            read(MODEL, one)
        chosen.append(tape.last("decoder.layers.1.ffn.router.chosen").flatten())
    share = torch.cat(chosen).bincount(minlength=EXPERTS).double() / len(torch.cat(chosen))
    expert = int((share - 0.1).abs().argmin())  # one that some tokens choose and some do not
    bench = expert_bench(MODEL, TRIALS, seed=0, batch=3)  # the third trial is shorter: padding
    found = measure_expert(bench, {"layer": 1, "expert": expert})
    worker = copy.deepcopy(MODEL)
    worker.decoder.layers[1].ffn.experts.down[expert] = 0
    nll, before = score(worker, TRIALS).nll, score(MODEL, TRIALS).nll
    by_domain = [np.mean((nll - before)[[0, 2]]), (nll - before)[1]]
    assert all(by_domain)
    np.testing.assert_allclose(found["loss"], by_domain, atol=1e-9)
    assert found["slots"] == pytest.approx(float(share[expert]))
    assert measure_expert(bench, {"layer": 1, "expert": expert}) == found  # the random control too
    slots = [measure_expert(bench, {"layer": 1, "expert": expert})["slots"] for expert in range(EXPERTS)]
    assert sum(slots) == pytest.approx(1)  # the slots of padding count nowhere


def test_the_sweep_over_experts_is_resumed_and_makes_one_table(tmp_path: Path) -> None:
    options = {"path": tmp_path / "experts.jsonl", "scenes": 1, "families": ["name"], "layers": [2], "progress": False}
    asked = 0

    def stop() -> bool:
        nonlocal asked
        asked += 1
        return asked > 6

    with pytest.raises(SweepError, match="of 16 cases are still to do"):
        single_experts(**options, workers=1, should_stop=stop)
    lines = (tmp_path / "experts.jsonl").read_bytes()
    result = single_experts(**options, workers=1)
    assert (tmp_path / "experts.jsonl").read_bytes().startswith(lines)
    assert result["loss"].shape == (1, 16, 1) and result["slots"].sum() == pytest.approx(1)
    assert result["loss"].any() and not result["loss"][result["slots"] == 0].any()
    with pytest.raises(ValueError, match="layer 0 has no experts"):
        single_experts(**options | {"layers": [0]})
    figure = single_experts_figure(result)
    figure.savefig(BytesIO())
    assert figure.get_supxlabel() == "study"


# --- I5 ------------------------------------------------------------------------------------------------------------------


def greedy(model: KimiVL, asked: Trial) -> Trial:
    """The trial with its first scored token as the model would write it, and nothing else scored."""
    with torch.no_grad():
        word = int(model.logits(read(model, asked)[0, asked.scored[0] - 1]).argmax())
    ids = asked.ids.clone()
    ids[asked.scored[0]] = word
    return Trial(**{**vars(asked), "ids": ids, "scored": asked.scored[:1]})


def test_only_the_object_matters_where_only_the_object_is_seen() -> None:
    """The decoder gets visual token 1 and nothing of the other five, so replacing those changes nothing at all."""
    trials = [trial(seed, boxes=[(28, 0, 56, 28)]) for seed in range(3)]
    places = trials[0].positions("picture")

    def hide(stream: torch.Tensor, _site: str) -> torch.Tensor:
        stream[:, [place for at, place in enumerate(places) if at != 1]] = 0
        return stream

    with attach(MODEL, edit={"embedded": hide}):
        result = visual_token_ablation(MODEL, trials, model_name=NAME, draws=2)
    names = result.axes["wrong"][0][1]
    loss = dict(zip(names, result["loss"][:, 0], strict=True))
    tokens = dict(zip(names, result["tokens"][:, 0], strict=True))
    assert tokens == {
        "object": 1, "random, as many": 1, "gradient, as many": 1, "object + 1 ring": 6, "random, as many as the ring": 5,
        "blank picture": 6, "shuffled picture": 6,
    }  # fmt: skip
    assert loss["object"] != 0 and loss["object"] == loss["object + 1 ring"]
    assert loss["random, as many"] == loss["random, as many as the ring"] == 0
    assert loss["gradient, as many"] == loss["object"]  # the gradient finds it


def test_wrong_counts_only_what_was_right_before() -> None:
    right, wrong = greedy(MODEL, trial(0, boxes=[(0, 0, 28, 28)])), trial(1, "red red", boxes=[(0, 0, 28, 28)])
    assert score(MODEL, [right, wrong]).right.tolist() == [True, False]
    result = visual_token_ablation(MODEL, [right, wrong], model_name=NAME, draws=1)
    alone = visual_token_ablation(MODEL, [right, wrong][:1], model_name=NAME, draws=1)
    assert set(result["wrong"][:, 0].tolist()) <= {0.0, 1.0} and result.about["right_before"] == 1
    assert result["wrong"][-2:, 0].tolist()[0] == alone["wrong"][-2:, 0].tolist()[0]
    only_wrong = visual_token_ablation(MODEL, [wrong], model_name=NAME, draws=1)
    assert np.isnan(only_wrong["wrong"]).all() and not np.isnan(only_wrong["loss"]).any()


def test_other_pictures_are_blank_or_made_of_the_same_cells() -> None:
    one = trial()
    blank, shuffled = (other_picture(one, kind, np.random.default_rng(3)) for kind in ("blank picture", "shuffled picture"))
    assert not blank.pixel_values.any()
    grid = one.pictures[0].grid
    cells = [one.pixel_values[grid.patches_of_token(token)] for token in range(6)]
    found = [next(at for at, cell in enumerate(cells) if torch.equal(cell, shuffled.pixel_values[grid.patches_of_token(token)]))
             for token in range(6)]  # fmt: skip
    assert sorted(found) == list(range(6)) and found != list(range(6))


def test_a_ring_is_the_eight_neighbours() -> None:
    hit = np.zeros((5, 6), bool)
    hit[0, 1] = hit[4, 5] = True
    expected = np.zeros((5, 6), bool)
    expected[0:2, 0:3] = expected[3:5, 4:6] = True
    assert np.array_equal(grown(hit), expected)


def test_attention_received_is_the_mean_of_explicit_rows(seeing: KimiVL) -> None:
    one = trial()
    places = one.positions("picture")
    with torch.no_grad(), attach(MODEL, read=["decoder.layers.1.attn.core@in"]) as tape:
        read(MODEL, one)
    rows = decoder_rows(tape.last("decoder.layers.1.attn.core@in"))[0]  # (H, T, S)
    expected = [float(rows[:, places[-1] + 1 :, place].mean()) for place in places]
    np.testing.assert_allclose(attention_received(MODEL, one, 1), expected, atol=1e-12)
    np.testing.assert_allclose(np.ptp(attention_received(seeing, one, 1)), 0, atol=1e-12)  # without queries all look alike


def test_dropping_none_is_the_model_and_dropping_all_is_blocking_all() -> None:
    one = trial()
    result = visual_token_dropping(MODEL, [one], model_name=NAME, layer=0, shares=(0, 0.5, 1))
    before = score(MODEL, [one]).nll[0]
    assert [result[name][0, 0] for name in ("loss", "random loss", "most attended loss")] == [before] * 3
    every = [result[name][2, 0] for name in ("loss", "random loss", "most attended loss")]
    assert every[0] == every[1] == every[2] != before
    assert len({result[name][1, 0] for name in ("loss", "most attended loss")}) == 2
    with pytest.raises(ValueError, match="layer=2 has no layer after it"):
        visual_token_dropping(MODEL, [one], model_name=NAME, layer=2)


def test_dropping_is_taking_the_tokens_out_of_the_sequence_from_the_next_layer_on() -> None:
    """By hand: the layers after the chosen one run on the shorter stream, with the positions that its tokens had."""
    one, layer = trial(), 0
    received, places = attention_received(MODEL, one, layer), one.positions("picture")
    gone = {places[at] for at in np.argsort(received)[:3]}
    kept = torch.tensor([at for at in range(len(one.ids)) if at not in gone])
    (seen,) = batches(MODEL, [one], 1)
    with torch.no_grad():
        where = MODEL.decoder.place(seen.x, None)
        x = MODEL.decoder.layers[0](seen.x, where)[:, kept]
        where.rotation = tuple(part[:, kept] for part in where.rotation)
        for block in MODEL.decoder.layers[1:]:
            x = block(x, where)
        stream = torch.zeros_like(seen.x)
        stream[:, kept] = MODEL.decoder.norm(x)
        logits = MODEL.logits(stream)[0].log_softmax(-1)
    expected = -np.mean([float(logits[at - 1, one.ids[at]]) for at in one.scored])
    result = visual_token_dropping(MODEL, [one], model_name=NAME, layer=layer, shares=(0.5,))
    assert result["loss"][0, 0] == pytest.approx(expected, abs=1e-9)
    assert score_batches(MODEL, [seen]).nll[0] != pytest.approx(expected, abs=1e-6)


def test_figures_name_the_weights_and_draw_controls_and_chance() -> None:
    boxed = [trial(0, boxes=[(0, 0, 28, 28)])]
    masking = expert_masking(MODEL, TRIALS, model_name=NAME, shares=(0, 2 / EXPERTS))
    sweep = top_k_sweep(MODEL, TRIALS, model_name=NAME, ks=(3, 4))
    tokens = visual_token_ablation(MODEL, boxed, model_name=NAME, draws=1)
    figures = [
        masking_figure(masking),
        top_k_figure(sweep),
        token_ablation_figure(tokens),
        dropping_figure(visual_token_dropping(MODEL, boxed, model_name=NAME, shares=(0, 0.5))),
    ]
    for figure in figures:
        assert figure.get_supxlabel() == NAME
        figure.savefig(BytesIO())
    for at, result in enumerate((masking, sweep)):
        lines = [line.get_ydata() for line in figures[at].axes[0].lines]
        assert any(np.array_equal(line, [result.chance["loss"]] * 2) for line in lines)
        control = result["control"][:, 0] if at == 0 else result["control"][:, 0, 0]
        assert any(np.array_equal(line, control) for line in lines)
    hatched = {patch.get_label() for patch in figures[2].axes[0].containers if patch[0].get_hatch()}
    assert {label.split(" (")[0] for label in hatched} == {"random, as many", "random, as many as the ring"}
    assert [line.get_label() for line in figures[3].axes[0].lines] == ["least attended", "random, as many", "most attended"]
