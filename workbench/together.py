"""One answer by several processes: each loads its part of a model (`kimi_vl_ref.split`), the first of them prints."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from kimi_vl_ref import Chat, Reply, checkpoint_folder, stream_reply
from kimi_vl_ref.fit import slow_at
from kimi_vl_ref.group import in_processes
from kimi_vl_ref.split import check_ranks, load_split
from kimi_vl_ref.weights import find_shards, read_config


def answer(
    model: str, ranks: int, messages: list[dict[str, Any]], settings: dict[str, Any], show: Callable[[Iterable[Reply]], None]
) -> None:
    """Asks "study" or a checkpoint folder, its experts over `ranks` processes; `show`, found by its name, is given the
    replies as they grow. What needs no weights is checked first, here. Raises ValueError.
    """
    folder = checkpoint_folder(model)
    config = read_config(folder)
    find_shards(folder)
    check_ranks(config.text, ranks)
    Chat.from_folder(folder).prompt(messages)
    if settings["seed"] is None:  # every process must draw the same tokens
        settings = settings | {"seed": int(torch.seed() % 2**31)}
    stored = getattr(torch, config.torch_dtype)
    on_gpus = torch.cuda.is_available()
    dtype = stored if on_gpus or not (model == "study" or slow_at(stored)) else torch.float32
    in_processes(ranks, _answer, folder, ranks, dtype, messages, settings, show, on_gpus=on_gpus)


def _answer(
    rank: int, device: str, folder: Path, ranks: int, dtype: torch.dtype, messages: list[dict[str, Any]],
    settings: dict[str, Any], show: Callable[[Iterable[Reply]], None],
) -> None:
    part, chat = load_split(folder, rank, ranks, device, dtype), Chat.from_folder(folder)
    replies = stream_reply(part, chat, messages, **settings)
    if rank == 0:
        show(replies)
    else:
        for _ in replies:  # every process takes every step
            pass
