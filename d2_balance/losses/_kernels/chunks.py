"""Passes over large tensors, chunk by chunk, each chunk by one thread from its start to its end.

A chunk is small enough that what is computed from it stays in the cache. torch would split every
operation on it between all threads, which meet after each: beside other work on the machine one of
them is often descheduled, and the others wait for it at every operation on every chunk. Here a
thread takes the next chunk once it is done with one, and the threads meet at the end of the pass.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TypeVar

import torch
from torch import Tensor

CHUNK = 2**17  # entries: a few float32 buffers of that size stay in the cache of a core
MAX_THREADS = 16  # more would wait for each other at Python's lock

T = TypeVar("T")


def map_chunks(work: Callable[[slice], T], samples: Tensor, groups: int = 1) -> list[T]:
    """Call `work` for the slices of the samples of a batch.

    Args:
        work: given a slice; writes to slices of tensors or returns a value, without a gradient.
        samples: (R, C) or (R,), split along R.
        groups: chunks of a slice, for work that goes through them itself.

    Returns:
        The values that `work` has returned, in the order of the slices, whatever the threads.
    """
    with torch.no_grad():
        slices = chunk_slices(samples, groups)
        threads = min(torch.get_num_threads(), MAX_THREADS, len(slices))
        if threads < 2 or samples.device.type != "cpu" or torch.compiler.is_compiling():
            return [work(chunk) for chunk in slices]
    inference, waiting = torch.is_inference_mode_enabled(), deque(enumerate(slices))
    results: dict[int, T] = {}

    def take_slices() -> None:
        with torch.inference_mode(inference), torch.no_grad():  # modes belong to a thread
            while True:
                try:
                    index, item = waiting.popleft()
                except IndexError:
                    return
                results[index] = work(item)

    pool = _pool(torch.get_num_threads(), os.getpid())
    for future in [pool.submit(take_slices) for _ in range(threads)]:
        future.result()
    return [results[index] for index in range(len(slices))]


def chunk_slices(samples: Tensor, groups: int = 1) -> list[slice]:
    """Slices of (R, C) or (R,) samples; one where each operation costs a launch, as on a GPU."""
    total = len(samples)
    size = groups * (CHUNK // max(samples[:1].numel(), 1))
    if samples.device.type != "cpu" or torch.compiler.is_compiling():
        size = total
    size = max(size, 1)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:
    """Threads whose operations are not split further; a forked process makes its own."""
    pool = ThreadPoolExecutor(threads, f"d2_balance_{process}", lambda: torch.set_num_threads(1))
    met = threading.Barrier(threads)
    for future in [pool.submit(met.wait) for _ in range(threads)]:
        future.result()  # every thread has started
    torch.set_num_threads(threads)  # threads that others start later take the number set last
    return pool


def neighbours(length: int, tables: int, size: int, device: torch.device) -> Tensor:
    """(length,) int64, offsets that let neighbours count in tables of their own.

    Most entries fall into one bin, and a counter has to wait for its last addition. The caller adds
    up the `tables` of `size` each.
    """
    return torch.arange(length, device=device).remainder_(tables).mul_(size)
