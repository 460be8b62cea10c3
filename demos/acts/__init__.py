"""What the panels of the viewer can ask of the model. One file a panel, each with its ACTS.

An act is a function (Asked) -> iterator of plain JSON dictionaries: what is known so far, the last one whole. It raises
ValueError with one sentence for the visitor.
"""

from __future__ import annotations

from . import lens
from .act import Act, Asked

ACTS: dict[str, Act] = lens.ACTS

__all__ = ["ACTS", "Act", "Asked"]
