"""One run of training or evaluation, from its arguments to summary.md."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from contextlib import ExitStack
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from d2_balance.data import register_from_config

from .errors import Interrupted, RunStopped
from .hooks.nonfinite import NonFiniteLossError
from .resume.checkpoint import load_trained
from .setup.config_file import find_config
from .setup.launch import PROGRAM
from .setup.lazy import read_run, save_lazy
from .setup.run import output_lock, prepare_run, short_messages, use_cpu_without_cuda
from .setup.scaling import batch_warning, scale_to_batch
from .setup.validate import validate
from .summary import write_summary
from .trainer import BalancedTrainer

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")


def train(args: argparse.Namespace) -> dict[str, Any]:
    """Train and evaluate, or evaluate only; called on every rank.

    Args:
        args: `config_file`, `resume`, `eval_only` and `opts` of `d2-balance train`.

    Returns:
        The results of the evaluation on the first rank.

    Raises:
        SystemExit: what the user has to change was printed; status 2.
    """
    with ExitStack() as stack:
        with short_messages(PROGRAM):
            if args.config_file:  # may be the name of a config of this package
                args.config_file = find_config(args.config_file)
            cfg, trainer_class = _set_up(args, stack)
            if args.eval_only:
                model = trainer_class.build_model(cfg)
                load_trained(model, cfg.MODEL.WEIGHTS)
            else:
                trainer = trainer_class(cfg)
                trainer.resume_or_load(resume=args.resume)
        if args.eval_only:
            results = trainer_class.test_finished(cfg, model)
            if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
                verify_results(cfg, results)
        else:
            results = _train(trainer)
        if comm.is_main_process():
            write_summary(
                cfg,
                results,
                config_file=args.config_file,
                eval_only=args.eval_only,
                inert=() if args.eval_only else trainer.inert_remedies,
            )
        return results


def _without_colours(record: logging.LogRecord) -> bool:
    """Take the colours of a terminal out of a message; a filter that keeps every record."""
    record.msg = _ESCAPE.sub("", str(record.msg))
    return True


def _train(trainer: BalancedTrainer) -> dict[str, Any]:
    try:
        with short_messages(PROGRAM, (NonFiniteLossError, RunStopped)):
            return trainer.train()
    except Interrupted as stop:
        if comm.get_local_rank() == 0:
            print(f"{PROGRAM}: {stop}", file=sys.stderr)
        sys.exit(stop.status)


def _set_up(args: argparse.Namespace, stack: ExitStack) -> tuple[CfgNode, type[BalancedTrainer]]:
    """Check the config of the run; OUTPUT_DIR belongs to the run until `stack` is left.

    What can end the run comes before Detectron2 logs the environment and the whole config.
    """
    cfg, trainer = read_run(args.config_file, args.opts)
    scaled = scale_to_batch(cfg)
    without_cuda = use_cpu_without_cuda(cfg)
    prepare_run(cfg, eval_only=args.eval_only, resume=args.resume)
    cfg.freeze()
    stack.enter_context(output_lock(cfg.OUTPUT_DIR))
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="d2_balance")
    logger = logging.getLogger("d2_balance")
    register_from_config(cfg)
    validate(cfg, eval_only=args.eval_only, resume=args.resume, registered=trainer.lazy is None)
    unscaled = "" if trainer.lazy is not None else batch_warning(cfg, args.config_file, args.opts)
    logging.getLogger("detectron2").addFilter(_without_colours)  # of the config, in files and pipes
    default_setup(cfg, args)
    if without_cuda:
        logger.info("There is no CUDA device: MODEL.DEVICE is cpu.")
    if scaled:
        logger.info(scaled)
    if unscaled and not args.eval_only:
        logger.warning(unscaled)
    save_lazy(trainer, cfg.OUTPUT_DIR)
    return cfg, trainer
