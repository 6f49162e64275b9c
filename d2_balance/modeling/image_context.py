"""What is known of a picture beside its objects, and rides on the ImageList to the heads."""

from __future__ import annotations

from detectron2.structures import ImageList

from d2_balance.data.image_labels import ImageLabels

from .ignore_regions import regions_of


class LabelledPictures:
    """Base of models whose heads look at ignore regions and image-level labels in training.

    Stands before Detectron2's class. An ImageList gets `ignore_boxes` (see `regions_of`), and, with
    `image_labels`, `listed` and `partial`, (N, K) bool or None.
    """

    image_labels: ImageLabels | None

    def preprocess_image(self, batched_inputs: list[dict]) -> ImageList:
        images = super().preprocess_image(batched_inputs)
        if self.training:
            images.ignore_boxes = regions_of(batched_inputs, self.device)
            if self.image_labels is not None:
                images.listed = self.image_labels.listed(batched_inputs, self.device)
                images.partial = self.image_labels.partial(batched_inputs, self.device)
        return images
