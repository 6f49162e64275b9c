"""LVIS's image-level labels as masks for the losses.

An LVIS image is annotated for some classes only. ``neg_category_ids`` are verified to be absent,
``not_exhaustive_category_ids`` present but not marked completely; about every class that is neither
among them nor annotated, nothing is known (Gupta et al., LVIS, sec. 3).

Shapes: N images, K classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .catalog.metadata import id_map
from .columns import IMAGE_LABEL_KEYS
from .records import objects_of

NOT_EXHAUSTIVE = IMAGE_LABEL_KEYS[1]
_UNRESOLVED = object()


class ImageLabels:
    """Turns a batch into masks of the classes about which something is known.

    Args:
        dataset_names: the training sets, whose metadata say how category ids become classes.
        num_classes: K.
    """

    def __init__(self, dataset_names: Sequence[str], num_classes: int) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, not {num_classes}")
        self.dataset_names = tuple(dataset_names)
        self.num_classes = num_classes
        # Detectron2's own sets write their map when they are loaded, so it is read at first use.
        self._id_map: Any = _UNRESOLVED

    def verified(
        self, batched_inputs: Sequence[dict[str, Any]], device: torch.device | str
    ) -> Tensor | None:
        """Classes with a verified statement, per image.

        Listed are the classes of ``instances.gt_classes``, of ``neg_category_ids`` and of
        ``not_exhaustive_category_ids``. An image without these keys, in a batch where others have
        them, lists its annotated classes.

        Args:
            batched_inputs: N outputs of Detectron2's DatasetMapper, on the CPU as it gives them
                (classes on a GPU would be waited for).
            device: where the mask goes; the host does not wait for the copy.

        Returns:
            (N, K) bool, or None if no image has one of the two keys.

        Raises:
            ValueError: for an id outside the training set's categories, naming the image; for
                training sets that map ids differently, naming both.
        """
        if not any(key in record for record in batched_inputs for key in IMAGE_LABEL_KEYS):
            return None
        return self._mask([self._classes(record) for record in batched_inputs], device)

    def not_exhaustive(
        self, batched_inputs: Sequence[dict[str, Any]], device: torch.device | str
    ) -> Tensor | None:
        """Classes that are not annotated exhaustively, per image.

        Arguments and errors as `verified`.

        Returns:
            (N, K) bool, or None if no image has such a class.
        """
        if not any(record.get(NOT_EXHAUSTIVE) for record in batched_inputs):
            return None
        keys = (NOT_EXHAUSTIVE,)
        return self._mask([self._labelled(record, keys) for record in batched_inputs], device)

    def _mask(self, classes: Sequence[Sequence[int]], device: torch.device | str) -> Tensor:
        rows = [row for row, own in enumerate(classes) for _ in own]
        mask = torch.zeros(len(classes), self.num_classes, dtype=torch.bool)
        mask[rows, [index for own in classes for index in own]] = True
        return mask.to(device, non_blocking=True)

    def _labelled(
        self, record: dict[str, Any], keys: Sequence[str] = IMAGE_LABEL_KEYS
    ) -> list[int]:
        """Indices in [0, K) of the classes under some keys of one image, possibly repeated."""
        raw_ids = [raw for key in keys for raw in record.get(key) or ()]
        mapping = self._resolved_map()
        if mapping is None:
            classes = [raw - 1 for raw in raw_ids]
        else:
            classes = [mapping.get(raw, -1) for raw in raw_ids]
        wrong = [
            raw
            for raw, index in zip(raw_ids, classes, strict=True)
            if not 0 <= index < self.num_classes
        ]
        if wrong:
            raise ValueError(
                f"{record.get('file_name', 'an image')}: {' / '.join(IMAGE_LABEL_KEYS)} hold "
                f"{wrong[:5]}; must be category ids of the {self.num_classes} classes of "
                f"{', '.join(self.dataset_names)}"
            )
        return classes

    def _classes(self, record: dict[str, Any]) -> list[int]:
        """Indices in [0, K) of the listed classes of one image, possibly repeated."""
        classes = self._labelled(record)
        annotated = record["instances"].gt_classes.tolist() if "instances" in record else []
        if annotated and not 0 <= min(annotated) <= max(annotated) < self.num_classes:
            raise ValueError(
                f"{record.get('file_name', 'an image')}: the classes of the annotations run from "
                f"{min(annotated)} to {max(annotated)}; must be [0, {self.num_classes})"
            )
        return classes + annotated

    def _resolved_map(self) -> dict[int, int] | None:
        if self._id_map is _UNRESOLVED:
            maps = {name: id_map(name) for name in self.dataset_names}
            first = next(iter(maps), "")
            for name, mapping in maps.items():
                if mapping != maps[first]:
                    raise ValueError(
                        f"the training sets {first!r} and {name!r} map category ids to classes "
                        "differently, so image-level labels are ambiguous: give both files the "
                        "same 'categories'"
                    )
            self._id_map = maps.get(first)
        return self._id_map


def require_image_labels(
    dataset_dicts: Sequence[dict[str, Any]],
    name: str,
    key: str = "MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS",
) -> None:
    """Check that a dataset has image-level labels at all.

    Detectron2's LVIS loader writes empty lists where a file has none, so empty lists do not count.

    Args:
        dataset_dicts: Detectron2's standard dicts.
        name: of the dataset, for the message.
        key: what switches off the need for the labels, for the message.

    Raises:
        ValueError: naming the dataset and what to do.
    """
    if not objects_of(dataset_dicts).labelled.any():
        raise ValueError(
            f"the dataset {name!r} has no image-level labels: set {key} never or add "
            "neg_category_ids to the images of its annotation file"
        )
