"""Analyses by name: what `kimi-vl analyse` can do with recorded runs, and the figure of each.

To add one, write `Entry(line, analyse, figure)` into ENTRIES: two functions of what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from matplotlib.figure import Figure

from kimi_vl_ref import Chat, KimiVL, load
from workbench.figures import experts as expert_figures
from workbench.figures import lens as lens_figures
from workbench.figures import localise as localise_figures
from workbench.figures import looking as looking_figures
from workbench.figures import routing as routing_figures
from workbench.figures import selection as selection_figures
from workbench.figures import thought as thought_figures
from workbench.runs import Run, fingerprint

from . import experts, lens, localise, looking, magnitudes, routing, selection, thought
from .result import Result
from .trials import Trial, run_trial


@dataclass(frozen=True)
class Asked:
    """What an analysis was asked for. What it does not need it ignores; what it needs and was not given it says."""

    runs: Sequence[Run]
    labels: Sequence[str] = ()  # the domain of each run
    against: Sequence[Run] = ()  # runs to compare with
    model: str = "study"  # as for `load`, where an analysis runs the model again
    group: str = "all"
    layer: int | None = None
    position: int | None = None
    picture: int = 0
    experts: Sequence[tuple[int, int]] = ()  # (layer, expert)
    seed: int = 0

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
        model, chat = load(self.model)
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
class Entry:
    line: str  # for the list of names: what it shows, and what it takes if not any runs
    analyse: Callable[[Asked], Result]
    figure: Callable[[Result, Asked], Figure]


def _plain(draw: Callable[[Result], Figure]) -> Callable[[Result, Asked], Figure]:
    return lambda result, _: draw(result)


def _pruned(asked: Asked) -> Result:
    if not asked.experts:
        raise ValueError("there is nothing to prune; name experts, such as --expert 3.7 for expert 7 of layer 3")
    model, _ = asked.loaded
    return magnitudes.pruning_damage(model, asked.trials, asked.experts, model_name=asked.model_name, seed=asked.seed)


def _compared(asked: Asked) -> Result:
    if len(asked.against) != 1:
        raise ValueError(f"this analysis compares two runs, and {len(asked.against)} were given with --against; name one there")
    return selection.run_difference(asked.run, asked.against[0])


def _selected(asked: Asked) -> Result:
    position = asked.run.prompt_length if asked.position is None else asked.position  # the first token written
    return selection.token_selection(asked.run, position, asked.routed_layer)


ENTRIES: dict[str, Entry] = {
    "expert-load": Entry(
        "R1: who is chosen how often, and how uneven that is",
        lambda asked: routing.expert_loads(asked.runs),
        _plain(routing_figures.load_figure),
    ),
    "routing-confidence": Entry(
        "R2: entropy of scores and weights, margin, choices that the bias decides",
        lambda asked: routing.routing_confidence(asked.runs),
        _plain(routing_figures.confidence_figure),
    ),
    "domains": Entry(
        "R3: experts by domain; a run's domain is its file's name without the number (--group)",
        lambda asked: routing.domain_specialisation(asked.runs, asked.labels, asked.group, seed=asked.seed),
        _plain(routing_figures.domains_figure),
    ),
    "modality": Entry(
        "R4: experts of pictures and experts of text",
        lambda asked: routing.modality_specialisation(asked.runs, seed=asked.seed),
        _plain(routing_figures.modality_figure),
    ),
    "expert-map": Entry(
        "R4: where on a picture the experts of a layer work; one run (--layer, --picture)",
        lambda asked: routing.expert_map(asked.run, asked.routed_layer, asked.picture),
        lambda result, asked: routing_figures.expert_map_figure(result, asked.run.pictures[asked.picture]),
    ),
    "kinds": Entry(
        "what an expert's choice tells of the kind of its token, beside shuffled kinds",
        lambda asked: routing.kind_information(asked.runs, seed=asked.seed),
        _plain(routing_figures.kinds_figure),
    ),
    "vocabulary": Entry(
        "R5: how far a token's identity settles its expert, and each expert's words",
        lambda asked: experts.vocabulary_specialisation(asked.runs, seed=asked.seed),
        _plain(expert_figures.vocabulary_figure),
    ),
    "coactivation": Entry(
        "R6: experts that are chosen together (--group, --layer)",
        lambda asked: experts.coactivation(asked.runs, asked.group),
        lambda result, asked: expert_figures.coactivation_figure(result, asked.layer),
    ),
    "agreement": Entry(
        "R7: the same experts for the same tokens in two checkpoints (--against, one for each run)",
        lambda asked: experts.agreement(asked.runs, asked.against),
        _plain(expert_figures.agreement_figure),
    ),
    "repetition": Entry(
        "R8: do neighbours in the text and on the picture share experts",
        lambda asked: experts.repetition(asked.runs),
        _plain(expert_figures.repetition_figure),
    ),
    "super-experts": Entry(
        "R9: experts with an output far above all others (--model)",
        lambda asked: magnitudes.super_experts(asked.loaded[0], asked.trials, model_name=asked.model_name),
        _plain(expert_figures.super_experts_figure),
    ),
    "pruning": Entry(
        "R9: what the replies lose without some experts, beside random ones (--expert, --model)",
        _pruned,
        _plain(expert_figures.pruning_figure),
    ),
    "shared-expert": Entry(
        "what the shared expert writes beside the routed ones (--model)",
        lambda asked: magnitudes.shared_and_routed(asked.loaded[0], asked.trials, model_name=asked.model_name),
        _plain(expert_figures.shared_figure),
    ),
    "selection": Entry(
        "scores, bias and weights of one token at one layer; one run (--position, --layer)",
        _selected,
        _plain(selection_figures.selection_figure),
    ),
    "bias": Entry(
        "where the selection bias changed the choice",
        lambda asked: selection.bias_effect(asked.runs),
        _plain(selection_figures.bias_figure),
    ),
    "margins": Entry(
        "how narrowly experts were chosen, and near-ties",
        lambda asked: selection.router_margins(asked.runs),
        _plain(selection_figures.margins_figure),
    ),
    "difference": Entry(
        "two runs token by token: another prompt, picture, precision or edit; one run (--against)",
        _compared,
        _plain(selection_figures.difference_figure),
    ),
    "modality-mass": Entry(
        "V5: attention on pictures, question and the rest while the reply is written",
        lambda asked: looking.modality_mass(asked.runs),
        _plain(looking_figures.modality_mass_figure),
    ),
    "attention-timeline": Entry(
        "V5: the same, word by word; one run",
        lambda asked: looking.attention_timeline(asked.run),
        _plain(looking_figures.attention_timeline_figure),
    ),
    "attention-sinks": Entry(
        "V6: positions that are looked at whatever is asked; one run (--model)",
        lambda asked: looking.attention_sinks(asked.loaded[0], asked.loaded[1].processor, asked.run),
        _plain(looking_figures.attention_sinks_figure),
    ),
    "massive-activations": Entry(
        "V6: single numbers that dwarf the stream; one run (--model)",
        lambda asked: looking.massive_activations(asked.loaded[0], asked.loaded[1].processor, asked.run),
        _plain(looking_figures.massive_activations_figure),
    ),
    "localisation-heads": Entry(
        "V8: heads that look at one spot of the picture",
        lambda asked: localise.localisation_heads(asked.runs, asked.picture),
        _plain(localise_figures.localisation_heads_figure),
    ),
    "thought-classes": Entry(
        "C1: what the sentences of the thoughts do, and what follows what",
        lambda asked: thought.thought_classes(asked.runs),
        _plain(thought_figures.thought_classes_figure),
    ),
    "token-entropy": Entry(
        "C7: where the thoughts could have forked",
        lambda asked: thought.token_entropy(asked.runs),
        _plain(thought_figures.token_entropy_figure),
    ),
    "image-reliance": Entry(
        "C8: attention on the picture along the reply",
        lambda asked: thought.image_reliance(asked.runs),
        _plain(thought_figures.image_reliance_figure),
    ),
    "logit-lens": Entry(
        "P1: what each layer would say next; one run (--model)",
        lambda asked: lens.logit_lens(*asked.loaded, asked.run),
        _plain(lens_figures.logit_lens_figure),
    ),
}
