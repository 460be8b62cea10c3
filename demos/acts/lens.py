"""The lens panel: what each layer would say next at one position."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from workbench.analyses.lens import logit_lens

from .act import Act, Asked


def lens(asked: Asked) -> Iterator[dict[str, Any]]:
    """args: position (of the run). Yields {"position", "layers", "words" and "probs": a list of the likeliest a layer}."""
    position = asked.whole("position", 0, len(asked.run.token_ids) - 1)
    result = logit_lens(asked.session.model, asked.session.chat, asked.run, [position], top=5)
    yield {
        "position": position,
        "layers": [str(name) for name in result.axes["words"][0][1]],
        "words": result["words"][:, 0].tolist(),
        "probs": result["probs"][:, 0].astype(float).round(4).tolist(),
    }


ACTS: dict[str, Act] = {"lens": lens}
