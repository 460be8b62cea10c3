"""The ways of looking inside that `benchmarks.recording` compares: ours, and those of three other libraries.

A way makes, for a number of tokens, two functions: a plain forward pass, and the same one recorded. The sizes are those of a
small DeepSeek-V3: hidden 512, 4 layers, 8 heads of 128 + 64 / 128, latent 512, 16 experts of which 4, float32.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

LAYERS, HEADS = 4, 8
Way = tuple[Callable[[], Any], Callable[[], Any]]  # plain, recorded


def model(context: int) -> Any:
    import torch

    from benchmarks import peers
    from kimi_vl_ref import TINY, KimiVL

    sizes = peers.config("issue")  # its tower is not asked here
    text = replace(sizes.text, max_position_embeddings=context + 64)
    torch.manual_seed(0)
    return KimiVL(replace(sizes, vision=TINY.vision, text=text)).eval().requires_grad_(False)


def prompt(tokens: int) -> Any:
    import torch

    return torch.randint(2000, (1, tokens), generator=torch.Generator().manual_seed(1))


def ours(read: list[str], keep: Callable[..., Any] | None = None) -> Callable[[int], Way]:
    def prepare(tokens: int) -> Way:
        from workbench.tape import attach

        net, ids = model(tokens), prompt(tokens)

        def recorded() -> Any:
            with attach(net, read=read, keep=keep) as tape:
                net(ids)
            return tape

        return lambda: net(ids), recorded

    return prepare


def last_rows(inputs: Any, _site: str) -> Any:
    """Attention rows of the last 64 queries over every key: what a recorded answer of 64 tokens needs."""
    from workbench.rows import decoder_rows

    count = inputs[0].shape[1]
    return decoder_rows(inputs, slice(count - 64, count))


def theirs(tokens: int) -> Any:
    """transformers' DeepSeek-V3 decoder with our weights, at its best: grouped experts and SDPA."""
    decoder = as_transformers_square(model(tokens)).model.language_model
    decoder.config._attn_implementation, decoder.config._experts_implementation = "sdpa", "grouped_mm"
    return decoder


def as_transformers_square(net: Any) -> Any:
    """The tiny MoonViT's position table is not square and transformers' is; the decoder does not use it."""
    import torch

    from workbench.released import as_transformers

    vision = replace(net.config.vision, init_pos_emb_width=net.config.vision.init_pos_emb_height)
    net.config = replace(net.config, vision=vision)
    table = net.vision.positions.weight
    net.vision.positions.weight = torch.nn.Parameter(table[:, : table.shape[0]].clone(), requires_grad=False)
    return as_transformers(net)


def output_attentions(tokens: int) -> Way:
    decoder, ids = theirs(tokens), prompt(tokens)

    def recorded() -> Any:
        decoder.set_attn_implementation("eager")  # the only one that returns them
        try:
            out = decoder(ids, use_cache=False, output_attentions=True)
            assert len(out.attentions) == LAYERS
            return out
        finally:
            decoder.set_attn_implementation("sdpa")

    return lambda: decoder(ids, use_cache=False), recorded


def nnsight_router(tokens: int) -> Way:
    from nnsight import NNsight  # type: ignore[import-not-found]

    decoder, ids = theirs(tokens), prompt(tokens)
    traced = NNsight(decoder)

    def recorded() -> Any:
        saved: list[Any] = []
        with traced.trace(ids, use_cache=False):
            for layer in traced.layers[1:]:
                saved.append(layer.mlp.gate.output.save())
        assert len(saved) == LAYERS - 1
        return saved

    return lambda: decoder(ids, use_cache=False), recorded


def lens_bridge(tokens: int) -> Way:
    from transformer_lens.model_bridge import TransformerBridge  # type: ignore[import-not-found]

    with tempfile.TemporaryDirectory() as folder:
        lens_checkpoint(tokens, folder)
        bridge, ids = TransformerBridge.boot_transformers(folder), prompt(tokens)

    def wanted(name: str) -> bool:
        return name.endswith(("hook_pattern", "gate.hook_out"))

    return lambda: bridge(ids), lambda: bridge.run_with_cache(ids, names_filter=wanted)


def lens_checkpoint(tokens: int, folder: str) -> None:
    """The bridge loads a causal language model by its folder, and wants a tokenizer there even if it is never asked."""
    from tokenizers import Tokenizer, models  # type: ignore[import-not-found]
    from transformers import DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    inner = theirs(tokens)
    inner.config.architectures = ["DeepseekV3ForCausalLM"]
    whole = DeepseekV3ForCausalLM(inner.config).eval().requires_grad_(False)
    whole.model = inner
    whole.save_pretrained(folder)
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")),
        **dict.fromkeys(("pad_token", "eos_token", "bos_token", "unk_token"), "<unk>"),
    )
    words.save_pretrained(folder)


WAYS: dict[str, Callable[[int], Way]] = {
    "ours, routing of all tokens": ours(["decoder.layers.*.ffn.router.chosen", "decoder.layers.*.ffn.router.weights"]),
    "ours, rows of the last 64 tokens": ours(["decoder.layers.*.attn.core@in"], last_rows),
    "transformers, output_attentions=True": output_attentions,
    "nnsight, router outputs": nnsight_router,
    "TransformerLens bridge, patterns and routers": lens_bridge,
}

# what a way has to hold of T tokens by its nature, in bytes: for a way that could not be measured
MATRICES = ("transformers, output_attentions=True", "TransformerLens bridge, patterns and routers")


def probabilities(way: str, tokens: int) -> int:
    """Bytes of the T x T float32 probabilities that a way keeps of every head and layer; 0 for one that keeps none."""
    return 4 * LAYERS * HEADS * tokens**2 if way in MATRICES else 0
