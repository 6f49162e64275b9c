"""Mask R-CNN with ViT-H and federated loss on LVIS v1."""

from ..common.vitdet import vitdet

model, dataloader, optimizer, lr_multiplier, train = vitdet("H", "lvis")
