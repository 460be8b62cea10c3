"""The compare panel: the same question of another picture, or of other weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from workbench.runs import Run, record
from workbench.thoughts import messages_of

from ..desk import uploaded
from ..session import Session
from .act import Act, Asked, noted, sampling


def ask_other(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: path of an uploaded picture that takes the first one's place. Yields {"note"}, and {"payload"} of the new run."""
    picture = asked.session.picture(uploaded(asked.args.get("path")))
    pictures = [picture, *asked.run.pictures[1:]]
    yield from _answered(asked, asked.session, replace(asked.run, pictures=pictures))


def ask_against(asked: Asked) -> Iterator[dict[str, Any]]:
    """The same question with the weights that the page was given beside its own. Yields {"note"}, and {"payload"}."""
    if asked.session.against is None:
        raise ValueError("there are no other weights; start the page with --against and a checkpoint folder")
    yield from _answered(asked, asked.session.against, asked.run)


def _answered(asked: Asked, session: Session, run: Run) -> Iterator[dict[str, Any]]:
    if not asked.run.pictures and run.pictures:
        raise ValueError("this question was asked without a picture; ask it with one first")
    options = {"model_name": session.model_name, "should_stop": asked.should_stop, **sampling(run)}
    new = yield from noted(record(session.model, session.chat, messages_of(run), **options), "Answering: {} tokens")
    yield {"payload": asked.view(asked.keep(new))}


ACTS: dict[str, Act] = {"ask_other": ask_other, "ask_against": ask_against}
