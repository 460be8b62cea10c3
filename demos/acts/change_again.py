"""A run answered again under changes, and what became different.

Letters: S tokens of the reply, L layers, E experts, K chosen, v channels of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kimi_vl_ref import Chat, KimiVL, Reply
from workbench.analyses.experts import chosen_by_both
from workbench.analyses.looking import modality_mass
from workbench.analyses.trials import Trial, read, run_trial, token_logprobs
from workbench.edits import Change, applied, routing_of
from workbench.runs import Begin, Run, record
from workbench.tape import attach
from workbench.thoughts import messages_of

from .act import noted, same_weights, sampling
from .change_kinds import Block, Kind, Region, blanked
from .change_places import Making, Text


@dataclass(frozen=True)
class Replay:
    """The original reply given to the model once more: how likely it is now, and who serves it."""

    reply: float  # log-probability of the whole original reply, nats
    answer: float | None  # of its answer alone, given the original thought; None if there was none
    chosen: np.ndarray  # (L, S, K)


class Base:
    """The run that is changed. Raises ValueError for one of other weights, or one that was answered under changes itself."""

    def __init__(self, model: KimiVL, chat: Chat, run: Run):
        same_weights(model, run)
        if run.settings.get("changes"):
            raise ValueError("this run was answered under changes already; choose the run they were made to")
        self.model, self.chat, self.run = model, chat, run

    @cached_property
    def trial(self) -> Trial:
        return run_trial(self.chat, self.run, score="reply")

    @cached_property
    def before(self) -> Replay:
        return self.replayed([])

    def text(self, run: Run | None) -> Text:
        """Where the parts of the text of a run stand; None: before a reply is written."""
        if run is None:
            return Text(self.run.roles, self.run.prompt_length, None)
        answers = run.positions("answer")
        answers = answers[answers >= run.prompt_length]
        return Text(run.roles, run.prompt_length, int(answers[0]) if len(answers) else None)

    def changes(self, kinds: Sequence[Kind], text: Text) -> list[Change]:
        return [change for one in kinds for change in one.changes(Making(self.run, text, self.head_means))]

    @torch.no_grad()
    def head_means(self, layer: int, heads: list[int]) -> Tensor:
        """What heads of a layer read on average over this run, (len(heads), v)."""
        site = f"decoder.layers.{layer}.attn.core"
        with attach(self.model, read=[site]) as tape:
            read(self.model, self.trial)
        return tape.last(site)[0].mean(0)[heads]

    @torch.no_grad()
    def replayed(self, kinds: Sequence[Kind]) -> Replay:
        """The original reply under changes, in one pass."""
        trial = self.trial
        if any(isinstance(one, Region) for one in kinds):
            pixels, grids, _ = self.chat.processor(blanked(self.run, kinds))
            trial = replace(trial, pixel_values=pixels, grids=grids)
        changes = self.changes(kinds, self.text(self.run))
        with applied(self.model, changes, read=["decoder.layers.*.ffn.router.chosen"], idle="report") as done:
            logprobs, _ = token_logprobs(self.model, trial, read(self.model, trial))
        each = logprobs[0].double().cpu().numpy()
        answer = [at for at, t in enumerate(trial.scored) if trial.roles[t] == "answer" or t == len(trial.ids) - 1]
        wrote = np.array(trial.scored) - 1  # a word is written one position before its own
        chosen = np.stack([ids.cpu().numpy()[wrote] for ids in routing_of(done.tape, row=0).values()])
        return Replay(float(each.sum()), float(each[answer].sum()) if self.run.answer else None, chosen)

    def answered(
        self, kinds: Sequence[Kind], should_stop: Callable[[], bool], note: str
    ) -> Generator[dict[str, Any], None, Run]:
        """The question asked again under changes: yields {"note"}, returns the Run. Sampled as the original was.

        Where a change tells thought from answer, the model writes the thought first and then, with its thought given, the
        answer: only then it is known where the thought ends.
        """
        own = self.run.settings.get("begin", {}).get("tokens", 0)
        ids = self.run.token_ids[self.run.prompt_length :][:own].tolist()
        begin = Begin(ids, f"begin the reply with {own} tokens, as before", self.run.settings["begin"]) if own else None
        run = yield from self._recorded(kinds, self.text(None), begin, should_stop, note)
        text = self.text(run)
        if not any(isinstance(one, Block) and one.split() for one in kinds) or text.answer is None or should_stop():
            return run
        thought = run.token_ids[run.prompt_length : text.answer].tolist()
        begin = Begin(thought, "its own thought given, so that only the answer is kept from looking") if thought else None
        return (yield from self._recorded(kinds, text, begin, should_stop, note))

    def _recorded(
        self, kinds: Sequence[Kind], text: Text, begin: Begin | None, should_stop: Callable[[], bool], note: str
    ) -> Generator[dict[str, Any], None, Run]:
        asked = messages_of(self.run)
        images = iter(blanked(self.run, kinds))
        for message in asked:
            if not isinstance(message["content"], str):
                message["content"] = [
                    {**part, "image": next(images)} if part["type"] == "image" else part for part in message["content"]
                ]
        writing = record(
            self.model, self.chat, asked, model_name=self.run.model_name, should_stop=should_stop,
            changes=self.changes(kinds, text), begin=begin, **sampling(self.run),
        )  # fmt: skip
        run = yield from noted(_quiet(writing), f"{note} {{}} tokens…")
        regions = [one.line() for one in kinds if isinstance(one, Region)]
        return replace(run, edits=regions + run.edits, settings=run.settings | ({"regions": regions} if regions else {}))


def _quiet(items: Iterator[Reply | Run]) -> Iterator[Reply | Run]:
    """Without the warning that a change touched nothing: the page says it beside the answer."""
    while True:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*touched nothing", RuntimeWarning)
            item = next(items, None)
        if item is None:
            return
        yield item


def moved(before: np.ndarray, after: np.ndarray) -> float:
    """Share of expert choices (L, S, K) and (L, S, K') that are not in both, of the larger number of choices.

    moved(np.array([[[0, 1]]]), np.array([[[0, 2]]]))     # 0.5
    """
    return 1.0 - float(chosen_by_both(before, after).mean()) / max(before.shape[-1], after.shape[-1])


def on_picture(run: Run) -> float | None:
    """Share of attention on the pictures while the reply was written, mean over layers, heads and words; None without
    picture, or for an empty reply. `analyses.looking.modality_mass` of one run.
    """
    if not run.pictures or not len(run.positions("thought", "answer")):
        return None
    mass = modality_mass([run])
    return float(mass["mass"][:, list(mass.axes["mass"][1][1]).index("image")].mean())
