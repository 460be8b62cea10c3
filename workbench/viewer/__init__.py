"""One linked viewer of a run, in plain JavaScript, and what feeds it: `payload` for a page, `standalone` for one HTML file."""

from .payload import payload, progress, source, standalone, steps

__all__ = ["payload", "progress", "source", "standalone", "steps"]
