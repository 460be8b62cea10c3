"""A readable reference of Kimi-VL (arXiv 2504.07491): MoonViT, projector, Moonlight decoder. Start at `model.py`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import torch

from .chat import Chat
from .config import KIMI_VL_A3B, TINY, ConfigError, KimiVLConfig
from .fit import Fit, choose_fit, load_fitted
from .generate import Reply, generate, reply, stream_reply
from .model import KimiVL
from .weights import CheckpointError, load_checkpoint, save_checkpoint

__all__ = [
    "KIMI_VL_A3B",
    "TINY",
    "Chat",
    "CheckpointError",
    "ConfigError",
    "Fit",
    "KimiVL",
    "KimiVLConfig",
    "Reply",
    "checkpoint_folder",
    "choose_fit",
    "generate",
    "load",
    "load_checkpoint",
    "reply",
    "save_checkpoint",
    "stream_reply",
]


def load(
    source: str | Path = "study",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    fit: Fit | str | None = None,
) -> tuple[KimiVL, Chat]:
    """A model and the chat that belongs to it, from "study" (the small model shipped beside) or a checkpoint folder.

    dtype: the checkpoint's unless given; the study model computes in float32 on a CPU, which is faster there.
    fit: "auto" chooses device, dtype, bits and whether the weights stay on the disk by what is free here, in the place of
    `device` and `dtype`; another of `fit.WAYS`, or what `choose_fit` returned, has it so. `choose_fit(source).says` tells why.
    """
    folder = checkpoint_folder(source)
    if fit is not None:
        model = load_fitted(folder, choose_fit(folder, fit) if isinstance(fit, str) else fit)
    else:
        if dtype is None and source == "study" and torch.device(device).type == "cpu":
            dtype = torch.float32
        model = load_checkpoint(folder, device, dtype)
    chat = Chat.from_folder(folder)
    placeholder = chat.tokenizer.special.get("<|media_pad|>")
    if placeholder != model.config.media_placeholder_token_id:
        raise CheckpointError(
            f"{folder}: config.json gives media_placeholder_token_id={model.config.media_placeholder_token_id}, but "
            f"the tokenizer has <|media_pad|> at {placeholder}; take both from the same release"
        )
    return model, chat


def checkpoint_folder(source: str | Path) -> Path:
    """Where a checkpoint lies: a folder as given, or the study model's, which is found beside the package, not
    imported.
    """
    if not str(source):
        raise CheckpointError("the name of the model is empty; give a checkpoint folder, or 'study'")
    if source != "study":
        try:
            return Path(source).expanduser()
        except RuntimeError as error:
            raise CheckpointError(f"{source} has no home folder to start from; give the whole path") from error
    workbench = find_spec("workbench")
    if workbench is None or workbench.origin is None:
        raise CheckpointError(
            "the study model ships with the workbench package, which is not installed; give a checkpoint folder"
        )
    return Path(workbench.origin).parent / "study" / "checkpoint"
