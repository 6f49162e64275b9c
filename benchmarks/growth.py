"""How the time of the losses grows with R, K and P: measurements, fitted exponents, plots.

Shapes: R rows, K classes, P positive rows. One of them changes at a time. The exponent is that
s of time ~ size^s, fitted by least squares to the logarithms of the largest three sizes: at small
sizes the fixed cost of some tens of operations hides the growth.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from loss_cases import build, make_samples, plain_loss, training_step
from measuring import seconds
from tqdm import tqdm

from d2_balance.losses import CLS_LOSSES, Samples
from d2_balance.modeling.compatibility import has_class_columns_only
from d2_balance.utils.files import atomic_path

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# What changes, its sizes, and R, K and P where they do not change.
DENSE = {
    "R": ([2_000, 10_000, 40_000, 160_000], (0, 80, 100)),
    "K": ([5, 20, 80, 320], (30_000, 0, 100)),
    "P": ([30, 100, 300, 1_000, 3_000], (50_000, 80, 0)),
}
ROI = {
    "R": ([256, 1_024, 4_096, 16_384], (0, 300, 64)),
    "K": ([20, 80, 300, 1_203, 4_800], (1_024, 0, 256)),
    "P": ([16, 64, 256, 1_024], (2_048, 300, 0)),
}
PLAIN = "cross-entropy"
FITTED = 3  # largest sizes that a exponent is fitted to


def measure(
    wanted: Callable[[str, str], bool], repeat: int, device: str, scale: float = 1.0
) -> list[dict]:
    """Time of each loss at each size; the losses of a size take turns.

    Args:
        wanted: of a shape's name (here empty) and a loss.
        repeat: timed rounds; the least time counts, for what disturbs only adds.
        device: of the logits.
        scale: factor of R and P, for a short run.

    Returns:
        Rows with head, axis, R, K, P, loss and ms.
    """
    losses = {"dense": [], "RoI": []}
    for name, cls in sorted(CLS_LOSSES):
        if wanted("", name):
            losses["dense" if has_class_columns_only(cls) else "RoI"].append(name)
    rows = []
    for head, plan in (("dense", DENSE), ("RoI", ROI)):
        for axis, (sizes, fixed) in plan.items():
            for size in tqdm(sizes, f"{head}, growth with {axis}", leave=False):
                shape = {key: value or size for key, value in zip("RKP", fixed, strict=True)}
                for key in "RP":
                    shape[key] = max(2, round(shape[key] * scale))
                times = _times(losses[head], *shape.values(), head, repeat, device)
                for name, time in times.items():
                    row = {"head": head, "axis": axis, **shape, "loss": name}
                    rows.append(row | {"ms": 1000 * time})
    return rows


def _times(
    names: list[str], rows: int, classes: int, positives: int, head: str, repeat: int, device: str
) -> dict[str, float]:
    """Seconds of each loss and of the plain one, on logits that all of one width share."""
    runs, samples = {}, {}

    def inputs(columns: int) -> Samples:
        if columns not in samples:
            samples[columns] = make_samples(rows, columns, classes, positives, device)
        return samples[columns]

    for name in names:
        loss = build(name, classes).to(device)
        runs[name] = training_step(loss, inputs(loss.num_outputs(classes)))
    if names:
        softmax = head == "RoI"
        runs[PLAIN] = plain_loss(inputs(classes + softmax), softmax)
    for run in runs.values():
        run()
    rounds = [{name: seconds(run) for name, run in runs.items()} for _ in range(repeat)]
    return {name: min(times[name] for times in rounds) for name in runs}


def exponent(sizes: list[int], times: list[float]) -> float:
    """The exponent of a power law through the largest sizes."""
    order = np.argsort(sizes)[-FITTED:]
    x, y = np.log(np.array(sizes)[order]), np.log(np.array(times)[order])
    return float(np.polyfit(x, y, 1)[0])


def curves(points: list[dict]) -> dict[tuple[str, str, str], tuple[list[int], list[float]]]:
    """Sizes and times for each head, axis and loss."""
    result: dict = {}
    for row in points:
        sizes, times = result.setdefault((row["head"], row["axis"], row["loss"]), ([], []))
        sizes.append(row[row["axis"]]), times.append(row["ms"])
    return result


def grads(points: list[dict]) -> list[dict]:
    """A row for each head and loss, with the exponents of R, K and P."""
    table: dict = {}
    for (head, axis, loss), (sizes, times) in curves(points).items():
        row = table.setdefault((head, loss), {"head": head, "loss": loss})
        row[f"exponent in {axis}"] = exponent(sizes, times)
    return [table[key] for key in sorted(table)]


def draw(points: list[dict], directory: Path, machine: dict[str, object]) -> None:
    """Log-log plots, `growth_dense.png` and `growth_roi.png`; the legend gives exponents."""
    found = curves(points)
    colours = [*plt.get_cmap("tab10").colors, *plt.get_cmap("Dark2").colors]
    directory.mkdir(parents=True, exist_ok=True)
    for head, plan in (("dense", DENSE), ("RoI", ROI)):
        names = sorted({loss for kind, _, loss in found if kind == head} - {PLAIN})
        if not names:
            continue
        figure, places = plt.subplots(1, 3, figsize=(15, 7), sharey=True, layout="constrained")
        for place, axis in zip(places, plan, strict=True):
            for number, loss in enumerate([PLAIN, *names]):
                sizes, times = found[head, axis, loss]
                style = {"color": "black", "linewidth": 3} if not number else {
                    "color": colours[(number - 1) % len(colours)],
                    "marker": "os^vD"[number % 5],
                    "markersize": 4,
                }  # fmt: skip
                label = f"{exponent(sizes, times):5.2f}  {loss}"
                place.loglog(sizes, times, label=label, **style)
            shape = next(row for row in points if (row["head"], row["axis"]) == (head, axis))
            others = [f"{key} {shape[key]:,}" for key in "RKP" if key != axis]
            place.set(title=f"growth with {axis} ({', '.join(others)})", xlabel=axis)
            place.grid(True, which="major", alpha=0.3)
            place.legend(
                fontsize=8, title="exponent", title_fontsize=8, ncols=3, borderaxespad=0,
                loc="upper center", bbox_to_anchor=(0.5, -0.12),
            )  # fmt: skip
        places[0].set_ylabel("forward and backward, ms")
        figure.suptitle(
            f"{head} heads: {machine['device']}, {machine['threads']} thread(s), "
            f"torch {machine['torch']}",
            fontsize=10,
        )
        with atomic_path(str(directory / f"growth_{head.lower()}.png")) as path:
            figure.savefig(path, dpi=110, format="png")
        plt.close(figure)
