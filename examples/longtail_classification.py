#!/usr/bin/env python3
"""The losses in a plain classification loop, without Detectron2, boxes or a config.

    python examples/longtail_classification.py [--steps 400]

Ten Gaussian classes with 500 down to 5 samples; the same network is trained from the same weights
with cross-entropy, with the softmax equalization loss (arXiv:2003.05176) and with Balanced Softmax
(arXiv:2007.10740). Printed is the accuracy on a balanced test set by class frequency. Seconds on a
CPU.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from d2_balance.losses import BalancedSoftmaxLoss, SoftmaxCELoss, SoftmaxEQLLoss

CLASSES, DIMENSIONS = 10, 16
GROUPS = {"many": slice(0, 4), "medium": slice(4, 7), "few": slice(7, 10)}


def gaussians(counts: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples (n, DIMENSIONS) around fixed class centers, and their labels (n,)."""
    centers = torch.randn(
        CLASSES, DIMENSIONS, generator=torch.Generator().manual_seed(0), dtype=torch.float32
    )
    labels = torch.repeat_interleave(torch.arange(CLASSES), counts)
    noise = torch.randn(len(labels), DIMENSIONS, generator=generator)
    return centers[labels] + 1.7 * noise, labels


def class_accuracy(
    loss: nn.Module, train: tuple[Tensor, Tensor], test: tuple, steps: int
) -> Tensor:
    """Train a network of one hidden layer; return the accuracy (CLASSES,) in percent."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(DIMENSIONS, 64), nn.ReLU(), nn.Linear(64, CLASSES))
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
    inputs, labels = train
    for step in range(steps):
        pick = torch.randint(len(labels), (64,), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss(net(inputs[pick]), labels[pick]).mean().backward()  # one value per sample
        optimizer.step()
    with torch.no_grad():
        right = (net(test[0]).argmax(dim=1) == test[1]).float()
    return 100 * right.view(CLASSES, -1).mean(dim=1)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    counts = torch.logspace(2.7, 0.7, CLASSES).round().long()  # 501, 300, ..., 5
    train = gaussians(counts, torch.Generator().manual_seed(1))
    test = gaussians(torch.full((CLASSES,), 200), torch.Generator().manual_seed(2))
    frequency = counts / counts.sum()
    losses = {
        "cross-entropy": SoftmaxCELoss(),
        "SoftmaxEQL": SoftmaxEQLLoss(class_frequency=frequency, lambda_=0.02, gamma=0.95),
        "BalancedSoftmax": BalancedSoftmaxLoss(class_count=counts.double()),
    }
    print(f"training samples by class: {counts.tolist()}")
    for name, loss in losses.items():
        accuracy = class_accuracy(loss, train, test, args.steps)
        groups = ", ".join(f"{g} {accuracy[part].mean():.1f}" for g, part in GROUPS.items())
        print(f"{name}: accuracy {accuracy.mean():.1f} %: {groups}")


if __name__ == "__main__":
    main()
