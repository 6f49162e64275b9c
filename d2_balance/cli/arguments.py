"""Arguments that several commands have."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from d2_balance.utils.executors import Executor


def at_least(low: int) -> Callable[[str], int]:
    """Return the type of an argument that is an integer of at least `low`."""

    def integer(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is not an integer of at least {low}")
        return value

    return integer


def fraction(text: str) -> float:
    """Type of an argument that is a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in [0, 1]")
    return value


def add_overwrite(parser: argparse.ArgumentParser) -> None:
    """Add --overwrite."""
    parser.add_argument("--overwrite", action="store_true", help="replace outputs that exist")


def add_set(parser: argparse.ArgumentParser) -> None:
    """Add --set, which becomes `opts`."""
    parser.add_argument(
        "--set",
        dest="opts",
        nargs="+",
        default=[],
        metavar="KEY VALUE",
        help="keys of the configuration and their values",
    )


def add_executor_arguments(parser: argparse.ArgumentParser, jobs: str) -> None:
    """Add --jobs, --cpus, --ray and --slurm; `jobs` is what runs side by side, such as "trials"."""
    parser.add_argument(
        "--jobs", type=at_least(1), default=1, help=f"{jobs} side by side (default 1)"
    )
    parser.add_argument(
        "--cpus", type=at_least(1), default=1, help="processors of a job on a cluster"
    )
    parser.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help=f"run the {jobs} on a Ray cluster: its address, or the one that runs here",
    )
    parser.add_argument(
        "--slurm", metavar="PARTITION", help=f"run the {jobs} on SLURM through submitit"
    )


def executor_of(args: argparse.Namespace, gpus: int, directory: str) -> Executor:
    """Return the executor that `add_executor_arguments` describes.

    Args:
        args: the parsed arguments.
        gpus: GPUs of a job.
        directory: where submitit keeps its files.

    Raises:
        ValueError: the arguments do not go together, or the cluster cannot be reached.
    """
    from d2_balance.utils.executors import make_executor

    return make_executor(
        args.jobs,
        ray=args.ray,
        slurm=args.slurm,
        gpus=gpus,
        cpus=args.cpus,
        directory=directory,
    )
