"""A random TINY model, a chat for it, and pictures: what the tests of the workbench look into."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kimi_vl_ref import TINY, Chat, KimiVL
from kimi_vl_ref.chat import Tokenizer
from kimi_vl_ref.images import ImageProcessor
from kimi_vl_ref.thought import CLOSE_THOUGHT, OPEN_THOUGHT
from workbench.study.tokenizer import SPECIAL_OFFSETS, train_ranks

TEXTS = ["How many red circles are in the picture? There are two.", "count the circles", OPEN_THOUGHT, CLOSE_THOUGHT]


def tiny_model(seed: int = 0, dtype: torch.dtype = torch.float32, **text: int) -> KimiVL:
    """Every parameter and buffer random, norms, biases and the selection bias included."""
    model = KimiVL(replace(TINY, text=replace(TINY.text, **text)) if text else TINY).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        around = 1.0 if "norm.weight" in name or "latent.weight" in name else 0.0
        size = 0.3 if tensor.ndim < 2 else tensor[0].numel() ** -0.5
        tensor.copy_(around + size * torch.randn(tensor.shape, generator=generator, dtype=torch.float64))
    return model.eval().requires_grad_(False)


def tiny_inputs(seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Two prompts of 19 tokens with three pictures of three sizes: input_ids (2, 19), pixel_values, image_grid_hws."""
    generator = torch.Generator().manual_seed(seed)
    grids = torch.tensor([[4, 2], [2, 6], [2, 4]])
    ids = torch.randint(TINY.media_placeholder_token_id, (2, 19), generator=generator)
    for row, start, count in ((0, 3, 2), (0, 7, 3), (1, 5, 2)):
        ids[row, start : start + count] = TINY.media_placeholder_token_id
    return ids, torch.randn(28, 3, 14, 14, generator=generator, dtype=torch.float64).to(dtype), grids


@cache
def tiny_chat() -> Chat:
    ranks = train_ranks(TEXTS, 300)
    tokenizer = Tokenizer(ranks, {len(ranks) + offset: name for name, offset in SPECIAL_OFFSETS.items()})
    processor = ImageProcessor(14, (2, 2), 4096, True, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Chat(tokenizer, processor)


@cache
@torch.inference_mode(False)  # whichever test asks first: gradients cannot go through weights that were made in that mode
def talking_model() -> KimiVL:
    """A random model with the vocabulary of `tiny_chat`."""
    tokenizer = tiny_chat().tokenizer
    config = replace(
        TINY,
        text=replace(TINY.text, vocab_size=tokenizer.vocab_size),
        media_placeholder_token_id=tokenizer.special["<|media_pad|>"],
    )
    model = KimiVL(config)
    filled = tiny_model(1, vocab_size=tokenizer.vocab_size)
    model.load_state_dict(filled.state_dict())
    return model.eval().requires_grad_(False)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def question(text: str = "How many red circles?", *pictures: Image.Image) -> list[dict]:
    images = [{"type": "image", "image": image} for image in pictures]
    return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]


def saying(text: str) -> dict[str, Any]:
    """An edit of the logits that makes `talking_model` write this text and stop."""
    tokenizer = tiny_chat().tokenizer
    ids = iter([*tokenizer.encode(text), tokenizer.special["<|im_end|>"]])

    def only(logits: Tensor, site: str) -> Tensor:
        logits[:] = -30.0
        logits[:, next(ids)] = 30.0
        return logits

    return {"logits": only}
