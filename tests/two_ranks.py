"""Two processes that train together, for the tests that compare ranks."""

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank, train, folder):
    address = f"file://{folder}/store"
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=2, timeout=timedelta(minutes=5)
    )
    torch.save(train(rank), os.path.join(folder, f"{rank}.pth"))
    dist.destroy_process_group()


def results_of_two_ranks(train: Callable[[int], object], folder: Path) -> list:
    """What `train`, a function of a module, returns in each of two processes for its rank."""
    mp.spawn(_worker, (train, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pth") for rank in range(2)]
