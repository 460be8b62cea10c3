"""What a sentence of a thought is doing, told by cue words: a table that can be read, argued with and replaced.

Six classes (plan, look, compute, check, backtrack, conclude) and "other" for a sentence without any cue. Every cue also names
its function in the eight-class scheme of thought anchors (arXiv 2506.19143) and, where there is one, the behaviour that the
Kimi-VL report (arXiv 2504.07491, section 2.4) trains for: planning, evaluation, reflection, exploration.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from dataclasses import dataclass
from itertools import accumulate

from workbench.runs import Run
from workbench.thoughts import sentences

CLASSES: tuple[str, ...] = ("plan", "look", "compute", "check", "backtrack", "conclude", "other")


@dataclass(frozen=True)
class Cue:
    """A sentence in which `pattern` is found (case does not matter) belongs to `kind`."""

    kind: str  # one of CLASSES
    function: str  # one of the eight classes of arXiv 2506.19143, or "" for none
    behaviour: str  # one of the report's four, or "" for none
    pattern: str


# The first cue that is found decides, so what outranks what is the order of the lines.
CUES = (
    Cue("backtrack", "uncertainty_management", "exploration",
        r"^(but |or )?(alternatively|what if|maybe instead|on the other hand|another (way|approach|option|possibility))\b"),
    Cue("backtrack", "uncertainty_management", "exploration",
        r"\b(try (a different|another)|a different (way|approach)|let('s| me| us) try)\b"),
    Cue("backtrack", "uncertainty_management", "reflection",
        r"^(but |oh )?(wait|hmm+|hold on|actually|oops|no,)|\b(scratch that|i (made a mistake|was wrong|mis(read|counted)))\b"),
    Cue("backtrack", "uncertainty_management", "reflection",
        r"\b(that|this)( is|'s| was| seems| looks) (wrong|incorrect|not right|off)\b|\blet('s| me) re(do|start|think|count)\b"),
    Cue("check", "self_checking", "evaluation",
        r"\b(check|checking|verify|verifying|confirm|double-check|make sure|sanity)\b|\b(does|do) (this|that|it|they) "
        r"(make sense|match|fit|hold|agree)|\b(is|seems|looks) (correct|right|consistent)\b"),
    Cue("conclude", "final_answer_emission", "",
        r"\bfinal answer\b|\banswer( is|:| should be| must be)|\\boxed"),
    Cue("compute", "active_computation", "",
        r"\d\s*[-+*/×÷^=<>≤≥]\s*[-(]*\s*[\da-z]|[a-z)]\s*=\s*[-(\d]"),
    Cue("plan", "problem_setup", "planning",
        r"\b(question|problem|task) (asks|is asking|wants|says|states|is about)\b|\b(we|i)('re| are| am) (asked|given)\b"),
    Cue("plan", "plan_generation", "planning",
        r"\blet('s| me| us)\b|\b(i|we)('ll| will| should| need to| have to| can| want to)\b|^(first|next|then|now)\b"),
    Cue("conclude", "result_consolidation", "",
        r"^(and )?(so|therefore|thus|hence|overall|altogether|in (total|summary|conclusion)|(this|which) (means|gives))\b"),
    Cue("compute", "active_computation", "",
        r"\b(comput|calculat|subtract|multipl|divid|simplif|substitut|add(s|ed|ing)?\b|(sum|equals|plus|minus|times)\b)"),
    Cue("look", "fact_retrieval", "",
        r"\b(picture|image|figure|diagram|chart|graph|axis|photo|screen\w*|legend|see|show(s|n)?|labell?ed|there (is|are))\b"),
    Cue("look", "fact_retrieval", "",
        r"\b(left|right|top|bottom|middle|centre|center|corner|above|below|none)\b"),
)  # fmt: skip
OTHER = Cue("other", "", "", "")
_COMPILED = tuple((re.compile(cue.pattern, re.IGNORECASE), cue) for cue in CUES)


@dataclass(frozen=True)
class Segment:
    """One sentence of a run's thought: token positions start to stop (stop not included), its text and the cue it has."""

    start: int
    stop: int
    text: str
    cue: Cue


def classify(sentence: str) -> Cue:
    """The first cue of the table that the sentence holds; OTHER if it holds none.

        classify("Wait, that is wrong.").kind          # "backtrack"
        classify("red circle top left").kind           # "look"
    """
    text = sentence.strip().replace("’", "'")
    return next((cue for pattern, cue in _COMPILED if pattern.search(text)), OTHER)


def thought_positions(run: Run) -> list[int]:
    """Positions of the thought that this run wrote; thoughts of earlier turns, which are prompt, are left out."""
    return [t for t in range(run.prompt_length, len(run.roles)) if run.roles[t] == "thought"]


def segments(run: Run) -> list[Segment]:
    """The thought of a run, sentence by sentence; a token belongs to the sentence in which it ends. [] without a thought."""
    positions = thought_positions(run)
    text = "".join(run.texts[t] for t in positions)
    ends = list(accumulate(len(run.texts[t]) for t in positions))
    found: list[Segment] = []
    first = 0
    for start, stop in _spans(text):
        last = bisect_left(ends, stop + 1)  # tokens that end at or before `stop`
        if last > first:
            sentence = text[start:stop].strip()
            found.append(Segment(positions[first], positions[last - 1] + 1, sentence, classify(sentence)))
            first = last
    return found


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, blanks included, so that they join to the text again. [] for a blank text."""
    return [text[a:b] for a, b in _spans(text)]


def _spans(text: str) -> list[tuple[int, int]]:
    """Where sentences lie; together they are the whole text, and blanks belong to what follows them.

    A list of findings is cut at its commas, as `thoughts.sentences` does; in prose, which has full stops, clauses stay with
    their sentence: "Wait, let me check." is one.
    """
    found = sentences(text)
    prose = re.search(r"[.!?](\s|$)", text) is not None
    cuts = [
        len(text[:start].rstrip())
        for (_, before), (start, _) in zip(found, found[1:], strict=False)
        if not prose or "\n" in text[before:start] or not text[before:start].strip()  # not parted by a comma alone
    ]
    bounds = [0, *cuts, len(text)]
    return list(zip(bounds, bounds[1:], strict=False)) if found else []
