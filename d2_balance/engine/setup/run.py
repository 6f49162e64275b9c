"""Settle where a run writes, its seed and device, and how it ends where a user must act."""

from __future__ import annotations

import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
import yaml
from detectron2.config import CfgNode
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager

from d2_balance.data.class_counts import FROM_CHECKPOINT
from d2_balance.utils.errors import is_deliberate
from d2_balance.utils.lock import directory_lock

from ..resume.checkpoint import resumable_files
from ..resume.same_run import check_same_model

CONFIG_ERROR = 2
"""Exit status where the user has to change something; argparse uses the same."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


def use_cpu_without_cuda(cfg: CfgNode) -> bool:
    """Set MODEL.DEVICE to cpu where it asks for CUDA and there is none.

    Returns:
        Whether the device was changed.
    """
    changes = cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available()
    if changes:
        cfg.MODEL.DEVICE = "cpu"
    return changes


def on_main_process(function: Callable[[], T]) -> T:
    """Call a function on the first rank and return its result on all; every rank must call this.

    Raises:
        ValueError: on all ranks, where `function` raised it.
    """
    outcome: tuple[T | None, str | None] = None, None
    if comm.is_main_process():
        try:
            outcome = function(), None
        except ValueError as error:
            outcome = None, str(error)
    result, message = comm.all_gather(outcome)[0]
    if message is not None:
        raise ValueError(message)
    return result


@contextmanager
def output_lock(directory: str) -> Iterator[None]:
    """Keep other runs from writing into `directory` while the block runs; every rank enters it.

    Raises:
        ValueError: on all ranks, where another run holds the lock.
    """
    with ExitStack() as stack:
        on_main_process(lambda: stack.enter_context(directory_lock(directory)))
        yield


def prepare_run(cfg: CfgNode, *, eval_only: bool = False, resume: bool = False) -> None:
    """Settle OUTPUT_DIR, MODEL.WEIGHTS and SEED in cfg; nothing on the disk changes.

    - Training refuses a directory that holds a run, unless it resumes. Resuming where there is
      nothing starts afresh.
    - An evaluation writes beside a run: to OUTPUT_DIR/eval_1, eval_2 and so on. With `resume` it
      takes the last checkpoint of OUTPUT_DIR. Losses take class counts from the weights.
    - SEED below 0 becomes the seed of the run that is resumed, else a random one.
    - Only the same model is resumed: another architecture, loss or number of classes is refused.

    Raises:
        ValueError: OUTPUT_DIR holds a run, or the run that it holds is one of another model.
    """

    def decide() -> tuple[str, str, int]:
        directory, weights, seed = cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SEED
        if not (eval_only or resume) and holds_run(directory):
            raise ValueError(
                f"OUTPUT_DIR {directory} holds a run already, and nothing is overwritten: pass "
                "--resume to continue it, or set another OUTPUT_DIR."
            )
        saved = _config_of_run(directory) if resume else ""
        if resume and not eval_only:
            check_same_model(saved, cfg, f"the run in {directory}")
        if seed < 0:
            seed = int((yaml.safe_load(saved) or {}).get("SEED", -1))
        if seed < 0:
            # Detectron2 adds the rank, and numpy takes seeds below 2^32
            seed = secrets.randbelow(2**31)
        if eval_only:
            if resume:
                weights = last_checkpoint(directory) or weights
            directory = _evaluation_directory(directory)
        return directory, weights, seed

    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.SEED = on_main_process(decide)
    balance = cfg.MODEL.BALANCE
    counted = balance.CLASS_COUNTS_FILE or balance.NORCAL.GAMMA or balance.CALIBRATION.NAME
    if (
        eval_only and not counted
    ):  # calibrations need counts at test time, which stock weights do not carry
        cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = FROM_CHECKPOINT


def holds_run(directory: str) -> bool:
    """Return whether a directory holds results of training or of an evaluation.

    A config.yaml alone does not count: it is there as well when a run was refused at its start.
    """
    if not PathManager.isdir(directory):
        return False
    files = PathManager.ls(directory)
    metrics = os.path.join(directory, "metrics.json")
    return (
        "last_checkpoint" in files
        or "summary.md" in files
        or any(name.endswith(".pth") for name in files)
        or ("metrics.json" in files and os.path.getsize(metrics) > 0)
    )


def last_checkpoint(directory: str) -> str:
    """Path of the last checkpoint of a run, "" where there is none."""
    return next(iter(resumable_files(directory)), "")


def _config_of_run(directory: str) -> str:
    """Return the config.yaml of the run in a directory, "" where there is none."""
    path = os.path.join(directory, "config.yaml")
    if not (holds_run(directory) and PathManager.isfile(path)):
        return ""
    with PathManager.open(path) as file:
        return file.read()


def _evaluation_directory(directory: str) -> str:
    """OUTPUT_DIR itself where it holds no run, else a directory in it that is not there yet."""
    if not holds_run(directory):
        return directory
    number = 1
    while PathManager.exists(found := os.path.join(directory, f"eval_{number}")):
        number += 1
    return found


@contextmanager
def short_messages(
    program: str, kind: type[Exception] | tuple[type[Exception], ...] = ValueError
) -> Iterator[None]:
    """End the program with one message, without traceback, where the user has to change something.

    That is an exception of `kind` raised by this package, Detectron2 or their config library. All
    others are bugs and keep their traceback.
    """
    try:
        yield
    except kind as error:
        if not is_deliberate(error):
            raise
        if comm.get_local_rank() == 0 or not getattr(error, "everywhere", True):
            print(f"{program}: error: {error}", file=sys.stderr)
        sys.exit(CONFIG_ERROR)
