"""Logs besides Detectron2's: CSV, Weights & Biases, MLflow; classes and images in TensorBoard."""

from __future__ import annotations

import csv
import importlib.util
import logging
import os
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter, get_event_storage

from d2_balance.evaluation.files import file_name_of
from d2_balance.utils.files import read_json, write_json

CSV_FILE = "metrics.csv"
WANDB_FILE = "wandb_run.json"
MLFLOW_FILE = "mlflow_run.json"
_ALLOWED = re.compile(r"[^\w\-./ ]")  # what names of MLflow must not hold
_BATCH = 1000  # metrics in a call to MLflow

logger = logging.getLogger(__name__)


def check_logs(cfg: CfgNode) -> None:
    """Check that the packages are there that LOG needs.

    Raises:
        ValueError: naming the key and what to do.
    """
    for key, package, install in (
        ("WANDB_PROJECT", "wandb", "wandb"),
        ("MLFLOW_EXPERIMENT", "mlflow", "mlflow-skinny"),
    ):
        if cfg.LOG[key] and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"LOG.{key} is {cfg.LOG[key]!r} and the package {package} is missing: "
                f'pip install {install}, or set LOG.{key} "".'
            )


class _NewScalars(EventWriter):
    """Base of writers that write each scalar once, smoothed as metrics.json has it."""

    def __init__(self, window_size: int = 20) -> None:
        self._window_size, self._last_write = window_size, -1

    def new_scalars(self) -> dict[int, dict[str, float]]:
        """Return what was put since the last call: iteration to name to value."""
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
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115  until close()

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
        self._run = wandb.init(
            project=cfg.LOG.WANDB_PROJECT,
            mode=cfg.LOG.WANDB_MODE,
            dir=cfg.OUTPUT_DIR,
            config=yaml.safe_load(cfg.dump()),
            resume="allow",
            **(read_json(path) if os.path.isfile(path) else {}),
        )
        write_json(path, {"id": self._run.id})
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")

    def write(self) -> None:
        for iteration, scalars in self.new_scalars().items():
            self._run.log(scalars | {"iteration": iteration})

    def add_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Write (H, W, 3) uint8 RGB."""
        import wandb

        self._run.log({name: wandb.Image(image), "iteration": iteration})

    def close(self) -> None:
        self._run.finish()


class MlflowWriter(_NewScalars):
    """Logs scalars and images to MLflow; a resumed run continues the same one there.

    Args:
        cfg: with LOG; it is logged as the artifact config.yaml.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        uri = cfg.LOG.MLFLOW_URI
        if not uri:
            uri = Path(cfg.OUTPUT_DIR, "mlruns").resolve().as_uri()
            # MLflow 3 asks for a consent to files, and a database needs more than mlflow-skinny
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow

        self._client = mlflow.MlflowClient(uri)
        path = os.path.join(cfg.OUTPUT_DIR, MLFLOW_FILE)
        if os.path.isfile(path):
            self._run_id = read_json(path)["run_id"]
            self._client.update_run(self._run_id, status="RUNNING")
        else:
            experiment = self._client.get_experiment_by_name(cfg.LOG.MLFLOW_EXPERIMENT)
            number = (
                self._client.create_experiment(cfg.LOG.MLFLOW_EXPERIMENT)
                if experiment is None
                else experiment.experiment_id
            )
            name = os.path.basename(os.path.normpath(cfg.OUTPUT_DIR))
            self._run_id = self._client.create_run(number, run_name=name).info.run_id
            for key, value in _headline(cfg).items():
                self._client.log_param(self._run_id, key, value)
            write_json(path, {"run_id": self._run_id, "uri": uri})
        self._client.log_text(self._run_id, cfg.dump(), "config.yaml")

    def write(self) -> None:
        now = int(time.time() * 1000)
        for iteration, scalars in self.new_scalars().items():
            metrics = [
                self._metric(_ALLOWED.sub("_", name), value, now, iteration)
                for name, value in scalars.items()
            ]
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(self._run_id, metrics[start : start + _BATCH])

    def _metric(self, *values: Any) -> Any:
        from mlflow.entities import Metric

        return Metric(*values)

    def add_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Write (H, W, 3) uint8 RGB as a PNG, one file for each iteration."""
        stem = _ALLOWED.sub("_", os.path.splitext(name)[0])
        file = f"{stem}/{iteration:07d}.png"
        self._client.log_image(self._run_id, image, artifact_file=file)

    def close(self) -> None:
        self._client.set_terminated(self._run_id)


class ClassAPWriter(TensorboardXWriter):
    """Detectron2's TensorBoard writer, for AP of classes besides scalars.

    A thousand classes would swell metrics.json, so they do not go through the EventStorage.
    """

    def add_classes(self, records: dict[str, dict[str, Any]], prefix: str, iteration: int) -> None:
        """Write class_AP/<class> and class_AP_segm/<class>.

        Args:
            records: as the evaluators write them.
            prefix: goes before the names.
            iteration: x axis.
        """
        for name, record in records.items():
            for key in ("AP", "AP_segm"):
                if record.get(key) is not None:
                    self._writer.add_scalar(f"{prefix}class_{key}/{name}", record[key], iteration)

    def add_image(self, name: str, image: np.ndarray, iteration: int) -> None:
        """Write (H, W, 3) uint8 RGB."""
        self._writer.add_image(name, image, iteration, dataformats="HWC")


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
        if self._writer is None:
            return
        for dataset in self._datasets:
            name = f"per_class_ap_{file_name_of(dataset)}.json"
            path = os.path.join(self._directory, name)
            if os.path.isfile(path):
                prefix = f"{dataset}/" if len(self._datasets) > 1 else ""
                self._writer.add_classes(read_json(path), prefix, self.trainer.iter)


def log_writers(cfg: CfgNode) -> list[EventWriter]:
    """Return the writers that LOG names, for the first process."""
    writers: list[EventWriter] = []
    if comm.is_main_process() and cfg.LOG.CSV:
        writers.append(CSVWriter(os.path.join(cfg.OUTPUT_DIR, CSV_FILE)))
    if comm.is_main_process() and cfg.LOG.WANDB_PROJECT:
        writers.append(WandbWriter(cfg))
    if comm.is_main_process() and cfg.LOG.MLFLOW_EXPERIMENT:
        writers.append(MlflowWriter(cfg))
    return writers


def _headline(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings that runs are compared by."""
    balance = cfg.MODEL.BALANCE
    return {
        "model": cfg.MODEL.META_ARCHITECTURE,
        "cls_loss": balance.CLS_LOSS or "stock",
        "box_loss": balance.BOX_LOSS or "stock",
        "sampler": cfg.DATALOADER.SAMPLER_TRAIN,
        "lr": cfg.SOLVER.BASE_LR,
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "max_iter": cfg.SOLVER.MAX_ITER,
        "seed": cfg.SEED,
    }
