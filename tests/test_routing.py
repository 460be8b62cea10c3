"""Load, confidence and specialisation of experts: what was planted is what is found, and luck is told from it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from hand_made import NAME, blank, drawn_words, hand_made, random_choice
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.counting import GROUPS, KINDS, kinds_of, mutual_information, over_runs, positions_of
from workbench.analyses.result import Result
from workbench.analyses.routing import (
    domain_specialisation,
    expert_loads,
    expert_map,
    gini,
    kind_information,
    modality_specialisation,
    routing_confidence,
)
from workbench.figures.routing import (
    confidence_figure,
    domains_figure,
    expert_map_figure,
    kinds_figure,
    load_figure,
    modality_figure,
)
from workbench.runs import Run, record

EXPERTS = 8


@pytest.fixture(scope="module")
def runs() -> list[Run]:
    """Two real runs of the random model: its own routing, over pictures and words."""
    found = []
    for seed in (0, 1):
        asked = question("How many red circles?", picture(100, 60, seed))
        *_, run = record(talking_model(), tiny_chat(), asked, model_name=NAME, max_new_tokens=6)
        assert isinstance(run, Run)
        found.append(run)
    return found


def of(result: Result, name: str, group: str) -> np.ndarray:
    return result[name][[str(one) for one in result.axes[name][0][1]].index(group)]


# --- groups and counts -------------------------------------------------------------------------------------------------


def test_groups_are_positions_of_the_run() -> None:
    roles = ["special", "image 0", "image 0", "user", "special", "thought", "answer", "special"]
    run = hand_made(np.zeros((8, 1)), 2, roles, prompt_length=5, pictures=[blank(1, 2)])
    found = {group: positions_of(run, group).tolist() for group in GROUPS}
    assert found == {
        "all": list(range(8)), "prefill": [0, 1, 2, 3, 4], "decode": [5, 6, 7], "picture": [1, 2], "text": [0, 3, 4, 5, 6, 7],
        "question": [3], "thought": [5], "answer": [6],
    }  # fmt: skip
    with pytest.raises(ValueError, match="no group of tokens is called 'words'"):
        positions_of(run, "words")


def test_each_token_has_one_kind_and_digits_are_told_from_words() -> None:
    roles = ["special", "image 0", "user", "user", "thought", "thought", "answer", "answer"]
    texts = ["<|im_user|>", "<|media_pad|>", " count", " 2", " so", "3", "red", "x4"]
    run = hand_made(np.zeros((8, 1)), 2, roles, texts=texts, pictures=[blank(1, 1)])
    names = [KINDS[at] for at in kinds_of(run)]
    assert names == ["marker", "picture", "prompt", "digit", "thought", "digit", "answer", "answer"]


def test_an_interval_covers_the_mean_of_runs_as_often_as_it_says() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        sums = rng.normal(1.0, 1.0, (30, 1))
        _, low, high = over_runs(lambda total, n: total / n, sums, np.ones((30, 1)), draws=200)
        covered += bool(low[0] <= 1.0 <= high[0])
    assert 0.88 <= covered / 200 <= 0.98
    assert np.isnan(over_runs(lambda total: total, np.ones((1, 2)))[1]).all()  # one run has no interval


def test_runs_of_different_routing_are_refused() -> None:
    a, b = hand_made(np.zeros((3, 1)), 4), hand_made(np.zeros((3, 1)), 5)
    with pytest.raises(ValueError, match="run 1 has the layers, experts and top_k"):
        expert_loads([a, b])
    with pytest.raises(ValueError, match="no runs to analyse"):
        expert_loads([])


# --- R1 ------------------------------------------------------------------------------------------------------------------


def test_uniform_routing_has_no_violation_and_all_to_one_the_largest() -> None:
    even = np.stack([np.arange(16) % EXPERTS, (np.arange(16) + 1) % EXPERTS], -1)
    uneven = np.tile([3, 5], (16, 1))
    result = expert_loads([hand_made(np.stack([even, uneven]), EXPERTS)], ["all"])
    np.testing.assert_allclose(result["max_vio"], [[0, EXPERTS / 2 - 1]], atol=1e-12)
    np.testing.assert_allclose(result["cv"], [[0, np.sqrt(EXPERTS / 2 - 1)]], atol=1e-12)
    np.testing.assert_allclose(result["gini"], [[0, 1 - 2 / EXPERTS]], atol=1e-12)
    assert result["dead"].tolist() == [[0, EXPERTS - 2]]
    assert result["load"][0, 1].tolist() == [0, 0, 0, 1, 0, 1, 0, 0]


def test_gini_is_the_mean_difference_of_two_experts() -> None:
    counts = np.array([4.0, 0, 9, 2, 2, 7])
    pairs = np.abs(counts[:, None] - counts[None]).mean()
    assert gini(counts) == pytest.approx(pairs / (2 * counts.mean()))


def test_load_and_violation_are_those_of_a_count_by_hand(runs: list[Run]) -> None:
    result = expert_loads(runs)
    for group in ("picture", "decode"):
        for at in range(len(runs[0].moe_layers)):
            seen: Counter[int] = Counter()
            tokens = 0
            for run in runs:
                for t, role in enumerate(run.roles):
                    if role.startswith("image ") if group == "picture" else t >= run.prompt_length:
                        tokens += 1
                        seen.update(run.chosen[at, t].tolist())
            load = np.array([seen[expert] / tokens for expert in range(11)])
            np.testing.assert_allclose(of(result, "load", group)[at], load)
            assert of(result, "max_vio", group)[at] == pytest.approx(max(seen.values()) / (tokens * 4 / 11) - 1)
    assert result.chance["load"] == 4 / 11 and result.weights == NAME


# --- R2 ------------------------------------------------------------------------------------------------------------------


def test_equal_scores_have_the_entropy_of_all_experts() -> None:
    run = hand_made(np.tile([0, 1], (5, 1)), EXPERTS, scores=np.full((1, 5, EXPERTS), 0.5))
    result = routing_confidence([run], ["all"])
    assert result["score_entropy"][0, 0] == pytest.approx(np.log2(EXPERTS))
    assert result["weight_entropy"][0, 0] == pytest.approx(1.0)  # two experts that count alike
    assert result["effective_experts"][0, 0] == pytest.approx(2.0)
    assert result["margin"][0, 0] == 0 and result["flip_rate"][0, 0] == 0


def test_margin_and_flips_are_those_that_were_planted() -> None:
    scores = np.zeros((1, 4, 4))
    scores[0] = [0.5, 0.375, 0.25, 0.125]
    bias = np.array([[0, 0, 0.1875, 0]])  # 0.25 + 0.1875 passes 0.375
    scores[0, 3] = [0.75, 0.625, 0.25, 0.125]  # and does not pass 0.625
    run = hand_made([[0, 2], [0, 2], [0, 2], [0, 1]], 4, scores=scores, bias=bias)
    result = routing_confidence([run], ["all"])
    assert result["flip_rate"][0, 0] == 0.75
    assert result["margin"][0, 0] == pytest.approx((3 * (0.4375 - 0.375) + (0.625 - 0.4375)) / 4)


def test_confidence_is_that_of_the_raw_scores(runs: list[Run]) -> None:
    """Token by token from the recorded scores, with plain Python."""
    result, run = routing_confidence(runs[:1]), runs[0]
    entropies, flips, margins = [], [], []
    for t in range(run.prompt_length, len(run.token_ids)):
        s, b = [float(x) for x in run.scores[0, t]], [float(x) for x in run.bias[0]]
        entropies.append(-sum(x / sum(s) * np.log2(x / sum(s)) for x in s))
        biased = [x + y for x, y in zip(s, b, strict=True)]
        top, plain = (set(sorted(range(11), key=lambda e: -v[e])[:4]) for v in (biased, s))
        flips.append(top != plain)
        margins.append(sorted(biased)[-4] - sorted(biased)[-5])
        assert top == set(run.chosen[0, t].tolist())
    assert of(result, "score_entropy", "decode")[0] == pytest.approx(np.mean(entropies))
    assert of(result, "flip_rate", "decode")[0] == pytest.approx(np.mean(flips))
    assert of(result, "margin", "decode")[0] == pytest.approx(np.mean(margins))


# --- R3 ------------------------------------------------------------------------------------------------------------------


def domain_runs(own: bool, seed: int = 0) -> tuple[list[Run], list[str]]:
    """Sixteen runs of two domains; the experts are the domain's own half, or anyone's."""
    rng, runs = np.random.default_rng(seed), []
    domains = ["chart", "count"] * 8  # of fewer, some dealings are the true one
    for domain in domains:
        chosen = random_choice(rng, 60, EXPERTS // 2 if own else EXPERTS, 2)
        runs.append(hand_made(chosen + (EXPERTS // 2 if own and domain == "count" else 0), EXPERTS))
    return runs, domains


def test_domains_with_experts_of_their_own_have_nothing_in_common() -> None:
    runs, domains = domain_runs(own=True)
    result = domain_specialisation(runs, domains, shuffles=50)
    assert result["share"][0, 0, EXPERTS // 2 :].sum() == 0 and result["share"][1, 0, : EXPERTS // 2].sum() == 0
    np.testing.assert_allclose(result["share"].sum(-1), 2)
    np.testing.assert_allclose(result["divergence"][0], [[0, 1], [1, 0]], atol=1e-12)
    assert result["mean_divergence"][0] > result["divergence_shuffled"][1, 0]


def test_a_router_that_does_not_care_for_domains_is_at_chance_and_inside_the_shuffles() -> None:
    runs, domains = domain_runs(own=False)
    result = domain_specialisation(runs, domains, shuffles=50)
    assert np.abs(result["share"] - 2 / EXPERTS).max() < 0.1 and result.chance["share"] == 2 / EXPERTS
    assert result["mean_divergence"][0] <= result["divergence_shuffled"][1, 0]


def test_domains_that_cannot_be_compared_are_named() -> None:
    runs, domains = domain_runs(own=True)
    with pytest.raises(ValueError, match="all runs are of the domain 'chart'"):
        domain_specialisation(runs, ["chart"] * 16)
    with pytest.raises(ValueError, match="2 domains are named for 16 runs"):
        domain_specialisation(runs, ["chart", "count"])
    with pytest.raises(ValueError, match="domain 'chart' have no picture tokens"):
        domain_specialisation(runs, domains, "picture")


# --- R4 ------------------------------------------------------------------------------------------------------------------


def modal_run(swapped: bool = False) -> Run:
    """Expert 0 serves pictures only, 1 text only, 2 every token, 3 no one; `swapped` names picture text and text picture."""
    roles = ["image 0"] * 4 + ["user"] * 4
    chosen = [[0, 2]] * 4 + [[1, 2]] * 4
    if swapped:
        roles = roles[::-1]
    return hand_made(chosen, 4, roles, pictures=[blank(2, 2)])


def test_preference_names_the_experts_of_pictures_and_of_text() -> None:
    result = modality_specialisation([modal_run()], shuffles=20)
    np.testing.assert_array_equal(result["preference"], [[1, -1, 0, np.nan]])
    assert result["divergence"][0] == pytest.approx(0.5)  # half of each load is expert 2
    assert result["tokens"].tolist() == [4, 4]


def test_swapped_labels_swap_the_sign() -> None:
    runs = [hand_made(random_choice(np.random.default_rng(0), 8, 4, 2), 4, modal_run(s).roles, pictures=[blank(2, 2)])
            for s in (False, True)]  # fmt: skip
    a, b = (modality_specialisation([run], shuffles=5)["preference"] for run in runs)
    assert np.nanmax(np.abs(a)) > 0.1
    np.testing.assert_allclose(a, -b)


def test_shuffled_modality_is_below_a_planted_one_and_covers_none() -> None:
    runs = [modal_run() for _ in range(10)]
    planted = modality_specialisation(runs, shuffles=50)
    assert planted["divergence"][0] > 5 * planted["divergence_shuffled"][1, 0]
    rng = np.random.default_rng(1)
    runs = [replace(run, chosen=random_choice(rng, 8, 4, 2).astype(np.uint16)) for run in runs]
    none = modality_specialisation(runs, shuffles=50)
    assert none["divergence"][0] <= none["divergence_shuffled"][1, 0]
    with pytest.raises(ValueError, match="show no picture"):
        modality_specialisation([hand_made(np.zeros((3, 1)), 2)])


def test_an_expert_is_on_the_map_where_it_was_chosen() -> None:
    """2 x 3 visual tokens; expert 5 has the middle of the lower row, second in that choice, with weight 0.75."""
    chosen, weights = np.tile([0, 1], (7, 1)), np.tile([0.5, 0.25], (7, 1))
    chosen[1 + 4], weights[1 + 4] = [2, 5], [0.25, 0.75]
    roles = ["special"] + ["image 0"] * 6
    run = hand_made(np.stack([np.zeros((7, 2)), chosen]), EXPERTS, roles, pictures=[blank(2, 3)],
                    weights=np.stack([np.full((7, 2), 0.5), weights]))  # fmt: skip
    result = expert_map(run, layer=2)
    expected = np.zeros((2, 3))
    expected[1, 1] = 0.75
    np.testing.assert_array_equal(result["weight"][5], expected)
    assert result["weight"][0].tolist() == [[0.5, 0.5, 0.5], [0.5, 0, 0.5]]
    with pytest.raises(ValueError, match="layer 3 does not route; choose among 1, 2"):
        expert_map(run, layer=3)
    with pytest.raises(ValueError, match="picture 1 does not exist"):
        expert_map(run, layer=2, picture=1)
    with pytest.raises(ValueError, match="cannot be drawn"):
        expert_map_figure(result, run.pictures[0], [99])


# --- kinds ---------------------------------------------------------------------------------------------------------------


def kind_runs(settled: bool) -> list[Run]:
    """Four runs, half picture, a quarter each question and answer; one expert for each kind, or anyone."""
    roles = ["image 0"] * 16 + ["user"] * 8 + ["answer"] * 8
    rng, runs = np.random.default_rng(0), []
    for _ in range(4):
        settled_choice = np.repeat([0, 1, 2], [16, 8, 8])[:, None]
        chosen = settled_choice if settled else random_choice(rng, 32, 4, 1)[0]
        texts = ["w"] * 32
        runs.append(hand_made(chosen, 4, roles, texts=texts, pictures=[blank(4, 4)]))
    return runs


def test_one_expert_a_kind_tells_all_there_is_to_know() -> None:
    result = kind_information(kind_runs(settled=True), shuffles=50)
    assert float(result["kind_entropy"]) == pytest.approx(1.5)
    assert result["information"][0] == pytest.approx(1.5)
    assert result["information_low"][0] == pytest.approx(1.5) and result["shuffled_high"][0] < 0.2
    assert result["dead"].tolist() == [1] and result["max_vio"][0] == pytest.approx(1.0)
    assert result["share"][KINDS.index("picture"), 0].tolist() == [1, 0, 0, 0]


def test_experts_that_do_not_care_tell_no_more_than_shuffled_kinds() -> None:
    result = kind_information(kind_runs(settled=False), shuffles=100)
    assert 0 < result["information"][0] <= result["shuffled_high"][0]
    assert result["shuffled_low"][0] < result["shuffled"][0] < result["shuffled_high"][0]


def test_information_is_that_of_pairs_counted_by_hand(runs: list[Run]) -> None:
    result = kind_information(runs, shuffles=2)
    for at in range(2):
        pairs = [(int(k), int(e)) for run in runs for k, of in zip(kinds_of(run), run.chosen[at], strict=True) for e in of]
        joint, n = Counter(pairs), len(pairs)
        kinds, experts = Counter(k for k, _ in pairs), Counter(e for _, e in pairs)
        information = sum(c / n * np.log2(c * n / (kinds[k] * experts[e])) for (k, e), c in joint.items())
        assert result["information"][at] == pytest.approx(information)
    assert mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-12)


# --- figures -------------------------------------------------------------------------------------------------------------


def test_every_figure_names_the_weights_and_shows_what_was_computed(runs: list[Run]) -> None:
    load, modality = expert_loads(runs), modality_specialisation(runs, shuffles=3)
    figures = {
        "load": load_figure(load),
        "confidence": confidence_figure(routing_confidence(runs)),
        "domains": domains_figure(domain_specialisation(runs, ["a", "b"], shuffles=3)),
        "modality": modality_figure(modality),
        "map": expert_map_figure(expert_map(runs[0], 1), runs[0].pictures[0]),
        "kinds": kinds_figure(kind_information(runs, shuffles=3)),
    }
    for figure in figures.values():
        assert NAME in drawn_words(figure)
    (shown,) = figures["load"].axes[0].images
    np.testing.assert_array_equal(shown.get_array(), load["load"][0])
    (shown,) = figures["modality"].axes[0].images
    assert (shown.norm.vmin, shown.norm.vmax) == (-1, 1)
    np.testing.assert_array_equal(np.ma.filled(shown.get_array(), np.nan), modality["preference"])
    lines = [line.get_ydata()[0] for line in figures["confidence"].axes[0].lines if line.get_linestyle() == "--"]
    assert lines == [np.log2(11)]  # chance: no preference among 11 experts
