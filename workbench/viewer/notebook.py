"""A run in a notebook cell: the single-file viewer in a frame, squeezed, with a few lines of text that survive everywhere."""

from __future__ import annotations

import base64
import html
import zlib
from typing import TYPE_CHECKING

from .payload import payload, standalone

if TYPE_CHECKING:
    from ..runs import Run

HEIGHT = 760  # pixels of the frame
ATTENTION_BYTES = 400_000  # of a run's attention inside a notebook; a longer run keeps means, and says so

# The viewer unpacks itself and takes the place of this script.
_UNPACK = (
    "<script>(async () => {{"
    'const squeezed = Uint8Array.from(atob("{data}"), (c) => c.charCodeAt(0));'
    'const stream = new Blob([squeezed]).stream().pipeThrough(new DecompressionStream("deflate"));'
    "const page = await new Response(stream).text();"
    "document.open(); document.write(page); document.close();"
    "}})();</script>"
)


def cell(run: Run) -> str:
    """HTML for a notebook: what `repr(run)` says, and the viewer in a frame that can reach nothing around it.

    Where frames or scripts are taken out, as on GitHub, the text is what remains.
    """
    page = standalone(payload(run, attention_bytes=ATTENTION_BYTES), title="A recorded run")
    inside = _UNPACK.format(data=base64.b64encode(zlib.compress(page.encode(), 9)).decode("ascii"))
    text = html.escape(repr(run)).replace("\n", "<br>")
    frame = "width: 100%; border: 0; background: none"
    return (
        f"<p><code>{text}</code></p>"
        f'<iframe srcdoc="{html.escape(inside, quote=True)}" sandbox="allow-scripts allow-downloads" '
        f'title="A recorded run" height="{HEIGHT}" style="{frame}"></iframe>'
    )
