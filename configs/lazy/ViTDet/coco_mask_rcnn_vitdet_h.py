"""Mask R-CNN with ViT-H on COCO."""

from ..common.vitdet import vitdet

model, dataloader, optimizer, lr_multiplier, train = vitdet("H", "coco")
