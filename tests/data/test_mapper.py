"""Regions move with their image; objects without a mask say so, and are boxes in all else."""

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from d2_balance.data.mapper import BalancedMapper

from ..conftest import small_cfg

POLYGON = [[2.0, 3, 12, 3, 12, 15]]


@pytest.fixture
def record(tmp_path):
    """An image of 40 x 30 with a triangle, a box without a mask, a crowd, and two regions."""
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)
    box = {"bbox_mode": BoxMode.XYWH_ABS}
    return {
        "file_name": str(path),
        "width": 40,
        "height": 30,
        "annotations": [
            box | {"bbox": [20, 5, 10, 8], "category_id": 1},
            box | {"bbox": [2, 3, 10, 12], "category_id": 0, "segmentation": POLYGON},
            box | {"bbox": [0, 0, 5, 5], "category_id": 2, "iscrowd": 1},
        ],
        "ignore_boxes": np.array([[10, 4, 20, 14], [35, 20, 40, 30]], dtype=np.float32),
    }


def mapped(record, augmentations=(), masks=True, mask_format="polygon", cls=BalancedMapper, **more):
    mapper = cls(
        True,
        augmentations=list(augmentations),
        image_format="BGR",
        use_instance_mask=masks,
        instance_mask_format=mask_format,
        **more,
    )
    return mapper(record)


@pytest.mark.parametrize(
    ("augmentation", "expected"),
    [
        (T.RandomFlip(1.0), [[20, 4, 30, 14], [0, 20, 5, 30]]),
        (T.RandomFlip(1.0, horizontal=False, vertical=True), [[10, 16, 20, 26], [35, 0, 40, 10]]),
        (T.Resize((60, 80)), [[20, 8, 40, 28], [70, 40, 80, 60]]),
        (T.CropTransform(15, 6, 20, 20), [[0, 0, 5, 8]]),  # x 15 to 35, y 6 to 26
    ],
)
def test_regions_move_with_the_image_and_are_cut_at_its_border(record, augmentation, expected):
    found = mapped(record, [augmentation])["ignore_boxes"]
    assert found.dtype == torch.float32
    assert found.tolist() == expected


def test_no_region_stays_no_region(record):
    record["ignore_boxes"] = np.zeros((0, 4), np.float32)
    assert mapped(record, [T.RandomFlip(1.0)])["ignore_boxes"].shape == (0, 4)
    del record["ignore_boxes"]
    assert "ignore_boxes" not in mapped(record)


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_objects_without_a_mask_are_told_apart(record, mask_format):
    objects = mapped(record, [T.RandomFlip(1.0)], mask_format=mask_format)["instances"]
    assert objects.gt_classes.tolist() == [0, 1]
    assert objects.gt_has_mask.tolist() == [True, False]
    assert objects.gt_boxes.tensor.tolist() == [[28, 3, 38, 15], [10, 5, 20, 13]]
    assert len(objects.gt_masks) == 2
    areas = objects.gt_masks.tensor.flatten(1).sum(1) if mask_format == "bitmask" else None
    if areas is not None:
        assert areas[1] == 80


def test_boxes_without_masks_survive_crops_that_recompute_boxes(record):
    crop = T.CropTransform(0, 0, 25, 30)
    objects = mapped(record, [crop], recompute_boxes=True)["instances"]
    assert objects.gt_boxes.tensor.tolist() == [[2, 3, 12, 15], [20, 5, 25, 13]]
    assert objects.gt_has_mask.tolist() == [True, False]
    objects = mapped(record, [T.CropTransform(0, 0, 15, 30)], recompute_boxes=True)["instances"]
    assert objects.gt_has_mask.tolist() == [True]


@pytest.mark.parametrize("keep", [[0], [0, 2]])
def test_images_of_boxes_only_have_masks_that_are_none(record, keep):
    record["annotations"] = [record["annotations"][i] for i in keep]
    objects = mapped(record)["instances"]
    assert objects.gt_has_mask.tolist() == [False]
    assert objects.has("gt_masks")


@pytest.mark.parametrize("masks", [True, False])
def test_images_whose_objects_have_masks_are_detectron2s(record, masks):
    record["annotations"] = record["annotations"][1:]
    del record["ignore_boxes"]
    found, stock = mapped(record, masks=masks), mapped(record, masks=masks, cls=DatasetMapper)
    assert found.keys() == stock.keys()
    assert found["instances"].get_fields().keys() == stock["instances"].get_fields().keys()
    assert torch.equal(found["instances"].gt_boxes.tensor, stock["instances"].gt_boxes.tensor)


def test_without_a_mask_head_boxes_are_boxes(record):
    objects = mapped(record, masks=False)["instances"]
    assert objects.gt_classes.tolist() == [1, 0]  # the order of the file
    assert not objects.has("gt_has_mask") and not objects.has("gt_masks")


def test_records_stay_as_they_are_and_the_config_makes_the_mapper(record):
    before = str(record)
    cfg = small_cfg("mask", "INPUT.MIN_SIZE_TRAIN", (30,))
    assert len(BalancedMapper(cfg, True)(record)["instances"]) == 2
    assert str(record) == before


def test_recomputed_boxes_do_not_stop_at_an_image_without_objects(tmp_path):
    from PIL import Image as PILImage

    PILImage.new("RGB", (40, 30)).save(tmp_path / "empty.png")
    mapper = BalancedMapper(
        is_train=True,
        augmentations=[],
        image_format="BGR",
        use_instance_mask=True,
        recompute_boxes=True,
    )
    record = {"file_name": str(tmp_path / "empty.png"), "width": 40, "height": 30}
    assert len(mapper(record | {"annotations": []})["instances"]) == 0
    crowd = {"bbox": [1, 2, 5, 6], "bbox_mode": 1, "category_id": 0, "iscrowd": 1}
    assert len(mapper(record | {"annotations": [crowd]})["instances"]) == 0
