#!/usr/bin/env python3
"""Trains or evaluates a detector with the losses, datasets and evaluators of d2_balance.

    train_net.py --config-file FILE [--num-gpus N] [--resume] [KEY VALUE ...]
    train_net.py --config-file FILE --eval-only MODEL.WEIGHTS FILE
    torchrun --nproc-per-node N train_net.py --config-file FILE [--resume] [KEY VALUE ...]

Everything goes to OUTPUT_DIR: log.txt, metrics.json, checkpoints, TensorBoard, and summary.md with
the results and plots. A stopped run continues with --resume; docs/training.md says more.
"""

import argparse
import logging
import os
import sys
import warnings
from contextlib import ExitStack

# Detectron2 is older than these deprecations; a user can do nothing about them.
warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)

# ruff: noqa: E402  the filters must stand before the imports that warn
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

import d2_balance  # noqa: F401  registers models, heads and datasets
from d2_balance.data import register_from_config
from d2_balance.engine import (
    BalancedTrainer,
    NonFiniteLossError,
    RunStopped,
    batch_warning,
    check_launch,
    output_lock,
    prepare_run,
    read_run,
    save_lazy,
    scale_to_batch,
    short_messages,
    start,
    use_cpu_without_cuda,
    write_summary,
)
from d2_balance.engine.setup.validate import validate


def setup(args: argparse.Namespace, stack: ExitStack) -> tuple[CfgNode, type[BalancedTrainer]]:
    """The checked config of the run and its trainer; OUTPUT_DIR and the loggers are there then.

    OUTPUT_DIR belongs to this run until `stack` is left.
    """
    cfg, trainer = read_run(args.config_file, args.opts)
    scaled = scale_to_batch(cfg)
    without_cuda = use_cpu_without_cuda(cfg)
    prepare_run(cfg, eval_only=args.eval_only, resume=args.resume)
    cfg.freeze()
    stack.enter_context(output_lock(cfg.OUTPUT_DIR))
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, comm.get_rank(), name="d2_balance")
    logger = logging.getLogger("d2_balance")
    if without_cuda:
        logger.info("No CUDA device was found: MODEL.DEVICE is cpu.")
    if scaled:
        logger.info(scaled)
    unscaled = batch_warning(cfg, args.config_file, args.opts)
    if unscaled and not args.eval_only:
        logger.warning(unscaled)
    register_from_config(cfg)
    validate(cfg, eval_only=args.eval_only, resume=args.resume, registered=trainer.registered)
    save_lazy(trainer, cfg.OUTPUT_DIR)
    return cfg, trainer


def main(args: argparse.Namespace) -> dict:
    """One rank: trains and evaluates, or evaluates only. Returns the results on the first rank."""
    with ExitStack() as stack:
        return run(args, stack)


def run(args: argparse.Namespace, stack: ExitStack) -> dict:
    """What `main` does, while OUTPUT_DIR belongs to this run."""
    program = os.path.basename(sys.argv[0])
    with short_messages(program):
        cfg, trainer_class = setup(args, stack)
        if args.eval_only:
            model = trainer_class.build_model(cfg)
            DetectionCheckpointer(model).load(cfg.MODEL.WEIGHTS)
        else:
            trainer = trainer_class(cfg)
            trainer.resume_or_load(resume=args.resume)
    if args.eval_only:
        results = trainer_class.test_finished(cfg, model)
        if comm.is_main_process() and cfg.TEST.EXPECTED_RESULTS:
            verify_results(cfg, results)
    else:
        with short_messages(program, (NonFiniteLossError, RunStopped)):
            results = trainer.train()
    if comm.is_main_process():
        write_summary(cfg, results, config_file=args.config_file, eval_only=args.eval_only)
    return results


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    with short_messages(os.path.basename(sys.argv[0])):
        check_launch(args)
    start(main, args)
