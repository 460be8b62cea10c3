"""Analyses of a model by name, with the figure of each: it is asked about scenes of the study, or about a person's pictures.

To add one, write `Entry(paper, line, analyse, figure, ...)` into MODELS: two functions of what was asked for (`given.Posed`),
and in `uses` the options that they read.
Defaults are small, so that one command on the study model takes a minute or two on two cores; `--scenes` makes them larger.
"""

from __future__ import annotations

from workbench.figures import attribution as attribution_figures
from workbench.figures import causes as cause_figures
from workbench.figures import eyes as eye_figures
from workbench.figures import lens as lens_figures
from workbench.figures import localise as localise_figures
from workbench.figures import part_sweeps as sweep_figures
from workbench.figures import thought as thought_figures

from . import (
    ablations,
    attribution,
    budget,
    causes,
    confidence,
    economy,
    eyes,
    lens,
    localise,
    occlusion,
    part_sweeps,
    picture_ablations,
    posing,
    probes,
)
from .given import Entry, plain

JUDGED = ("name", "where", "read")  # short answers, each about one place
THOUGHT = ("count", "relation", "sum")  # families that are thought about

MODELS: dict[str, Entry] = {
    # the eye, and looks
    "head-atlas": Entry(
        "V1", "how far and how evenly each head of MoonViT looks",
        lambda posed: eyes.head_atlas(posed.net, posed.chat.processor, posed.pictures, model_name=posed.model_name),
        plain(eye_figures.head_atlas_figure),
        takes="pictures", families=("where",), scenes=10,
    ),
    "patch-attention": Entry(
        "V1", "what one patch reads in the layers of MoonViT: that at a point, or where the thing asked about is",
        lambda posed: eyes.patch_attention(
            posed.net, posed.chat.processor, posed.pictures, posing.patch(posed), posed.picture, model_name=posed.model_name
        ),
        lambda result, posed: eye_figures.patch_attention_figure(result, posing.picture(posed), posed.layer),
        takes="pictures", families=("where",), one=True,
        uses=("at", "picture", "layer"),
    ),
    "rollout": Entry(
        "V2", "attention rollout of MoonViT: all patches, or that at a point",
        lambda posed: eyes.rollout(
            posed.net, posed.chat.processor, posed.pictures, posed.picture,
            None if posed.at is None else [posing.patch(posed)], model_name=posed.model_name,
        ),
        lambda result, posed: eye_figures.rollout_figure(result, posing.picture(posed)),
        takes="pictures", families=("where",), one=True,
        uses=("at", "picture"),
    ),
    "relevancy": Entry(
        "V3", "what the answer's first token, or another, owes to each position, by gradients",
        posing.relevancy,
        lambda result, posed: eye_figures.relevancy_figure(result, posed.run),
        takes="questions", families=("where",), one=True,
        uses=("position", "max_tokens"),
    ),
    "localisation": Entry(
        "V8", "boxes of localisation heads, found on one half of the scenes and judged on the other",
        posing.localisation,
        plain(localise_figures.localisation_figure),
        takes="scenes", families=("where",), scenes=30,
        uses=("max_tokens",),
    ),
    "head-hits": Entry(
        "V8", "how often each head's peak touches what is asked about",
        lambda posed: localise.head_hits([posed.runs[at] for at in posed.located], posing.boxes(posed)),
        plain(localise_figures.head_hits_figure),
        takes="scenes", families=("where",), scenes=20,
        uses=("max_tokens",),
    ),
    "pointing": Entry(
        "V8", "where localisation heads, found on other scenes, point on a picture",
        posing.pointing,
        lambda result, posed: localise_figures.pointing_figure(
            posed.run, result.about["heads"], posing.truth(posed), posed.picture
        ),
        takes="questions", families=("where",), one=True,
        uses=("picture", "max_tokens", "seed"),
    ),
    "relative-attention": Entry(
        "V8", "attention for the question over that for 'describe the picture.'",
        posing.relative_attention,
        lambda result, posed: localise_figures.relative_attention_figure(
            result, posed.run.pictures[posed.picture], posed.layer
        ),
        takes="questions", families=("where",), one=True,
        uses=("picture", "layer", "max_tokens"),
    ),
    # thoughts
    "thought-budget": Entry(
        "C2", "accuracy when a thought is closed after so many tokens",
        lambda posed: budget.thought_budget(
            posed.net, posed.chat, posed.pairs, model_name=posed.model_name, max_new_tokens=posed.max_tokens
        ),
        plain(thought_figures.thought_budget_figure),
        takes="scenes", families=THOUGHT, scenes=40,
        uses=("max_tokens",),
    ),
    "early-answering": Entry(
        "C3", "whether the answer stays when the thought is cut, spoiled, reworded or filler",
        lambda posed: budget.early_answering(
            posed.net, posed.chat, posed.pairs,
            model_name=posed.model_name, seed=posed.seed, max_new_tokens=posed.max_tokens,
        ),
        plain(thought_figures.early_answering_figure),
        takes="scenes", families=("count",), scenes=40,
        uses=("max_tokens",),
    ),
    "answer-confidence": Entry(
        "C3", "how sure of its answer the model is after a part of its thought, or of another's",
        lambda posed: confidence.answer_confidence(
            posed.net, posed.chat, posed.pairs,
            model_name=posed.model_name, seed=posed.seed, max_new_tokens=posed.max_tokens,
        ),
        plain(thought_figures.answer_confidence_figure),
        takes="scenes", families=("count",), scenes=20,
        uses=("max_tokens",),
    ),
    "picture-removed": Entry(
        "C8", "accuracy when the picture goes while the model thinks",
        lambda posed: budget.picture_removed(
            posed.net, posed.chat, posed.pairs, model_name=posed.model_name, max_new_tokens=posed.max_tokens
        ),
        plain(thought_figures.picture_removed_figure),
        takes="scenes", families=("count",), scenes=40,
        uses=("max_tokens",),
    ),
    "thinking-efficiency": Entry(
        "C8", "how much of a thought came after its first right solution",
        lambda posed: economy.thinking_efficiency(posed.runs, [question.check for _, question in posed.pairs]),
        plain(thought_figures.thinking_efficiency_figure),
        takes="scenes", families=THOUGHT, scenes=10,
        uses=("max_tokens",),
    ),
    "length-reward": Entry(
        "C8", "the reward against long replies, among sampled replies to one question",
        posing.length_reward,
        plain(thought_figures.length_reward_figure),
        takes="scenes", families=("count",), one=True,
        uses=("samples", "max_tokens"),
    ),
    # lenses, probes, weights
    "patch-lens": Entry(
        "P1", "the word that each layer reads on each visual token, the last layer's or another's drawn",
        posing.patch_lens,
        lambda result, posed: lens_figures.patch_words_map(
            result, posed.run.pictures[posed.picture], posing.last_layer(posed) if posed.layer is None else posed.layer
        ),
        takes="questions", families=("describe",), one=True,
        uses=("layer", "picture", "max_tokens"),
    ),
    "patch-words": Entry(
        "P1", "on how many visual tokens of an object the lens names it",
        lambda posed: lens.patch_words(
            posed.net, posed.chat, posed.runs, [lens.named_objects(scene) for scene, _ in posed.pairs], seed=posed.seed
        ),
        plain(lens_figures.patch_words_figure),
        takes="scenes", families=("name",), scenes=20,
        uses=("max_tokens",),
    ),
    "probes": Entry(
        "P3", f"what a linear probe of {', '.join(posing.LABELS)} reads at each site, with a control task",
        posing.probed,
        lambda result, posed: lens_figures.probes_figure({posed.label: result}),
        takes="scenes", families=("where",), scenes=40,
        uses=("label",),
    ),
    "similarity": Entry(
        "P4", "how alike sites are, by linear CKA of visual tokens",
        posing.similarity,
        plain(lens_figures.similarity_figure),
        takes="questions", families=("where",), scenes=20,
        uses=("seed",),
    ),
    "modality-gap": Entry(
        "P4", "how far apart pictures and words lie, layer by layer",
        posing.modality_gap,
        plain(lens_figures.modality_gap_figure),
        takes="questions", families=("where",), scenes=20,
        uses=("seed",),
    ),
    "weight-spectrum": Entry(
        "P5", "how evenly weight matrices use their directions",
        lambda posed: probes.weight_spectrum(posed.net, posed.model_name, seed=posed.seed),
        plain(lens_figures.weight_spectrum_figure),
        takes="weights",
        uses=("seed",),
    ),
    "muon-update": Entry(
        "P5", "size of a step of Muon and of AdamW, on matrices of the model's shapes",
        lambda posed: probes.muon_update(posing.shapes(posed.net), seed=posed.seed),
        plain(lens_figures.muon_update_figure),
        takes="weights",
        uses=("seed",),
    ),
    # causes
    "activation-patching": Entry(
        "I1", f"how far activations ({', '.join(causes.SITES)}) carry an answer over to a mirrored picture",
        posing.patching,
        plain(cause_figures.patching_figure),
        takes="scenes", families=("where",), scenes=8,
        uses=("site", "layer"),
    ),
    "attention-knockout": Entry(
        "I3", "what an answer loses when one group of positions may not look at another",
        lambda posed: causes.attention_knockout(posed.net, posed.trials, model_name=posed.model_name, seed=posed.seed),
        plain(cause_figures.knockout_figure),
        takes="questions", families=("count",), scenes=10,
        uses=("seed",), uses_of_yours=("max_tokens",),
    ),
    "expert-masking": Entry(
        "I4", "loss without each token's best experts",
        lambda posed: ablations.expert_masking(posed.net, posed.trials, model_name=posed.model_name, seed=posed.seed),
        plain(cause_figures.masking_figure),
        takes="questions", families=JUDGED, scenes=20,
        uses=("seed",), uses_of_yours=("max_tokens",),
    ),
    "top-k-sweep": Entry(
        "I4", "loss with K experts a token, with and without the shared expert",
        lambda posed: ablations.top_k_sweep(posed.net, posed.trials, model_name=posed.model_name, seed=posed.seed),
        plain(cause_figures.top_k_figure),
        takes="questions", families=JUDGED, scenes=20,
        uses=("seed",), uses_of_yours=("max_tokens",),
    ),
    "single-experts": Entry(
        "I4", "loss without each expert; can be stopped and gone on with",
        lambda posed: posing.swept(posed, ablations.single_experts, layers=posing.one_layer(posed)),
        plain(cause_figures.single_experts_figure),
        takes="scenes", families=JUDGED, scenes=20, sweeps=True,
        uses=("layer", "workers"),
    ),
    "single-heads": Entry(
        "I6", "loss without each head of the decoder; can be stopped and gone on with",
        lambda posed: posing.swept(posed, part_sweeps.single_heads, layers=posing.one_layer(posed)),
        plain(sweep_figures.single_heads_figure),
        takes="scenes", families=JUDGED, scenes=20, sweeps=True,
        uses=("layer", "workers"),
    ),
    "single-layers": Entry(
        "I6", "loss without each layer's attention and FFN; can be stopped and gone on with",
        lambda posed: posing.swept(posed, part_sweeps.single_layers),
        plain(sweep_figures.single_layers_figure),
        takes="scenes", families=JUDGED, scenes=20, sweeps=True,
        uses=("workers",),
    ),
    "visual-token-ablation": Entry(
        "I5", "right answers that turn wrong without the visual tokens of the object, or of a random place",
        lambda posed: picture_ablations.visual_token_ablation(
            posed.net, posing.located_trials(posed), model_name=posed.model_name, seed=posed.seed
        ),
        plain(cause_figures.token_ablation_figure),
        takes="scenes", families=JUDGED, scenes=10,
    ),
    "visual-token-dropping": Entry(
        "I5", "right answers when the least attended visual tokens are dropped after a layer",
        lambda posed: picture_ablations.visual_token_dropping(
            posed.net, posed.trials,
            layer=1 if posed.layer is None else posed.layer, model_name=posed.model_name, seed=posed.seed,
        ),
        plain(cause_figures.dropping_figure),
        takes="questions", families=JUDGED, scenes=10,
        uses=("layer", "seed"), uses_of_yours=("max_tokens",),
    ),
    # attribution
    "integrated-gradients": Entry(
        "T1", "what each visual token brings to the reply, by gradients, with routing pinned and free",
        lambda posed: attribution.integrated_gradients(posed.net, posed.trial, model_name=posed.model_name),
        lambda result, posed: attribution_figures.attribution_maps(
            result, posed.trial.pictures[0], boxes=posed.trial.boxes
        ),
        takes="questions", families=("where",), one=True,
        uses_of_yours=("max_tokens",),
    ),
    "logit-attribution": Entry(
        "T2", "the logit of a token as a sum of what each head and expert wrote",
        lambda posed: attribution.logit_attribution(
            posed.net, posed.trial, model_name=posed.model_name, position=posed.position
        ),
        plain(attribution_figures.logit_parts),
        takes="questions", families=("where",), one=True,
        uses=("position",), uses_of_yours=("max_tokens",),
    ),
    "occlusion": Entry(
        "T3", "what the reply loses while a grey box hides a part of the picture",
        lambda posed: occlusion.occlusion(posed.net, posed.trial, model_name=posed.model_name),
        lambda result, posed: attribution_figures.attribution_maps(
            result, posed.trial.pictures[0], boxes=posed.trial.boxes
        ),
        takes="questions", families=("where",), one=True,
        uses_of_yours=("max_tokens",),
    ),
    "map-curves": Entry(
        "T3", "the reply's probability while cells are hidden or shown, in the order of several maps",
        lambda posed: occlusion.map_curves(
            posed.net, posed.trial, posing.maps(posed), model_name=posed.model_name, seed=posed.seed
        ),
        plain(attribution_figures.map_curves_figure),
        takes="questions", families=("where",), one=True,
        uses=("seed",), uses_of_yours=("max_tokens",),
    ),
    "map-league": Entry(
        "T3", "how well maps show what an answer rests on: deletion, insertion, pointing, overlap",
        lambda posed: occlusion.map_league(
            posed.net, posing.located_trials(posed), posing.maps(posed), model_name=posed.model_name, seed=posed.seed
        ),
        plain(attribution_figures.league_table),
        takes="scenes", families=("where",), scenes=8,
    ),
}  # fmt: skip
