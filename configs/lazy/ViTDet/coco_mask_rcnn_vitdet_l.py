"""Mask R-CNN with ViT-L on COCO."""

from ..common.vitdet import vitdet

model, dataloader, optimizer, lr_multiplier, train = vitdet("L", "coco")
