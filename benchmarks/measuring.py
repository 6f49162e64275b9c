"""What the benchmarks measure: time in turn with a baseline, peak memory, waits for the device."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

Run = Callable[[], object]

WAITS = ("aten::item", "aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
"""Operations that make a GPU's host wait, by the names that a profile on any device shows."""


LEAST_SECONDS = 0.6
"""Pairs are timed for at least this long: a median of a few short calls says little."""

MOST_PAIRS = 60


def keep_memory() -> None:
    """Has the C library keep freed memory, as PyTorch does with a GPU's.

    glibc gives tensors above 32 MB back at once, and at times smaller ones, so that the next call
    gets pages that the system must fill with zeros first. That can take longer than a loss, and it
    depends on what ran before.
    """
    # glibc's M_MMAP_MAX and M_TRIM_THRESHOLD; another library has no such function, or ignores it
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, -1)


def about() -> dict[str, object]:
    """Machine, versions and threads."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "device": device,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }


def in_words(machine: dict[str, object]) -> str:
    """What `about` says, on one line."""
    return ", ".join(f"{key} {value}" for key, value in machine.items())


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def seconds(run: Run) -> float:
    """Wall time of one call."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def in_turn(run: Run, plain: Run, repeat: int) -> tuple[float, float]:
    """Median seconds of both, which take turns so that other work on the machine meets both."""
    times = zip(*pairs(run, plain, repeat), strict=True)
    ours, theirs = (statistics.median(each) for each in times)
    return ours, theirs


def pairs(run: Run, plain: Run, repeat: int) -> list[tuple[float, float]]:
    """Seconds of both, which take turns, after one call of each that does not count.

    At least `repeat` pairs, and more of short ones, up to `MOST_PAIRS` in `LEAST_SECONDS`.
    """
    run(), plain()
    times: list[tuple[float, float]] = []
    while len(times) < repeat or (len(times) < MOST_PAIRS and sum(map(sum, times)) < LEAST_SECONDS):
        times.append((seconds(run), seconds(plain)))
    return times


def peak_memory(run: Run, warm: bool = False) -> int:
    """Bytes that one call holds at most beyond what it started with; warm: it has run before."""
    if not warm:
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    held = peak = 0
    for _, change in sorted(changes, key=lambda item: item[0]):
        held += change
        peak = max(peak, held)
    return peak


def waits(run: Run, warm: bool = False) -> dict[str, int]:
    """How often one call runs each operation of `WAITS` that it runs at all; warm: as above."""
    if not warm:
        run()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {e.key: e.count for e in profiler.key_averages() if e.key in WAITS}
