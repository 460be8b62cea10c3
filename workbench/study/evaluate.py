"""How often the study model is right, on scenes whose content it was never trained on, beside what a constant answer
gets.

    kimi-vl study evaluate --scenes 500

Greedy decoding, one question a scene. The split "report" is for the figures that are published, "choose" for decisions
made on the way; both are disjoint from training by content (`scenes.split_of`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from kimi_vl_ref import Chat, KimiVL, generate, load
from kimi_vl_ref.chat import Prompt, collate, reply_roles
from kimi_vl_ref.generate import ThoughtBudget
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT, split_thought

from .families import FAMILIES, Question, majority_baseline, make
from .scenes import Scene
from .views import Album


@dataclass(frozen=True)
class Score:
    """Accuracy on one family, with a 95% Wilson interval, and the best constant answer's accuracy beside it."""

    family: str
    scenes: int
    right: int
    low: float
    high: float
    baseline: float

    @property
    def accuracy(self) -> float:
        return self.right / self.scenes


def wilson(right: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% interval of a share (Wilson 1927); it behaves near 0 and 1."""
    share, spread = right / n, z * z / n
    middle = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def ask(
    model: KimiVL,
    chat: Chat,
    pairs: Sequence[tuple[Scene | Album, Question]],
    *,
    max_new_tokens: int = 160,
    thought_budget: int | None = None,
    thoughts: Sequence[str] | None = None,
    batch: int = 50,
    progress: bool = False,
) -> list[tuple[str, str]]:
    """Greedy (thought, answer) to each question about its scene. `thoughts` are written in the model's place, one a
    question; "" leaves that model to itself.
    """
    replies: list[tuple[str, str]] = []
    for start in tqdm(range(0, len(pairs), batch), disable=not progress, leave=False):
        prompts = [chat.prompt(messages(s, q)) for s, q in pairs[start : start + batch]]
        given = [""] * len(prompts) if thoughts is None else thoughts[start : start + batch]
        prompts = [_thinking(chat, prompt, thought) for prompt, thought in zip(prompts, given, strict=True)]
        weight = model.logits.weight
        inputs = collate(prompts, pad_id=0).to(weight.device, weight.dtype)
        budgets = None if thought_budget is None else [ThoughtBudget(chat.tokenizer, thought_budget) for _ in prompts]
        written: list[list[int]] = [[] for _ in prompts]
        for step in generate(model, inputs, max_new_tokens=max_new_tokens, stop_ids=chat.stop_ids, budgets=budgets):
            for ids, token in zip(written, step.tokens, strict=True):
                if token is not None and token not in chat.stop_ids:
                    ids.append(token)
        texts = [chat.tokenizer.decode(ids) for ids in written]
        replies += [(t, text.strip()) if t else split_thought(text) for t, text in zip(given, texts, strict=True)]
    return replies


def _thinking(chat: Chat, prompt: Prompt, thought: str) -> Prompt:
    """The prompt with a finished thought behind it."""
    ids = chat.tokenizer.encode(f"{OPEN_THOUGHT} {thought}{CLOSE_THOUGHT}") if thought else []
    return replace(prompt, input_ids=prompt.input_ids + ids, roles=prompt.roles + reply_roles(chat.tokenizer, ids))


def messages(pictures: Scene | Album, question: Question) -> list[dict]:
    images = [{"type": "image", "image": image} for image in pictures.images]
    return [{"role": "user", "content": [*images, {"type": "text", "text": question.text}]}]


def evaluate(
    model: KimiVL,
    chat: Chat,
    families: Sequence[str] = tuple(FAMILIES),
    *,
    scenes: int = 500,
    split: str = "report",
    level: str = "full",
    thought_budget: int | None = None,
    progress: bool = False,
) -> list[Score]:
    """One Score a family; the constant answer is chosen on as many training questions."""
    scores = []
    for family in families:
        pairs = [make(family, seed, split, level) for seed in range(scenes)]
        train = [make(family, seed, "train", level)[1] for seed in range(scenes)]
        right = count_right(pairs, ask(model, chat, pairs, thought_budget=thought_budget, progress=progress))
        low, high = wilson(right, scenes)
        scores.append(Score(family, scenes, right, low, high, majority_baseline(train, [q for _, q in pairs])))
    return scores


def count_right(pairs: Sequence[tuple[Scene | Album, Question]], replies: Sequence[tuple[str, str]]) -> int:
    return sum(question.check(answer) for (_, question), (_, answer) in zip(pairs, replies, strict=True))


def table(scores: Sequence[Score]) -> str:
    """The scores as a Markdown table, percent."""
    lines = ["| family | right | 95% interval | constant answer |", "|---|---|---|---|"]
    for s in scores:
        interval = f"{100 * s.low:.1f} to {100 * s.high:.1f}"
        lines.append(f"| {s.family} | {100 * s.accuracy:.1f} | {interval} | {100 * s.baseline:.1f} |")
    return "\n".join(lines)


def check_json_path(path: str | Path | None) -> None:
    """Raises ValueError for a file whose folder does not exist: before hours of answering, not after."""
    if path is not None and not Path(path).parent.is_dir():
        raise ValueError(f"{path} cannot be written; name a file in a folder that exists with --json")


def main(
    model: str = "study",
    scenes: int = 500,
    families: Sequence[str] | None = None,
    split: str = "report",
    thought_budget: int | None = None,
    json_path: str | Path | None = None,
) -> None:
    """Prints the table; `json_path` also writes the numbers."""
    if scenes < 1:
        raise ValueError(f"{scenes} scenes give no share; use 1 or more")
    check_json_path(json_path)
    loaded, chat = load(model)
    with torch.inference_mode():
        options = {"scenes": scenes, "split": split, "thought_budget": thought_budget, "progress": True}
        scores = evaluate(loaded, chat, families or tuple(FAMILIES), **options)
    print(f"{model}, {scenes} scenes a family, split '{split}', greedy, thought budget {thought_budget}")
    print(table(scores))
    if json_path is not None:
        Path(json_path).write_text(json.dumps([asdict(s) for s in scores], indent=2) + "\n")
