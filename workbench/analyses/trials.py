"""Questions with a reply written out, so that one forward pass says how likely the reply is: what interventions are judged by.

A reply that is the likeliest token at every scored place is what greedy decoding would write there. Letters: B rows, T tokens
of prompt and reply, M visual tokens of the trial, D decoder stream, W vocabulary, S scored tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.chat import Prompt, reply_roles
from kimi_vl_ref.images import Picture
from workbench.runs import Run, fingerprint
from workbench.study.batches import written_reply
from workbench.study.evaluate import messages as messages_of
from workbench.study.families import Question, make
from workbench.study.scenes import Scene
from workbench.study.views import Album

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Trial:
    """One question and one reply to it. `scored` are positions of reply tokens; the one at t is predicted at t - 1."""

    question: str
    reply: str
    ids: Tensor  # (T,) prompt, reply and the token that ends it
    texts: list[str]  # (T,) for the eye
    roles: list[str]  # (T,) as in `kimi_vl_ref.chat.Prompt`
    scored: list[int]
    pictures: list[Picture]
    pixel_values: Tensor | None  # (N, 3, 14, 14)
    grids: Tensor | None  # (pictures, 2)
    boxes: tuple[Box, ...] = ()  # what the answer is about, in pixels of the first picture; () if unknown
    domain: str = ""

    def positions(self, group: str) -> list[int]:
        """Positions of a group: "picture", "question", "thought", "answer" (its scored tokens) or "last" (where they are
        predicted). Raises ValueError for another name.
        """
        last = [position - 1 for position in self.scored]
        if group in ("answer", "last"):
            return self.scored if group == "answer" else last
        role = {"picture": "image ", "question": "user", "thought": "thought"}.get(group)
        if role is None:
            raise ValueError(f"no group of positions is called {group!r}; use picture, question, thought, answer or last")
        return [at for at, name in enumerate(self.roles) if name.startswith(role)]


def make_trial(
    chat: Chat,
    messages: Sequence[Mapping[str, Any]],
    reply: str,
    *,
    score: str = "answer",
    boxes: Sequence[Box] = (),
    domain: str = "",
) -> Trial:
    """A conversation that waits for its answer, and the reply to judge; `score` is "answer" or "reply" (thought included).

        trial = make_trial(chat, [{"role": "user", "content": "how many?"}], "2")

    The token that ends the reply is scored too: "1" is not the start of "12". Raises ValueError.
    """
    prompt, written = chat.prompt(messages), chat.tokenizer.encode(reply)
    if score not in ("answer", "reply"):
        raise ValueError(f"score is {score!r}; use 'answer', or 'reply' to score the thought too")
    question = next((_text(one["content"]) for one in reversed(messages) if one["role"] == "user"), "")
    return written_trial(chat, prompt, written, question, reply, whole=score == "reply", boxes=boxes, domain=domain)


def written_trial(
    chat: Chat,
    prompt: Prompt,
    written: Sequence[int],
    question: str,
    reply: str,
    *,
    begun: int = 0,
    whole: bool = False,
    boxes: Sequence[Box] = (),
    domain: str = "",
) -> Trial:
    """A prompt and the tokens written after it, which end here. Of those after the first `begun`, the answer's and the token
    that ends the reply are scored; whole: all are. question and reply are how the trial is called.
    """
    written = [*written, chat.tokenizer.special["<|im_end|>"]]
    ids, roles = prompt.input_ids + written, prompt.roles + reply_roles(chat.tokenizer, written)
    start, last = len(prompt.input_ids) + begun, len(ids) - 1
    scored = [at for at in range(start, len(ids)) if whole or roles[at] == "answer" or at == last]
    return Trial(
        question,
        reply,
        torch.tensor(ids),
        [chat.tokenizer.token_text(id) for id in ids],
        roles,
        scored,
        list(prompt.pictures),
        prompt.pixel_values,
        prompt.image_grid_hws,
        tuple(boxes),
        domain,
    )


def scene_trial(chat: Chat, scene: Scene | Album, question: Question, *, score: str = "answer") -> Trial:
    """The true reply to a question about a study scene, with the boxes of what it is about.

        trial = scene_trial(chat, *make("count", seed=7))
    """
    reply = written_reply(question)
    return make_trial(
        chat, messages_of(scene, question), reply, score=score, boxes=question.targets, domain=question.family
    )


def study_trials(
    chat: Chat, families: Sequence[str], scenes: int, *, split: str = "report", score: str = "answer", first: int = 0
) -> list[Trial]:
    """Trials of scenes `first` to `first + scenes - 1` of each family, family after family.

        trials = study_trials(chat, ["count", "where"], scenes=20)
    """
    return [
        scene_trial(chat, *make(family, seed, split), score=score)
        for family in families
        for seed in range(first, first + scenes)
    ]


def run_trial(chat: Chat, run: Run, *, score: str = "answer") -> Trial:
    """What a recorded run wrote, as a trial. Raises ValueError for a run without an answer to score.

        score(model, [run_trial(chat, run)]).nll      # how likely its own answer is
    """
    roles, length = run.roles, len(run.token_ids)
    end = length - 1 if run.finished else None
    scored = [
        at for at in range(run.prompt_length, length) if score == "reply" or roles[at] == "answer" or at == end
    ]
    if not scored:
        raise ValueError("the run wrote nothing to score; record it with a higher max_new_tokens")
    pixels, grids, pictures = chat.processor([picture.image for picture in run.pictures])
    trial = Trial(
        run.question, run.answer, torch.from_numpy(run.token_ids.astype(np.int64)), run.texts, roles, scored, pictures,
        pixels, grids,
    )  # fmt: skip
    return trial if pictures else replace(trial, pixel_values=None, grids=None)


def see(model: KimiVL, trial: Trial) -> Tensor:
    """The trial's visual tokens (M, D). Raises ValueError for a trial without a picture."""
    if trial.pixel_values is None or trial.grids is None:
        raise ValueError(f"the trial {trial.question!r} has no picture; give one that has")
    weight = model.logits.weight
    return model.see(trial.pixel_values.to(weight.device, weight.dtype), trial.grids)


def read(model: KimiVL, trial: Trial, visual: Tensor | None = None, rows: int = 1) -> Tensor:
    """The normed stream (B, T, D) of the trial, B rows alike, or with visual tokens (B, M, D) of their own."""
    if visual is None:
        visual = see(model, trial)[None] if trial.pixel_values is not None else None
    elif visual.shape[0] != rows:
        rows = visual.shape[0]
    ids = trial.ids.to(model.logits.weight.device).expand(rows, -1)
    if visual is not None:
        visual = visual.expand(rows, -1, -1).flatten(0, 1)
    return model.decoder(model.embedded(ids, visual))


def token_logprobs(model: KimiVL, trial: Trial, stream: Tensor) -> tuple[Tensor, Tensor]:
    """Of the scored tokens: log-probabilities in nats and whether each is the likeliest, both (B, S).

    stream: (B, T, D) as `read` gives it.
    """
    rows = torch.tensor(trial.scored, device=stream.device)
    logits = model.logits(stream[:, rows - 1])
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    wanted = trial.ids.to(stream.device)[rows].expand(len(stream), -1)
    return wide.log_softmax(-1).gather(-1, wanted[..., None]).squeeze(-1), wide.argmax(-1) == wanted


@dataclass(frozen=True)
class Scores:
    """One entry a trial."""

    logprob: np.ndarray  # (n,) of the whole scored reply, nats
    nll: np.ndarray  # (n,) nats a scored token
    right: np.ndarray  # (n,) bool: greedy decoding would write every scored token


@dataclass(frozen=True)
class Batch:
    """Trials that go through the decoder together, padded on the right."""

    trials: list[Trial]
    x: Tensor  # (B, T, D) the stream at its start

    @property
    def real(self) -> Tensor:
        """(B, T) False for padding."""
        lengths = torch.tensor([len(trial.ids) for trial in self.trials], device=self.x.device)
        return torch.arange(self.x.shape[1], device=self.x.device) < lengths[:, None]


@torch.no_grad()
def batches(model: KimiVL, trials: Sequence[Trial], size: int) -> list[Batch]:
    """Trials with their pictures seen: what an intervention in the decoder alone can be run on again and again."""
    found = []
    for start in range(0, len(trials), size):
        group = list(trials[start : start + size])
        device = model.logits.weight.device
        ids = torch.zeros(len(group), max(len(trial.ids) for trial in group), dtype=torch.long, device=device)
        for row, trial in enumerate(group):
            ids[row, : len(trial.ids)] = trial.ids.to(device)
        seen = [see(model, trial) for trial in group if trial.pixel_values is not None]
        found.append(Batch(group, model.embedded(ids, torch.cat(seen) if seen else None)))
    return found


@torch.no_grad()
def score_batches(model: KimiVL, seen: Iterable[Batch]) -> Scores:
    """`score` of trials whose pictures were seen before; only the decoder runs."""
    found = []
    for batch in seen:
        stream = model.decoder(batch.x, batch.real.sum(1))
        found += [token_logprobs(model, trial, stream[row : row + 1]) for row, trial in enumerate(batch.trials)]
    return Scores(
        np.array([float(logprobs.sum()) for logprobs, _ in found]),
        np.array([float(-logprobs.mean()) for logprobs, _ in found]),
        np.array([bool(hits.all()) for _, hits in found], bool),
    )


def score(model: KimiVL, trials: Sequence[Trial], batch: int = 1) -> Scores:
    """How likely the replies are, under whatever is attached to the model.

    batch: trials a forward pass. Leave it at 1 where positions are named: they mean another word in each trial.

        with applied(model, [ablate_experts(3, [7])]):
            score(model, trials).right.mean()
    """
    groups = (trials[start : start + batch] for start in range(0, len(trials), batch))
    return score_batches(model, (one for group in groups for one in batches(model, group, batch)))  # held one at a time


def about_trials(model: KimiVL, trials: Sequence[Trial], model_name: str, **more: Any) -> dict[str, Any]:
    """What a Result says of the trials that it was computed from. Raises ValueError for none."""
    if not trials:
        raise ValueError("there are no trials to analyse; give at least one")
    return {
        "weights": model_name,
        "fingerprint": fingerprint(model),
        "trials": len(trials),
        "domains": sorted({trial.domain for trial in trials}),
        "prompts": [trial.question for trial in trials],
        "replies": [trial.reply for trial in trials],
        **more,
    }


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content)


def domains(trials: Sequence[Trial]) -> list[str]:
    """Their domains, in the order in which they come."""
    return list(dict.fromkeys(trial.domain for trial in trials))


def by_domain(trials: Sequence[Trial], values: np.ndarray) -> np.ndarray:
    """One value a trial -> their mean in each of `domains`; nan where all are nan."""
    of = np.array([trial.domain for trial in trials])
    groups = [values[(of == domain) & ~np.isnan(values)] for domain in domains(trials)]
    return np.array([group.mean() if len(group) else np.nan for group in groups])
