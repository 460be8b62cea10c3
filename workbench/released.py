"""Our site names in another implementation of the same model, through the table of names in `kimi_vl_ref/weights.py`.

Shown on transformers' Kimi-K2.5 (of which one frame computes what Kimi-VL computes) and DeepSeek-V3 (the decoder alone).
`attach(theirs, read=["decoder.layers.*.ffn.router.chosen"])` reads there what it reads in ours, in our shapes. A site that
has no module of its own there is seen a step away: `_seen` says where and how.

What is less than ours: `resid_mid` and `router.scores` can be read but not edited, since nothing there passes them on; the
sites of WITHOUT are shown by no module at all. Letters as in sites.py; N = B*T.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from kimi_vl_ref.model import KimiVL
from kimi_vl_ref.weights import MODULES, released_module

from .sites import TABLE, Call, Site, View, names

# Released names -> transformers', inside the tower and the projector, in this order.
RENAMED = [
    ("vision_tower.encoder.", "vision_tower."),
    ("vision_tower.blocks.", "vision_tower.layers."),
    (".norm1", ".norm2"),
    (".norm0", ".norm1"),
    (".mlp.fc1", ".mlp.fc2"),
    (".mlp.fc0", ".mlp.fc1"),
    (".wo", ".attn.proj"),
    ("multi_modal_projector", "mm_projector"),
    ("linear_1", "in_proj"),
    ("linear_2", "out_proj"),
]
_TOWER = ("vision_tower.", "mm_projector.")
LEAVES = {"gate_up": "gate_up_proj", "down": "down_proj"}  # of the experts, which both hold stacked
WITHOUT = {
    "vision.layers.{i}.attn.qkv": "these are three modules there; read q, k and v",
    "decoder.layers.{i}.attn.q_rope": "queries are rotated inside their attention",
    "decoder.layers.{i}.attn.k_rope": "keys are rotated inside their attention",
}


def released_sites(model: nn.Module) -> dict[str, Site]:
    """Our sites in transformers' modules, in the order of TABLE, with the module and the View that show each.

    Empty for a model that is not built of these modules. DeepSeek-V3 has only the sites of the decoder.

        released_sites(theirs)["decoder.layers.1.attn.core"].module      # where theirs shows it
    """
    modules: dict[str, Any] = dict(model.named_modules())
    text, tower = _prefixes(modules)
    if text is None:
        return {}
    decoder, vision = modules[f"{text}layers"], [] if tower is None else modules[f"{tower}vision_tower.layers"]
    seen = _seen(decoder[0].self_attn.num_heads, vision[0].attn.num_heads if len(vision) else 1, tower is not None)
    found: dict[str, Site] = {}
    for name, template in names(len(vision), len(decoder)):
        layer = name.split(".")[2] if "{i}" in template else ""
        released, view = seen.get(template, (MODULES.get(template, ""), None))
        path = _their_name(released.replace("{i}", layer), text, tower or "")
        if path.endswith(".q_proj") and path not in modules:
            path = path.replace(".q_proj", ".q_b_proj")  # larger relatives make their queries in two steps
        if released and template not in WITHOUT and path in modules:
            found[name] = Site(name, *TABLE[template], path, view)
    return found


def language_model(model: nn.Module) -> nn.Module | None:
    """The module that runs the decoder's layers in transformers' models; None in any other model."""
    modules = dict(model.named_modules())
    text, _ = _prefixes(modules)
    return None if text is None else modules[text.removesuffix(".")]


def in_language_model(
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: Tensor | None = None,
    *_args: Any,
    **_kwargs: Any,
) -> tuple[list[int], list[int] | None, int]:
    """What it was given -> the first position of each row, how many columns are real (None: there is padding), and T."""
    given = input_ids if inputs_embeds is None else inputs_embeds
    assert given is not None
    batch, width = given.shape[:2]
    start = 0 if past_key_values is None else int(past_key_values.get_seq_length())
    padded = attention_mask is not None and not bool(attention_mask.bool().all())
    return [start] * batch, None if padded else [width] * batch, width


def as_transformers(model: KimiVL) -> nn.Module:
    """transformers' Kimi-K2.5 with the weights of a KimiVL, which the two then share.

    Raises ValueError without transformers, or for a position table that is not square, as theirs is.

        theirs = as_transformers(model)
        walk(model, theirs, probe(model.config)).first      # None: they agree
    """
    transformers = _transformers()
    config = model.config.to_dict()
    vision = {key: value for key, value in config["vision_config"].items() if key != "model_type"}
    sides = vision.pop("init_pos_emb_height"), vision.pop("init_pos_emb_width")
    if sides[0] != sides[1]:
        raise ValueError(
            f"the position table is {sides[0]} x {sides[1]}, and transformers knows only square ones; "
            "compare with another checkpoint of ours instead"
        )
    theirs = transformers.Kimi_K25Config(
        text_config=config["text_config"],
        vision_config={**vision, "pos_emb_height": sides[0], "pos_emb_width": sides[1]},
        projection_hidden_size=vision["hidden_size"],
        image_token_id=model.config.media_placeholder_token_id,
        tie_word_embeddings=False,
    )
    theirs._attn_implementation = theirs._experts_implementation = "eager"  # the formulas in the open
    built = transformers.Kimi_K25ForConditionalGeneration(theirs)
    # assigned, not copied: a cast of the whole model would round its rotary frequencies too
    built.load_state_dict(_their_state(model), strict=True, assign=True)
    return built.eval().requires_grad_(False)


def as_decoder(model: KimiVL) -> nn.Module:
    """transformers' DeepSeek-V3 with the decoder of a KimiVL, whose weights the two then share. Raises ValueError without
    transformers.

    Nothing is initialised on the way, so that a layer of full size is there in a moment.
    """
    theirs = _transformers().DeepseekV3Config(**model.config.to_dict()["text_config"])
    theirs._attn_implementation = theirs._experts_implementation = "eager"
    with torch.device("meta"):
        built = _transformers().DeepseekV3ForCausalLM(theirs)
    built.model.rotary_emb = type(built.model.rotary_emb)(config=theirs)  # its frequencies are no part of a checkpoint
    state = {name: tensor for name, tensor in _their_state(model, "model.", "").items() if not name.startswith(_TOWER)}
    built.load_state_dict(state, strict=True, assign=True)
    return built.eval().requires_grad_(False)


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ModuleNotFoundError:
        raise ValueError("transformers is not installed; pip install 'transformers>=5.23,<6'") from None


def _their_state(model: KimiVL, text: str = "model.language_model.", tower: str = "model.") -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    heads = model.config.vision.num_attention_heads
    for name, tensor in model.state_dict().items():
        module, _, leaf = name.rpartition(".")
        path = _their_name(released_module(module), text, tower)
        if module.endswith(".attn.qkv"):
            for part, rows in zip("qkv", tensor.chunk(3), strict=True):
                if part != "v":  # even channels of a head first, then the odd ones
                    rows = torch.cat([rows.unflatten(0, (heads, -1))[:, half::2] for half in (0, 1)], dim=1).flatten(0, 1)
                state[f"{path.removesuffix('.wqkv')}.attn.{part}_proj.{leaf}"] = rows
        elif module.endswith(".experts"):
            state[f"{path}.{LEAVES[leaf]}"] = tensor
        elif module.endswith(".chosen"):
            state[f"{path}.e_score_correction_bias"] = tensor
        else:
            state[f"{path}.position_embeddings" if module == "vision.positions" else f"{path}.{leaf}"] = tensor
    return state


def _prefixes(modules: dict[str, Any]) -> tuple[str | None, str | None]:
    """What stands before `layers` of the decoder and before `vision_tower`; None for a part that is not there."""
    ends = "layers.0.self_attn.kv_a_proj_with_mqa", "vision_tower.patch_embed.proj"
    text, tower = (next((name.removesuffix(end) for name in modules if name.endswith(end)), None) for end in ends)
    return text, tower


def _their_name(released: str, text: str, tower: str) -> str:
    if released.startswith("language_model."):
        inner = released.removeprefix("language_model.")
        return inner if inner == "lm_head" else (text + inner.removeprefix("model").removeprefix(".")).removesuffix(".")
    for old, new in RENAMED:
        released = released.replace(old, new)
    return tower + released


def _seen(heads: int, vision_heads: int, pictures: bool) -> dict[str, tuple[str, View | None]]:
    """Sites that are not what the module of their name returns: the (released) module that shows them, and how."""
    block, layer = "vision_tower.encoder.blocks.{i}", "language_model.model.layers.{i}"
    flat = View(lambda value, call: value.unflatten(0, (call.batch, -1)), lambda _, ours, __: ours.flatten(0, 1))
    single = View(lambda value, _: value.squeeze(1), lambda _, ours, __: ours.unsqueeze(1))  # (M, 1, width)
    passed = View(lambda value, _: value, None, given="hidden_states")
    table: dict[str, tuple[str, View | None]] = {
        "vision.patches": (MODULES["vision.patches"], _shaped((1, 1))),
        "vision.positions": (MODULES["vision.positions"], View(_positions, lambda _, ours, call: call.args[0] + ours)),
        "vision.layers.{i}.attn.q": (f"{block}.attn.q_proj", _alternating(vision_heads)),
        "vision.layers.{i}.attn.k": (f"{block}.attn.k_proj", _alternating(vision_heads)),
        "vision.layers.{i}.attn.v": (f"{block}.attn.v_proj", _by_head(vision_heads)),
        "vision.layers.{i}.attn.core": (f"{block}.wo", _by_head(vision_heads, given="input")),
        "vision.layers.{i}.attn": (f"{block}.attn", None),
        "vision.layers.{i}.resid_mid": (f"{block}.norm1", passed),
        "vision": (MODULES["vision.norm"], None),
        "projector.merged": (
            MODULES["projector.norm"],
            View(lambda value, _: value, lambda _, ours, __: ours, given="input"),
        ),
        "projector.linear_1": (MODULES["projector.linear_1"], single),
        "projector.linear_2": (MODULES["projector.linear_2"], single),
        "projector": (MODULES["projector"], single),
        "decoder.layers.{i}.attn.core": (f"{layer}.self_attn.o_proj", _by_head(heads, given="input")),
        "decoder.layers.{i}.attn": (
            f"{layer}.self_attn",
            View(lambda value, _: value[0], lambda value, ours, _: (ours, *value[1:])),
        ),
        "decoder.layers.{i}.resid_mid": (f"{layer}.post_attention_layernorm", passed),
        "decoder.layers.{i}.ffn.router.scores": (f"{layer}.mlp.gate", View(_scores, None)),
        "decoder.layers.{i}.ffn.router.chosen": (f"{layer}.mlp.gate", View(_part(2), _choose)),
        "decoder.layers.{i}.ffn.router.weights": (
            f"{layer}.mlp.gate",
            View(_part(1), lambda value, ours, _: (value[0], ours.flatten(0, 1), value[2])),
        ),
        "decoder.layers.{i}.ffn.experts": (f"{layer}.mlp.experts", flat),
        "decoder": (MODULES["decoder.norm"], None),
    }
    if pictures:  # where visual tokens are in place: what their decoder is given
        whole = View(lambda value, _: value, lambda _, ours, __: ours, given="inputs_embeds")
        table["embedded"] = ("language_model.model", whole)
    return table


def _positions(value: Tensor, call: Call) -> Tensor:
    """They return patches with positions added; the difference is positions to within the rounding of that sum."""
    return value - call.args[0]


def _scores(value: Any, call: Call) -> Tensor:
    return value[0].sigmoid().unflatten(0, (call.batch, -1))  # their gate returns logits, weights, chosen, each (N, .)


def _part(at: int) -> Any:
    return lambda value, call: value[at].unflatten(0, (call.batch, -1))


def _choose(value: Any, ours: Tensor, call: Call) -> Any:
    """Their gate chooses and weighs in one step; as in ours, the weights have to follow an edited choice."""
    gate: Any = call.module
    chosen = ours.flatten(0, 1)
    weights = value[0].sigmoid().gather(1, chosen)
    if gate.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return value[0], weights * gate.routed_scaling_factor, chosen


def _shaped(more: tuple[int, ...]) -> View:
    return View(lambda value, _: value.flatten(1), lambda _, ours, __: ours.reshape(*ours.shape, *more))


def _by_head(heads: int, given: str | None = None) -> View:
    return View(lambda value, _: value.unflatten(-1, (heads, -1)), lambda _, ours, __: ours.flatten(-2), given)


def _alternating(heads: int) -> View:
    """Their queries and keys hold the even channels of a head first, then the odd ones; ours alternate."""

    def take(value: Tensor, _: Call) -> Tensor:
        return value.unflatten(-1, (heads, 2, -1)).transpose(-1, -2).flatten(-2)

    def put(_: Any, ours: Tensor, __: Call) -> Tensor:
        return ours.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-3)

    return View(take, put)
