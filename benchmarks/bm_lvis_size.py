#!/usr/bin/env python3
"""Time and memory of everything that grows with the data, on files of LVIS v1's size made here.

    python benchmarks/bm_lvis_size.py [--only ROW ...] [--before DIRECTORY] [--scale S]

Every row is a command or a call in a process of its own, and so is what it is compared with:
hotcoco called directly, the lvis package, stock Detectron2, another row. CPU seconds are user and
system time of the process and its children; memory is the peak of the process. Both tell programs
apart on a busy machine too; the load is printed. --before takes a checkout of another version and
runs the same commands from there. Under 20 minutes on two cores; --scale 0.1 takes a tenth of the
images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import bm_data
import bm_evaluation
import numpy as np
from memory import peak_gib
from tabulate import tabulate

MAIN = """
import sys
try:
    from d2_balance.cli.main import main
except ModuleNotFoundError:
    from d2_balance.cli import main
sys.exit(main())
"""
RANKS = """
import multiprocessing, sys
sys.path.insert(0, sys.argv[1])

def memory():
    with open("/proc/self/smaps_rollup") as file:  # of a shared page each process has its part
        return sum(int(line.split()[1]) for line in file if line.startswith("Pss:"))

def start(path, barrier, queue):
    import bm_data
    from d2_balance.data import records, samplers
    barrier.wait()
    before = memory()
    barrier.wait()
    kept = bm_data.lazy_records(path)
    barrier.wait()
    queue.put(memory() - before)
    barrier.wait()

if __name__ == "__main__":
    count = int(sys.argv[3])
    context = multiprocessing.get_context("spawn")
    barrier, queue = context.Barrier(count), context.Queue()
    ranks = [
        context.Process(target=start, args=(sys.argv[2], barrier, queue)) for _ in range(count)
    ]
    for rank in ranks:
        rank.start()
    print(sum(queue.get() for _ in ranks) / 2**20)
    for rank in ranks:
        rank.join()
"""
HERE = str(Path(__file__).resolve().parent)
MASKS = 400  # different ones


@dataclasses.dataclass
class Usage:
    """What a process took.

    Attributes:
        cpu: seconds, user and system, of the process and its children.
        gib: peak memory of the process.
        wall: seconds of the clock.
        output: what it printed.
    """

    cpu: float
    gib: float
    wall: float
    output: str

    @property
    def last(self) -> str:
        """The last word of the output."""
        return self.output.split()[-1]


def run(command: list[str], directory: Path, **env: str) -> Usage:
    """Run a command in a process of its own and return what it took.

    Raises:
        RuntimeError: its exit status is not 0.
    """
    output = directory / "output.txt"
    begin = time.perf_counter()
    with open(output, "w", encoding="utf-8") as stream:
        child = subprocess.Popen(
            command,
            stdout=stream,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "D2_BALANCE_CACHE": str(directory / "cache"), **env},
        )
    peak = 0.0
    while True:
        peak = max(peak, peak_gib(child.pid))
        found, status, used = os.wait4(child.pid, os.WNOHANG)
        if found:
            break
        time.sleep(0.005)
    text = output.read_text(encoding="utf-8", errors="replace")
    if status:
        raise RuntimeError(f"{' '.join(command)[:300]}: status {status}\n{text[-2000:]}")
    wall = time.perf_counter() - begin
    return Usage(used.ru_utime + used.ru_stime, peak, wall, text)


def ours(*arguments: object) -> list[str]:
    """Return the command line of d2-balance."""
    return [sys.executable, "-c", MAIN, *map(str, arguments)]


def code(text: str) -> list[str]:
    """Return the command line of Python code."""
    return [sys.executable, "-c", text]


def peer(name: str, truth: Path, detections: Path) -> list[str]:
    """Return the command line of an evaluator of `bm_evaluation`."""
    script = os.path.join(HERE, "bm_evaluation.py")
    return [sys.executable, script, "--child", name, str(truth), str(detections)]


def masks_peer(truth: Path, detections: Path) -> list[str]:
    """Return the command line of hotcoco on masks."""
    return code(
        "import hotcoco\n"
        f"ground = hotcoco.COCO({str(truth)!r})\n"
        f"found = hotcoco.LVISResults(ground, {str(detections)!r})\n"
        "hotcoco.LVISeval(ground, found, 'segm').run()"
    )


def data(name: str, path: Path) -> list[str]:
    """Return the command line of a measurement of `bm_data`."""
    script = os.path.join(HERE, "bm_data.py")
    return [sys.executable, script, "--measure", name, "--file", str(path)]


class Bench:
    """The files, made once, and the rows.

    Args:
        directory: of the files.
        scale: fraction of the images.
        before: checkout of another version, None for no such column.
    """

    def __init__(self, directory: Path, scale: float, before: str | None) -> None:
        self.directory, self.scale, self.before = directory, scale, before
        self.rows: list[dict[str, object]] = []

    def boxes(self, images: int) -> tuple[Path, Path]:
        """Ground truth and 300 detections an image."""
        where = self.directory / f"boxes{images}"
        if not where.exists():
            where.mkdir()
            size = self._images(images)
            args = argparse.Namespace(
                images=size, classes=1203, objects=round(size * 12.5), per_image=300
            )
            bm_evaluation.make_files(where, args)
        return where / "truth.json", where / "detections.json"

    def masks(self, images: int) -> tuple[Path, Path]:
        """The same with a mask for each object and detection, and without their boxes."""
        where = self.directory / f"masks{images}"
        if not where.exists():
            truth, found = self.boxes(images)
            where.mkdir()
            rng, shapes = np.random.default_rng(0), _masks()
            content = json.loads(truth.read_text())
            for annotation in content["annotations"]:
                area, rle = shapes[rng.integers(MASKS)]
                annotation |= {"area": area, "segmentation": rle}
            (where / "truth.json").write_text(json.dumps(content))
            detections = json.loads(found.read_text())
            for detection in detections:
                del detection["bbox"]
                detection["segmentation"] = shapes[rng.integers(MASKS)][1]
            (where / "detections.json").write_text(json.dumps(detections))
        return where / "truth.json", where / "detections.json"

    def train(self) -> Path:
        """A training file of LVIS v1's size, with polygons."""
        path = self.directory / "train.json"
        if not path.exists():
            images = self._images(100_000)
            args = argparse.Namespace(images=images, objects=round(images * 12.7), classes=1203)
            bm_data.make_file(path, args)
        return path

    def _images(self, images: int) -> int:
        return max(20, round(images * self.scale))

    def add(
        self,
        name: str,
        command: list[str],
        beside: tuple[str, list[str] | Usage] | None = None,
        *,
        target: str = "",
        before: bool = True,
        **env: str,
    ) -> None:
        """Measure a command and what it is compared with, and keep the row."""
        found = run(command, self.directory, **env)
        other = None
        if beside is not None:
            label, what = beside
            other = label, what if isinstance(what, Usage) else run(what, self.directory)
        old = None
        if self.before and before:
            cache = str(self.directory / "cache_before")
            old = run(command, self.directory, PYTHONPATH=self.before, D2_BALANCE_CACHE=cache)
        self.row(name, found, other, old, target=target)

    def row(
        self,
        name: str,
        found: Usage,
        beside: tuple[str, Usage] | None = None,
        old: Usage | None = None,
        *,
        target: str = "",
    ) -> None:
        """Keep a row and print it."""
        row: dict[str, object] = {"what": name, "CPU s": found.cpu, "GiB": found.gib}
        if beside is not None:
            label, other = beside
            row |= {"beside": label, "its CPU s": other.cpu, "its GiB": other.gib}
            row |= {"CPU ratio": found.cpu / other.cpu, "GiB ratio": found.gib / other.gib}
        row["target"] = target
        if old is not None:
            row |= {"before, CPU s": old.cpu, "before, GiB": old.gib}
        self.rows.append(row)
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def commands(self) -> None:
        """What every command costs before it does anything."""
        beside = ("import hotcoco", code("import hotcoco"))
        self.add("--help", ours("--help"), beside, target="0.3 s, 0.1 GiB")
        self.add("eval --help", ours("eval", "--help"), beside, target="0.3 s, 0.1 GiB")

    def evaluation(self, images: int, per: str) -> None:
        """Boxes of 300 detections an image."""
        truth, found = self.boxes(images)
        command = ours("eval", found, "--dataset", truth)
        if per == "lvis":
            beside = ("lvis 0.5.3", peer("lvis", truth, found))
            self.add(f"eval, boxes, {images:,} images", command, beside, target="1/20 of CPU")
        else:
            beside = ("hotcoco", peer("hotcoco", truth, found))
            self.add(f"eval, boxes, {images:,} images", command, beside, target="1.5, 1.5")

    def mask_evaluation(self, images: int) -> None:
        """Masks of 300 detections an image."""
        truth, found = self.masks(images)
        command = ours("eval", found, "--dataset", truth)
        beside = ("hotcoco", masks_peer(truth, found))
        self.add(f"eval, masks, {images:,} images", command, beside, target="1.5, 1.5")

    def training(self) -> None:
        """Annotations of the whole training file to the first 16 dicts; imports do not count."""
        path = self.train()
        run(data("columns, same file again", path), self.directory)  # fills the cache
        stock, first, second = (
            self._data(name, path)
            for name in (
                "stock Detectron2, start of a training",
                "start of a training, file never read",
                "start of a training, file read before",
            )
        )
        beside = "stock Detectron2", stock
        self.row("start of a training, file never read", first, beside, target="0.35, 0.35")
        self.row("start of a training, file read before", second, beside, target="0.15")
        script = self.directory / "ranks.py"
        script.write_text(RANKS)
        one, four = (
            float(run([sys.executable, str(script), HERE, str(path), n], self.directory).last)
            for n in ("1", "4")
        )
        self.rows.append(
            {
                "what": "4 ranks, memory beyond imports",
                "GiB": four,
                "beside": "1 rank",
                "its GiB": one,
            }
            | {"GiB ratio": four / one, "target": "1.3"}
        )
        print(self.rows[-1], flush=True)

    def _data(self, name: str, path: Path) -> Usage:
        found = run(data(name, path), self.directory)
        cpu = float(found.output.split()[-2])  # after the imports
        return dataclasses.replace(found, cpu=cpu)

    def analysis(self) -> None:
        """`analyze` on the training file, with a warm cache and without."""
        path = self.train()
        cache = {"D2_BALANCE_CACHE": str(self.directory / "cache_analyze")}
        command, target = ours("analyze", path), "3 GiB, 1/4 of before"
        self.add("analyze, file never read", command, target=target, **cache)
        self.add("analyze, file read before", command, before=False, **cache)

    def rescoring(self) -> None:
        """`rescore fit` beside one evaluation of the same detections."""
        truth, found = self.boxes(1250)
        once = run(ours("eval", found, "--dataset", truth), self.directory)
        other = self.directory / "other.json"  # what one evaluates on later; other images
        content = json.loads(truth.read_text())
        image = {**content["images"][0], "id": 10**6}
        other.write_text(json.dumps({**content, "images": [image], "annotations": []}))
        command = ours("rescore", "fit", found, "--dataset", truth, "--test", other)
        command += ["--max-dets", "200"]
        beside, name = ("one evaluation", once), "rescore fit, 1,250 images"
        self.writing(name, command, beside, target="1/20 of before")

    def merging(self) -> None:
        """`ensemble` of three models."""
        truth, found = self.boxes(5000)
        command = ours("ensemble", found, found, found, "--dataset", truth)
        self.writing("ensemble, 3 x 5,000 images", command, target="1/3 of before")

    def writing(
        self,
        name: str,
        command: list[str],
        beside: tuple[str, Usage] | None = None,
        *,
        target: str = "",
    ) -> None:
        """Measure a command that writes a file, which may not exist yet."""
        output = self.directory / "written.json"
        command = [*command, "--output", str(output)]
        found = run(command, self.directory)
        output.unlink()
        old = None
        if self.before:
            old = run(command, self.directory, PYTHONPATH=self.before)
            output.unlink()
        self.row(name, found, beside, old, target=target)


def table(rows: list[dict[str, object]]) -> str:
    """Return the rows as a Markdown table, with the columns that any of them has."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    order = [key for key in keys if key != "target"] + ["target"]
    lines = [[row.get(key, "") for key in order] for row in rows]
    return tabulate(lines, headers=order, tablefmt="github", floatfmt=".2f")


def draw(rows: list[dict[str, object]], path: str) -> None:
    """Draw CPU seconds of each row, of what stands beside it, and of the version before."""
    from d2_balance.utils.plotting import new_figure

    shown = [row for row in rows if "CPU s" in row][::-1]
    figure = new_figure(8, 0.5 * len(shown) + 1.2)
    axes = figure.subplots()
    series = {"CPU s": "d2_balance", "its CPU s": "beside it", "before, CPU s": "version before"}
    for offset, (key, label) in zip((0.27, 0.0, -0.27), series.items(), strict=True):
        at = [n for n, row in enumerate(shown) if key in row]
        if at:
            axes.barh([n + offset for n in at], [shown[n][key] for n in at], 0.25, label=label)
    for n, row in enumerate(shown):
        if row.get("beside"):
            axes.text(row["its CPU s"], n, f" {row['beside']}", va="center", fontsize=8)
    axes.set_yticks(range(len(shown)), [str(row["what"]) for row in shown])
    axes.set_xscale("log")
    axes.set_xlabel("CPU seconds, user and system (log scale)")
    axes.set_xlim(right=5 * axes.get_xlim()[1])  # room for the names beside the bars
    figure.legend(loc="outside upper center", ncols=len(series))
    figure.savefig(path, dpi=110, format="png")


def write_page(page: Path, about: dict[str, object], rows: list[dict[str, object]]) -> None:
    """Bring table, machine and chart of a page up to date."""
    from d2_balance.utils.blocks import with_blocks
    from d2_balance.utils.files import atomic_path

    machine = ", ".join(f"{key} {value}" for key, value in about.items())
    text = with_blocks(
        page.read_text(encoding="utf-8"), {"lvis machine": machine, "lvis": table(rows)}
    )
    with atomic_path(str(page.parent / "images" / "lvis_size.png")) as path:
        draw(rows, path)
    with atomic_path(str(page)) as path:
        Path(path).write_text(text, encoding="utf-8")


def _masks() -> list[tuple[int, dict[str, object]]]:
    """Area and RLE of random ellipses."""
    import pycocotools.mask as mask_util

    rng = np.random.default_rng(0)
    y, x = np.mgrid[: bm_evaluation.HEIGHT, : bm_evaluation.WIDTH]
    found = []
    for _ in range(MASKS):
        cy, cx = rng.uniform(0.2, 0.8, 2) * (bm_evaluation.HEIGHT, bm_evaluation.WIDTH)
        ry, rx = np.exp(rng.uniform(1.5, 4.8, 2))
        inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
        rle = mask_util.encode(np.asfortranarray(inside, dtype=np.uint8))
        found.append((int(inside.sum()), {"size": rle["size"], "counts": rle["counts"].decode()}))
    return found


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    groups: dict[str, Callable[[Bench], None]] = {
        "commands": Bench.commands,
        "lvis": lambda b: b.evaluation(1250, "lvis"),
        "boxes": lambda b: b.evaluation(5000, "hotcoco"),
        "masks": lambda b: b.mask_evaluation(5000),
        "rescore": Bench.rescoring,
        "ensemble": Bench.merging,
        "val": lambda b: b.evaluation(19_809, "hotcoco"),
        "training": Bench.training,
        "analyze": Bench.analysis,
    }
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--before", metavar="DIRECTORY", help="checkout of another version")
    parser.add_argument("--scale", type=float, default=1.0, help="fraction of the images")
    parser.add_argument("--directory", help="keep the files there")
    parser.add_argument("--json", metavar="FILE", help="also write the figures")
    parser.add_argument("--page", type=Path, help="page to bring up to date")
    args = parser.parse_args()
    loads = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(args.directory or temporary).absolute()
        directory.mkdir(parents=True, exist_ok=True)
        bench = Bench(directory, args.scale, args.before and os.path.abspath(args.before))
        for name in args.only:
            groups[name](bench)
            loads.append(os.getloadavg()[0])
    about = {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {sys.version.split()[0]}",
        "load": f"{min(loads):.1f} to {max(loads):.1f}",
        "scale": args.scale,
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(table(bench.rows))
    if args.page:
        write_page(args.page, about, bench.rows)
    if args.json:
        from d2_balance.utils.files import atomic_path

        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"about": about, "rows": bench.rows}, file, indent=1)


if __name__ == "__main__":
    main()
