"""Every result says which weights, which prompts, how many and which seed; the seed that is named is the one drawn from."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import pytest

from hand_made import NAME, blank, hand_made, random_choice
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.ablations import expert_masking, top_k_sweep
from workbench.analyses.causes import attention_knockout
from workbench.analyses.experts import agreement, repetition, vocabulary_specialisation
from workbench.analyses.magnitudes import pruning_damage, shared_and_routed
from workbench.analyses.result import Result
from workbench.analyses.routing import (
    domain_specialisation,
    expert_loads,
    kind_information,
    modality_specialisation,
    routing_confidence,
)
from workbench.analyses.selection import bias_effect, router_margins
from workbench.analyses.thought import thought_classes, token_entropy
from workbench.analyses.trials import Trial, make_trial
from workbench.runs import Run

MODEL = copy.deepcopy(talking_model()).double()
ROLES = ["image 0"] * 4 + ["user"] * 12 + ["thought"] * 14 + ["answer"] * 10


def made(seed: int) -> Run:
    chosen = random_choice(np.random.default_rng(seed), len(ROLES), 8, 2, layers=2)
    ids = np.arange(len(ROLES)) % 5
    logprobs = np.zeros(len(ROLES))
    return hand_made(chosen, 8, ROLES, token_ids=ids, prompt_length=16, pictures=[blank(2, 2)], seed=seed, logprobs=logprobs)


RUNS = [made(3), made(4)]

OF_RUNS: dict[str, Callable[[int], Result]] = {
    "domains": lambda seed: domain_specialisation(RUNS, ["a", "b"], shuffles=4, seed=seed),
    "modality": lambda seed: modality_specialisation(RUNS, shuffles=4, seed=seed),
    "kinds": lambda seed: kind_information(RUNS, shuffles=4, seed=seed),
    "vocabulary": lambda seed: vocabulary_specialisation(RUNS, at_least=2, shuffles=4, draws=4, seed=seed),
    "token entropy": lambda seed: token_entropy(RUNS, draws=4, seed=seed),
}
WITHOUT_A_CHOICE: dict[str, Callable[[], Result]] = {
    "load": lambda: expert_loads(RUNS),
    "confidence": lambda: routing_confidence(RUNS),
    "bias": lambda: bias_effect(RUNS),
    "margins": lambda: router_margins(RUNS),
    "agreement": lambda: agreement(RUNS, RUNS),
    "repetition": lambda: repetition(RUNS),
    "thought classes": lambda: thought_classes(RUNS),
}


PAIR = [("picture", "last")]


def trials() -> list[Trial]:
    return [make_trial(tiny_chat(), question(f"count {what}", picture(56, 28)), "two") for what in ("circles", "red")]


OF_TRIALS: dict[str, Callable[[int], Result]] = {
    "masking": lambda seed: expert_masking(MODEL, trials(), model_name=NAME, shares=(0.2,), seed=seed),
    "top k": lambda seed: top_k_sweep(MODEL, trials(), model_name=NAME, ks=(2,), seed=seed),
    "knockout": lambda seed: attention_knockout(MODEL, trials(), model_name=NAME, pairs=PAIR, window=3, seed=seed),
    "pruning": lambda seed: pruning_damage(MODEL, trials(), [(1, 0)], model_name=NAME, controls=2, seed=seed),
}


@pytest.mark.parametrize("name", OF_RUNS)
def test_a_result_of_runs_says_what_it_is_of_and_the_seed_of_its_draws(name: str) -> None:
    about = OF_RUNS[name](5).about
    assert (about["weights"], about["runs"], about["prompts"]) == (NAME, 2, ["how many?"] * 2)
    assert about["seeds"] == [3, 4] and about["seed"] == 5


@pytest.mark.parametrize("name", WITHOUT_A_CHOICE)
def test_intervals_over_runs_name_their_seed(name: str) -> None:
    about = WITHOUT_A_CHOICE[name]().about
    assert about["weights"] == NAME and about["prompts"] == ["how many?"] * 2 and about["seed"] == 0
    assert about["intervals"] == "95%, runs drawn anew"


@pytest.mark.parametrize("name", OF_TRIALS)
def test_a_result_of_trials_says_what_it_is_of_and_its_seed_is_used(name: str) -> None:
    result, again, other = (OF_TRIALS[name](seed) for seed in (5, 5, 6))
    about = result.about
    assert (about["weights"], about["trials"], about["prompts"]) == (NAME, 2, ["count circles", "count red"])
    assert about["seed"] == 5 and about["fingerprint"]
    drawn = [value for value in result.values if value in ("control", "nll_change")]
    assert drawn and all(np.array_equal(result[value], again[value]) for value in drawn)
    assert any(not np.array_equal(result[value], other[value]) for value in drawn)


def test_intervals_over_trials_name_their_seed() -> None:
    about = shared_and_routed(MODEL, trials(), model_name=NAME).about
    assert about["intervals"] == "95%, trials drawn anew" and about["seed"] == 0 and about["trials"] == 2
