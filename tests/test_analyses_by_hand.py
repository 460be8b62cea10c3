"""Analyses against a second implementation: a slow decoder in numpy (naive.py) with its attention and routing in the open, and
definitions counted in plain loops over them. Nothing of the workbench is used on that side.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest

from naive import Naive, naive_decoder, read_out
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.ablations import expert_bench, measure_expert
from workbench.analyses.attribution import logit_attribution
from workbench.analyses.causes import attention_knockout
from workbench.analyses.experts import coactivation, repetition
from workbench.analyses.lens import logit_lens
from workbench.analyses.localise import localisation_heads
from workbench.analyses.looking import attention_sinks, modality_mass
from workbench.analyses.replay import replayed
from workbench.analyses.routing import expert_loads, routing_confidence
from workbench.analyses.selection import bias_effect
from workbench.analyses.trials import Trial, make_trial, read, see
from workbench.runs import Run, record
from workbench.tape import attach

MODEL, CHAT = copy.deepcopy(talking_model()).double(), tiny_chat()
NAME = "tiny model, random weights"
ASKED = question("count the circles", picture(84, 56))
EXPERTS, K = MODEL.config.text.n_routed_experts, MODEL.config.text.num_experts_per_tok


@pytest.fixture(scope="module")
def run() -> Run:
    *_, run = record(MODEL, CHAT, ASKED, model_name=NAME, max_new_tokens=4)
    assert isinstance(run, Run)
    return run


@pytest.fixture(scope="module")
def naive(run: Run) -> Naive:
    return naive_decoder(MODEL, replayed(MODEL, CHAT.processor, run)[0].numpy())


@pytest.fixture(scope="module")
def trial() -> Trial:
    return make_trial(CHAT, ASKED, "two")


def entering(trial: Trial) -> np.ndarray:
    """The stream with which a trial enters the decoder."""
    return MODEL.embedded(trial.ids[None], see(MODEL, trial))[0].numpy()


def logprob(trial: Trial, found: Naive) -> float:
    return sum(float(found.logprobs[at - 1, trial.ids[at]]) for at in trial.scored)


def written(run: Run) -> list[int]:
    return list(range(run.prompt_length, len(run.roles)))


# --- what was recorded ---------------------------------------------------------------------------------------------------


def test_a_run_holds_the_naive_routing_and_log_probabilities(run: Run, naive: Naive) -> None:
    for at, layer in enumerate(run.moe_layers):
        assert run.chosen[at].tolist() == naive.chosen[layer]
        np.testing.assert_allclose(run.weights[at], naive.weights[layer], atol=1e-3)  # kept in float16
    for t in written(run):
        p = np.exp(naive.logprobs[t - 1])
        assert run.logprobs[t] == pytest.approx(float(naive.logprobs[t - 1, run.token_ids[t]]), abs=1e-5)
        assert run.entropies[t] == pytest.approx(float(-(p * naive.logprobs[t - 1]).sum()), abs=1e-5)


# --- routing: R1, R2, R6, R8 ---------------------------------------------------------------------------------------------


def test_loads_and_their_violation(run: Run, naive: Naive) -> None:
    result = expert_loads([run], ["all", "picture", "decode"])
    groups = [range(len(run.roles)), [t for t, role in enumerate(run.roles) if role == "image 0"], written(run)]
    for g, positions in enumerate(groups):
        for at, layer in enumerate(run.moe_layers):
            times = [sum(e in naive.chosen[layer][t] for t in positions) for e in range(EXPERTS)]
            assert result["load"][g, at] == pytest.approx([n / len(positions) for n in times])
            assert result["max_vio"][g, at] == pytest.approx(max(times) / (len(positions) * K / EXPERTS) - 1)


def test_margins_and_what_the_bias_decides(run: Run, naive: Naive) -> None:
    confidence, effect = routing_confidence([run], ["all"]), bias_effect([run], ["all"])
    for at, layer in enumerate(run.moe_layers):
        margins, flips, spread = [], 0, []
        gained = np.zeros(EXPERTS)
        for t, scores in enumerate(naive.scores[layer]):
            ranked = sorted(scores + naive.bias[layer], reverse=True)
            margins.append(ranked[K - 1] - ranked[K])
            plain = sorted(range(EXPERTS), key=lambda e: -scores[e])[:K]
            flips += set(plain) != set(naive.chosen[layer][t])
            gained[[e for e in naive.chosen[layer][t] if e not in plain]] += 1
            p = scores / scores.sum()
            spread.append(-sum(one * np.log2(one) for one in p))
        tokens = len(run.roles)
        assert confidence["margin"][0, at] == pytest.approx(np.mean(margins), abs=1e-3)
        assert confidence["score_entropy"][0, at] == pytest.approx(np.mean(spread), abs=1e-3)
        assert confidence["flip_rate"][0, at] == effect["flip_rate"][0, at] == pytest.approx(flips / tokens) != 0
        assert effect["gained"][at] == pytest.approx(gained / tokens)


def test_partners_and_neighbours(run: Run, naive: Naive) -> None:
    together, alike = coactivation([run])["together"], repetition([run], ["thought", "text"], lags=[1, 2])
    text = [t for t, role in enumerate(run.roles) if not role.startswith("image ")]
    for at, layer in enumerate(run.moe_layers):
        chosen = naive.chosen[layer]
        for i in range(EXPERTS):
            of = [one for one in chosen if i in one]
            expected = [sum(j in one for one in of) / len(of) if of else np.nan for j in range(EXPERTS)]
            assert together[at, i] == pytest.approx(expected, nan_ok=True)
        for place, lag in enumerate((1, 2)):
            pairs = [(t - lag, t) for t in text if t - lag in text]
            first = [ids[int(np.argmax(weights))] for ids, weights in zip(chosen, naive.weights[layer], strict=True)]
            assert alike["first"][1, at, place] == pytest.approx(np.mean([first[a] == first[b] for a, b in pairs]))
            shared = [len(set(chosen[a]) & set(chosen[b])) / K for a, b in pairs]
            assert alike["shared"][1, at, place] == pytest.approx(np.mean(shared))


# --- attention: V5, V6, V8 -----------------------------------------------------------------------------------------------


def test_attention_on_each_kind_of_position(run: Run, naive: Naive) -> None:
    roles = dict.fromkeys(run.roles[t] for t in written(run))
    result = modality_mass([run], list(roles))
    for at, group in enumerate(result.axes["mass"][1][1]):
        keys = [k for k, role in enumerate(run.roles) if role == group or (group == "image" and role.startswith("image "))]
        for layer, probs in enumerate(naive.probs):
            each = [sum(probs[h, t - 1, k] for k in keys) for h in range(len(probs)) for t in written(run)]
            assert result["mass"][layer, at] == pytest.approx(np.mean(each), abs=1e-3)


def test_what_positions_receive_and_which_are_sinks(run: Run, naive: Naive) -> None:
    epsilon, tokens = 0.12, len(run.roles)
    result = attention_sinks(MODEL, CHAT.processor, run, epsilon)
    above = np.zeros(tokens)
    for layer, probs in enumerate(naive.probs):
        each = np.array([[np.mean([p[q, k] for q in range(k, tokens)]) for k in range(tokens)] for p in probs])
        np.testing.assert_allclose(result["received"][layer], each.mean(0), atol=1e-6)
        above += (each > epsilon).sum(0)
    assert above.any() and result["sink"] == pytest.approx(above / (len(naive.probs) * len(naive.probs[0])))


def test_heads_on_the_picture(run: Run, naive: Naive) -> None:
    result = localisation_heads([run], skip=0)
    word = max(t for t, role in enumerate(run.roles[: run.prompt_length]) if role == "user" and run.texts[t].strip(" .?"))
    seen = [t for t, role in enumerate(run.roles) if role == "image 0"]
    for layer, probs in enumerate(naive.probs):
        np.testing.assert_allclose(result["mass"][layer], [sum(p[word, k] for k in seen) for p in probs], atol=1e-3)


# --- causes and attribution: I3, I4, T2, P1 ------------------------------------------------------------------------------


def test_an_answer_whose_looks_are_blocked(trial: Trial) -> None:
    result = attention_knockout(MODEL, [trial], model_name=NAME, pairs=[("picture", "last")], window=2)
    x, keys, queries = entering(trial), trial.positions("picture"), trial.positions("last")
    before = logprob(trial, naive_decoder(MODEL, x))
    for start in (0, 1):

        def sees(layer: int, q: int, k: int, start: int = start) -> bool:
            return not (start <= layer < start + 2 and q in queries and k in keys)

        blocked = logprob(trial, naive_decoder(MODEL, x, sees))
        assert result["change"][0, start] == pytest.approx(np.exp(blocked - before) - 1, abs=1e-9)


def test_an_answer_without_what_one_expert_writes(trial: Trial) -> None:
    x = entering(trial)
    plain = naive_decoder(MODEL, x)
    expert = plain.chosen[2][trial.scored[0] - 1][0]
    without = naive_decoder(MODEL, x, works=lambda layer, e: (layer, e) != (2, expert))
    expected = (logprob(trial, plain) - logprob(trial, without)) / len(trial.scored)
    found = measure_expert(expert_bench(MODEL, [trial], seed=0), {"layer": 2, "expert": expert})
    assert expected != 0 and found["loss"] == pytest.approx([expected], abs=1e-9)


def test_what_each_head_adds_to_a_logit(trial: Trial) -> None:
    result, found = logit_attribution(MODEL, trial, model_name=NAME), naive_decoder(MODEL, entering(trial))
    row, token = trial.scored[0] - 1, int(trial.ids[trial.scored[0]])
    last = found.streams[-1][row]
    scale = np.sqrt(np.mean(last**2) + MODEL.decoder.norm.eps)
    direction = MODEL.decoder.norm.weight.numpy() * MODEL.logits.weight[token].numpy() / scale
    expected = [[float(head[row] @ direction) for head in heads] for heads in found.head_writes]
    np.testing.assert_allclose(result["heads"], expected, atol=1e-9)
    assert sum(result[name].sum() for name in result.values) == pytest.approx(found.logits[row, token])


def test_what_each_layer_would_say(run: Run, naive: Naive) -> None:
    positions = [t - 1 for t in written(run)]
    result = logit_lens(MODEL, CHAT, run)
    for layer, stream in enumerate(naive.streams):
        logits = read_out(MODEL, stream[positions])
        p = np.exp(logits - logits.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        final = np.exp(naive.logprobs[positions])
        np.testing.assert_allclose(result["probs"][layer, :, 0], p.max(-1), atol=1e-6)
        np.testing.assert_allclose(result["kl"][layer], (final * np.log(final / p)).sum(-1), atol=1e-6)


def test_the_naive_decoder_is_no_copy_of_a_broken_one(trial: Trial) -> None:
    """It agrees with the model as it is, and no longer once a weight of the model is another than it was given."""
    x = entering(trial)
    logits = MODEL.logits(read(MODEL, trial))[0].numpy()
    np.testing.assert_allclose(naive_decoder(MODEL, x).logits, logits, atol=1e-9)
    with attach(MODEL, edit={"decoder.layers.1.ffn.router.weights": lambda weights, _: weights.flip(-1)}):
        other = MODEL.logits(read(MODEL, trial))[0].numpy()
    assert np.abs(naive_decoder(MODEL, x).logits - other).max() > 1e-3
