"""Files that are written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
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
