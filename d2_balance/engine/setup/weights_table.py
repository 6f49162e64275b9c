"""The table of what was taken over from a weights file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from d2_balance.utils.text import table

LOADED = "loaded"
SHAPE = "skipped (shape)"
NEW = "skipped (missing)"
REINITIALIZED = "re-initialised"
RUN_STATE = "skipped (state)"
UNUSED = "unused"

_SHOWN = 40  # rows of one kind


@dataclass(frozen=True)
class WeightRow:
    """What happened to one tensor.

    Attributes:
        name: in the model; of an unused one in the file.
        status: LOADED; SHAPE, NEW, RUN_STATE and REINITIALIZED, which keep their initial values; or
            UNUSED.
        reason: why it was not loaded.
        shape: in the model; of an unused one in the file.
    """

    name: str
    status: str
    reason: str
    shape: tuple[int, ...]


def weights_table(rows: Sequence[WeightRow]) -> str:
    """Return a table of what was loaded by part of the model, and of each tensor that was not.

    The sums stand below it.
    """
    parts: dict[str, int] = {}
    for row in rows:
        if row.status == LOADED:
            part = ".".join(row.name.split(".")[:2])
            parts[part] = parts.get(part, 0) + 1
    lines = [(f"{part}.* ({count})", LOADED, "", "") for part, count in parts.items()]
    for status in (SHAPE, REINITIALIZED, NEW, RUN_STATE, UNUSED):
        of_status = [row for row in rows if row.status == status]
        lines += [(r.name, status, str(r.shape), r.reason) for r in of_status[:_SHOWN]]
        if len(of_status) > _SHOWN:
            lines.append((f"and {len(of_status) - _SHOWN} more", status, "", ""))
    text = table(lines, ["tensor", "what became of it", "shape", "why"])
    statuses = [row.status for row in rows]
    sums = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    return f"{text}\n{', '.join(sums)}."
