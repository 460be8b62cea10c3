"""How sure of its answer a model is after each part of its thought: the confidence curve of analysis C3.

The answer is not written but scored, so that the curve is smooth where `budget.early_answering` counts yes and no. Letters:
Q questions with a thought, P cuts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.chat import Prompt
from kimi_vl_ref.thought import CLOSE_THOUGHT
from workbench.study.families import Question

from .asked import Pair, about_pairs, agreement, constant_accuracy, plain
from .budget import CUTS, thoughts
from .counting import over_runs, with_interval
from .result import Result
from .trials import Trial, score, written_trial


def answer_confidence(
    model: KimiVL,
    chat: Chat,
    pairs: Sequence[Pair],
    cuts: Sequence[float] = CUTS,
    *,
    model_name: str,
    seed: int = 0,
    batch: int = 16,
    max_new_tokens: int = 160,
) -> Result:
    """C3: the probability of the right answer after the first p of the thought (arXiv 2307.13702; paper C3, confidence).

        result = answer_confidence(model, chat, pairs, model_name="study model")
        result["right"][0]      # (P,) P(right answer | first p of its own thought), the mean over questions

    right (2, P)   the thought is cut after the first p of its tokens and closed; the probability that the answer, a blank
                   before it and the end of the reply after it, is the true one.
    own (2, P)     the same of the answer that the model gives after its whole thought.
    Both with a 95% interval over questions drawn anew. The second row is the control: as many tokens of another question's
    thought, drawn at random, from its start and repeated where it is shorter. Chance: a guess that always gives the answer
    which suits these questions best, and for `own` that of another question of the family. Greedy thoughts. Raises ValueError
    unless two or more questions have a thought, and for cuts that do not run from 0 to 1.
    """
    prompts, free, thinking = thoughts(model, chat, pairs, cuts, max_new_tokens)
    if len(thinking) < 2:
        raise ValueError("only one of these questions has a thought, which leaves no other for a control; give more")
    rng = np.random.default_rng(seed)
    cases: dict[tuple[int, int, int, int], Trial] = {}  # (question, whose thought, cut, which answer)
    for row, q in enumerate(thinking):
        other = thinking[int(rng.choice([at for at in range(len(thinking)) if at != row]))]
        answers = [pairs[q][1].answer, free[q].answer]
        for whose, thought in enumerate((free[q].thought, free[other].thought)):
            for at, p in enumerate(cuts):
                kept = round(p * len(free[q].thought))
                begun = [*free[q].opening, *(thought * (1 + kept // len(thought)))[:kept]]
                for which, answer in enumerate(answers[: 1 if plain(answers[0]) == plain(answers[1]) else 2]):
                    cases[row, whose, at, which] = _trial(chat, prompts[q], pairs[q][1], begun, answer)
    sure = np.exp(score(model, list(cases.values()), batch).logprob)
    each = np.full((len(thinking), 2, len(cuts), 2), np.nan)
    for place, value in zip(cases, sure, strict=True):
        each[place] = value
    each = np.where(np.isnan(each), each[..., :1], each)  # the model's own answer is the right one
    count = np.ones(len(thinking))
    values: dict[str, np.ndarray] = {}
    for which, name in enumerate(("right", "own")):
        mean = over_runs(lambda sums, n: sums / n[..., None, None], each[..., which], count, seed=seed)
        values |= with_interval(name, mean)
    whose = ("thought", ["its own", "another question's"])
    axes: dict[str, Any] = dict.fromkeys(values, [whose, ("part of the thought", list(cuts))])
    about = about_pairs(model, model_name, pairs, seed=seed, with_thought=len(thinking))
    asked = [pairs[q][1] for q in thinking]
    agree = agreement([question.family for question in asked], [plain(free[q].answer) for q in thinking])
    title = "How sure of its answer the model is after a part of the thought"
    return Result("answer-confidence", title, values, axes, {"right": constant_accuracy(asked), "own": agree}, about)


def _trial(chat: Chat, prompt: Prompt, question: Question, begun: list[int], answer: str) -> Trial:
    """The question with this beginning of a reply, closed, and an answer to score, its end included."""
    said = chat.tokenizer.encode(f"{CLOSE_THOUGHT} {answer}")  # in one piece: where a marker ends depends on what follows
    return written_trial(
        chat, prompt, [*begun, *said], question.text, answer, begun=len(begun), domain=question.family
    )
