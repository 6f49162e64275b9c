"""Self-contained HTML pages: text, tables and images in one file that opens anywhere."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tabulate import tabulate

from .files import write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1a1a1a;max-width:62rem;margin:2rem auto;
padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem}h2{font-size:1.2rem;margin-top:2.2rem;
border-bottom:1px solid #ddd;padding-bottom:.2rem}
table{border-collapse:collapse;margin:.8rem 0;font-size:14px}
th,td{padding:.25rem .7rem;border-bottom:1px solid #e4e4e4;text-align:left;vertical-align:top}
th{background:#f6f6f6}td{font-variant-numeric:tabular-nums}
img{max-width:100%;height:auto;display:block;margin:.8rem 0}
pre{background:#f6f6f6;padding:.8rem;overflow-x:auto;font-size:13px}
.note{color:#555}.warning{border-left:4px solid #D55E00;padding-left:.7rem}
.scroll{overflow-x:auto}
"""


class Page:
    """Collects the parts of a page; `write` puts them into one file.

    Args:
        title: heading of the page.
    """

    def __init__(self, title: str):
        self.title = title
        self._parts: list[str] = []

    def heading(self, text: str) -> None:
        """Start a section."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def text(self, text: str, kind: str = "") -> None:
        """Add a paragraph; `kind` is "", "note" or "warning"."""
        label = f' class="{kind}"' if kind else ""
        self._parts.append(f"<p{label}>{_inline(text)}</p>")

    def items(self, lines: Sequence[str]) -> None:
        """Add a list."""
        inner = "".join(f"<li>{_inline(line)}</li>" for line in lines)
        self._parts.append(f"<ul>{inner}</ul>")

    def code(self, text: str) -> None:
        """Add text whose line breaks and spaces matter."""
        self._parts.append(f"<pre>{html.escape(text)}</pre>")

    def table(self, rows: Sequence[Sequence], headers: Sequence[str], folded: str = "") -> None:
        """Add a table; numbers are shown as given. `folded` hides it under this heading."""
        body = tabulate(rows, headers=headers, tablefmt="html", disable_numparse=True)
        body = f'<div class="scroll">{body}</div>'
        if folded:
            body = f"<details><summary>{html.escape(folded)}</summary>{body}</details>"
        self._parts.append(body)

    def figure(self, figure: Figure, caption: str) -> None:
        """Add an image as PNG within the page; `caption` says what it shows."""
        data = base64.b64encode(png(figure)).decode("ascii")
        self._parts.append(f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{data}">')
        self.text(caption, "note")

    def html(self) -> str:
        """The whole page."""
        title = html.escape(self.title)
        head = f'<meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>'
        body = "\n".join(self._parts)
        return (
            f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n'
            f"<body><h1>{title}</h1>\n{body}\n</body></html>\n"
        )

    def write(self, path: str) -> None:
        """Write the page to `path`, atomically."""
        write_text(path, self.html())


def _inline(text: str) -> str:
    """Escape text, and show what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text))


def png(figure: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
