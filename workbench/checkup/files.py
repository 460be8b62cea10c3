"""Where a checkpoint lies, and what lies in its folder: a folder as given, or a hub id in the local cache."""

from __future__ import annotations

import re
from pathlib import Path

from kimi_vl_ref import checkpoint_folder
from kimi_vl_ref.weights import CheckpointError

from .findings import Report

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".ckpt"}


def locate(source: str) -> tuple[Path, str]:
    """The folder of "study", of a path or of a hub id in the local cache, and what the checkpoint is called.

    Asks no network. Raises CheckpointError for what is neither.
    """
    folder = checkpoint_folder(source)
    if folder.is_dir():
        return folder, source if source == "study" else folder.resolve().name
    if HUB_ID.fullmatch(source) and (cached := in_cache(source)):
        return cached, source
    if HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source} is neither a folder nor in the local cache of the hub; fetch it with `kimi-vl download {source}`"
        )
    raise CheckpointError(f"{source} is not a folder; give a checkpoint folder in the released layout, a hub id or 'study'")


def in_cache(hub_id: str) -> Path | None:
    """The snapshot of a repository that its `main` names in the local cache, else the newest; None if there is none."""
    from huggingface_hub.constants import HF_HUB_CACHE

    repository = Path(HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}"
    main, snapshots = repository / "refs" / "main", repository / "snapshots"
    if main.is_file():
        named = snapshots / main.read_text(encoding="utf-8").strip()
        if named.parent == snapshots and named.is_dir():
            return named
    found = sorted((p for p in snapshots.glob("*") if p.is_dir()), key=lambda path: path.stat().st_mtime)
    return found[-1] if found else None


def check_files(report: Report, folder: Path) -> None:
    """Links that lead elsewhere, and files that are never opened."""
    inside = folder.resolve()
    # a snapshot in the cache of the hub is made of links into the `blobs` of its own repository
    own = inside.parent.parent if inside.parent.name == "snapshots" else inside
    entries = sorted(folder.iterdir())
    away = [
        f"{path.name} is a link that leads out of the folder, to {path.resolve()}; copy the file here unless you made the link"
        for path in entries
        if path.is_symlink() and not path.resolve().is_relative_to(own)
    ]
    report.add_first("files", "warn", away)
    code = [path.name for path in entries if path.suffix == ".py"]
    pickles = [path.name for path in entries if path.suffix in PICKLES]
    unused = code + pickles
    if unused:
        report.add("files", "note", f"{len(unused)} files are never opened here (code or pickles): {', '.join(unused[:4])}")
    elif not away:
        report.add("files", "ok", "no code, no pickles, no links out of the folder")
