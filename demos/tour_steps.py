"""The eight steps of the tour, from the pixels to the next word: what each says, which tensors it shows, its equation, and the
functions whose source stands beside it, read while the page runs.

Letters as in workbench/sites.py: P patches, V their vector, M visual tokens, B rows, T tokens, D decoder stream, R latent, E
experts, K chosen, W vocabulary, Q rows asked for. Tensors are read with `workbench.tape.attach`.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.figure import Figure

from kimi_vl_ref import Chat, KimiVL, stream_reply
from kimi_vl_ref.attention import LatentAttention
from kimi_vl_ref.generate import choose
from kimi_vl_ref.images import ImageProcessor, Picture
from kimi_vl_ref.moe import DenseFFN, MoE, Router, Weights
from kimi_vl_ref.projector import Merge, Projector
from kimi_vl_ref.vision import PatchEmbedding
from workbench.edits.routing import moe_layers
from workbench.rows import decoder_rows
from workbench.sites import sites
from workbench.tape import attach

from . import tour_figures as drawn

NEXT = 8  # likeliest next words shown
PIXELS = "pixel_values"
LETTERS = {
    "P": "patches", "c": "colours", "y": "rows of pixels", "x": "columns of pixels", "V": "numbers of a patch",
    "C": "patches side by side", "M": "visual tokens", "D": "numbers of a token", "B": "conversations at once", "T": "tokens",
    "R": "numbers of a latent", "E": "experts", "K": "chosen experts", "Q": "tokens asked for the next", "W": "word pieces",
}  # fmt: skip
ROUTER = "decoder.layers.{i}.ffn.router"


@dataclass(frozen=True)
class Live:
    """What was read in one forward pass over a picture and a question; arrays by the name of their site."""

    picture: Picture
    question: str
    read: dict[str, np.ndarray]
    axes: dict[str, str]  # letters, outermost first
    layer: int  # the first that routes; steps 5 to 7 stand in it
    attention: np.ndarray  # (H, T) of the last token in that layer
    bias: np.ndarray  # (E,) of that layer's router
    image: slice  # positions of the visual tokens
    names: list[str]  # of the NEXT likeliest words
    facts: dict[str, Any]  # numbers that the texts name

    def site(self, template: str) -> str:
        return template.format(i=self.layer)

    def __getitem__(self, template: str) -> np.ndarray:
        return self.read[self.site(template)]


@dataclass(frozen=True)
class Step:
    """`sites`: the tensors shown, {i} is the layer. `code`: functions of kimi_vl_ref. `draw` gives a figure and its words."""

    name: str
    text: str
    sites: tuple[str, ...]
    equation: str
    code: tuple[Callable[..., Any], ...]
    draw: Callable[[Live], tuple[Figure, str]]

    def shapes(self, live: Live) -> str:
        """Each tensor by name, its axes in letters and in numbers."""
        lines = []
        for site in map(live.site, self.sites):
            letters, numbers = live.axes[site].split(), live.read[site].shape
            meant = ", ".join(f"{letter} {LETTERS[letter]}" for letter in letters)
            lines.append(f"`{site}` ({', '.join(letters)}) = **{' × '.join(map(str, numbers))}**: {meant}")
        return "  \n".join(lines)

    def source(self) -> str:
        """The code as it stands in its files."""
        return "\n\n".join(f"# {_file(one)}\n{textwrap.dedent(inspect.getsource(one))}".rstrip() for one in self.code)


def _file(function: Callable[..., Any]) -> str:
    return f"{function.__module__.replace('.', '/')}.py: {function.__qualname__}"


@torch.inference_mode()
def walk(model: KimiVL, chat: Chat, picture: Picture, question: str) -> Live:
    """Reads a picture, a question and what the model's reply begins with, up to its first real word.

    Raises ValueError for a prompt that is too long.
    """
    content = [{"type": "image", "image": picture.image}, {"type": "text", "text": question}]
    messages = [{"role": "user", "content": content}]
    prompt, begun = chat.prompt(messages), _begun(model, chat, messages)
    length = len(prompt.input_ids) + len(begun)
    assert prompt.pixel_values is not None and prompt.image_grid_hws is not None
    layer, weight = moe_layers(model)[0], model.logits.weight
    wanted = [name.format(i=layer) for step in STEPS for name in step.sites if name != PIXELS]
    core = f"decoder.layers.{layer}.attn.core@in"
    read: dict[str, Any] = dict.fromkeys(wanted)
    read[core] = lambda given, _: decoder_rows(given, [length - 1])[0, :, 0]
    ids = torch.tensor([[*prompt.input_ids, *begun]], device=weight.device)
    with attach(model, read=read) as tape:
        stream = model(ids, prompt.pixel_values.to(weight.device, weight.dtype), prompt.image_grid_hws)
        probs = model.logits(stream[:, -1:])[0, -1].float().softmax(-1)
    arrays = {name: tape.last(name).float().cpu().numpy() for name in wanted}
    arrays[PIXELS] = prompt.pixel_values.numpy()
    best = probs.topk(NEXT)
    image = [at for at, role in enumerate(prompt.roles) if role.startswith("image")]
    config, processor = model.config, chat.processor
    return Live(
        prompt.pictures[0],
        question,
        arrays | {"probs": best.values.cpu().numpy()},
        {name: site.axes for name, site in sites(model).items()} | {PIXELS: "P c y x"},
        layer,
        tape.last(core).float().cpu().numpy(),
        model.get_submodule(f"decoder.layers.{layer}.ffn.router.chosen").bias.float().cpu().numpy(),  # type: ignore[union-attr]
        slice(image[0], image[-1] + 1),
        [chat.tokenizer.token_text(int(id)) for id in best.indices],
        {
            "P": len(arrays[PIXELS]), "M": len(image), "T": length, "words": length - len(image), "layer": layer,
            "width": prompt.pictures[0].grid.original[0], "height": prompt.pictures[0].grid.original[1],
            "mean": ", ".join(f"{v:g}" for v in processor.image_mean), "std": ", ".join(f"{v:g}" for v in processor.image_std),
            "side": processor.patch_size, "numbers": 3 * processor.patch_size**2, "eyes": config.vision.num_hidden_layers,
            "V": config.vision.hidden_size, "D": config.text.hidden_size, "R": config.text.kv_lora_rank,
            "E": config.text.n_routed_experts, "K": config.text.num_experts_per_tok, "W": config.text.vocab_size,
            "r": config.text.qk_rope_head_dim, "decoder": config.text.num_hidden_layers,
            "scale": config.text.routed_scaling_factor,
        },
    )  # fmt: skip


def _begun(model: KimiVL, chat: Chat, messages: list[dict[str, Any]]) -> list[int]:
    """What the reply opens with before its first word, such as the mark that begins a thought."""
    for so_far in stream_reply(model, chat, messages, max_new_tokens=16):
        if so_far.thought.strip() or so_far.answer.strip():
            return so_far.token_ids[:-1]
    return []


# ---- the figures: from the live tensors, with what they show in words


def _busiest(live: Live) -> int:
    """The visual token whose pixels differ most from each other: there is something to see on it."""
    grid = live.picture.grid
    inside = [token for token in range(grid.token_count) if all(map(grid.patch_box, grid.patches_of_token(token)))]
    spread = [live[PIXELS][grid.patches_of_token(token)].std() for token in inside]
    return inside[int(np.argmax(spread))] if inside else 0  # a picture smaller than a token is all edge


def _pixels(live: Live) -> tuple[Figure, str]:
    patch = live.picture.grid.patches_of_token(_busiest(live))[0]
    values = rearrange(live[PIXELS], "(h w) c y x -> c (h y) (w x)", h=live.picture.grid.grid[0])
    return drawn.pixels(values, live.picture, patch), "Left the picture, one patch framed; right the colours of that patch."


def _patches(live: Live) -> tuple[Figure, str]:
    said = "Left the picture cut into patches; right a row for the vector of each."
    return drawn.patches(live["vision.patches"], live.picture), said


def _merged(live: Live) -> tuple[Figure, str]:
    figure = drawn.merged(live["projector.merged"], live.picture, _busiest(live))
    return figure, "Left four neighbours framed; right their four vectors, which become one."


def _tokens(live: Live) -> tuple[Figure, str]:
    said = "Left how long each visual token's vector is; right a row for each."
    return drawn.tokens(live["projector"], live.picture), said


def _attention(live: Live) -> tuple[Figure, str]:
    read = live.attention[:, live.image].mean(0)
    said = f"Left where the last token read: {read.sum():.0%} of its attention went to the picture, mean over heads. "
    return drawn.attention(live["decoder.layers.{i}.attn.latent"][0], read, live.picture), said + "Right the latents."


def _router(live: Live) -> tuple[Figure, str]:
    scores, chosen, weights = (live[f"{ROUTER}.{name}"][0, -1] for name in ("scores", "chosen", "weights"))
    chosen = chosen.astype(int)
    picked = ", ".join(f"{expert} (weight {weight:.2f})" for expert, weight in zip(chosen, weights, strict=True))
    return drawn.router(scores, live.bias, chosen, weights), f"Of the last token: experts {picked} are chosen."


def _experts(live: Live) -> tuple[Figure, str]:
    chosen = live[f"{ROUTER}.chosen"][0].astype(int)  # (T, K)
    served = (chosen[:, :, None] == np.arange(live.facts["E"])).any(1)  # (T, E)
    picture = np.zeros(len(served), bool)
    picture[live.image] = True
    shares = served[picture].mean(0), served[~picture].mean(0)
    most = shares[0].argmax()
    said = f"Expert {most} serves most picture tokens, {shares[0][most]:.0%} of them; by chance it would be "
    chance = live.facts["K"] / live.facts["E"]
    return drawn.experts(*shares, chance), f"{said}{chance:.0%}."


def _words(live: Live) -> tuple[Figure, str]:
    probs = live["probs"].tolist()
    return drawn.words(live.names, probs), f"The likeliest is “{live.names[0].strip()}”, {drawn.percent(probs[0])}."


STEPS = (
    Step(
        "Pixels",
        "A picture is a box of numbers: how red, green and blue each of its {width} × {height} pixels is, from 0 to 255. "
        "The numbers are shifted and scaled to lie between about −1 and 1, which networks learn from more easily. Where "
        "the sides are no whole number of the squares to come, black is added at the right and below.",
        (PIXELS,),
        r"x = \frac{{p / 255 - \mu}}{{\sigma}} \qquad \mu = ({mean}),\ \sigma = ({std})",
        (ImageProcessor._patches,),
        _pixels,
    ),
    Step(
        "Patches",
        "The picture is cut into squares of {side} × {side} pixels, called *patches*: {P} here, counted row by row. A "
        "patch is {numbers} numbers, and one matrix turns them into a list of {V} numbers, the *vector* of the patch. "
        "From here on the model computes with vectors, not with pixels.",
        ("vision.patches",),
        r"v_p = W x_p + b \qquad W:\ {V} \times {numbers}",
        (PatchEmbedding.forward,),
        _patches,
    ),
    Step(
        "2 × 2 merge",
        "In the {eyes} layers of MoonViT, the part of the model that sees, every patch takes up something from every "
        "other patch, so that its vector also says what is around it. Then four neighbours are laid side by side: a "
        "quarter as many places, {M}, each with four times the numbers.",
        ("projector.merged",),
        r"m_{{i,j}} = [\,v_{{2i,2j}};\ v_{{2i,2j+1}};\ v_{{2i+1,2j}};\ v_{{2i+1,2j+1}}\,]",
        (Merge.forward,),
        _merged,
    ),
    Step(
        "Projector",
        "Words are vectors too: the part that reads and writes, the *decoder*, keeps one of {D} numbers for each piece of "
        "text, a *token*. The projector, two matrices with a bend between them (GELU), makes a vector of that length from "
        "each place of the picture, a *visual token*. They stand in the row where the picture was put: {T} tokens in all, "
        "{M} of them picture.",
        ("projector",),
        r"z = W_2\,\mathrm{{GELU}}(W_1\,\mathrm{{norm}}(m) + b_1) + b_2",
        (Projector.forward,),
        _tokens,
    ),
    Step(
        "Latent attention",
        "The decoder has {decoder} layers; this is layer {layer}. Each token sends out a *query* q, every token up to it "
        "offers a *key* k and a *value* v, and where query and key fit, more of the value is taken over: shares that add "
        "up to 1. Keys and values are rebuilt from one short list of {R} numbers a token, the *latent* c, and {r} more "
        "that say where it stands ($k^r$): only these have to be kept in memory.",
        ("decoder.layers.{i}.attn.latent",),
        r"c_s = \mathrm{{norm}}(W^D x_s) \qquad k_s = [W^K c_s;\ k^r_s],\quad v_s = W^V c_s \qquad "
        r"o_t = \sum_{{s \le t}} \mathrm{{softmax}}_s\!\left(\frac{{q_t \cdot k_s}}{{\sqrt d}}\right) v_s",
        (LatentAttention.forward,),
        _attention,
    ),
    Step(
        "Router",
        "After attention, each token is worked on by a few small networks, *experts*, out of {E}. The router gives every "
        "expert a score s from 0 to 1; to choose the best {K}, a bias b is added that keeps the work evenly spread. How "
        "much a chosen expert counts, its weight w, comes from the scores alone.",
        (f"{ROUTER}.scores", f"{ROUTER}.chosen", f"{ROUTER}.weights"),
        r"s = \mathrm{{sigmoid}}(W x) \qquad \text{{chosen}} = \mathrm{{top}}_{{{K}}}(s + b) \qquad "
        r"w_i = {scale}\ \frac{{s_i}}{{\sum_{{j \in \text{{chosen}}}} s_j}}",
        (Router.forward, Weights.forward),
        _router,
    ),
    Step(
        "Experts",
        "Each chosen expert computes a vector from the token's own, and they are added up, each times its weight; a "
        "*shared* expert, which works on every token, is added too. The sum is added to the token's vector, and the next "
        "layer goes on from there. Below: how many of the {M} picture tokens and of the {words} others each expert works "
        "on in this layer.",
        ("decoder.layers.{i}.ffn",),
        r"y = \sum_{{i \in \text{{chosen}}}} w_i E_i(x) + E_{{\text{{shared}}}}(x) \qquad "
        r"E(x) = W_{{\text{{down}}}}\left(\mathrm{{silu}}(W_{{\text{{gate}}}} x) \odot W_{{\text{{up}}}} x\right)",
        (MoE.forward, DenseFFN.forward),
        _experts,
    ),
    Step(
        "Next word",
        "After the last layer, the vector of the last token is compared with one vector for each of the {W} word pieces "
        "that the model knows; the result is a number for each, its *logit*. Softmax makes probabilities of them. A piece "
        "is chosen, here the likeliest, put at the end of the row, and the decoder reads on: word by word, until the "
        "answer is whole.",
        ("logits",),
        r"p = \mathrm{{softmax}}(W_U\,\mathrm{{norm}}(x_T))",
        (choose,),
        _words,
    ),
)
