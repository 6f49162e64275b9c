"""An analysis as text for the console, and as one page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from d2_balance.utils.page import Page
from d2_balance.utils.progress import progress
from d2_balance.utils.text import table

from .remedies import inert, suggestions
from .report import Analysis
from .sections import Code, Part, Section, Table, Text, sections
from .suggest import advice, settings, to_yaml


@dataclass(frozen=True)
class Base:
    """What the analysis was made with, and the settings build on.

    Attributes:
        file: the configuration file; "" for none.
        given: keys and values in turn that changed it.
    """

    file: str = ""
    given: Sequence[str] = ()


def as_text(found: Analysis, base: Base = Base()) -> str:
    """All tables, and what to set, for the console.

    Args:
        found: the analysis.
        base: what it was made with.
    """
    blocks = []
    for section in [*sections(found), what_to_set(found, base)]:
        blocks.append(f"== {section.title}")
        blocks += [block for block in map(_block, section.parts) if block]
    return "\n\n".join(blocks)


def as_page(found: Analysis, base: Base = Base()) -> Page:
    """The same with images, as one page."""
    page = Page(f"What is in {os.path.basename(found.source.name)}")
    if base.file:
        given = f", {' '.join(base.given)}" if base.given else ""
        page.text(f"Analysed with {base.file}{given}.", "note")
    made = [*sections(found), what_to_set(found, base)]
    for section in progress(made, "drawing", unit="sections"):
        _add(page, section)
    return page


def what_to_set(found: Analysis, base: Base) -> Section:
    """The last section: remedies without effect, suggestions, and the YAML."""
    parts: list[Part] = [Text(line, True) for line in inert(found)]
    parts += [
        Text(f"{n}. {s.name}: {s.reason} {s.effect}") for n, s in enumerate(suggestions(found), 1)
    ]
    parts += [Text(line) for line in advice(found)]
    lines = settings(found, base.given)
    if lines:
        parts += [Text(_where(base.file)), Code(to_yaml(lines, os.path.basename(base.file)))]
    else:
        parts.append(Text("Nothing: the configuration fits the data in everything checked."))
    return Section("What to set", parts)


def suggestion(found: Analysis, base: Base, path: str) -> str:
    """The YAML file of `--yaml`: the settings, on top of the config that they were made for.

    Args:
        found: the analysis.
        base: what it was made with.
        path: where the file goes, from which `_BASE_` is found.
    """
    directory = os.path.dirname(os.path.abspath(path))
    file = os.path.relpath(base.file, directory) if base.file else ""
    return to_yaml(settings(found, base.given), file)


def _where(config_file: str) -> str:
    if config_file:
        return "A file beside the configuration; or its keys, merged into yours by hand."
    return "Keys to merge into your configuration."


def _block(part: Part) -> str:
    if isinstance(part, Text):
        return f"WARNING: {part.text}" if part.warning else part.text
    if isinstance(part, Code):
        return part.text.rstrip()
    if isinstance(part, Table) and not part.page_only:
        rows = [[_cut(cell) for cell in row] for row in part.rows]
        return table(rows, part.headers)
    return ""


def _cut(cell: str) -> str:
    return cell if len(str(cell)) <= 90 else f"{str(cell)[:87]}..."


def _add(page: Page, section: Section) -> None:
    page.heading(section.title)
    for part in section.parts:
        if isinstance(part, Text):
            page.text(part.text, "warning" if part.warning else "")
        elif isinstance(part, Table):
            page.table(part.rows, part.headers, part.folded)
        elif isinstance(part, Code):
            page.code(part.text)
        else:
            page.figure(part.draw(), part.caption)
