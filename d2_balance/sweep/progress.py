"""One live table in a terminal, a line per event elsewhere."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from optuna.trial import TrialState

if TYPE_CHECKING:
    from .run import Sweep

REFRESH_SECONDS = 2.0


class Progress(AbstractContextManager["Progress"]):
    """Shows a sweep while it runs.

    Args:
        stream: where lines go; a terminal gets a live table of rich.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self._live: Any = None
        self._last = 0.0

    def __enter__(self) -> Progress:
        if self.stream.isatty():
            from rich.live import Live

            self._live = Live(auto_refresh=False)
            self._live.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.__exit__(kind, error, trace)

    def event(self, line: str) -> None:
        """Print a line, above the table if there is one."""
        if self._live is not None:
            self._live.console.print(line, markup=False, highlight=False)
        else:
            print(line, file=self.stream, flush=True)

    def tick(self, sweep: Sweep) -> None:
        """Bring the table up to date, at most every REFRESH_SECONDS."""
        now = time.monotonic()
        if self._live is not None and now - self._last > REFRESH_SECONDS:
            self._last = now
            self._live.update(live_table(sweep), refresh=True)


def live_table(sweep: Sweep) -> Any:
    """Return the state of every trial as a table of rich, with the time that is left."""
    from rich.table import Table

    spec = sweep.spec
    left = sweep.eta()
    title = "" if left is None else f"about {left / 60:.0f} min left"
    grid = Table(title=title, title_justify="left")
    grid.add_column("remedy")
    for seed in spec.seeds:
        grid.add_column(f"seed {seed}", justify="right")
    states = {sweep.study.key(t): t for t in sweep.study.trials()}
    for remedy in spec.remedies:
        cells = []
        for seed in spec.seeds:
            trial = states.get((remedy.name, seed))
            cells.append("" if trial is None else _cell(trial))
        grid.add_row(remedy.name, *cells)
    return grid


def _cell(trial: Any) -> str:
    if trial.state == TrialState.COMPLETE:
        return f"{trial.value:.1f}"
    words = {
        TrialState.WAITING: "waits",
        TrialState.PRUNED: "stopped",
        TrialState.FAIL: "failed",
    }
    if trial.state in words:
        return words[trial.state]
    last = trial.last_step
    return "runs" if last is None else f"runs ({trial.intermediate_values[last]:.1f})"
