"""A coverage-guided fuzzer over what is loaded from files: pictures, run files and config.json.

    pip install atheris                                   # no dependency of this project: only this file needs it
    python benchmarks/fuzz.py --minutes 60

It begins with real files, changes them so that new code is reached, and counts everything that is not the loader's own
exception as a crash, by the line it came from. The last line says how many files were tried, how many edges of our code
the seeds and then all files reached, and each crash once; a crash's file is kept with --keep FOLDER.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent.parent
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO")


def seeds(folder: Path) -> Path:
    """Real files of every kind, each after one byte that says which loader it is for; the run they were made from."""
    sys.path.insert(0, str(HERE / "tests"))
    from tiny import picture, question, talking_model, tiny_chat
    from workbench import run_files
    from workbench.runs import Run, record

    *_, run = record(talking_model(), tiny_chat(), question("count", picture(28, 28)), model_name="t", max_new_tokens=2)
    assert isinstance(run, Run)
    run.save(folder.parent / "seed.run")
    files = [b"R" + (folder.parent / "seed.run").read_bytes(), b"S" + run_files.read(folder.parent / "seed.run")[0].encode()]
    for form in FORMATS:
        for image in (picture(9, 7), picture(16, 16).convert("P"), picture(5, 5).convert("L")):
            file = BytesIO()
            image.convert("RGB" if form in ("JPEG", "PPM") else image.mode).save(file, form)
            files.append(b"P" + file.getvalue())
    for config in (HERE / "tests/golden/tiny", HERE / "workbench/study/checkpoint"):
        files.append(b"C" + (config / "config.json").read_bytes())
    for number, data in enumerate(files):
        (folder / f"{number:03d}").write_bytes(data)
    return folder.parent / "seed.run"


def loaders(seed: Path, scratch: Path) -> dict[int, tuple[type[Exception], Callable[[bytes], Any]]]:
    """By first byte: the exception that bad input should raise, and the loader."""
    from safetensors.numpy import save

    from kimi_vl_ref.config import ConfigError, KimiVLConfig
    from kimi_vl_ref.images import ImageError, open_image
    from workbench import run_files
    from workbench.runs import Run, RunError
    from workbench.viewer import payload

    arrays = run_files.read(seed)[1]

    def written(data: bytes) -> Path:
        scratch.write_bytes(data)
        return scratch

    def shown(path: Path) -> None:
        payload(Run.load(path))  # what was loaded can be looked at

    def story(data: bytes) -> None:  # with a checksum that is right
        text = data.decode("utf-8", "replace")
        marks = {"kimi_vl_run": text, "format": str(run_files.FORMAT), "sha256": run_files.digest(text, arrays)}
        shown(written(save(arrays, marks)))

    return {
        ord("P"): (ImageError, lambda data: open_image(data)),
        ord("R"): (RunError, lambda data: shown(written(data))),
        ord("S"): (RunError, story),
        ord("C"): (ConfigError, lambda data: KimiVLConfig.from_json(written(data))),
    }


def work(folder: Path, minutes: float) -> None:
    """One process of the fuzzer, which libFuzzer ends; what it found is in `found.json`."""
    atheris = importlib.import_module("atheris")
    with atheris.instrument_imports(include=["kimi_vl_ref", "workbench", "PIL"]):
        known = loaders(folder / "seed.run", folder / "scratch")
    found: dict[str, Any] = {"tried": 0, "refused": 0, "loaded": 0, "crashes": {}}
    told = time.monotonic()

    def one(data: bytes) -> None:
        nonlocal told
        proper, loader = known.get(data[0] if data else 0, (None, None))
        found["tried"] += 1
        if loader is not None and proper is not None:
            try:
                loader(data[1:])
                found["loaded"] += 1
            except proper:
                found["refused"] += 1
            except Exception as error:
                frame = traceback.extract_tb(error.__traceback__)[-1]
                where = f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:80]}"
                if where not in found["crashes"]:
                    found["crashes"][where] = f"crash-{len(found['crashes'])}"
                    (folder / found["crashes"][where]).write_bytes(data)
        if time.monotonic() - told > 1:
            told = time.monotonic()
            (folder / "found.json").write_text(json.dumps(found))

    options = [f"-max_total_time={round(60 * minutes)}", "-rss_limit_mb=4096", "-max_len=20000", "-timeout=60"]
    atheris.Setup([sys.argv[0], *options, str(folder / "corpus")], one)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--keep", type=Path, help="a folder for the files that crashed")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    sys.path.insert(0, str(HERE))
    if given.work:
        work(given.work, given.minutes)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = given.keep or Path(name)
        (folder / "corpus").mkdir(parents=True, exist_ok=True)
        seeds(folder / "corpus")
        command = [sys.executable, __file__, "--work", str(folder), "--minutes", str(given.minutes)]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace")
        edges = re.findall(r"cov: (\d+)", done.stderr)
        if not (folder / "found.json").exists():
            sys.exit(done.stderr[-2000:])
        found = json.loads((folder / "found.json").read_text())
        first = re.search(r"INITED cov: (\d+)", done.stderr)
        counts = f"{found['refused']:,} refused, {found['loaded']:,} loaded"
        print(f"{found['tried']:,} files in {given.minutes:g} minutes: {counts}; exit {done.returncode}")
        print(f"edges reached: {first[1] if first else '?'} by the seeds, {edges[-1] if edges else '?'} in the end")
        print(f"crashes: {len(found['crashes'])}")
        print("\n".join(found["crashes"]))


if __name__ == "__main__":
    main()
