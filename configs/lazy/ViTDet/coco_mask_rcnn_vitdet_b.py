"""Mask R-CNN with ViT-B on COCO."""

from ..common.vitdet import vitdet

model, dataloader, optimizer, lr_multiplier, train = vitdet("B", "coco")
