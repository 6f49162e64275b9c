"""Test-time augmentation (TTA) for boxes and masks, in bounded memory.

Detectron2's GeneralizedRCNNWithTTA does the work: every variant of an image is detected, the
boxes of all are joined by non-maximum suppression, and the masks of the joined boxes are averaged
over the variants. Scores come from the heads' own `predict_probs`, so that NorCal, BAGS and
thresholds by class hold here as well.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers.mask_ops import paste_masks_in_image
from detectron2.modeling import META_ARCH_REGISTRY, GeneralizedRCNN, GeneralizedRCNNWithTTA
from detectron2.structures import Boxes, ROIMasks
from torch import Tensor, nn

from d2_balance.utils.config_tree import changed


def check_test_augmentation(cfg: CfgNode) -> None:
    """Check TEST.AUG if it is enabled.

    Raises:
        ValueError: naming the key.
    """
    aug = cfg.TEST.AUG
    if not aug.ENABLED:
        return
    name = cfg.MODEL.META_ARCHITECTURE
    if not issubclass(META_ARCH_REGISTRY.get(name), GeneralizedRCNN):
        raise ValueError(
            f"TEST.AUG.ENABLED works with two-stage models, not with {name}; must be "
            "BalancedRCNN or GeneralizedRCNN."
        )
    for key in ("KEYPOINT_ON", "LOAD_PROPOSALS"):
        if cfg.MODEL[key]:
            raise ValueError(f"TEST.AUG.ENABLED does not work with MODEL.{key}; set one to False.")
    for key, on in (
        ("TEST_NMS.METHOD", cfg.MODEL.BALANCE.TEST_NMS.METHOD != "hard"),
        ("MASKNESS", cfg.MODEL.BALANCE.MASKNESS > 0),
    ):
        if on:
            raise ValueError(
                f"TEST.AUG.ENABLED does not work with MODEL.BALANCE.{key}; switch one of them off."
            )
    if not aug.MIN_SIZES or min(aug.MIN_SIZES) < 1:
        raise ValueError(
            f"TEST.AUG.MIN_SIZES is {tuple(aug.MIN_SIZES)}; must be sizes of at least 1 pixel."
        )
    if aug.IMS_PER_BATCH < 1:
        raise ValueError(f"TEST.AUG.IMS_PER_BATCH is {aug.IMS_PER_BATCH}; it must be at least 1.")


def augmentation_config(cfg: CfgNode) -> CfgNode:
    """The config for the test loader: images as they are, which TEST.AUG resizes once."""
    cfg = changed(cfg, {"INPUT.MIN_SIZE_TEST": 0})  # Detectron2's word for no resizing
    cfg.freeze()
    return cfg


class AugmentedRCNN(GeneralizedRCNNWithTTA):
    """GeneralizedRCNNWithTTA whose masks never are N full images at once.

    Args:
        cfg: config with TEST.AUG; IMS_PER_BATCH variants go through the model at once.
        model: a GeneralizedRCNN in evaluation mode.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module) -> None:
        super().__init__(cfg, model, batch_size=cfg.TEST.AUG.IMS_PER_BATCH)

    def _reduce_pred_masks(self, outputs: list[Any], tfms: list[Any]) -> SoftMasks:
        return SoftMasks(super()._reduce_pred_masks(outputs, tfms)[:, 0])


class SoftMasks(ROIMasks):
    """ROIMasks (N, M, M) that are pasted into the image one by one, when they are read.

    An image of 12 megapixels with 300 detections takes 3.6 GB as (N, H, W) of bool.
    """

    def __getitem__(self, item: Any) -> SoftMasks:
        return SoftMasks(super().__getitem__(item).tensor)

    def to_bitmasks(
        self, boxes: Any, height: int, width: int, threshold: float = 0.5
    ) -> SimpleNamespace:
        """An object whose `tensor` is a `PastedMasks`, where Detectron2 has (N, H, W)."""
        boxes = boxes.tensor if isinstance(boxes, Boxes) else boxes
        return SimpleNamespace(tensor=PastedMasks(self.tensor, boxes, (height, width), threshold))


class PastedMasks:
    """Masks of one image, a sequence of N (H, W) bool tensors, each made when it is asked for.

    Args:
        masks: (N, M, M) in [0, 1].
        boxes: (N, 4) where they belong, x0 y0 x1 y1 in pixels.
        size: height and width of the image.
        threshold: soft values from here on are in the mask.
    """

    def __init__(self, masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float):
        self.masks, self.boxes, self.size, self.threshold = masks, boxes, size, threshold

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, item: Any) -> Any:
        """One mask (H, W) for an int, else the chosen masks as PastedMasks."""
        if not isinstance(item, int):
            return PastedMasks(self.masks[item], self.boxes[item], self.size, self.threshold)
        number = range(len(self))[item]  # raises IndexError past the end
        own = slice(number, number + 1)
        masks, boxes = self.masks[own], self.boxes[own]
        return paste_masks_in_image(masks, boxes, self.size, self.threshold)[0]

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def to(self, *args: Any, **kwargs: Any) -> PastedMasks:
        """The same masks on another device."""
        return PastedMasks(
            self.masks.to(*args, **kwargs),
            self.boxes.to(*args, **kwargs),
            self.size,
            self.threshold,
        )

    @property
    def tensor(self) -> Tensor:
        """(N, H, W), all at once."""
        if not len(self):
            return torch.zeros((0, *self.size), dtype=torch.bool)
        return torch.stack(list(self))
