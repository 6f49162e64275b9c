"""Logs besides Detectron2's: metrics.csv, Weights & Biases, and AP of each class in TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from d2_balance.evaluation.files import file_name_of

CSV_FILE = "metrics.csv"
WANDB_FILE = "wandb_run.json"
WANDB_MODES = ("online", "offline")

logger = logging.getLogger(__name__)


def check_logs(cfg: CfgNode) -> None:
    """Checks LOG.

    Raises:
        ValueError: naming the key and what to do.
    """
    if not cfg.LOG.WANDB_PROJECT:
        return
    if cfg.LOG.WANDB_MODE not in WANDB_MODES:
        raise ValueError(
            f"LOG.WANDB_MODE is {cfg.LOG.WANDB_MODE!r}; must be {' or '.join(WANDB_MODES)}."
        )
    if importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"LOG.WANDB_PROJECT is {cfg.LOG.WANDB_PROJECT!r} and the package wandb is missing: "
            'pip install wandb, or set LOG.WANDB_PROJECT "".'
        )


class _NewScalars(EventWriter):
    """Base of writers that write each scalar once, smoothed as metrics.json has it."""

    def __init__(self, window_size: int = 20) -> None:
        self._window_size, self._last_write = window_size, -1

    def new_scalars(self) -> dict[int, dict[str, float]]:
        """What was put since the last call: iteration to name to value."""
        found: dict[int, dict[str, float]] = {}
        latest = get_event_storage().latest_with_smoothing_hint(self._window_size)
        for name, (value, iteration) in latest.items():
            if iteration > self._last_write:
                found.setdefault(iteration, {})[name] = value
        self._last_write = max((self._last_write, *found))
        return {iteration: found[iteration] for iteration in sorted(found)}


class CSVWriter(_NewScalars):
    """Appends lines of iteration, name, value to a file.

    Args:
        path: the file; its head is written where it is empty.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        self._file = open(path, "a", newline="", encoding="utf-8")  # until close()

    def write(self) -> None:
        lines = csv.writer(self._file)
        if os.fstat(self._file.fileno()).st_size == 0:  # a resumed run may have cut it to nothing
            lines.writerow(["iteration", "name", "value"])
        for iteration, scalars in self.new_scalars().items():
            lines.writerows([iteration, name, scalars[name]] for name in sorted(scalars))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class WandbWriter(_NewScalars):
    """Logs scalars to Weights & Biases; a resumed run continues the same one there.

    Iterations are logged as a metric of their own, the x axis of the others: a resumed run repeats
    some, and steps of Weights & Biases only go forward.

    Args:
        cfg: with LOG; it is logged as the run's config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        import wandb

        path = os.path.join(cfg.OUTPUT_DIR, WANDB_FILE)
        known = {}
        if os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                known = json.load(file)
        self._run = wandb.init(
            project=cfg.LOG.WANDB_PROJECT,
            mode=cfg.LOG.WANDB_MODE,
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            resume="allow",
            **known,
        )
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"id": self._run.id}, file)
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self) -> None:
        for iteration, scalars in self.new_scalars().items():
            self._run.log(scalars | {"iteration": iteration})

    def close(self) -> None:
        self._run.finish()


class ClassAPWriter(TensorboardXWriter):
    """Detectron2's TensorBoard writer, for AP of classes besides scalars.

    A thousand classes would swell metrics.json, so they do not go through the EventStorage.
    """

    def add_classes(self, records: dict[str, dict[str, Any]], prefix: str, iteration: int) -> None:
        """Writes class_AP/<class> and class_AP_segm/<class>.

        Args:
            records: as the evaluators write them.
            prefix: goes before the names.
            iteration: x axis.
        """
        for name, record in records.items():
            for key in ("AP", "AP_segm"):
                if record.get(key) is not None:
                    self._writer.add_scalar(f"{prefix}class_{key}/{name}", record[key], iteration)


class ClassAP(HookBase):
    """Hands AP of each class to TensorBoard after every evaluation.

    Stands behind EvalHook.

    Args:
        writer: of TensorBoard; None: this process writes nothing.
        directory: where the evaluators put their tables.
        datasets: names of the test sets.
        period: TEST.EVAL_PERIOD.
    """

    def __init__(
        self, writer: ClassAPWriter | None, directory: str, datasets: Sequence[str], period: int
    ) -> None:
        self._writer, self._directory = writer, directory
        self._datasets, self._period = datasets, period

    def after_step(self) -> None:
        done = self.trainer.iter + 1
        if self._period > 0 and done % self._period == 0 and done != self.trainer.max_iter:
            self._write()

    def after_train(self) -> None:
        if self.trainer.iter >= self.trainer.max_iter:
            self._write()

    def _write(self) -> None:
        for dataset in self._datasets if self._writer is not None else ():
            name = f"per_class_ap_{file_name_of(dataset)}.json"
            path = os.path.join(self._directory, name)
            if os.path.isfile(path):
                with open(path, encoding="utf-8") as file:
                    records = json.load(file)
                prefix = f"{dataset}/" if len(self._datasets) > 1 else ""
                self._writer.add_classes(records, prefix, self.trainer.iter)


def log_writers(cfg: CfgNode) -> list[EventWriter]:
    """The writers that LOG names, for the first process."""
    writers: list[EventWriter] = []
    if comm.is_main_process() and cfg.LOG.CSV:
        writers.append(CSVWriter(os.path.join(cfg.OUTPUT_DIR, CSV_FILE)))
    if comm.is_main_process() and cfg.LOG.WANDB_PROJECT:
        writers.append(WandbWriter(cfg))
    return writers
