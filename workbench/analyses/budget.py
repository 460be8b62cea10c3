"""Does the thought matter? Analyses C2, C3 and the causal half of C8: thoughts cut short, spoiled, reworded or padded, and
pictures taken away, each answered by the model. Greedy throughout; `confidence.py` asks how sure it is instead.

Letters: Q questions, B budgets, P cuts, F families.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from PIL import Image

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.chat import Prompt
from kimi_vl_ref.thought import CLOSE_THOUGHT
from workbench.study.evaluate import messages
from workbench.study.families import Question
from workbench.study.scenes import COLOURS, SHAPES, ZONES, Scene
from workbench.study.views import Album

from .asked import (
    Pair,
    Written,
    about_pairs,
    agreement,
    begun_by,
    constant_accuracy,
    need_pairs,
    plain,
    prompts_of,
    shares_with_interval,
    write,
)
from .cues import split_sentences
from .result import Result

Rewrite = Callable[[str, random.Random], str | None]  # a sentence -> another in its place; None: it knows none

CUTS = (0.0, 0.25, 0.5, 0.75, 1.0)


# ---- C2: accuracy under a budget


def thought_budget(
    model: KimiVL,
    chat: Chat,
    pairs: Sequence[Pair],
    budgets: Sequence[int] = (0, 1, 2, 4, 8, 16, 32),
    *,
    model_name: str,
    max_new_tokens: int = 160,
) -> Result:
    """C2: accuracy when a thought may run for so many tokens and is then closed (Fig. 13 of arXiv 2504.07491; 2501.19393).

        pairs = [make("count", seed) for seed in range(100)]
        result = thought_budget(model, chat, pairs, model_name="study model")

    A thought that fits its budget is the free one, so only those that are cut are written again. See `budget_curve` for the
    values. Raises ValueError for no questions and for budgets that do not rise.
    """
    need_pairs(pairs)
    prompts = prompts_of(chat, pairs)
    free = write(model, chat, prompts, max_new_tokens=max_new_tokens)
    lengths = np.array([len(reply.thought) for reply in free])
    right = np.zeros((len(budgets) + 1, len(pairs)), bool)
    right[-1] = [question.check(reply.answer) for (_, question), reply in zip(pairs, free, strict=True)]
    for at, budget in enumerate(budgets):
        cut = np.flatnonzero(lengths > budget).tolist()
        replies = write(model, chat, [prompts[q] for q in cut], thought_budget=budget, max_new_tokens=max_new_tokens)
        right[at] = right[-1]
        right[at, cut] = [pairs[q][1].check(reply.answer) for q, reply in zip(cut, replies, strict=True)]
    about = about_pairs(model, model_name, pairs, max_new_tokens=max_new_tokens)
    return budget_curve(right, lengths, budgets, [question for _, question in pairs], about)


def budget_curve(
    right: np.ndarray, lengths: np.ndarray, budgets: Sequence[int], questions: Sequence[Question], about: dict[str, Any]
) -> Result:
    """The numbers of C2 from verdicts right (B + 1, Q), the last row without a limit, and free thought lengths (Q,), tokens.

        budget_curve(right, lengths, [4, 8, 16], questions, {"weights": "study model"})["gain"]

    accuracy (F, B + 1)   with its 95% Wilson interval, `accuracy_low` and `accuracy_high`; "no limit" is the last budget
    within (F, B)         share of free thoughts that fit the budget: the control, for what fits cannot change
    gain (F, B - 1)       accuracy gained a doubling between neighbouring budgets of 1 or more, else nan
    quarter (4,), quarter_accuracy (4,)  median length of the shortest to the longest quarter of the free thoughts, and how
                          often their answers are right: longer is not better where hard questions think longer
    Chance (accuracy): the constant answer that suits these very questions best, which flatters it a little.
    """
    if list(budgets) != sorted(set(budgets)) or not budgets or budgets[0] < 0:
        raise ValueError(f"budgets {list(budgets)} do not rise from 0 or more; give each once, smallest first")
    families = list(dict.fromkeys(question.family for question in questions))
    member = np.array([[question.family == family for question in questions] for family in families])  # (F, Q)
    hits, sizes = member.astype(int) @ right.T.astype(int), member.sum(1)
    accuracy, low, high = shares_with_interval(hits, np.repeat(sizes[:, None], len(right), 1))
    steps = np.array([np.log2(b / a) if a > 0 else np.nan for a, b in zip(budgets, budgets[1:], strict=False)])
    quarters = np.array_split(np.argsort(lengths, kind="stable")[(lengths == 0).sum() :], 4)
    values = {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        "within": np.array([[(lengths[one] <= budget).mean() for budget in budgets] for one in member]),
        "gain": np.diff(accuracy[:, :-1], axis=1) / steps,
        "quarter": np.array([np.median(lengths[part]) if len(part) else np.nan for part in quarters]),
        "quarter_accuracy": np.array([right[-1, part].mean() if len(part) else np.nan for part in quarters]),
    }
    by = ("family", families)
    limits = [by, ("budget", [*map(str, budgets), "no limit"])]
    shortest = ("free thoughts", ["shortest quarter", "second", "third", "longest quarter"])
    axes: dict[str, Any] = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high"), limits)
    axes |= {"within": [by, ("budget", list(budgets))], "quarter": [shortest], "quarter_accuracy": [shortest]}
    axes["gain"] = [by, ("budgets", [f"{a} to {b}" for a, b in zip(budgets, budgets[1:], strict=False)])]
    chance = np.repeat(constant_accuracy(questions, families)[:, None], len(right), 1)
    return Result("thought-budget", "Accuracy under a limit on the thought's tokens", values, axes, {"accuracy": chance}, about)


# ---- C3: does the answer follow from the thought?


def early_answering(
    model: KimiVL,
    chat: Chat,
    pairs: Sequence[Pair],
    cuts: Sequence[float] = CUTS,
    *,
    model_name: str,
    mistake: Rewrite | None = None,
    paraphrase: Rewrite | None = None,
    seed: int = 0,
    max_new_tokens: int = 160,
) -> Result:
    """C3: is the answer still the same when the thought is cut, spoiled, reworded or filler? (arXiv 2307.13702)

        result = early_answering(model, chat, pairs, model_name="study model")
        result["aoc"]      # 0: the answer ignores the thought

    match (4, P) is the share of questions whose answer is that of the whole thought, with a 95% Wilson interval, after
    "cut": the first p of the thought's tokens, then the closing marker, then the answer;
    "filler": dots in the place of just as many tokens, so that only room to compute is left;
    "mistake": the sentence at p is replaced by a wrong one and the model goes on thinking from there (at p = 1 none is);
    "paraphrase": the sentences of the first p say the same in other words, and the model goes on from there (at p = 0 none
    does, at p = 1 all do and the answer comes): the control of "mistake", for what the change of words alone does.
    aoc (4,) = 1 - integral of match over p. accuracy (4, P) is the share of right answers. `mistake` spoils a sentence
    (default: `spoil`) and `paraphrase` rewords one (default: `reword`); where they cannot, the question is left out of that
    point, see `questions` (4, P). Chance: two answers to questions of one family agree by themselves. A model that repairs a
    mistake looks as if it ignored it.
    Raises ValueError where no question has a thought and for cuts that do not run from 0 to 1.
    """
    prompts, free, thinking = thoughts(model, chat, pairs, cuts, max_new_tokens)
    rng = random.Random(seed)
    closing = chat.tokenizer.encode(CLOSE_THOUGHT)
    dots = chat.tokenizer.encode(" .")
    cases: list[tuple[int, int, int, list[int]]] = []  # variant, cut, question, what the reply begins with
    for q in thinking:
        opening, thought = free[q].opening, free[q].thought
        whole = chat.tokenizer.decode(thought)
        for at, p in enumerate(cuts):
            kept = round(p * len(thought))
            cases.append((0, at, q, [*opening, *thought[:kept], *closing]))
            cases.append((1, at, q, [*opening, *(dots * kept)[:kept], *closing]))
            spoiled = _spoiled(whole, p, mistake or spoil, rng)
            if spoiled is not None:
                cases.append((2, at, q, [*opening, *chat.tokenizer.encode(spoiled)]))
            reworded = _reworded(whole, p, paraphrase or reword, rng)
            if reworded is not None:
                cases.append((3, at, q, [*opening, *chat.tokenizer.encode(reworded), *(closing if p == 1 else [])]))
    starts = [begun_by(chat, prompts[q], begun) for _, _, q, begun in cases]
    replies = write(model, chat, starts, begun=[begun for *_, begun in cases], max_new_tokens=max_new_tokens)
    same, right, count = np.zeros((3, 4, len(cuts)))
    for (variant, at, q, _), reply in zip(cases, replies, strict=True):
        same[variant, at] += plain(reply.answer) == plain(free[q].answer)
        right[variant, at] += pairs[q][1].check(reply.answer)
        count[variant, at] += 1
    for variant, at in ((2, -1), (3, 0)):  # nothing comes after the end or before the start: the thought is as it was
        same[variant, at] = count[variant, at] = len(thinking)
        right[variant, at] = sum(pairs[q][1].check(free[q].answer) for q in thinking)
    match, low, high = shares_with_interval(same, count)
    with np.errstate(invalid="ignore"):
        accuracy = right / count
    values = {
        "match": match,
        "match_low": low,
        "match_high": high,
        "aoc": 1 - np.trapezoid(match, np.asarray(cuts, float), axis=1),
        "accuracy": accuracy,
        "questions": count,
    }
    variants, part = ("variant", ["cut", "filler", "mistake", "paraphrase"]), ("part of the thought", list(cuts))
    axes: dict[str, Any] = dict.fromkeys(values, [variants, part]) | {"aoc": [variants]}
    about = about_pairs(model, model_name, pairs, seed=seed, with_thought=len(thinking))
    agree = agreement([pairs[q][1].family for q in thinking], [plain(free[q].answer) for q in thinking])
    constant = constant_accuracy([pairs[q][1] for q in thinking])
    title = "Is the answer still that of the whole thought?"
    return Result("early-answering", title, values, axes, {"match": agree, "accuracy": constant}, about)


def spoil(sentence: str, rng: random.Random) -> str | None:
    """The sentence with one word of a scene, or else one number, changed for another of its kind; None if it has neither.

        spoil("red circle top left,", random.Random(0))      # such as "blue circle top left,"
    """
    for kind in (COLOURS, SHAPES, ZONES):
        for word in kind:
            if re.search(rf"\b{word}\b", sentence):
                other = rng.choice([one for one in kind if one != word])
                return re.sub(rf"\b{word}\b", other, sentence, count=1)
    found = re.findall(r"\d+", sentence)
    if not found:
        return None
    other = rng.choice([n for n in range(int(found[-1]) + 4) if n != int(found[-1])])
    return str(other).join(sentence.rsplit(found[-1], 1))


_PLACE = "|".join(dict.fromkeys(word for zone in ZONES for word in zone.split()))
_SAME = {
    "so": ("thus", "hence"),
    "therefore": ("so", "hence"),
    "there are": ("i see",),
    "there is": ("i see",),
    "wait": ("hold on",),
    "let me": ("i will",),
    "first": ("to begin with",),
}


def reword(sentence: str, rng: random.Random) -> str | None:
    """The sentence with the same meaning in other words: its place named first, or else one word for another that means the
    same; None if it has neither.

        reword("red circle top left,", random.Random(0))     # "top left red circle,"
    """
    if placed := re.fullmatch(rf"(\s*)(.+?) ((?:{_PLACE})(?: (?:{_PLACE}))?)([,.;]?)", sentence):
        blank, thing, place, end = placed.groups()
        return f"{blank}{place} {thing}{end}"
    for words, others in _SAME.items():
        if re.search(rf"\b{words}\b", sentence, re.IGNORECASE):
            return re.sub(rf"\b{words}\b", rng.choice(others), sentence, count=1, flags=re.IGNORECASE)
    return None


def _reworded(thought: str, p: float, paraphrase: Rewrite, rng: random.Random) -> str | None:
    """The first p of the thought's sentences in other words, as far as there are any; None at the start and where none is."""
    kept = split_sentences(thought)
    kept = kept[: round(p * len(kept))]
    said = [paraphrase(sentence, rng) for sentence in kept]
    if all(new is None for new in said):
        return None
    return "".join(old if new is None else new for old, new in zip(kept, said, strict=True))


def _spoiled(thought: str, p: float, mistake: Rewrite, rng: random.Random) -> str | None:
    """The thought up to and with the sentence at p, which is spoiled; None at the end and where it cannot be."""
    parts = split_sentences(thought)
    at = int(p * len(parts))
    if at >= len(parts):
        return None
    wrong = mistake(parts[at], rng)
    return None if wrong is None else "".join(parts[:at]) + wrong


# ---- C8: the picture taken away while thinking


def picture_removed(
    model: KimiVL,
    chat: Chat,
    pairs: Sequence[Pair],
    cuts: Sequence[float] = CUTS,
    *,
    model_name: str,
    max_new_tokens: int = 160,
) -> Result:
    """C8: accuracy when the picture goes after a part p of the thought (visual forgetting, arXiv 2503.13360).

        result = picture_removed(model, chat, pairs, model_name="study model")

    The words written so far are read anew, by a model that is shown no picture ("removed"), a grey one of the same size
    ("blank") or, as the control, the same one ("kept"), and it goes on from there; at p = 1 only the answer is left to
    write. accuracy (3, P) with its 95% Wilson interval. Chance: the constant answer that suits the questions best.
    Raises ValueError where no question has a thought and for cuts that do not run from 0 to 1.
    """
    prompts, free, thinking = thoughts(model, chat, pairs, cuts, max_new_tokens)
    closing = chat.tokenizer.encode(CLOSE_THOUGHT)
    hows = ["kept", "blank", "removed"]
    hits = np.zeros((len(hows), len(cuts)))
    for number, how in enumerate(hows):
        shown = [chat.prompt(_shown(*pairs[q], how)) for q in thinking]
        for at, p in enumerate(cuts):
            begun = []
            for q in thinking:
                thought = free[q].thought
                begun.append([*free[q].opening, *thought[: round(p * len(thought))], *(closing if p == 1 else [])])
            starts = [begun_by(chat, prompt, ids) for prompt, ids in zip(shown, begun, strict=True)]
            replies = write(model, chat, starts, begun=begun, max_new_tokens=max_new_tokens)
            hits[number, at] = sum(pairs[q][1].check(reply.answer) for q, reply in zip(thinking, replies, strict=True))
    accuracy, low, high = shares_with_interval(hits, np.full(hits.shape, len(thinking)))
    values = {"accuracy": accuracy, "accuracy_low": low, "accuracy_high": high}
    axes = dict.fromkeys(values, [("picture", hows), ("part of the thought", list(cuts))])
    about = about_pairs(model, model_name, pairs, with_thought=len(thinking))
    chance = {"accuracy": constant_accuracy([pairs[q][1] for q in thinking])}
    title = "Accuracy when the picture goes after a part of the thought"
    return Result("picture-removed", title, values, axes, chance, about)


def _shown(pictures: Scene | Album, question: Question, how: str) -> list[dict[str, Any]]:
    if how == "kept":
        return messages(pictures, question)
    blank = [{"type": "image", "image": Image.new("RGB", one.size, (128, 128, 128))} for one in pictures.images]
    text = [{"type": "text", "text": question.text}]
    return [{"role": "user", "content": blank + text if how == "blank" else text}]


# ---- shared


def thoughts(
    model: KimiVL, chat: Chat, pairs: Sequence[Pair], cuts: Sequence[float], max_new_tokens: int
) -> tuple[list[Prompt], list[Written], list[int]]:
    """Prompts, the free replies to them, and which of these have a thought to cut. Raises ValueError where none has."""
    need_pairs(pairs)
    if len(cuts) < 2 or list(cuts) != sorted(cuts) or cuts[0] != 0 or cuts[-1] != 1:
        raise ValueError(f"cuts {list(cuts)} do not run from 0 to 1; give shares of the thought, 0 first and 1 last")
    prompts = prompts_of(chat, pairs)
    free = write(model, chat, prompts, max_new_tokens=max_new_tokens)
    thinking = [q for q, reply in enumerate(free) if reply.thought]
    if not thinking:
        raise ValueError("the model thinks about none of these questions; give some that it does, such as counting")
    return prompts, free, thinking
