"""Peak memory of a process."""

from __future__ import annotations


def peak_gib(process: int | str = "self") -> float:
    """Peak memory of this or another process, 0 if that has ended.

    ru_maxrss would also count what the parent held when it started the process.
    """
    try:
        with open(f"/proc/{process}/status", encoding="utf-8") as file:
            kib = next((line.split()[1] for line in file if line.startswith("VmHWM")), 0)
    except OSError:
        return 0.0
    return int(kib) / 2**20
