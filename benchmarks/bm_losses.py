#!/usr/bin/env python3
"""Forward and backward time of every loss, as a multiple of cross-entropy on the same logits.

    python benchmarks/bm_losses.py [--repeat N] [--only NAME ...] [--shapes PART ...]
                                   [--json FILE] [--plots DIRECTORY] [--fresh-memory] [--compiled]

Each loss is timed in turn with the plain loss, in one run, and the medians are compared, so that
other work on the machine meets both. Dense heads are compared with
`binary_cross_entropy_with_logits`, softmax heads with `cross_entropy`. "copies" is the loss's time
over that of copying its logits once: what is bound by memory stays near the number of times that
it reads or writes them. Memory is the peak beyond the plain loss's, in tensors of the size of the
logits. ISR is the time of its weights alone over that of the loss that they weight.

fvcore's focal loss and, where mmdet 3.3 is installed (extra `bench`), mmdet's losses are timed in
turn with ours. mmdet's package is not imported as a whole, which would need mmcv and its compiled
part: `mmdet_losses.py` loads only its loss files, with stand-ins for what they import.

Freed memory is kept for the next call (`measuring.keep_memory`); --fresh-memory leaves that to the
C library, whose pages from the system can take longer than a loss.

With --compiled each loss's plain formula, compiled by torch.compile, is timed in turn with ours.

With --plots the growth of every loss with R, K and P is timed, fitted and drawn (`growth.py`).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import growth
import torch
from loss_cases import compiled_cases, isr_case, loss_cases, peers
from measuring import about, in_turn, in_words, keep_memory, peak_memory, seconds
from tabulate import tabulate
from tqdm import tqdm

from d2_balance.utils.files import atomic_path


def logits_shape(shape: str) -> tuple[int, int]:
    """R and K of a shape as `loss_cases` writes it."""
    rows, classes = shape.split(" x ")[:2]
    return int(rows.split()[-1].replace(",", "")), int(classes.split(", ")[0].replace(",", ""))


def copy_seconds(rows: int, columns: int, repeat: int, device: str) -> float:
    """Copying float32 logits once."""
    source = torch.zeros(rows, columns, device=device)
    target = torch.ones_like(source)
    target.copy_(source)
    return min(seconds(lambda: target.copy_(source)) for _ in range(max(repeat, 10)))


def measure(case: tuple[str, str, Callable, Callable], repeat: int, device: str) -> dict:
    """A row of the table."""
    shape, name, run, plain = case
    ours, theirs = in_turn(run, plain, repeat)
    row = {"shape": shape, "loss": name, "ms": 1000 * ours, "times plain": ours / theirs}
    if name == "ISR":
        return row
    rows, columns = logits_shape(shape)
    row["copies"] = ours / copy_seconds(rows, columns, repeat, device)
    row["extra memory"] = (peak_memory(run) - peak_memory(plain)) / (4 * rows * columns)
    return row


def measure_peers(wanted: Callable[[str, str], bool], repeat: int, device: str) -> list[dict]:
    """Ours and another library's in turn."""
    table = []
    for shape, name, run, other in peers(device):
        if wanted("", name):
            ours, theirs = in_turn(run, other, repeat)
            library = "fvcore" if name == "Focal" else "mmdet 3.3"
            times = {"ms": 1000 * ours, "theirs, ms": 1000 * theirs, "times faster": theirs / ours}
            table.append({"shape": shape, "loss": name, "library": library, **times})
    return table


def measure_compiled(wanted: Callable[[str, str], bool], repeat: int, device: str) -> list[dict]:
    """Ours and the compiled plain formula, from the test that holds them equal."""
    table = []
    for shape, name, run, compiled in compiled_cases(device, wanted):
        ours, theirs = in_turn(run, compiled, repeat)
        row = {"shape": shape, "loss": name, "ms": 1000 * ours, "compiled, ms": 1000 * theirs}
        table.append(row | {"times faster": theirs / ours})
    return table


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=5, help="timed pairs per line (5)")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="losses to time")
    parser.add_argument("--shapes", nargs="+", metavar="PART", default=[""], help="parts of shapes")
    parser.add_argument("--plots", metavar="DIRECTORY", help="also measure and draw the growth")
    parser.add_argument("--scale", type=float, default=1.0, help="growth: factor of R and P (1)")
    parser.add_argument("--fresh-memory", action="store_true", help="freed memory is not kept")
    parser.add_argument("--compiled", action="store_true", help="beside torch.compile")
    args = parser.parse_args()
    if not args.fresh_memory:
        keep_memory()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def wanted(shape: str, name: str) -> bool:
        parts = not shape or any(part in shape for part in args.shapes)
        return parts and (not args.only or name in args.only)

    cases = loss_cases(device, wanted)
    rows = [measure(case, args.repeat, device) for case in tqdm(cases, "timing", leave=False)]
    if wanted("RoI", "ISR"):
        rows.append(measure(isr_case(device), args.repeat, device))
    rows.sort(key=lambda row: row["shape"])
    others = measure_peers(wanted, args.repeat, device)
    compiled = measure_compiled(wanted, args.repeat, device) if args.compiled else []
    machine = about() | {"memory": "fresh" if args.fresh_memory else "kept"}
    print(in_words(machine))
    for table in filter(None, (rows, others, compiled)):
        print(tabulate(table, headers="keys", tablefmt="github", floatfmt=".2f"), end="\n\n")
    if not any(row["library"].startswith("mmdet") for row in others):
        print("No comparison with mmdet: not asked for, on a GPU, or not installed (extra bench).")
    grads, points = [], []
    if args.plots:
        points = growth.measure(wanted, args.repeat, device, args.scale)
        grads = growth.grads(points)
        growth.draw(points, Path(args.plots), machine)
        print(tabulate(grads, headers="keys", tablefmt="github", floatfmt=".2f"))
    if args.json:
        result = {"about": machine, "rows": rows, "peers": others}
        result |= {"compiled": compiled, "growth": points, "gradients": grads}
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
