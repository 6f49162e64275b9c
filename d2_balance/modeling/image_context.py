"""What is known of an image beside its objects, and rides on the ImageList to the heads."""

from __future__ import annotations

from detectron2.structures import ImageList

from d2_balance.data.image_labels import ImageLabels

from .ignore_regions import regions_of


class LabelledImages:
    """Base of models whose heads look at ignore regions and image-level labels in training.

    Stands before Detectron2's class. An ImageList gets `ignore_boxes` (see `regions_of`), and, with
    `image_labels`, `verified` and `not_exhaustive`, (N, K) bool or None.
    """

    image_labels: ImageLabels | None

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = super().preprocess_image(batched_inputs)
        if self.training:
            images.ignore_boxes = regions_of(batched_inputs, self.device)
            if self.image_labels is not None:
                images.verified = self.image_labels.verified(batched_inputs, self.device)
                images.not_exhaustive = self.image_labels.not_exhaustive(
                    batched_inputs, self.device
                )
        return images
