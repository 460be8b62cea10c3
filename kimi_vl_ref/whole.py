"""Files and folders that are written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


def write_whole(files: Mapping[Path, bytes]) -> None:
    """Writes all of them beside their places (NAME.part) and only then puts each in place, in one step.

    A full disk, or a kill before the last part is written, leaves the earlier files as they were; a kill may leave parts too.
    Raises OSError.
    """
    parts = {path: path.with_name(path.name + ".part") for path in files}
    try:
        for path, data in files.items():
            parts[path].write_bytes(data)
        for path, part in parts.items():
            os.replace(part, path)
    finally:
        for part in parts.values():
            part.unlink(missing_ok=True)


def write_json(path: Path, data: object) -> None:
    """Writes one file of JSON so."""
    write_whole({path: (json.dumps(data, indent=2) + "\n").encode()})


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The path of a folder to make and fill, which takes the place of `folder` when all is there; see `write_whole`."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)  # of one that was killed
    yield part
    os.replace(part, folder)
