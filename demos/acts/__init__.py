"""What the panels of the viewer can ask of the model. One file a panel, each with its ACTS.

An act is a function (Asked) -> iterator of plain JSON dictionaries: what is known so far, the last one whole. It raises
ValueError with one sentence for the visitor.
"""

from __future__ import annotations

from . import change, compare, keep, lens, look, think
from .act import Act, Asked

ACTS: dict[str, Act] = look.ACTS | think.ACTS | change.ACTS | lens.ACTS | compare.ACTS | keep.ACTS
WITHOUT_MODEL = frozenset(keep.ACTS)  # done at once, whoever is being answered

__all__ = ["ACTS", "WITHOUT_MODEL", "Act", "Asked"]
