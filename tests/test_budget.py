"""Thoughts cut, spoiled, reworded and padded, on a model that is made to follow a policy, so that every curve is known
beforehand."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from tiny import talking_model, tiny_chat
from workbench.analyses.budget import budget_curve, early_answering, picture_removed, reword, spoil, thought_budget
from workbench.analyses.confidence import answer_confidence
from workbench.figures.thought import (
    answer_confidence_figure,
    early_answering_figure,
    picture_removed_figure,
    thought_budget_figure,
)
from workbench.study.families import make
from workbench.tape import attach

MODEL, CHAT = talking_model(), tiny_chat()
Policy = Callable[[str, str, bool], str]  # (question, reply so far, is there a picture) -> the rest of the reply


@contextmanager
def following(policy: Policy, lead: float = 60.0) -> Iterator[None]:
    """MODEL, made to write what the policy says, row by row of a batch; `lead`: of that token's logit over all others."""
    rows: list[list[int]] = []
    scored: list[list[int]] = []  # rows whose replies are still to be scored
    special = CHAT.tokenizer.special

    def given(inputs: tuple[Any, ...], site: str) -> None:
        ids = inputs[0].tolist()
        if len(ids[0]) > 1 or not rows:
            rows[:] = ids
        else:
            for row, new in zip(rows, ids, strict=True):
                row += new

    def real(inputs: tuple[Any, ...], site: str) -> None:
        if inputs[0].shape[1] > 1:
            rows[:] = [row[:length] for row, length in zip(rows, inputs[1].tolist(), strict=True)]
            scored[:] = rows

    def next_token(ids: list[int]) -> int:
        *_, user, reply = CHAT.tokenizer.decode(ids).split("<|im_middle|>")
        text = user.split("<|im_end|>")[0].split("<|media_end|>")[-1]
        rest = policy(text, reply.split("<|im_end|>")[0], special["<|media_pad|>"] in ids)
        return CHAT.tokenizer.encode(rest)[0] if rest else special["<|im_end|>"]

    def only(logits: Tensor, site: str) -> Tensor:
        logits[:] = -30.0
        if logits.ndim == 3:  # the last tokens of one row are scored
            ids, count = scored.pop(0), logits.shape[1]
            for at in range(count):
                logits[0, at, next_token(ids[: len(ids) - count + at])] += lead
            return logits
        for row, ids in enumerate(rows):
            logits[row, next_token(ids)] += lead
        return logits

    with attach(MODEL, read={"embedded@in": given, "decoder@in": real}, edit={"logits": only}):
        yield


PAIRS = [make("count", seed, level="first") for seed in (0, 1, 2, 4)]
TRUTH = {question.text: question.answer for _, question in PAIRS}
assert len(TRUTH) == len(PAIRS)


def close(reply: str) -> str:
    """What is still missing of the closing marker."""
    begun = next(n for n in range(len(CLOSE_THOUGHT), -1, -1) if reply.endswith(CLOSE_THOUGHT[:n]))
    return CLOSE_THOUGHT[begun:]


def going_on(whole: str, reply: str, answer: str) -> str:
    """What is still missing of this thought, or else of a marker that ends whatever is thought; then of the answer."""
    _, closed, given = reply.partition(CLOSE_THOUGHT)
    if closed:
        return f" {answer}"[len(given) :]
    return whole[len(reply) :] + CLOSE_THOUGHT if whole.startswith(reply) else close(reply)


def in_its_words(question: str) -> str:
    return f"{OPEN_THOUGHT} red circle left, so {TRUTH[question]}"


def stubborn(question: str, reply: str, picture: bool) -> str:
    """Thinks, and answers what it would have answered anyway."""
    return going_on(in_its_words(question), reply, TRUTH[question])


def obedient(question: str, reply: str, picture: bool) -> str:
    """Answers the last number of its thought, whatever stands before it; "?" where there is none."""
    last = reply.partition(CLOSE_THOUGHT)[0].split(" ")[-1]
    seen = reply.partition(",")[0] if "," in reply else f"{OPEN_THOUGHT} red circle left"
    return going_on(f"{seen}, so {TRUTH[question]}", reply, last if last.isdigit() else "?")


CUTS = (0.0, 0.5, 1.0)


def test_an_answer_that_ignores_the_thought_has_no_area_over_the_curve() -> None:
    with following(stubborn):
        result = early_answering(MODEL, CHAT, PAIRS, CUTS, model_name="stubborn")
    assert (result["match"] == 1).all() and result["aoc"] == pytest.approx(np.zeros(4))
    assert (result["accuracy"] == 1).all() and (result["questions"] == 4).all()


def test_an_answer_read_off_the_thoughts_end_needs_all_of_it() -> None:
    with following(obedient):
        result = early_answering(MODEL, CHAT, PAIRS, CUTS, model_name="obedient")
    cut, filler, mistake, paraphrase = result["match"]
    assert cut.tolist() == [0, 0, 1] and filler.tolist() == [0, 0, 0]
    assert mistake.tolist() == [1, 0, 1]  # a wrong object is overruled by the true sum; a wrong sum is believed
    assert paraphrase.tolist() == [1, 1, 1]  # other words for the same sum
    assert result["aoc"] == pytest.approx([0.75, 1, 0.5, 0])
    assert result["match_low"][0, 2] < 1 == result["match_high"][0, 2]
    drawn = early_answering_figure(result)
    drawn.canvas.draw()
    assert drawn.get_supxlabel() == "obedient"
    assert "cut: AOC 0.75" in [text.get_text() for text in drawn.axes[0].get_legend().get_texts()]  # type: ignore[union-attr]
    answers = [question.answer for _, question in PAIRS]
    same = [answers[a] == answers[b] for a in range(4) for b in range(a)]
    assert result.chance["match"] == pytest.approx(np.mean(same))


def test_a_mistake_changes_one_word_for_another_of_its_kind() -> None:
    rng = random.Random(0)
    for _ in range(20):
        words = spoil(" red circle top left,", rng)
        assert words is not None and words.split()[0] in ("blue", "green", "yellow", "purple", "orange")
        assert words.split()[1:] == ["circle", "top", "left,"]
        number = spoil(" so 12", rng)
        assert number is not None and number.startswith(" so ") and number != " so 12"
    assert spoil("none,", rng) is None


def test_a_sentence_says_the_same_in_other_words() -> None:
    rng = random.Random(0)
    assert reword(" red circle top left,", rng) == " top left red circle,"
    assert reword(" orange cross centre", rng) == " centre orange cross"
    assert {reword(" so 12", rng) for _ in range(20)} == {" thus 12", " hence 12"}
    assert reword("Wait, the sum is 3.", rng) == "hold on, the sum is 3."
    assert reword(" none,", rng) is None and reword(" 3+4=7,", rng) is None


def attached_to_its_words(question: str, reply: str, picture: bool) -> str:
    """Answers right only after a thought in its own words: what it says lies in how it is said."""
    whole = in_its_words(question)
    return going_on(whole, reply, TRUTH[question] if reply.partition(CLOSE_THOUGHT)[0] == whole else "?")


def test_a_paraphrase_undoes_an_answer_that_hangs_on_the_words() -> None:
    said: list[str] = []

    def the_same(sentence: str, rng: random.Random) -> str:
        said.append(sentence)
        return sentence

    with following(attached_to_its_words):
        result = early_answering(MODEL, CHAT, PAIRS[:2], CUTS, model_name="attached")
        own = early_answering(MODEL, CHAT, PAIRS[:1], CUTS, model_name="attached", paraphrase=the_same)
        none = early_answering(MODEL, CHAT, PAIRS[:1], CUTS, model_name="attached", paraphrase=lambda sentence, rng: None)
    assert result["match"][3].tolist() == [1, 0, 0] and result["aoc"][3] == pytest.approx(0.75)
    assert own["match"][3].tolist() == [1, 1, 1]  # the same words again change nothing
    last = f" so {PAIRS[0][1].answer}"  # none at the start, half of two sentences, both
    assert said == [" red circle left,", " red circle left,", last]
    assert none["questions"][3].tolist() == [1, 0, 0]  # and what cannot be reworded is left out


def test_confidence_comes_with_the_end_of_the_thought_that_is_needed() -> None:
    two = [PAIRS[0], PAIRS[2]]
    assert two[0][1].answer != two[1][1].answer  # so that the other question's thought gives the right answer not away
    with following(obedient):
        result = answer_confidence(MODEL, CHAT, two, CUTS, model_name="obedient")
    np.testing.assert_allclose(result["right"], [[0, 0, 1], [0, 0, 0]], atol=1e-6)
    np.testing.assert_allclose(result["own"], result["right"], atol=1e-6)  # its answers are right
    assert result.chance["right"] == 0.5 and result.about["seed"] == 0
    drawn = answer_confidence_figure(result)
    drawn.canvas.draw()
    assert drawn.get_supxlabel() == "obedient"
    assert any(list(line.get_ydata()) == [0.5, 0.5] for line in drawn.axes[0].lines)


def test_confidence_is_the_product_over_the_answers_tokens_and_its_end() -> None:
    half = float(np.log(MODEL.config.text.vocab_size - 1))  # a logit so far above all others has a probability of one half
    with following(stubborn, half):
        result = answer_confidence(MODEL, CHAT, PAIRS, (0.0, 1.0), model_name="undecided")
    tokens = [len(CHAT.tokenizer.encode(f" {answer}")) + 1 for answer in TRUTH.values()]
    np.testing.assert_allclose(result["right"], np.full((2, 2), np.mean([0.5**count for count in tokens])), rtol=1e-4)


def wrong(question: str, reply: str, picture: bool) -> str:
    """Thinks of the truth and says another number."""
    return going_on(in_its_words(question), reply, "?")


def test_a_model_that_is_sure_of_a_wrong_answer_is_sure_of_its_own_only() -> None:
    with following(wrong):
        result = answer_confidence(MODEL, CHAT, PAIRS[:2], (0.0, 1.0), model_name="wrong")
    np.testing.assert_allclose(result["right"], np.zeros((2, 2)), atol=1e-6)
    np.testing.assert_allclose(result["own"], np.ones((2, 2)), atol=1e-6)


def test_cuts_must_span_the_thought_and_some_question_must_have_one() -> None:
    with pytest.raises(ValueError, match="do not run from 0 to 1"):
        early_answering(MODEL, CHAT, PAIRS, (0.5, 1.0), model_name="x")
    with pytest.raises(ValueError, match="no questions to ask"):
        picture_removed(MODEL, CHAT, [], model_name="x")
    with following(stubborn), pytest.raises(ValueError, match="only one of these questions"):
        answer_confidence(MODEL, CHAT, PAIRS[:1], model_name="x")
    with following(lambda question, reply, picture: "2"[len(reply) :]), pytest.raises(ValueError, match="thinks about none"):
        early_answering(MODEL, CHAT, PAIRS[:1], model_name="x")


# ---- C2


def rambling(question: str, reply: str, picture: bool) -> str:
    """Thinks the longer the later its question stands in PAIRS, and answers right only once it has thought to its end."""
    more = list(TRUTH).index(question)
    whole = f"{OPEN_THOUGHT}{' count' * more} so {TRUTH[question]}"
    thought, closed, answer = reply.partition(CLOSE_THOUGHT)
    if closed:
        return f" {TRUTH[question] if thought == whole else '?'}"[len(answer) :]
    return (whole + CLOSE_THOUGHT)[len(reply) :]


def test_a_model_that_needs_its_whole_thought_is_right_as_often_as_thoughts_fit_the_budget() -> None:
    lengths = [len(CHAT.tokenizer.encode(f"{' count' * more} so {answer}")) for more, answer in enumerate(TRUTH.values())]
    assert lengths == sorted(set(lengths))
    budgets = sorted({0, 1, *lengths, lengths[-1] - 1})  # one token too few is too few
    with following(rambling):
        result = thought_budget(MODEL, CHAT, PAIRS, budgets, model_name="rambling")
    fits = [sum(length <= budget for length in lengths) / 4 for budget in budgets]
    assert fits[:2] == [0, 0] and fits[-2:] == [0.75, 1]
    assert result["accuracy"][0].tolist() == [*fits, 1] and result["within"][0].tolist() == fits
    drawn = thought_budget_figure(result)
    drawn.canvas.draw()
    assert drawn.get_supxlabel() == "rambling"
    assert result["quarter"].tolist() == lengths and (result["quarter_accuracy"] == 1).all()


def test_gain_is_counted_by_the_doubling_and_chance_is_the_best_constant() -> None:
    questions = [make("count", seed, level="first")[1] for seed in range(4)] + [make("relation", 0)[1]]
    right = np.array([[0, 0, 0, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 1, 1, 0, 1]], bool)
    result = budget_curve(right, np.array([1, 3, 4, 9, 0]), [0, 1, 4], questions, {"weights": "made by hand"})
    assert result["accuracy"].tolist() == [[0, 0.25, 0.75, 0.75], [1, 1, 1, 1]]
    assert result["gain"][0] == pytest.approx([np.nan, 0.25], nan_ok=True)  # 0.5 in two doublings
    assert result["within"].tolist() == [[0, 0.25, 0.75], [1, 1, 1]]
    assert result["quarter"].tolist() == [1, 3, 4, 9] and result["quarter_accuracy"].tolist() == [1, 1, 1, 0]
    answers = [question.answer for question in questions[:4]]
    assert result.chance["accuracy"][0, 0] == max(map(answers.count, answers)) / 4
    with pytest.raises(ValueError, match="do not rise"):
        budget_curve(right, np.zeros(5), [4, 1], questions, {})


# ---- C8


def looking(question: str, reply: str, picture: bool) -> str:
    """Finds the truth in the picture alone, writes it into the thought, and copies it from there."""
    thought, closed, answer = reply.partition(CLOSE_THOUGHT)
    found = TRUTH[question] if picture else "?"
    if closed:
        return f" {thought.split(' ')[-1]}"[len(answer) :]
    return f"{OPEN_THOUGHT} so {found}{CLOSE_THOUGHT}"[len(reply) :]


def test_a_picture_taken_away_after_the_thought_is_not_missed_and_before_it_is() -> None:
    with following(looking):
        result = picture_removed(MODEL, CHAT, PAIRS, CUTS, model_name="looking")
    kept, blank, removed = result["accuracy"]
    assert kept.tolist() == [1, 1, 1] and blank.tolist() == [1, 1, 1]  # this model only minds that there is one
    assert removed.tolist() == [0, 0, 1]
    drawn = picture_removed_figure(result)
    drawn.canvas.draw()
    assert drawn.get_supxlabel() == "looking"


def test_nothing_stays_attached() -> None:
    with following(looking):
        picture_removed(MODEL, CHAT, PAIRS[:1], (0.0, 1.0), model_name="looking")
    assert not any(module._forward_hooks for module in MODEL.modules())
