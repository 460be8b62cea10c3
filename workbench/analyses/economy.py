"""What thoughts cost: too much thinking, too little, and the reward against length (a part of analysis C8). From runs alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np

from workbench.runs import Run

from .cues import Segment, segments
from .result import Result, about_runs
from .thought import need_thoughts

Check = Callable[[str], bool]  # is this answer right? `Question.check` of a study scene is one


def thinking_efficiency(runs: Sequence[Run], checks: Sequence[Check], stated: Callable[[str], str] | None = None) -> Result:
    """C8: how much of a thought came after its first right solution, and how early a wrong answer had been right.

        result = thinking_efficiency(runs, [question.check for question in questions])
        result["measures"]

    With T thought tokens and T' those up to the first sentence that states a right answer (T where none does):
    outcome efficiency xi_O = mean over all of right x T'/T (arXiv 2412.21187; 1 is best, low means overthinking);
    underthinking xi_UT = mean over the wrong of 1 - T'/T (2501.18585; 0 is best); process efficiency xi_P = mean over
    thoughts that state any of the share of their tokens on the way to a statement that was not made before (2412.21187).
    `checks` judge an answer, one a run; `stated` reads the answer that a sentence states, "" for none. Per run: tokens, right,
    first_right (nan: never). Raises ValueError where no run has a thought or the numbers differ.
    """
    if len(checks) != len(runs):
        raise ValueError(f"there are {len(checks)} checks for {len(runs)} runs; give one for each")
    thoughts = [segments(run) for run in runs]
    about = about_runs(runs, with_thought=sum(map(bool, thoughts)))
    need_thoughts(thoughts)
    right = np.array([check(run.answer) for run, check in zip(runs, checks, strict=True)])
    tokens, first, new = np.full((3, len(runs)), np.nan)
    for at, (found, check) in enumerate(zip(thoughts, checks, strict=True)):
        if found:
            tokens[at] = found[-1].stop - found[0].start
            first[at], new[at] = _solutions(found, check, stated or stated_answer)
    has = ~np.isnan(tokens)
    reached = np.where(np.isnan(first), 1.0, first / tokens)
    measures = [
        _mean((right * reached)[has]),
        _mean((1 - reached)[has & ~right]),
        _mean((new / tokens)[has & ~np.isnan(new)]),
    ]
    names = ["outcome efficiency (xi_O)", "underthinking (xi_UT)", "process efficiency (xi_P)"]
    values = {"measures": np.array(measures), "tokens": tokens, "right": right.astype(int), "first_right": first}
    axes = {name: [("run", range(len(runs)))] for name in values} | {"measures": [("measure", names)]}
    title = "How economical the thoughts are (shares of their tokens)"
    return Result("thinking-efficiency", title, values, axes, {}, about)


def _solutions(found: list[Segment], check: Check, stated: Callable[[str], str]) -> tuple[float, float]:
    """Tokens up to the first right statement, and tokens on the way to statements that are new; nan for none."""
    first, distinct, seen = float("nan"), float("nan"), set()
    start = found[0].start
    for segment in found:
        answer = stated(segment.text)
        if not answer:
            continue
        if (plain := " ".join(answer.lower().split())) not in seen:
            distinct = np.nan_to_num(distinct) + segment.stop - start
            seen.add(plain)
        start = segment.stop
        if np.isnan(first) and check(answer):
            first = float(segment.stop - found[0].start)
    return first, float(distinct)


def stated_answer(sentence: str) -> str:
    """The answer that a concluding sentence states: "so 2" -> "2", "The answer is blue." -> "blue"; "" for none."""
    patterns = (r"\banswer(?: is|:| should be| must be)\s*(.+)", r"\\boxed\{(.+)\}", r"^(?:so|therefore|thus|hence),?\s+(.+)")
    for pattern in patterns:
        if found := re.search(pattern, sentence.strip(), re.IGNORECASE):
            return found[1].strip().rstrip(".,;!")
    return ""


def length_reward(lengths: Sequence[float] | np.ndarray, right: Sequence[bool] | np.ndarray) -> np.ndarray:
    """C8: the reward against long answers of Kimi k1.5 (arXiv 2501.12599, section 2.3.3) for one group of replies to one
    question: lambda = 0.5 - (length - min) / (max - min) for a right reply, min(0, lambda) for a wrong one, all 0 if all
    are equally long.

        length_reward([10, 20, 30], [True, True, False])      # 0.5, 0.0, -0.5
    """
    size = np.asarray(lengths, np.float64)
    if not len(size) or len(size) != len(right):
        raise ValueError(f"there are {len(size)} lengths and {len(right)} verdicts; give one of each for every reply")
    if size.max() == size.min():
        return np.zeros(len(size))
    reward = 0.5 - (size - size.min()) / (size.max() - size.min())
    return np.where(np.asarray(right, bool), reward, np.minimum(reward, 0))


def length_rewards(runs: Sequence[Run], check: Check) -> Result:
    """C8: `length_reward` within the group that these runs are, sampled replies to one question; lengths in reply tokens.

        length_rewards(runs, question.check)["reward"]

    Values length, right and reward, one a run. Raises ValueError for runs of several questions.
    """
    about = about_runs(runs)
    if len(asked := sorted({run.question for run in runs})) > 1:
        raise ValueError(f"the runs answer {len(asked)} questions, such as {asked[:2]}; a group is replies to one question")
    length = np.array([len(run.token_ids) - run.prompt_length for run in runs])
    right = np.array([check(run.answer) for run in runs])
    values = {"length": length, "right": right.astype(int), "reward": length_reward(length, right)}
    title = "Length reward of Kimi k1.5 within a group of replies"
    return Result("length-reward", title, values, {name: [("run", range(len(runs)))] for name in values}, {}, about)


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")
