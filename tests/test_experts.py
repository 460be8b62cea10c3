"""Words, partners, checkpoints, neighbours and sizes of experts: planted answers, and what luck alone would give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from hand_made import NAME, blank, drawn_words, hand_made, levels, random_choice
from kimi_vl_ref import KimiVL
from kimi_vl_ref.attention import ExplicitCore
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.experts import agreement, coactivation, first_experts, repetition, vocabulary_specialisation
from workbench.analyses.magnitudes import pruning_damage, received, shared_and_routed, sink_decay, super_experts
from workbench.analyses.trials import Trial, make_trial, read, score
from workbench.figures.experts import (
    agreement_figure,
    coactivation_figure,
    pruning_figure,
    repetition_figure,
    shared_figure,
    super_experts_figure,
    vocabulary_figure,
)
from workbench.runs import Run, record
from workbench.tape import attach

EXPERTS = 8


@pytest.fixture(scope="module")
def run() -> Run:
    *_, run = record(talking_model(), tiny_chat(), question("How many?", picture(90, 60)), model_name=NAME, max_new_tokens=8)
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def trials() -> list[Trial]:
    asked = [question("How many red circles?", picture(60, 60)), question("count the circles")]
    return [make_trial(tiny_chat(), one, "There are two.") for one in asked]


# --- R5 ------------------------------------------------------------------------------------------------------------------


def test_a_router_that_follows_the_id_has_an_identity_share_of_one() -> None:
    """Layer 1 goes by the token read, layer 2 by the next token; ids are drawn at random, so neither tells of the other."""
    rng, runs = np.random.default_rng(0), []
    for _ in range(4):
        ids = rng.integers(EXPERTS, size=400)
        by_id, by_next = ids, np.append(ids[1:], 0)
        chosen = np.stack([np.stack([by, (by + 1) % EXPERTS], -1) for by in (by_id, by_next)])
        runs.append(hand_made(chosen, EXPERTS, token_ids=ids, weights=np.tile([0.75, 0.25], (2, 400, 1))))
    result = vocabulary_specialisation(runs, shuffles=20, draws=50)
    assert result["identity"][0, 0] == pytest.approx(1) and result["identity"][1, 1] == pytest.approx(1)
    for side, layer in ((0, 1), (1, 0)):  # the other way round it is luck, as the shuffles show
        assert result["identity"][side, layer] < 0.05 and result["shuffled"][side, layer] < 0.05
    assert result["shuffled_high"].max() < 0.05
    assert result["word"][0, 3, 0] == "w3" and result["word_share"][0, 3].tolist() == [1, 0, 0, 0, 0]
    assert result["word"][0, 3, 1] == ""


def test_luck_with_rare_words_is_in_the_shuffles() -> None:
    """40 ids of 8 tokens each, experts at random: the plain share is far above 0, and so is that of shuffled ids."""
    rng = np.random.default_rng(0)
    ids = np.repeat(np.arange(40), 8)
    result = vocabulary_specialisation([hand_made(random_choice(rng, 320, EXPERTS, 1), EXPERTS, token_ids=ids)], shuffles=50)
    assert result["identity"][0, 0] > 0.2
    assert result["shuffled_low"][0, 0] <= result["identity"][0, 0] <= result["shuffled_high"][0, 0]


def test_only_frequent_words_of_question_and_reply_count() -> None:
    roles = ["special"] * 20 + ["image 0"] * 2 + ["user"] * 9 + ["answer"] * 3
    ids = [1] * 20 + [2, 2] + [3] * 9 + [4] * 3
    run = hand_made(np.arange(34)[:, None] % 4, 4, roles, token_ids=ids, pictures=[blank(1, 2)])
    result = vocabulary_specialisation([run], shuffles=2)
    assert result["tokens"].tolist() == [9, 8] and result["ids"].tolist() == [1, 1]
    with pytest.raises(ValueError, match="no token of these runs occurs 10 times"):
        vocabulary_specialisation([run], at_least=10)


def test_the_first_expert_has_the_largest_weight_not_the_largest_selection() -> None:
    run = hand_made([[2, 1], [0, 3]], 4, weights=[[[0.25, 0.75], [0.5, 0.5]]])
    assert first_experts(run).tolist() == [[1, 0]]


# --- R6 ------------------------------------------------------------------------------------------------------------------


def test_independent_picks_are_together_at_chance() -> None:
    run = hand_made(random_choice(np.random.default_rng(0), 20000, EXPERTS, 3), EXPERTS)
    result = coactivation([run])
    off = ~np.eye(EXPERTS, dtype=bool)
    assert result.chance["together"] == 2 / 7
    np.testing.assert_allclose(result["together"][0][off], 2 / 7, atol=0.03)
    np.testing.assert_allclose(result["by_load"][0][off], 2 / 7, atol=0.01)
    assert (result["together"][0].diagonal() == 1).all()


def test_partners_and_strangers_are_found_and_never_chosen_is_nan() -> None:
    """0 always comes with 1; 1 comes with 0 in half of its tokens; 3 is never chosen."""
    run = hand_made([[0, 1], [1, 0], [1, 2], [2, 1]], 4)
    together = coactivation([run])["together"][0]
    expected = [[1, 1, 0, 0], [0.5, 1, 0.5, 0], [0, 1, 1, 0], [np.nan] * 4]
    np.testing.assert_array_equal(together, expected)
    with pytest.raises(ValueError, match="no picture tokens"):
        coactivation([run], "picture")


def test_what_loads_lead_to_adds_up_to_the_other_picks(run: Run) -> None:
    result = coactivation([run])
    used = ~np.isnan(result["together"][..., 0])
    for name in ("together", "by_load"):
        np.testing.assert_allclose(result[name].sum(-1)[used], 4)  # itself, and K - 1 others


def test_coactivation_is_that_of_pairs_counted_by_hand(run: Run) -> None:
    result, pairs = coactivation([run]), Counter()
    for chosen in run.chosen[1].tolist():
        pairs.update((i, j) for i in chosen for j in chosen)
    for i, j in ((0, 1), (4, 2), (7, 9)):
        if pairs[i, i]:
            assert result["together"][1, i, j] == pytest.approx(pairs[i, j] / pairs[i, i])
    assert sum(pairs.values()) == len(run.token_ids) * 16


# --- R7 ------------------------------------------------------------------------------------------------------------------


def test_a_model_agrees_with_itself_and_a_stranger_by_chance(run: Run) -> None:
    np.testing.assert_array_equal(agreement([run], [run])["same"][0], [1, 1])
    rng = np.random.default_rng(0)
    a, b = (hand_made(random_choice(rng, 5000, EXPERTS, 3), EXPERTS) for _ in range(2))
    result = agreement([a], [b], ["all"])
    assert result["same"][0, 0] == pytest.approx(3 / 8, abs=0.02) and result.chance["same"] == 3 / 8


def test_half_of_the_experts_in_another_order_is_half_an_agreement() -> None:
    a, b = hand_made([[0, 1], [2, 3]], 8), hand_made([[1, 5], [3, 2]], 8, model_name="another")
    result = agreement([a], [b], ["all"])
    assert result["same"][0, 0] == 0.75
    b = replace(b, versions={"weights": "others"})
    assert agreement([a], [b], ["all"]).weights == f"{NAME} and another"


def test_replies_are_compared_as_long_as_they_are_the_same() -> None:
    a = hand_made([[0], [1], [2], [3]], 4, ["user", "user", "answer", "answer"], prompt_length=2)
    b = hand_made([[0], [1], [2], [0]], 4, a.roles, prompt_length=2, token_ids=[0, 1, 2, 9])
    result = agreement([a], [b], ["all", "decode"])
    assert result["tokens"].tolist() == [3, 1] and result["same"][0, 0] == 1
    with pytest.raises(ValueError, match="pair 0 has different prompts from token 1 on"):
        agreement([a], [hand_made([[0], [1]], 4, token_ids=[0, 7], prompt_length=2)])
    with pytest.raises(ValueError, match="1 runs cannot be paired with 2"):
        agreement([a], [a, a])


def test_another_picture_is_no_agreement() -> None:
    light = blank(1, 2)
    dark = replace(light, image=light.image.point(lambda value: value // 2))
    a, b = (hand_made([[0], [1]], 4, ["image 0"] * 2, pictures=[one]) for one in (light, dark))
    with pytest.raises(ValueError, match="pair 0 has different pictures"):
        agreement([a], [b])


# --- R8 ------------------------------------------------------------------------------------------------------------------


def test_constant_routing_repeats_and_random_routing_is_at_chance() -> None:
    rng = np.random.default_rng(0)
    chosen = np.stack([np.tile([0, 1, 2], (4000, 1)), random_choice(rng, 4000, EXPERTS, 3)[0]])
    result = repetition([hand_made(chosen, EXPERTS)], ["answer"], [1, 5])
    assert (result["first"][0, 0] == 1).all() and (result["shared"][0, 0] == 1).all()
    assert result["first_shuffled"][0, 0] == 1
    np.testing.assert_allclose(result["first"][0, 1], 1 / 8, atol=0.02)
    np.testing.assert_allclose(result["shared"][0, 1], 3 / 8, atol=0.02)
    assert result.chance == {"first": 1 / 8, "shared": 3 / 8}


def test_a_rhythm_is_found_at_its_own_lag_and_not_in_any_order() -> None:
    result = repetition([hand_made(np.arange(300)[:, None] % 3, 4)], ["answer"], [1, 2, 3])
    assert result["first"][0, 0].tolist() == [0, 0, 1]
    assert result["first_shuffled"][0, 0] == pytest.approx(99 / 299)  # another of the 100 of 300


def test_pictures_are_compared_along_rows_and_columns() -> None:
    """3 x 4 tokens whose expert is their column: all vertical neighbours alike, no horizontal one."""
    run = hand_made(np.tile(np.arange(4), 3)[:, None], 4, ["image 0"] * 12, pictures=[blank(3, 4)])
    result = repetition([run], ["picture"], [1, 2])
    assert result["pairs"].tolist() == [[2 * 4 + 3 * 3, 1 * 4 + 3 * 2]]
    np.testing.assert_allclose(result["first"][0, 0], [8 / 17, 4 / 10])


def test_a_group_ends_where_another_begins() -> None:
    run = hand_made([[0], [0], [0], [1], [1]], 4, ["thought", "thought", "answer", "thought", "thought"])
    result = repetition([run], ["thought", "answer"], [1, 2])
    assert result["pairs"].tolist() == [[2, 1], [0, 0]] and np.isnan(result["first"][1]).all()
    assert result["first"][0, 0].tolist() == [1, 0]
    with pytest.raises(ValueError, match="lag 0 is no distance"):
        repetition([run], ["thought"], [0])


# --- R9 ------------------------------------------------------------------------------------------------------------------


@contextmanager
def louder(model: KimiVL, layer: int, expert: int, times: float) -> Iterator[None]:
    """One expert writes so many times as much."""
    down = model.decoder.layers[layer].ffn.experts.down
    before = down[expert].clone()
    down[expert] *= times
    try:
        yield
    finally:
        down[expert] = before


def busiest(model: KimiVL, trials: list[Trial], layer: int) -> int:
    with attach(model, read=[f"decoder.layers.{layer}.ffn.router.chosen"]) as tape, torch.no_grad():
        read(model, trials[0])
    (chosen,) = tape[f"decoder.layers.{layer}.ffn.router.chosen"]
    return int(chosen.flatten().bincount().argmax())


def test_one_expert_a_thousand_times_louder_is_the_super_expert(trials: list[Trial]) -> None:
    model = talking_model()
    plain = super_experts(model, trials, model_name=NAME)
    assert plain.about["super experts"] == [] and not plain["massive"].any()
    expert = busiest(model, trials, 1)
    with louder(model, 1, expert, 1e3):
        loud = super_experts(model, trials, model_name=NAME)
    assert loud.about["candidates"] == [[1, expert]]
    np.testing.assert_allclose(loud["magnitude"][0, expert], 1e3 * plain["magnitude"][0, expert], rtol=1e-4)
    others = np.arange(11) != expert
    np.testing.assert_allclose(loud["magnitude"][0, others], plain["magnitude"][0, others], rtol=1e-4)


def test_a_candidate_is_super_where_massive_activations_form(trials: list[Trial], monkeypatch: pytest.MonkeyPatch) -> None:
    """One row of one expert a million times larger: a single channel of its tokens towers over the stream from there on."""
    model, layer = talking_model(), 2
    with attach(model, read=[f"decoder.layers.{layer}.ffn.router.chosen"]) as tape, torch.no_grad():
        read(model, trials[0])
    counts = tape[f"decoder.layers.{layer}.ffn.router.chosen"][0].flatten().bincount(minlength=11)
    expert = int(counts.argmax())
    down = model.decoder.layers[layer].ffn.experts.down
    before = down[expert, 0].clone()
    down[expert, 0] *= 1e6
    try:
        result = super_experts(model, trials, model_name=NAME)
    finally:
        down[expert, 0] = before
    assert result.about["super experts"] == [[layer, expert]]
    assert result["massive"].tolist() == [0, 0, 1]


def test_magnitudes_are_those_of_every_expert_alone(trials: list[Trial]) -> None:
    """From the weights and the experts' input, token by token."""
    model = talking_model()
    result = super_experts(model, trials[1:], model_name=NAME)
    site = "decoder.layers.1.ffn"
    with attach(model, read=[f"{site}.experts@in", f"{site}.router.chosen"]) as tape, torch.no_grad():
        read(model, trials[1])
    x, chosen, _ = tape[f"{site}.experts@in"][0]
    worker, largest = model.decoder.layers[1].ffn.experts, np.zeros(11)
    for token, experts in zip(x[0], chosen[0].tolist(), strict=True):
        for expert in experts:
            gate, up = (worker.gate_up[expert] @ token).chunk(2)
            out = worker.down[expert] @ (torch.nn.functional.silu(gate) * up)
            largest[expert] = max(largest[expert], float(out.abs().max()))
    np.testing.assert_allclose(result["magnitude"][0], largest, rtol=1e-4)


def test_pruning_a_loud_expert_does_more_than_pruning_others(trials: list[Trial]) -> None:
    model = talking_model()
    expert = busiest(model, trials, 1)
    with louder(model, 1, expert, 30.0):
        result = pruning_damage(model, trials, [(1, expert)], model_name=NAME, controls=4)
        before = score(model, trials)
    change = np.abs(result["nll_change"]).mean(1)
    assert change[0] > 3 * change[1:].max() > 0
    assert result.about["nll"] == pytest.approx(before.nll.mean(), rel=1e-5)
    named = [tuple(one) for name, of in result.about["sets"].items() if name != "these" for one in of]
    assert len(named) == 4 and all(layer == 1 and other != expert for layer, other in named)


def test_pruning_is_zeroing_the_expert_weights(trials: list[Trial]) -> None:
    model = talking_model()
    expert = busiest(model, trials, 2)
    result = pruning_damage(model, trials, [(2, expert)], model_name=NAME, controls=0)
    before = score(model, trials).nll
    with louder(model, 2, expert, 0.0):
        after = score(model, trials).nll
    assert np.abs(result["nll_change"][0]).max() > 0
    np.testing.assert_allclose(result["nll_change"][0], after - before, rtol=1e-3, atol=1e-6)
    with pytest.raises(ValueError, match="no experts to prune"):
        pruning_damage(model, trials, [], model_name=NAME)
    with pytest.raises(ValueError, match="layer 2 has 5 other experts, too few to control for 6"):
        pruning_damage(model, trials, [(2, e) for e in range(6)], model_name=NAME)


def test_sinks_that_lose_half_of_their_attention_have_decayed_by_half() -> None:
    """Layer 0: head 0 has a sink of 0.5 that falls to 0.25, head 1 none. Layer 1 has no sink."""
    before = np.array([[[0.5, 0.2, 0.1], [0.2, 0.2, 0.2]], [[0.1, 0.1, 0.1], [0.3, 0.1, 0.1]]])
    after = before * [[[0.5], [0.9]], [[0.9], [0.9]]]
    np.testing.assert_allclose(sink_decay([before], [after]), [0.5, np.nan])
    np.testing.assert_allclose(sink_decay([before, before], [after, before]), [0.25, np.nan])


def test_what_a_key_receives_is_the_mean_of_its_column_in_the_explicit_core(trials: list[Trial]) -> None:
    model, site = talking_model(), "decoder.layers.1.attn.core"
    with attach(model, read={f"{site}@in": received}) as tape, torch.no_grad():
        read(model, trials[0])
    explicit = {site: lambda original: ExplicitCore()}
    with attach(model, read=[f"{site}.probs"], swap=explicit) as spelled, torch.no_grad():
        read(model, trials[0])
    probs = spelled[f"{site}.probs"][0][0].numpy()  # (H, T, T)
    count = probs.shape[-1]
    for key in (0, 3, count // 2):
        np.testing.assert_allclose(tape[f"{site}@in"][0][:, key], probs[:, key:, key].mean(-1), rtol=1e-4)
    assert not tape[f"{site}@in"][0][:, -1].any()  # only the last token sees the last token


def test_the_shared_part_is_all_where_the_routed_experts_are_silent(trials: list[Trial]) -> None:
    model = talking_model()
    down = model.decoder.layers[1].ffn.experts.down
    before = down.clone()
    plain = shared_and_routed(model, trials, model_name=NAME)
    down.zero_()
    try:
        silent = shared_and_routed(model, trials, model_name=NAME)
    finally:
        down.copy_(before)
    assert silent["shared_part"][0, 0] == 1 and silent["routed"][0, 0] == 0
    assert 0 < plain["shared_part"][0, 0] < 1
    site = "decoder.layers.1.ffn"
    parts = [f"{site}.shared", f"{site}.experts"]
    norms = []
    for trial in trials:
        with attach(model, read=parts) as tape, torch.no_grad():
            read(model, trial)
        norms.append(np.stack([tape[part][0][0].norm(dim=-1).numpy() for part in parts]))
    shared, routed = np.concatenate(norms, axis=1)
    assert plain["shared_part"][0, 0] == pytest.approx((shared / (shared + routed)).mean(), rel=1e-5)


# --- figures -------------------------------------------------------------------------------------------------------------


def test_every_figure_of_experts_names_the_weights(run: Run, trials: list[Trial]) -> None:
    model = talking_model()
    shown = coactivation([run])
    figures = [
        vocabulary_figure(vocabulary_specialisation([run], at_least=1, shuffles=3)),
        coactivation_figure(shown, layer=2),
        agreement_figure(agreement([run], [run])),
        repetition_figure(repetition([run])),
        super_experts_figure(super_experts(model, trials, model_name=NAME)),
        pruning_figure(pruning_damage(model, trials, [(1, 0)], model_name=NAME, controls=2)),
        shared_figure(shared_and_routed(model, trials, model_name=NAME)),
    ]
    for figure in figures:
        assert NAME in drawn_words(figure)
    assert "layer 2" in drawn_words(figures[1]) and "by chance 9%" in drawn_words(figures[0])
    assert 3 / 10 in levels(figures[1].axes[1])  # (K - 1) / (E - 1)
    assert 4 / 11 in levels(figures[2].axes[0])  # K / E
    assert 1 / 11 in levels(figures[3].axes[0]) and 4 / 11 in levels(figures[3].axes[1])
    assert set(super_experts(model, trials, model_name=NAME).chance["magnitude"].values()) <= set(levels(figures[4].axes[0]))
    marks = {line.get_label(): len(np.atleast_1d(line.get_ydata())) for line in figures[5].axes[0].lines}
    assert marks["these experts"] == 1 and marks["random sets of the same size"] == 2 and 0 in levels(figures[5].axes[0])
    assert 0.5 in levels(figures[6].axes[0]) and 0 in levels(figures[6].axes[1])
    with pytest.raises(ValueError, match="layer 0 does not route"):
        coactivation_figure(shown, layer=0)
