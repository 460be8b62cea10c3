"""Checkpoints of any origin, looked at before they are trusted: fetched, checked, compared, and stand-ins to practise on.

    doctor.py    all checks of a folder (`kimi-vl doctor`): files, settings, weights, tokens, machine
    deep.py      layer by layer against transformers' modules (`kimi-vl doctor --deep`)
    download.py  the needed files of a hub id, and no others (`kimi-vl download`)
    standin.py   random checkpoints of the released layout and size
"""

from .doctor import checkup
from .findings import Finding, Report

__all__ = ["Finding", "Report", "checkup"]
