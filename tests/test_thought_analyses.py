"""Thoughts taken apart: sentences by their cues, forking tokens against a naive count, economy, and the picture forgotten."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kimi_vl_ref.images import Picture
from tiny import picture, question, talking_model, tiny_chat
from workbench.analyses.cues import CLASSES, CUES, classify, segments, split_sentences
from workbench.analyses.economy import length_reward, length_rewards, stated_answer, thinking_efficiency
from workbench.analyses.thought import image_reliance, repeated_ngrams, thought_classes, token_entropy
from workbench.figures import thought as figures
from workbench.runs import Run, record


def made_run(thought: list[str], answer: str = "2", *, entropies: Any = None, chosen: Any = None, scores: Any = None) -> Run:
    """A run of two prompt tokens, a visual token and these thought tokens, with 2 layers, 1 head, 4 experts, 2 chosen."""
    texts = ["<", "q", "pad", *thought, answer]
    roles = ["special", "user", "image 0", *["thought"] * len(thought), "answer"]
    t, n = len(texts), len(thought)
    grid = tiny_chat().processor.grid(20, 20)
    assert grid.token_count == 1
    all_entropies = np.full(t, np.nan, np.float32)
    all_entropies[3 : 3 + n] = 0 if entropies is None else entropies
    return Run(
        question="how many?", pictures=[Picture(Image.new("RGB", (20, 20)), grid)], texts=texts, roles=roles,
        token_ids=np.zeros(t, np.int32), prompt_length=3, logprobs=np.zeros(t, np.float32), entropies=all_entropies,
        thought="".join(thought), answer=answer, finished=True, moe_layers=[1, 2], n_experts=4,
        chosen=np.zeros((2, t, 2), np.uint16) + np.array([0, 1], np.uint16) if chosen is None else chosen,
        weights=np.ones((2, t, 2), np.float16), scores=np.ones((2, t, 4), np.float16) if scores is None else scores,
        bias=np.zeros((2, 4), np.float32), first_row=2, picture_attention=np.zeros((2, 1, t - 2, 1), np.float16),
        role_names=["special", "user", "image 0", "thought", "answer"], role_mass=np.zeros((2, 1, t - 2, 5), np.float16),
        model_name="made by hand", device="cpu", dtype="float32",
    )  # fmt: skip


STUDY = [" red", " circle", " top", " left", ",", " blue", " star", " centre", ",", " so", " 2"]


# ---- C1


@pytest.mark.parametrize(
    ("sentence", "kind", "behaviour"),
    [
        ("red circle top left,", "look", ""),
        ("none,", "look", ""),
        ("so 2", "conclude", ""),
        ("so green square", "conclude", ""),
        ("Let me first look for the triangles.", "plan", "planning"),
        ("The question asks for the largest bar.", "plan", "planning"),
        ("The chart shows four bars.", "look", ""),
        ("There are three apples on the table.", "look", ""),
        ("3 + 4 = 7.", "compute", ""),
        ("So x = 12 - 5.", "compute", ""),
        ("Multiplying both sides gives the area.", "compute", ""),
        ("Let me double-check the sum.", "check", "evaluation"),
        ("Does that make sense?", "check", "evaluation"),
        ("Wait, let me check that again.", "backtrack", "reflection"),
        ("That is wrong.", "backtrack", "reflection"),
        ("Alternatively, count by rows.", "backtrack", "exploration"),
        ("Let me try a different approach.", "backtrack", "exploration"),
        ("Therefore, the answer is 7.", "conclude", ""),
        ("Therefore the triangle is equilateral.", "conclude", ""),
        ("Marvellous weather.", "other", ""),
    ],
)
def test_a_sentence_is_told_by_its_cue(sentence: str, kind: str, behaviour: str) -> None:
    assert (classify(sentence).kind, classify(sentence).behaviour) == (kind, behaviour)


def test_every_cue_is_of_a_class_and_every_class_but_other_has_one() -> None:
    assert {cue.kind for cue in CUES} == set(CLASSES) - {"other"}
    functions = {cue.function for cue in CUES}
    assert len(functions) == 8 and {cue.behaviour for cue in CUES} >= {"planning", "evaluation", "reflection", "exploration"}


def test_prose_is_cut_at_full_stops_and_a_list_at_commas() -> None:
    assert split_sentences("red circle left, so 2") == ["red circle left,", " so 2"]
    assert split_sentences("It is 2.5, so 3. Wait!\nNo") == ["It is 2.5, so 3.", " Wait!", "\nNo"]
    assert split_sentences(" ") == []


def test_tokens_belong_to_the_sentence_in_which_they_end() -> None:
    found = segments(made_run(STUDY))
    assert [(s.start, s.stop, s.text, s.cue.kind) for s in found] == [
        (3, 8, "red circle top left,", "look"),
        (8, 12, "blue star centre,", "look"),
        (12, 14, "so 2", "conclude"),
    ]


def test_thoughts_of_earlier_turns_are_not_this_runs() -> None:
    run = made_run(STUDY)
    assert segments(replace(run, prompt_length=9))[0].start == 9


def test_shares_transitions_and_profile_are_those_counted_by_hand() -> None:
    result = thought_classes([made_run(STUDY), made_run(STUDY)], bins=2)
    look, conclude = CLASSES.index("look"), CLASSES.index("conclude")
    assert result["share"][[look, conclude]] == pytest.approx([9 / 11, 2 / 11]) and result["share"].sum() == pytest.approx(1)
    assert result["follows"][look, [look, conclude]] == pytest.approx([0.5, 0.5])
    assert np.isnan(result["follows"][conclude]).all()  # nothing follows
    assert result["profile"][conclude] == pytest.approx([0, 2 / 6])  # 5 tokens in the first half, 6 in the second
    assert result["share_low"][look] == pytest.approx(9 / 11) == result["share_high"][look]  # two runs alike
    assert result.chance["follows"][[look, conclude]] == pytest.approx([0.5, 0.5])


def test_reflection_counts_sentences_that_check_or_backtrack() -> None:
    run = made_run(["Wait", ".", " Let", " me", " verify", ".", " It", " is", " left", "."])
    assert thought_classes([run])["reflection"] == pytest.approx([2 / 10 * 1000])


def test_rumination_is_the_share_of_ngrams_said_before() -> None:
    assert repeated_ngrams("a b c a b c".split(), 3) == pytest.approx(1 / 4)
    assert repeated_ngrams("a b c d".split(), 3) == 0 and np.isnan(repeated_ngrams(["a"], 3))
    result = thought_classes([made_run([" a", " b", " c"] * 10)])
    assert result["rumination"][0] == pytest.approx(25 / 28) and result.chance["rumination"][0] < 0.7


# ---- C7


@cache
def recorded() -> list[Run]:
    """Two real runs of a random model; what it wrote counts as thought, so that there is something to look at."""
    runs = []
    for seed in range(2):
        asked = question("How many red circles?", picture(60, 40, seed))
        *_, run = record(talking_model(), tiny_chat(), asked, model_name="tiny", max_new_tokens=20, temperature=1.0, seed=seed)
        assert isinstance(run, Run)
        runs.append(replace(run, roles=run.roles[: run.prompt_length] + ["thought"] * (len(run.roles) - run.prompt_length)))
    return runs


def test_entropy_forks_switches_and_router_entropy_agree_with_a_naive_count() -> None:
    runs, model = recorded(), talking_model()
    result = token_entropy(runs, top=0.25)
    entropies, kinds, switches, router = [], [], [], []
    for run in runs:
        pixels, grids, _ = tiny_chat().processor([one.image for one in run.pictures])
        with torch.no_grad():
            logits = model.logits(model(torch.tensor(run.token_ids[None].astype(int)), pixels, grids))[0].double()
        for segment in segments(run):
            for t in range(segment.start, segment.stop):
                p = logits[t - 1].softmax(-1)
                entropies.append(float(-(p * p.log()).sum()))
                kinds.append(segment.cue.kind)
                now, before = run.chosen[:, t - 1].tolist(), run.chosen[:, t - 2].tolist()
                switches.append([sum(e not in b for e in a) / len(a) for a, b in zip(now, before, strict=True)])
                s = run.scores[:, t - 1].astype(float)
                q = s / s.sum(1, keepdims=True)
                router.append([-sum(x * np.log(x) for x in layer) / np.log(run.n_experts) for layer in q])
    assert result["entropy"] == pytest.approx(np.array(entropies), abs=1e-3)
    n = round(0.25 * len(entropies))
    forking = set(sorted(range(len(entropies)), key=lambda at: -entropies[at])[:n])
    assert set(np.flatnonzero(result["forking"])) == forking
    for at, kind in enumerate(CLASSES):
        of_kind = [i for i, one in enumerate(kinds) if one == kind]
        expected = len(forking & set(of_kind)) / len(of_kind) if of_kind else np.nan
        assert result["forking_share"][at] == pytest.approx(expected, nan_ok=True)
    chosen = sorted(forking)
    assert result["switch_at"][0] == pytest.approx(np.array(switches)[chosen].mean(0))
    assert result["switch_at"][2] == pytest.approx(np.mean(switches, 0))
    assert result["router_at"][0] == pytest.approx(np.array(router)[chosen].mean(0))
    ranks = [np.argsort(np.argsort(column)) for column in (entropies, np.array(router)[:, 0])]  # no ties here
    assert result["router_corr"][0] == pytest.approx(np.corrcoef(ranks[0], ranks[1])[0, 1])


def test_forks_planted_in_the_conclusion_are_found_there_and_follow_the_planted_switches() -> None:
    chosen = np.zeros((2, 15, 2), np.uint16) + np.array([0, 1], np.uint16)
    chosen[0, 11] = chosen[0, 12] = [2, 3]  # the rows that write " so" (12) and " 2" (13)
    chosen[0, 12] = [0, 1]
    entropies = [0.1] * 9 + [2.0, 2.0]
    result = token_entropy([made_run(STUDY, entropies=entropies, chosen=chosen)], top=2 / 11)
    assert result["forking_share"][CLASSES.index("conclude")] == 1 and result["forking_share"][CLASSES.index("look")] == 0
    assert result["switch_at"][0] == pytest.approx([1, 0]) and result["switch_at"][1] == pytest.approx([0, 0])
    assert result["switch_corr"][0] == pytest.approx(1) and np.isnan(result["switch_corr"][1])
    assert result["router_at"] == pytest.approx(np.ones((3, 2)), abs=1e-6)  # equal scores
    assert sorted(result.axes["word_entropy"][0][1]) == ["2", "so"]
    assert result.chance["forking_share"] == pytest.approx(2 / 11)


# ---- C8


def test_thinking_efficiency_is_that_of_three_thoughts_worked_on_paper() -> None:
    early = made_run(["so", " 2", ",", " so", " 2", ",", " so", " 2", ",", " so"], "2")  # right after 3 of 10, then repeats
    lost = made_run(["so", " 2", ",", " left", ",", " so", " 3", ","], "3")  # was right after 3 of 8
    never = made_run(["left", ",", " so", " 5"], "5")
    runs, check = [early, lost, never], "2".__eq__
    result = thinking_efficiency(runs, [check] * 3)
    xi_o, xi_ut, xi_p = result["measures"]
    assert xi_o == pytest.approx((3 / 10 + 0 + 0) / 3)
    assert xi_ut == pytest.approx(((1 - 3 / 8) + 0) / 2)  # never right: nothing was given up
    assert xi_p == pytest.approx((3 / 10 + 8 / 8 + 4 / 4) / 3)
    assert result["first_right"] == pytest.approx([3, 3, np.nan], nan_ok=True)


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [("so green square", "green square"), ("The answer is 12.", "12"), ("Thus, \\boxed{4}", "4"), ("red star left", "")],
)
def test_the_stated_answer_is_read_from_a_conclusion(sentence: str, answer: str) -> None:
    assert stated_answer(sentence) == answer


def test_length_reward_is_that_of_the_k15_report() -> None:
    assert length_reward([10, 20, 30], [True, True, True]).tolist() == [0.5, 0.0, -0.5]
    assert length_reward([10, 20, 30], [False, True, False]).tolist() == [0.0, 0.0, -0.5]  # a short wrong one earns nothing
    assert length_reward([7, 7], [True, False]).tolist() == [0.0, 0.0]
    result = length_rewards([made_run(STUDY[-2:], "2"), made_run(STUDY, "3")], "2".__eq__)
    assert result["length"].tolist() == [3, 12] and result["reward"].tolist() == [0.5, -0.5]


def test_attention_spread_evenly_gives_the_chance_line_of_image_reliance() -> None:
    run = made_run(STUDY)
    run.role_mass[:, :, :, 2] = 1 / (np.arange(2, 15) + 1)  # one visual token of those a row may see
    result = image_reliance([run, run], bins=4)
    assert result["mean"] == pytest.approx(result.chance["mean"], abs=2e-3)
    assert result["mass"].shape == (2, 4)


def test_a_picture_forgotten_half_way_shows_as_a_drop() -> None:
    run = made_run(STUDY[:10])
    run.role_mass[1, :, :6, 2] = 0.75  # the rows that write the first five tokens: positions 3 to 7 are rows 2 to 6
    run.role_mass[1, :, 5:, 2] = 0.25
    result = image_reliance([run], bins=2)
    assert result["mass"] == pytest.approx(np.array([[0, 0], [0.75, 0.25]]))
    assert result["mean"] == pytest.approx([0.375, 0.125]) and np.isnan(result["mean_low"]).all()  # one run has no interval


def test_figures_name_the_weights_and_draw_their_chance_lines() -> None:
    runs = [made_run(STUDY, entropies=np.linspace(0, 1, 11)), made_run(STUDY, "3")]
    drawn = {
        figures.thought_strip(runs): 0,
        figures.thought_classes_figure(thought_classes(runs)): 0,  # a row of its matrix
        figures.token_entropy_figure(token_entropy(runs, draws=5)): 1,
        figures.thinking_efficiency_figure(thinking_efficiency(runs, ["2".__eq__] * 2)): 0,
        figures.length_reward_figure(length_rewards(runs, "2".__eq__)): 0,
        figures.image_reliance_figure(image_reliance(runs)): 1,
    }
    for figure, lines in drawn.items():
        figure.canvas.draw()
        assert figure.get_supxlabel() == "made by hand"
        labels = [str(line.get_label()) for axes in figure.axes for line in axes.lines]
        assert sum(label.startswith("by chance") for label in labels) == lines


@pytest.mark.parametrize("analyse", [thought_classes, token_entropy, image_reliance])
def test_runs_without_a_thought_are_refused(analyse: Any) -> None:
    with pytest.raises(ValueError, match="none of the runs has a thought"):
        analyse([made_run([])])


def test_what_does_not_fit_is_refused() -> None:
    run = made_run(STUDY)
    with pytest.raises(ValueError, match="2 checks for 1 runs"):
        thinking_efficiency([run], [bool, bool])
    with pytest.raises(ValueError, match="no share of tokens"):
        token_entropy([run], top=1.5)
    with pytest.raises(ValueError, match="answer 2 questions"):
        length_rewards([run, replace(run, question="another")], bool)
    with pytest.raises(ValueError, match="has no picture"):
        image_reliance([replace(run, role_names=["special", "user", "other", "thought", "answer"])])
