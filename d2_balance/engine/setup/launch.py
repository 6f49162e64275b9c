"""Starts the processes of a run, or joins those that torchrun has started."""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from types import FrameType

import torch
import torch.distributed as dist
from detectron2.engine import launch
from detectron2.engine.launch import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException

PROGRAM = "d2-balance train"
"""Name of the program in messages."""

TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Environment variables of torchrun; LOCAL_WORLD_SIZE comes with them."""


def start(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call `main(args)` in every process of the run.

    Under torchrun the processes are there already, and this one joins them. Otherwise Detectron2's
    `launch` starts --num-gpus processes on this machine; without a GPU they are joined by gloo.

    Raises:
        ValueError: see `check_launch`.
        SystemExit: a started process has failed; with its exit status.
    """
    check_launch(args)
    if under_torchrun():
        join_torchrun()
        _run(main, args)
        return
    numbers = args.num_gpus, args.num_machines, args.machine_rank
    try:
        with _signals_passed_on() if args.num_gpus > 1 else nullcontext():
            launch(_run, *numbers, args.dist_url, args=(main, args))
    except ProcessExitedException as error:
        if error.signal_name:  # otherwise the process itself has printed why it ended
            print(f"{PROGRAM}: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code if error.exit_code > 0 else 128 - error.exit_code)


@contextmanager
def _signals_passed_on() -> Iterator[None]:
    """Leave Ctrl-C and SIGTERM to the processes that were started, and wait for their end."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        for child in multiprocessing.active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _run(main: Callable[[argparse.Namespace], object], args: argparse.Namespace) -> None:
    """Call `main(args)` and leave the process groups, also when it fails."""
    try:
        main(args)
    except BaseException as error:
        if dist.is_initialized() and dist.get_backend() == "gloo":  # NCCL may wait for the others
            leave_groups()
        if isinstance(error, KeyboardInterrupt) and multiprocessing.parent_process() is not None:
            sys.exit(128 + signal.SIGINT)  # torch ends a started process with 0 otherwise
        raise
    leave_groups()


def leave_groups() -> None:
    """Destroy the process groups of this process, if it has any, and end their threads.

    A thread of gloo that still runs when Python ends can abort the process, and it runs as long as
    Detectron2 keeps a reference to its group. Does not wait for the other processes.
    """
    if not dist.is_initialized():
        return
    dist.destroy_process_group()
    comm._LOCAL_PROCESS_GROUP = None
    comm._get_global_gloo_group.cache_clear()
    gc.collect()  # a model in a cycle of references holds the group that averages its gradients


def under_torchrun() -> bool:
    """Return whether torchrun has started this process, or a program that sets its variables."""
    return all(name in os.environ for name in TORCHRUN)


def check_launch(args: argparse.Namespace) -> None:
    """Refuse arguments that contradict torchrun, and processes that cannot be started.

    Raises:
        ValueError: naming the argument.
    """
    if under_torchrun():
        _check_torchrun(args)
    else:
        _check_numbers(args)


def _check_torchrun(args: argparse.Namespace) -> None:
    given = {"--num-gpus": args.num_gpus, "--num-machines": args.num_machines}
    wrong = [f"{name} {value}" for name, value in given.items() if value != 1]
    if wrong:
        raise ValueError(
            f"torchrun has started the processes already: leave out {' and '.join(wrong)} "
            "(torchrun takes --nproc-per-node and --nnodes), or do without torchrun."
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if torch.cuda.is_available() and local >= gpus:
        raise ValueError(
            f"torchrun has started more processes on this machine than its {gpus} GPUs; must be "
            f"--nproc-per-node {gpus} at most."
        )


def _check_numbers(args: argparse.Namespace) -> None:
    gpus = torch.cuda.device_count()
    if args.num_gpus < 1 or (torch.cuda.is_available() and args.num_gpus > gpus):
        raise ValueError(
            f"--num-gpus is {args.num_gpus}; must be a number from 1"
            + (f" to {gpus}, the GPUs of this machine." if torch.cuda.is_available() else ".")
        )
    if args.num_machines < 1 or not 0 <= args.machine_rank < args.num_machines:
        raise ValueError(
            f"--machine-rank is {args.machine_rank} and --num-machines {args.num_machines}; "
            "they must be at least 1, and a rank from 0 to one less."
        )


def join_torchrun(timeout: timedelta = DEFAULT_TIMEOUT) -> None:
    """Join the processes of torchrun, with what Detectron2's `launch` sets up."""
    has_gpu = torch.cuda.is_available()
    local = int(os.environ["LOCAL_RANK"])
    if has_gpu:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if has_gpu else "gloo", init_method="env://", timeout=timeout)
    comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size())))
    comm.synchronize()
