#!/usr/bin/env python3
"""Softmax losses on handwritten digits whose classes fall off exponentially, 100 to 1.

    python benchmarks/classification_longtail.py [--seeds 5] [--json FILE]

scikit-learn's digits (1,797 images of 8 x 8) come with the package. A third of each class is kept
for a balanced test; the rest is thinned out to 118 images of the first class down to 1 of the
last. Each loss trains the same network from the same weights on the same batches. Printed is the
mean accuracy over seeds with its spread, by class frequency.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time

import torch
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from d2_balance.losses import (
    BalancedSoftmaxLoss,
    LogitAdjustedLoss,
    Samples,
    SoftmaxCELoss,
    SoftmaxEQLLoss,
)
from d2_balance.utils.files import atomic_path

CLASSES, IMBALANCE, LARGEST = 10, 100, 118
STEPS, BATCH, LEARNING_RATE = 1500, 64, 0.05
GROUPS = {"many (4)": range(0, 4), "medium (3)": range(4, 7), "few (3)": range(7, 10)}


def long_tail(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images and labels with exponential imbalance, and a test set that has none."""
    data = load_digits()
    images = torch.tensor(data.data, dtype=torch.float32) / 16
    labels = torch.tensor(data.target)
    generator = torch.Generator().manual_seed(seed)
    train, test = [], []
    for c in range(CLASSES):
        members = (labels == c).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator)]
        count = max(1, round(LARGEST * IMBALANCE ** (-c / (CLASSES - 1))))
        test.append(members[:55])
        train.append(members[55 : 55 + count])
    train, test = torch.cat(train), torch.cat(test)
    return images[train], labels[train], images[test], labels[test]


def losses(count: Tensor) -> dict[str, nn.Module]:
    """The losses under test; for SEQL the classes with at most 10 images are the tail."""
    frequency = count / count.sum()
    tail = (10.5 / count.sum()).item()
    return {
        "cross-entropy": SoftmaxCELoss(),
        "SoftmaxEQL": SoftmaxEQLLoss(class_frequency=frequency, lambda_=tail, gamma=0.95),
        "BalancedSoftmax": BalancedSoftmaxLoss(class_count=count),
        "LogitAdjusted": LogitAdjustedLoss(instance_count=count),
    }


def accuracy(loss: nn.Module, data: tuple[Tensor, ...], seed: int) -> list[float]:
    """Trains a network of one hidden layer; returns the accuracy of each class in percent."""
    images, labels, test, truth = data
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, CLASSES))
    optimizer = torch.optim.SGD(
        net.parameters(), LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=1e-4
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    order = torch.Generator().manual_seed(seed)
    for _ in range(STEPS):
        pick = torch.randint(len(labels), (BATCH,), generator=order)
        samples = Samples(logits=net(images[pick]), labels=labels[pick], num_classes=CLASSES)
        optimizer.zero_grad()
        loss(samples).mean().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = (net(test).argmax(dim=1) == truth).float()
    return [100 * right[truth == c].mean().item() for c in range(CLASSES)]


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5, help="number of seeds (default 5)")
    parser.add_argument("--json", help="file for all figures; must not exist")
    args = parser.parse_args()
    if args.json and os.path.exists(args.json):
        parser.error(f"--json: {args.json} exists; name a new file")
    start = time.perf_counter()
    found: dict[str, list[list[float]]] = {}
    for seed in tqdm(range(args.seeds), desc="seeds"):
        data = long_tail(seed)
        count = data[1].bincount(minlength=CLASSES).double()
        for name, loss in losses(count).items():
            found.setdefault(name, []).append(accuracy(loss, data, seed))
    rows = []
    for name, runs in found.items():
        cells = [name]
        for classes in [range(CLASSES), *GROUPS.values()]:
            means = [statistics.mean(run[c] for c in classes) for run in runs]
            spread = statistics.stdev(means) if len(means) > 1 else 0.0
            cells.append(f"{statistics.mean(means):.1f} ± {spread:.1f}")
        rows.append(cells)
    print(tabulate(rows, headers=["loss", "all", *GROUPS], tablefmt="github"))
    seconds = time.perf_counter() - start
    print(
        f"\naccuracy in percent, mean and standard deviation of {args.seeds} seeds; training "
        f"images {', '.join(str(int(c)) for c in count)}\n{platform.processor() or 'cpu'}, torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads, {seconds:.0f} s"
    )
    if args.json:
        with atomic_path(args.json) as path, open(path, "w", encoding="utf-8") as file:
            json.dump({"classes": found, "seconds": seconds}, file)


if __name__ == "__main__":
    main()
