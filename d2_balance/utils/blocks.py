"""Generated tables inside Markdown files that are otherwise written by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping


def with_blocks(text: str, blocks: Mapping[str, str]) -> str:
    """`text` with what stands between `<!-- name -->` and `<!-- /name -->` brought up to date.

    Args:
        text: a Markdown file.
        blocks: tables by the name of their markers. Padding is taken out of them, which makes
            lines of links 500 characters long.

    Raises:
        ValueError: a marker is missing.
    """
    for name, table in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        if begin not in text or end not in text:
            raise ValueError(f"the markers {begin} and {end} are missing")
        table = re.sub(r" {2,}", " ", re.sub("-{4,}", "---", table))
        before, after = text.split(begin)[0], text.split(end)[1]
        text = f"{before}{begin}\n{table}\n{end}{after}"
    return text
