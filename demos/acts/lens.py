"""The panel "Lens and credit": what each layer would say next at words and at patches, and which parts of the picture a
written word owes its probability to.

Letters: L1 the streams (embedded, then after each layer), N positions, M visual tokens of a picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from kimi_vl_ref import Chat, KimiVL
from kimi_vl_ref.images import ImageProcessor
from workbench.analyses.attribution import integrated_gradients
from workbench.analyses.lens import logit_lens
from workbench.analyses.occlusion import map_curves, occlusion
from workbench.analyses.result import Result
from workbench.analyses.trials import Trial, run_trial
from workbench.runs import Run
from workbench.tape import attach

from .act import Act, Asked

LONGEST = 256  # positions read at once
TOP, PATCH_TOP = 5, 3
FINE = 48  # visual tokens; the grey box moves by half its width in pictures of up to so many, else by all of it
STOPPED = {"stopped": "Stopped before all was computed."}


class _Stopped(Exception):
    pass


def lens(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: first, last (positions of the run, LONGEST of them at most).

    Yields {"first", "layers" (L1,), "words", "probs" (L1, N, 5), "prob", "rank" (L1, N) of what the last layer says,
    "settled" (N,) number of the stream from which on that is the likeliest, "chance": {"prob", "rank"} of a guess}.
    """
    end = len(asked.run.token_ids) - 1
    first = asked.whole("first", 0, end)
    last = asked.whole("last", first, min(end, first + LONGEST - 1))
    result = logit_lens(asked.session.model, asked.session.chat, asked.run, range(first, last + 1), top=TOP)
    yield {
        "first": first,
        "layers": _layers(result),
        "words": result["words"].tolist(),
        **{name: _rounded(result[name]) for name in ("probs", "prob")},
        "rank": result["rank"].tolist(),
        "settled": result["settled"].tolist(),
        "chance": {"prob": result.chance["prob"], "rank": result.chance["rank"]},
    }


def patch_lens(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: picture (number). The lens at its visual tokens, and at those of a picture of one grey in its place.

    Yields {"picture", "layers", "words", "probs" (L1, M, 3), "grey" (L1, M) the likeliest word there without a picture}.
    """
    run, session = asked.run, asked.session
    if not run.pictures:
        raise ValueError("this run has no picture; ask about one to read words on its patches")
    picture = asked.whole("picture", 0, len(run.pictures) - 1)
    at = run.positions(f"image {picture}").tolist()
    yield {"note": "1 of 2: the picture"}
    result = logit_lens(session.model, session.chat, run, at, top=PATCH_TOP)
    if asked.should_stop():
        yield STOPPED
        return
    yield {"note": "2 of 2: a grey picture of the same size, for comparison"}
    blank = logit_lens(session.model, session.chat, without_pictures(run, session.chat.processor), at, top=1)
    yield {
        "picture": picture,
        "layers": _layers(result),
        "words": result["words"].tolist(),
        "probs": _rounded(result["probs"]),
        "grey": blank["words"][..., 0].tolist(),
    }


def credit(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: first, last: positions of written words. Their log-probability, shared out over the picture.

    Yields in turn, each with all before it: {"word", "loss"} occlusion, nats by row and column of visual tokens;
    {"gradients", "ends", "gap"} integrated gradients with the experts pinned, the log-probability with grey and with the
    picture, and what is missing to their difference (also with routing free); {"curves"} deletion and insertion of both
    maps with the controls. {"stopped"} when it was stopped.
    """
    session, run = asked.session, asked.run
    end = len(run.token_ids) - 1
    first = asked.whole("first", 0, end)
    trial = word_trial(session.chat, run, first, asked.whole("last", first, end))
    options: dict[str, Any] = {"model_name": session.model_name}
    grid = trial.pictures[0].grid
    side = grid.patch_size * grid.merge
    stride = side // 2 if grid.token_count <= FINE else side
    known: dict[str, Any] = {"word": "".join(trial.texts[at] for at in trial.scored)}
    try:
        yield {"note": "1 of 3: hiding place after place"}
        with _stopping(session.model, asked.should_stop):
            hidden = occlusion(session.model, trial, side=side, stride=stride, **options)
        known |= {"loss": _rounded(hidden["loss"])}
        yield known | {"note": "2 of 3: gradients from grey to the picture"}
        with _stopping(session.model, asked.should_stop):
            found = integrated_gradients(session.model, trial, **options)
        gradients = grid.token_heat(found["routing pinned"])
        known |= {
            "gradients": _rounded(gradients),
            "ends": found.about["log_probability_of_baseline_and_input"]["routing pinned"],
            "gap": found.about["completeness_gap"],
        }
        yield known | {"note": "3 of 3: hiding and showing the picture in the order of each map"}
        maps = {"integrated gradients": lambda _: gradients, "occlusion": lambda _: hidden["loss"]}
        with _stopping(session.model, asked.should_stop):
            curves = map_curves(session.model, trial, maps, **options)
        yield known | {"curves": _curves(curves)}
    except _Stopped:
        yield known | STOPPED
    except ImportError as error:  # captum is not there
        raise ValueError(str(error)) from error


def word_trial(chat: Chat, run: Run, first: int, last: int) -> Trial:
    """The run up to its written words at positions first..last, which are what is scored.

    Raises ValueError where none was written there, and for a run without exactly one picture.
    """
    if len(run.pictures) != 1:
        raise ValueError(f"credit is shared out over exactly one picture, and this run has {len(run.pictures)}")
    scored = list(range(max(first, run.prompt_length), last + 1))
    if not scored:
        raise ValueError("this word was given, not written; select a word of the thought or the answer")
    trial = run_trial(chat, run, score="reply")
    length = last + 1  # what comes later has no part in it
    return replace(trial, ids=trial.ids[:length], texts=trial.texts[:length], roles=trial.roles[:length], scored=scored)


def without_pictures(run: Run, processor: ImageProcessor) -> Run:
    """The run with each picture replaced by the processor's mean colour, of the same size."""
    grey = tuple(round(255 * mean) for mean in processor.image_mean)
    blank = [replace(one, image=Image.new("RGB", one.image.size, grey)) for one in run.pictures]
    return replace(run, pictures=blank)


@contextmanager
def _stopping(model: KimiVL, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Raises _Stopped at the next forward pass of the block once should_stop() says so."""

    def look(_value: Any, _site: str) -> None:
        if should_stop():
            raise _Stopped

    with attach(model, read=["decoder.norm"], keep=look):
        yield


def _layers(result: Result) -> list[str]:
    return [str(name) for name in result.axes["words"][0][1]]


def _rounded(values: np.ndarray) -> list[Any]:
    return np.asarray(values, float).round(5).tolist()


def _curves(result: Result) -> dict[str, Any]:
    _, maps, shares = (list(labels) for _, labels in result.axes["probability"])
    return {
        "maps": maps,
        "controls": result.about["controls"],
        "shares": shares,
        "deletion": _rounded(result["probability"][0]),
        "insertion": _rounded(result["probability"][1]),
        "areas": {"deletion": _rounded(result["area"][0]), "insertion": _rounded(result["area"][1])},
    }


ACTS: dict[str, Act] = {"lens": lens, "patch_lens": patch_lens, "credit": credit}
