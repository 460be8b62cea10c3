"""Run files: one safetensors file with a JSON text inside and a checksum over all of it, written whole or not at all.

Nothing is unpickled. `workbench.runs` says what the JSON and the arrays mean.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as to_safetensors

from kimi_vl_ref.told import cause, short

DTYPES = ("U8", "U16", "I32", "F16", "F32")  # a run has no other, and numpy lacks some
LARGEST = 4 << 30  # bytes; a run with every row of attention that memory allows has about a quarter of it
FORMAT = 2  # 1 had no `kept`: everything was float16


class RunError(ValueError):
    """A run file that cannot be read or written, or a question that this run cannot answer."""


def write(path: Path, text: str, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes beside the file and puts it in place in one step: a kill at any moment leaves the old file or the new one.

    A kill may leave a hidden part file, ".name.xxxx", beside it. Raises RunError.
    """
    metadata = {"kimi_vl_run": text, "format": str(FORMAT), "sha256": digest(text, arrays)}
    data, part = to_safetensors(dict(arrays), metadata), None
    try:
        if path.exists() and not path.is_file():
            raise RunError(f"cannot write {path} (not a file); give the name of a file, new or to be replaced")
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            part = Path(file.name)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except RunError:
        raise
    except (OSError, ValueError) as error:  # a NUL in a name is a ValueError
        if part is not None:
            part.unlink(missing_ok=True)
        raise RunError(f"cannot write {path} ({cause(error)}); choose a folder that exists and has room") from error


def read(path: Path) -> tuple[str, dict[str, np.ndarray]]:
    """The JSON text and the arrays of a run file, known to be as they were written. Raises RunError."""
    try:
        if not path.is_file():
            raise RunError(f"there is no file {path}; check the path of the run")
        if path.stat().st_size > LARGEST:
            raise RunError(f"{path} has more than {LARGEST:,} bytes, which no run has; check the path of the run")
        with safe_open(path, framework="numpy") as opened:
            metadata = opened.metadata() or {}
            if not {"kimi_vl_run", "format", "sha256"} <= metadata.keys():
                raise RunError(f"{path} is a safetensors file but not a run; give a file that Run.save has written")
            if metadata["format"] != str(FORMAT):
                raise RunError(
                    f"{path} is a run of format {short(metadata['format'])}, and this version reads format {FORMAT}; "
                    "open it with the version that wrote it, or record it again"
                )
            for name in opened.keys():  # noqa: SIM118, not a dict
                if (dtype := opened.get_slice(name).get_dtype()) not in DTYPES:
                    raise RunError(f"{path} is damaged: {short(name)} has the dtype {dtype}; copy or record it again")
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}
    except RunError:
        raise
    except (SafetensorError, OSError, MemoryError) as error:
        why = short(reason(error), 120)
        raise RunError(f"{path} is cut off, damaged or not a run ({why}); copy or record it again") from error
    if digest(metadata["kimi_vl_run"], arrays) != metadata["sha256"]:
        raise RunError(f"{path} is damaged: its contents do not match its checksum; copy or record it again")
    return metadata["kimi_vl_run"], arrays


def digest(text: str, arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the JSON text and all arrays with their names, dtypes and shapes."""
    found = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        found.update(f"{name} {array.dtype} {array.shape}".encode())
        found.update(array.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def reason(error: BaseException) -> str:
    """An error of a library as half a sentence."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error.args[0]!r} is missing" if isinstance(error, KeyError) else str(error).split("\n")[0].rstrip(".;")
