"""One piece of work in several processes that form a group of torch.distributed: a model that is split, or one in training."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import ProcessException, spawn


def in_processes(ranks: int, work: Callable[..., None], *arguments: Any, on_gpus: bool) -> None:
    """work(rank, device, *arguments) in `ranks` processes: a GPU each (NCCL), or all of them on the CPU (gloo).

    `work` is importable by name. Raises ValueError for more processes than GPUs, and one that any of them raises, in its own
    words.
    """
    gpus = torch.cuda.device_count()
    if on_gpus and gpus < ranks:
        raise ValueError(f"{ranks} processes need a GPU each and this computer has {gpus}; use at most {gpus}")
    with tempfile.TemporaryDirectory() as meeting:
        try:
            spawn(_enter, args=(ranks, on_gpus, meeting, work, arguments), nprocs=ranks)
        except ProcessException:
            refused = Path(meeting, "refused")
            if not refused.exists():
                raise
            raise ValueError(refused.read_text(encoding="utf-8")) from None


def _enter(
    rank: int, ranks: int, on_gpus: bool, meeting: str, work: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    # torch interrupts them when the process that started them is gone; one started in a shell's background ignores that
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if on_gpus:
        torch.cuda.set_device(rank)
    else:  # more threads than cores would wait for each other
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // ranks))
    where = f"file://{Path(meeting).resolve()}/meet"
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=where, rank=rank, world_size=ranks)
    try:
        work(rank, f"cuda:{rank}" if on_gpus else "cpu", *arguments)
    except ValueError as error:
        Path(meeting, "refused").write_text(str(error), encoding="utf-8")
        raise
    finally:
        dist.destroy_process_group()
