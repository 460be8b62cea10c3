"""Study questions asked in batches, each from a reply that has begun, and what verdicts on them are compared with.

Letters: Q questions, F families.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from kimi_vl_ref import Chat, KimiVL, generate
from kimi_vl_ref.chat import Prompt, collate, reply_roles
from kimi_vl_ref.generate import ThoughtBudget
from kimi_vl_ref.thought import OPEN_THOUGHT, split_thought
from workbench.runs import fingerprint
from workbench.study.evaluate import messages, wilson
from workbench.study.families import Question, majority_baseline
from workbench.study.scenes import Scene
from workbench.study.views import Album

Pair = tuple[Scene | Album, Question]

BATCH = 50  # rows answered together


@dataclass(frozen=True)
class Written:
    """One greedy reply, without the stop token: what opens the thought, the thought, and the answer's text."""

    opening: list[int]
    thought: list[int]
    answer: str


@torch.inference_mode()
def write(
    model: KimiVL,
    chat: Chat,
    prompts: Sequence[Prompt],
    *,
    begun: Sequence[Sequence[int]] | None = None,
    thought_budget: int | None = None,
    max_new_tokens: int = 160,
) -> list[Written]:
    """Greedy replies, in batches of prompts that are about equally long. `begun`: reply tokens that the prompts end in."""
    replies: list[Written | None] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda at: len(prompts[at].input_ids))
    weight = model.logits.weight
    for start in range(0, len(order), BATCH):
        group = order[start : start + BATCH]
        inputs = collate([prompts[at] for at in group], pad_id=0).to(weight.device, weight.dtype)
        written = [list(begun[at]) if begun else [] for at in group]
        budgets = None if thought_budget is None else [ThoughtBudget(chat.tokenizer, thought_budget) for _ in group]
        for step in generate(model, inputs, max_new_tokens=max_new_tokens, stop_ids=chat.stop_ids, budgets=budgets):
            for ids, token in zip(written, step.tokens, strict=True):
                if token is not None and token not in chat.stop_ids:
                    ids.append(token)
        for at, ids in zip(group, written, strict=True):
            replies[at] = _written(chat, ids)
    return [reply for reply in replies if reply is not None]


def _written(chat: Chat, ids: list[int]) -> Written:
    thought = [at for at, role in enumerate(reply_roles(chat.tokenizer, ids)) if role == "thought"]
    _, answer = split_thought(chat.tokenizer.decode(ids))
    if not thought or not chat.tokenizer.decode(ids).lstrip().startswith(OPEN_THOUGHT):
        return Written([], [], answer)  # a thought that was never opened cannot be begun again
    first = thought[0]
    if OPEN_THOUGHT not in chat.tokenizer.decode(ids[:first]):
        first += 1  # this token ends the marker and begins the thought
    return Written(ids[:first], [ids[at] for at in thought if at >= first], answer)


def prompts_of(chat: Chat, pairs: Sequence[Pair]) -> list[Prompt]:
    return [chat.prompt(messages(scene, question)) for scene, question in pairs]


def begun_by(chat: Chat, prompt: Prompt, ids: list[int]) -> Prompt:
    """The prompt with the beginning of its reply."""
    return replace(prompt, input_ids=prompt.input_ids + ids, roles=prompt.roles + reply_roles(chat.tokenizer, ids))


def shares_with_interval(hits: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shares and the ends of their 95% Wilson intervals; nan where nothing was counted."""
    with np.errstate(invalid="ignore"):
        share = hits / counts
    ends = [wilson(int(h), int(n)) if n else (np.nan, np.nan) for h, n in zip(hits.flat, counts.flat, strict=True)]
    low, high = np.array(ends).T.reshape(2, *hits.shape)
    return share, low, high


def constant_accuracy(questions: Sequence[Question], families: Sequence[str] = ()) -> Any:
    """Accuracy of the best constant answer, of each family or, without families, of all together."""
    names = families or list(dict.fromkeys(question.family for question in questions))
    each = [[question for question in questions if question.family == name] for name in names]
    accuracy = np.array([majority_baseline(asked, asked) for asked in each])
    return accuracy if families else float(np.average(accuracy, weights=[len(asked) for asked in each]))


def agreement(families: Sequence[str], answers: Sequence[str]) -> float:
    """How often the answers to two different questions of one family are the same; nan without two."""
    same = [
        answers[a] == answers[b] for a in range(len(answers)) for b in range(a) if families[a] == families[b]
    ]
    return float(np.mean(same)) if same else float("nan")


def plain(answer: str) -> str:
    return " ".join(answer.lower().split())


def about_pairs(model: KimiVL, model_name: str, pairs: Sequence[Pair], **more: Any) -> dict[str, Any]:
    return {
        "weights": model_name,
        "fingerprint": fingerprint(model),
        "questions": len(pairs),
        "families": list(dict.fromkeys(question.family for _, question in pairs)),
        "prompts": [question.text for _, question in pairs],
        "scene_seeds": [scene.seed for scene, _ in pairs],
        "decoding": "greedy",
        **more,
    }


def need_pairs(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise ValueError("there are no questions to ask; give at least one scene with its question")
