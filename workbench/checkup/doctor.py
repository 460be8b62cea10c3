"""`kimi-vl doctor`: everything that can be said of a checkpoint without loading it, and what this machine can do with it.

    report = checkup("path/to/Kimi-VL-A3B-Instruct")       # or a hub id in the local cache, or "study"
    print(*report.lines(), sep="\\n")
"""

from __future__ import annotations

from .files import check_files, locate
from .findings import Report
from .machine import check_machine
from .settings import check_config, check_preprocessor, small_enough
from .tokens import check_tokens
from .weights import check_weights


def checkup(source: str, *, machine: bool = True) -> Report:
    """All checks of one checkpoint, in a second or two. machine: also measure what this computer can do with it.

    Raises CheckpointError for a source that is no folder; what is wrong inside one is a line of the report.
    """
    folder, name = locate(source)
    report = Report(f"{name} in {folder}" if str(folder) != name else name)
    check_files(report, folder)
    if not small_enough(report, folder):
        return report
    config = check_config(report, folder)
    if config is None:
        return report
    check_weights(report, folder, config)
    check_preprocessor(report, folder, config, name)
    check_tokens(report, folder, config)
    if machine and not report.failed:
        check_machine(report, folder, config)
    return report
