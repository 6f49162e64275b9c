"""Processes that train together, for the tests that compare ranks."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from detectron2.utils import comm

from d2_balance.engine.setup.launch import leave_groups

PRELOADED = ["torch", "d2_balance.engine.train"]


@contextmanager
def joined(rank: int, directory: str | Path, ranks: int = 2) -> Iterator[None]:
    """Join several processes that meet in a directory and wait for each other at the end."""
    torch.set_num_threads(1)
    meeting = f"file://{directory}/meeting_of_{ranks}"
    dist.init_process_group(
        "gloo", init_method=meeting, rank=rank, world_size=ranks, timeout=timedelta(minutes=5)
    )
    comm.create_local_process_group(ranks)
    yield
    dist.barrier()
    leave_groups()


def _worker(rank, train, directory):
    with joined(rank, directory):
        torch.save(train(rank), os.path.join(directory, f"{rank}.pth"))


def start_ranks(function: Callable[..., object], arguments: tuple = (), ranks: int = 2) -> None:
    """Call a function of a module in processes of their own, with the rank before the arguments.

    They are forked from a server that has loaded the package, so that each start is quick.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    mp.start_processes(function, args=arguments, nprocs=ranks, start_method="forkserver")


def results_of_two_ranks(train: Callable[[int], object], directory: Path) -> list:
    """What `train`, a function of a module, returns in each of two processes for its rank."""
    start_ranks(_worker, (train, str(directory)))
    return [torch.load(directory / f"{rank}.pth") for rank in range(2)]
