"""Analyses of recorded runs by name, with the figure of each.

To add one, write `Entry(paper, line, analyse, figure)` into RUNS: two functions of what was asked for (`given.Asked`), and in
`uses` the options that they read.
"""

from __future__ import annotations

from workbench.figures import experts as expert_figures
from workbench.figures import lens as lens_figures
from workbench.figures import localise as localise_figures
from workbench.figures import looking as looking_figures
from workbench.figures import routing as routing_figures
from workbench.figures import selection as selection_figures
from workbench.figures import thought as thought_figures

from . import experts, lens, localise, looking, magnitudes, routing, selection, thought
from .given import Asked, Entry, plain
from .result import Result


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


RUNS: dict[str, Entry] = {
    "expert-load": Entry(
        "R1",
        "who is chosen how often, and how uneven that is",
        lambda asked: routing.expert_loads(asked.runs),
        plain(routing_figures.load_figure),
    ),
    "routing-confidence": Entry(
        "R2",
        "entropy of scores and weights, margin, choices that the bias decides",
        lambda asked: routing.routing_confidence(asked.runs),
        plain(routing_figures.confidence_figure),
    ),
    "domains": Entry(
        "R3",
        "experts by domain; a run's domain is its file's name without the number",
        lambda asked: routing.domain_specialisation(asked.runs, asked.labels, asked.group, seed=asked.seed),
        plain(routing_figures.domains_figure),
        uses=("group", "seed"),
    ),
    "modality": Entry(
        "R4",
        "experts of pictures and experts of text",
        lambda asked: routing.modality_specialisation(asked.runs, seed=asked.seed),
        plain(routing_figures.modality_figure),
        uses=("seed",),
    ),
    "expert-map": Entry(
        "R4",
        "where on a picture the experts of a layer work",
        lambda asked: routing.expert_map(asked.run, asked.routed_layer, asked.picture),
        lambda result, asked: routing_figures.expert_map_figure(result, asked.run.pictures[asked.picture]),
        one=True,
        uses=("layer", "picture"),
    ),
    "kinds": Entry(
        "",
        "what an expert's choice tells of the kind of its token, beside shuffled kinds",
        lambda asked: routing.kind_information(asked.runs, seed=asked.seed),
        plain(routing_figures.kinds_figure),
        uses=("seed",),
    ),
    "vocabulary": Entry(
        "R5",
        "how far a token's identity settles its expert, and each expert's words",
        lambda asked: experts.vocabulary_specialisation(asked.runs, seed=asked.seed),
        plain(expert_figures.vocabulary_figure),
        uses=("seed",),
    ),
    "coactivation": Entry(
        "R6",
        "experts that are chosen together",
        lambda asked: experts.coactivation(asked.runs, asked.group),
        lambda result, asked: expert_figures.coactivation_figure(result, asked.layer),
        uses=("group", "layer"),
    ),
    "agreement": Entry(
        "R7",
        "the same experts for the same tokens in two checkpoints, one run of the second for each of the first",
        lambda asked: experts.agreement(asked.runs, asked.against),
        plain(expert_figures.agreement_figure),
        uses=("against",),
    ),
    "repetition": Entry(
        "R8",
        "do neighbours in the text and on the picture share experts",
        lambda asked: experts.repetition(asked.runs),
        plain(expert_figures.repetition_figure),
    ),
    "super-experts": Entry(
        "R9",
        "experts with an output far above all others",
        lambda asked: magnitudes.super_experts(asked.loaded[0], asked.trials, model_name=asked.model_name),
        plain(expert_figures.super_experts_figure),
        uses=("model",),
    ),
    "pruning": Entry(
        "R9",
        "what the replies lose without some experts, beside random ones",
        _pruned,
        plain(expert_figures.pruning_figure),
        uses=("experts", "model", "seed"),
    ),
    "shared-expert": Entry(
        "",
        "what the shared expert writes beside the routed ones",
        lambda asked: magnitudes.shared_and_routed(asked.loaded[0], asked.trials, model_name=asked.model_name),
        plain(expert_figures.shared_figure),
        uses=("model",),
    ),
    "selection": Entry(
        "",
        "scores, bias and weights of one token at one layer",
        _selected,
        plain(selection_figures.selection_figure),
        one=True,
        uses=("position", "layer"),
    ),
    "bias": Entry(
        "",
        "where the selection bias changed the choice",
        lambda asked: selection.bias_effect(asked.runs),
        plain(selection_figures.bias_figure),
    ),
    "margins": Entry(
        "",
        "how narrowly experts were chosen, and near-ties",
        lambda asked: selection.router_margins(asked.runs),
        plain(selection_figures.margins_figure),
    ),
    "difference": Entry(
        "",
        "two runs token by token: another prompt, picture, precision or edit",
        _compared,
        plain(selection_figures.difference_figure),
        one=True,
        uses=("against",),
    ),
    "modality-mass": Entry(
        "V5",
        "attention on pictures, question and the rest while the reply is written",
        lambda asked: looking.modality_mass(asked.runs),
        plain(looking_figures.modality_mass_figure),
    ),
    "attention-timeline": Entry(
        "V5",
        "the same, word by word",
        lambda asked: looking.attention_timeline(asked.run),
        plain(looking_figures.attention_timeline_figure),
        one=True,
    ),
    "attention-sinks": Entry(
        "V6",
        "positions that are looked at whatever is asked",
        lambda asked: looking.attention_sinks(asked.loaded[0], asked.loaded[1].processor, asked.run),
        plain(looking_figures.attention_sinks_figure),
        one=True,
        uses=("model",),
    ),
    "massive-activations": Entry(
        "V6",
        "single numbers that dwarf the stream",
        lambda asked: looking.massive_activations(asked.loaded[0], asked.loaded[1].processor, asked.run),
        plain(looking_figures.massive_activations_figure),
        one=True,
        uses=("model",),
    ),
    "localisation-heads": Entry(
        "V8",
        "heads that look at one spot of the picture",
        lambda asked: localise.localisation_heads(asked.runs, asked.picture),
        plain(localise_figures.localisation_heads_figure),
        uses=("picture",),
    ),
    "thought-classes": Entry(
        "C1",
        "what the sentences of the thoughts do, and what follows what",
        lambda asked: thought.thought_classes(asked.runs),
        plain(thought_figures.thought_classes_figure),
    ),
    "token-entropy": Entry(
        "C7",
        "where the thoughts could have forked",
        lambda asked: thought.token_entropy(asked.runs),
        plain(thought_figures.token_entropy_figure),
    ),
    "image-reliance": Entry(
        "C8",
        "attention on the picture along the reply",
        lambda asked: thought.image_reliance(asked.runs),
        plain(thought_figures.image_reliance_figure),
    ),
    "logit-lens": Entry(
        "P1",
        "what each layer would say next",
        lambda asked: lens.logit_lens(asked.loaded[0], asked.loaded[1], asked.run),
        plain(lens_figures.logit_lens_figure),
        one=True,
        uses=("model",),
    ),
}
