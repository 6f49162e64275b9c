"""Tables of benchmarks/README.md from what `make bench` has measured.

    python benchmarks/performance_page.py DIRECTORY [--page benchmarks/README.md]

DIRECTORY holds losses.json and train.json of the benchmarks, and the growth plots, which go beside
the page. What is written by hand in the page stays.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from tabulate import tabulate

from d2_balance.utils.blocks import with_blocks
from d2_balance.utils.files import atomic_path

# times binary cross-entropy on 100,000 x 80 logits, for 300 and 3,000 positives
TARGETS = {
    "SigmoidCE": (None, None),
    "BalancedCE": (1.2, 1.2),
    "Focal": (1.6, 1.6),
    "EQL": (1.3, 1.3),
    "QFL": (1.6, 1.6),
    "VFL": (None, None),
    "EFL": (2.2, 2.2),
    "GHMC": (2.2, 2.2),
    "DR": (1.7, 1.7),
    "AP": (5, 6),
    "RankSort": (6, 6),
    "ALRP": (6, 6),
    "Federated": (None, None),
    "DropLoss": (None, None),
}
POSITIVES = ("300", "3,000")


def table(rows: list[dict], digits: str = ".2f") -> str:
    """Return a Markdown table of the records."""
    return tabulate(rows, headers="keys", tablefmt="github", floatfmt=digits, missingval="")


def machine(about: dict[str, object]) -> str:
    """Return one line about the machine."""
    return ", ".join(f"{key} {value}" for key, value in about.items())


def targets(rows: list[dict]) -> str:
    """The losses of dense heads on 100,000 x 80 logits beside their targets."""
    found = {(row["loss"], row["shape"]): row for row in rows}
    result = []
    for loss, goals in TARGETS.items():
        line: dict[str, object] = {"loss": f"`{loss}`"}
        cells = [found[loss, f"dense 100,000 x 80, {count} positive"] for count in POSITIVES]
        for count, goal, cell in zip(POSITIVES, goals, cells, strict=True):
            line |= {f"P {count}": cell["times plain"], f"target, {count}": goal}
        line |= {"ms": cells[0]["ms"], "copies": round(cells[0]["copies"])}
        result.append(line | {"extra memory": max(cell["extra memory"] for cell in cells)})
    return table(result)


def shapes(rows: list[dict], head: str) -> str:
    """Times plain of every loss by shape."""
    names = sorted({row["shape"] for row in rows if row["shape"].startswith(head)}, key=_size)
    lines: dict[str, dict] = {}
    for row in rows:
        if row["shape"] in names and row["loss"] != "ISR":
            line = lines.setdefault(row["loss"], {"loss": f"`{row['loss']}`"})
            line[row["shape"].removeprefix(f"{head} ")] = row["times plain"]
    order = ["loss", *(name.removeprefix(f"{head} ") for name in names if "images" not in name)]
    return table([{key: lines[loss].get(key) for key in order} for loss in sorted(lines)])


def _size(shape: str) -> tuple[int, ...]:
    numbers = (word.replace(",", "") for word in shape.split())
    return tuple(int(number) for number in numbers if number.isdigit())


def grads(rows: list[dict]) -> str:
    """Return the table of gradients."""
    return table([row | {"loss": f"`{row['loss']}`"} for row in rows])


def blocks(directory: Path) -> dict[str, str]:
    """Tables by the names of their markers.

    Raises:
        FileNotFoundError: a benchmark has not written its figures.
    """
    measured = {
        name: json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("losses", "train")
    }
    losses, train = measured["losses"], measured["train"]
    return {
        "machine": machine(losses["about"]),
        "targets": targets(losses["rows"]),
        "dense": shapes(losses["rows"], "dense"),
        "roi": shapes(losses["rows"], "RoI"),
        "peers": table(losses["peers"]),
        "gradients": grads(losses["gradients"]),
        "train machine": machine(train["about"]),
        "train": table(train["rows"]),
    }


def main() -> None:
    """Brings the page up to date."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--page", type=Path, default=Path(__file__).with_name("README.md"))
    args = parser.parse_args()
    text = with_blocks(args.page.read_text(encoding="utf-8"), blocks(args.directory))
    for name in ("growth_dense.png", "growth_roi.png"):
        with atomic_path(str(args.page.parent / name)) as path:
            shutil.copyfile(args.directory / name, path)
    with atomic_path(str(args.page)) as path:
        Path(path).write_text(text, encoding="utf-8")
    print(f"{args.page} has the figures of {args.directory}")


if __name__ == "__main__":
    main()
