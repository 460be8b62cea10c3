"""What an analysis is given on the command line: recorded runs (`Asked`), or a model with scenes of the study or a person's own
pictures and question (`Posed`). Whatever has to be recorded, read or loaded for it is, once, when it is first needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from kimi_vl_ref import Chat, KimiVL, load
from kimi_vl_ref.chat import Prompt
from kimi_vl_ref.images import open_image
from workbench.runs import Run, fingerprint, record
from workbench.study.evaluate import messages
from workbench.study.families import make

from .asked import Pair
from .result import Result
from .trials import Trial, run_trial, scene_trial

Messages = list[dict[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What can be asked for on the command line. `Entry.options` says which of them an analysis heeds."""

    model: str = "study"  # as for `load`
    families: Sequence[str] = ()
    scenes: int | None = None  # of each family
    images: Sequence[Path] = ()
    question: str = ""
    group: str = "all"
    layer: int | None = None
    position: int | None = None
    picture: int = 0
    at: tuple[float, float] | None = None  # a point of the picture, in its pixels
    experts: Sequence[tuple[int, int]] = ()  # (layer, expert)
    site: str = "residual"
    label: str = "colour"
    samples: int = 8  # replies to one question
    max_tokens: int = 160
    workers: int = 2
    progress: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Asked(Options):
    """Recorded runs, and what to do with them."""

    runs: Sequence[Run]
    labels: Sequence[str] = ()  # the domain of each run
    against: Sequence[Run] = ()  # runs to compare with
    recorder: Posed | None = None  # what recorded the runs just now, if they are no files

    @property
    def run(self) -> Run:
        """The only run. Raises ValueError for several."""
        if len(self.runs) != 1:
            raise ValueError(f"this analysis looks at one run, and {len(self.runs)} were given; name one")
        return self.runs[0]

    @property
    def routed_layer(self) -> int:
        """The layer asked for, or the first that routes."""
        return self.run.moe_layers[0] if self.layer is None else self.layer

    @cached_property
    def loaded(self) -> tuple[KimiVL, Chat]:
        """The model that wrote the runs. Raises ValueError if their weights are others."""
        model, chat = self.recorder.loaded if self.recorder else load(self.model)
        found, wanted = fingerprint(model), self.runs[0].versions.get("weights")
        if found != wanted:
            raise ValueError(f"the runs come from weights {wanted}, and {self.model!r} has {found}; name theirs with --model")
        return model, chat

    @property
    def trials(self) -> list[Trial]:
        return [run_trial(self.loaded[1], run, score="reply") for run in self.runs]

    @property
    def model_name(self) -> str:
        return self.runs[0].model_name


@dataclass(frozen=True)
class Posed(Options):
    """A model, and what is put before it: scenes of families, with their true answers, or pictures with one question."""

    out: Path = Path()  # where a sweep keeps what it has done

    @cached_property
    def loaded(self) -> tuple[KimiVL, Chat]:
        return load(self.model)

    @property
    def net(self) -> KimiVL:
        return self.loaded[0]

    @property
    def chat(self) -> Chat:
        return self.loaded[1]

    @property
    def model_name(self) -> str:
        return name_of(self.model)

    @property
    def first(self) -> int:
        """The number of the first scene: other seeds have other scenes."""
        return self.seed * (self.scenes or 0)

    @cached_property
    def pairs(self) -> list[Pair]:
        """Scenes with their questions, of split "report", which no training has seen."""
        return [make(family, self.first + at) for family in self.families for at in range(self.scenes or 0)]

    @cached_property
    def pictures(self) -> list[Image.Image]:
        """All pictures, without their questions."""
        if self.images:
            return [open_image(path) for path in self.images]
        return [image for scene, _ in self.pairs for image in scene.images]

    @property
    def conversations(self) -> list[Messages]:
        if self.images:
            return [self.conversation(self.question)]
        return [messages(scene, question) for scene, question in self.pairs]

    def conversation(self, text: str) -> Messages:
        """These words about the pictures of the one conversation that there is."""
        images = self.pictures if self.images else self.pairs[0][0].images
        return [{"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}]

    @cached_property
    def runs(self) -> list[Run]:
        """The model's own replies, greedy, recorded."""
        told = tqdm(self.conversations, desc="recording", unit="run", disable=not self.progress, leave=False)
        return [self.recorded(one) for one in told]

    def recorded(self, conversation: Messages, **options: Any) -> Run:
        """One reply to a conversation; options are those of `workbench.runs.record`."""
        options = {"model_name": self.model_name, "max_new_tokens": self.max_tokens, "detail": "full", **options}
        *_, run = record(self.net, self.chat, conversation, **options)
        assert isinstance(run, Run)
        return run

    @cached_property
    def trials(self) -> list[Trial]:
        """True answers to the questions about scenes; the model's own answer to a question about a person's pictures."""
        if self.images:
            return [run_trial(self.chat, run) for run in self.runs]
        return [scene_trial(self.chat, *pair) for pair in self.pairs]

    @property
    def trial(self) -> Trial:
        return self.trials[0]

    @property
    def run(self) -> Run:
        return self.runs[0]

    @cached_property
    def prompts(self) -> list[Prompt]:
        return [self.chat.prompt(one) for one in self.conversations]

    @cached_property
    def located(self) -> list[int]:
        """Which questions are about a place in one picture; those about nothing there ("how many?" 0) have none.

        Raises ValueError where none is.
        """
        found = [at for at, (scene, question) in enumerate(self.pairs) if question.targets and len(scene.images) == 1]
        if not found:
            raise ValueError(f"no question of {', '.join(self.families)} is about a place in one picture; ask another --family")
        return found


# With what an analysis is asked, and the options that are heeded then whatever it does
WAYS: Mapping[str, Sequence[str]] = {
    "run files": (),
    "scenes": ("model", "families", "scenes", "seed"),
    "a picture of yours": ("model", "images", "question"),
    "weights": ("model",),
}


@dataclass(frozen=True)
class Entry:
    """An analysis by name."""

    paper: str  # its number in the usual list of analyses, "" for none
    line: str  # what it shows, for the list of names
    analyse: Callable[[Any], Result]  # of Asked or Posed
    figure: Callable[[Result, Any], Figure]
    one: bool = False  # looks at one run, or at one question
    takes: str = "runs"  # or "scenes", "questions" (or scenes), "pictures" (or scenes), "weights"
    families: Sequence[str] = ()  # asked where none is named
    scenes: int = 20  # of each family, where nothing else is said
    sweeps: bool = False  # works case by case in processes of its own, with a bar of its own
    uses: Sequence[str] = ()  # fields of `Options`, or "against", that its functions read, besides those of WAYS
    uses_of_yours: Sequence[str] = ()  # and those that they read of a picture of yours alone

    def options(self, way: str) -> list[str]:
        """What it heeds of `Options` and "against" when it is asked with one of WAYS."""
        found = [*WAYS[way], *self.uses]
        if way == "a picture of yours":
            found += self.uses_of_yours
        if self.takes == "runs" and way != "run files":
            found.append("max_tokens")  # the runs are recorded first
        if self.takes == "pictures" and "question" in found:
            found.remove("question")
        return list(dict.fromkeys(found))


def flag(option: str) -> str:
    """ "max_tokens" of `Options` -> "--max-tokens"; what can be given several times is in the singular there."""
    singular = {"families": "family", "images": "image", "experts": "expert"}
    return "--" + singular.get(option, option).replace("_", "-")


def plain(draw: Callable[[Result], Figure]) -> Callable[[Result, Any], Figure]:
    """A figure that is drawn from the result alone."""
    return lambda result, _: draw(result)


def name_of(model: str) -> str:
    """What figures call a model."""
    return "study model" if model == "study" else Path(model).name
