"""Cascade Mask R-CNN with ViT-B and federated loss on LVIS v1."""

from ..common.vitdet import vitdet

model, dataloader, optimizer, lr_multiplier, train = vitdet("B", "lvis", cascade=True)
