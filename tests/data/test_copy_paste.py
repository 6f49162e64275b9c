"""Copy-paste: mmdet's figures, a slow oracle, what stays true in a record, and the same data again.

The configuration and the training stream are in `tests/engine/test_copy_paste.py`.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from d2_balance.data.copy_paste import CopyPaste, cut_objects, tight_box
from d2_balance.data.mapper import BalancedMapper
from d2_balance.data.unreadable import SKIPPED

REFERENCE = Path(__file__).parents[1] / "reference" / "copy_paste.npz"
SIZE = 60


@pytest.mark.parametrize("case", ["default", "low"])
def test_image_boxes_and_masks_equal_mmdet(case):
    with np.load(REFERENCE) as file:
        f = {k.removeprefix(f"{case}_"): v for k, v in file.items() if k.startswith(case)}
    covered = f["pasted_masks"].any(axis=0)
    image = np.where(covered[..., None], f["pasted_image"], f["image"])
    assert np.array_equal(image, f["out_image"])
    boxes, masks = f["boxes"].copy(), f["masks"].astype(bool)
    limits = {"max_shift": float(f["box_threshold"]), "min_pixels": int(f["mask_threshold"])}
    stays = cut_objects(boxes, masks, covered, **limits)
    left = len(f["out_boxes"]) - len(f["pasted_boxes"])  # theirs come before the pasted ones
    seen = f["out_masks"][:left].any(axis=(1, 2))
    assert not seen.all()  # mmdet keeps an object without a pixel, and ours does not
    assert np.array_equal(boxes[stays], f["out_boxes"][:left][seen])
    assert np.array_equal(masks[stays], f["out_masks"][:left][seen].astype(bool))
    assert np.array_equal(f["labels"][stays], f["out_labels"][:left][seen])


def cut_by_hand(box, pixels, covered, max_shift, min_pixels):
    """Box and pixels of an object by loops; None if it does not stay."""
    left = [(y, x) for y, x in pixels if not covered[y, x]]
    if len(left) == len(pixels):
        return box, left
    if not left:
        return None
    ys, xs = [y for y, _ in left], [x for _, x in left]
    new = [min(xs), min(ys), max(xs) + 1, max(ys) + 1]
    near = all(abs(a - b) <= max_shift for a, b in zip(box, new, strict=True))
    return (new, left) if near or len(left) > min_pixels else None


@pytest.mark.parametrize("with_masks", [True, False])
def test_cutting_equals_the_loop_over_pixels(with_masks):
    rng = np.random.default_rng(0)
    for _ in range(40):
        low = rng.integers(0, 20, (6, 2))
        boxes = np.concatenate([low, low + rng.integers(1, 12, (6, 2))], axis=1).astype(float)
        masks = np.zeros((6, 32, 32), dtype=bool)
        for mask, (x0, y0, x1, y1) in zip(masks, boxes.astype(int), strict=True):
            mask[y0:y1, x0:x1] = rng.random((y1 - y0, x1 - x0)) < 0.7 if with_masks else True
            mask[y0, x0] = mask[y1 - 1, x1 - 1] = True  # the box is tight
        covered = np.zeros((32, 32), dtype=bool)
        y, x = rng.integers(0, 24, 2)
        covered[y : y + 14, x : x + 10] = rng.random(covered[y : y + 14, x : x + 10].shape) < 0.9
        expected = [
            cut_by_hand(box.tolist(), np.argwhere(mask).tolist(), covered, 4, 25)
            for box, mask in zip(boxes, masks, strict=True)
        ]
        given = masks.copy() if with_masks else None
        stays = cut_objects(boxes, given, covered, max_shift=4, min_pixels=25)
        assert stays.tolist() == [e is not None for e in expected]
        for i in stays.nonzero()[0].tolist():
            assert boxes[i].tolist() == expected[i][0]
            if with_masks:
                assert np.argwhere(given[i]).tolist() == [list(p) for p in expected[i][1]]


def test_free_sides_of_a_box_keep_their_fractions():
    covered = np.zeros((20, 20), dtype=bool)
    covered[:, 10:] = True
    boxes = np.array([[2.3, 4.6, 14.5, 9.2], [2.0, 2.0, 10.0, 9.0]])
    assert cut_objects(boxes, None, covered).all()
    assert boxes.tolist() == [[2.3, 4.6, 10.0, 9.2], [2.0, 2.0, 10.0, 9.0]]


def square(x, y, side, category, masks=True, **more):
    corners = [[x, y, x + side, y, x + side, y + side, x, y + side]]
    annotation = {"bbox": [x, y, side, side], "bbox_mode": BoxMode.XYWH_ABS}
    annotation |= {"category_id": category} | more
    return annotation | ({"segmentation": [[float(c) for c in corners[0]]]} if masks else {})


@pytest.fixture
def records(tmp_path):
    """Twelve black images with objects of class 0; class 1 is a white square of the first image."""
    found = []
    for n in range(12):
        pixels = np.zeros((SIZE, SIZE, 3), dtype=np.uint8)
        annotations = [square(4, 4, 20, 0), square(0, 0, 3, 2, iscrowd=1)]
        if n == 0:
            pixels[40:50, 30:40] = 255
            annotations.append(square(30, 40, 10, 1))
        path = str(tmp_path / f"{n}.png")
        Image.fromarray(pixels).save(path)
        found.append(
            {"file_name": path, "height": SIZE, "width": SIZE, "annotations": annotations}
            | {"neg_category_ids": [2], "not_exhaustive_category_ids": []}
        )
    return found


def mapper_of(records, masks=True, augmentations=(), **settings):
    mapper = BalancedMapper(
        True,
        augmentations=list(augmentations),
        image_format="BGR",
        use_instance_mask=masks,
        instance_mask_format="bitmask",
    )
    settings = {"threshold": 0.5, "max_objects": 1, "scale": (1.0, 1.0)} | settings
    mapper.copy_paste = CopyPaste(records, use_masks=masks, **settings)
    return mapper


def pasted(mapper, record, tries=40):
    """The first of some mapped records into which something was pasted."""
    for seed in range(tries):
        np.random.seed(seed)
        result = mapper(record)
        if (result["instances"].gt_classes == 1).any():
            return result
    raise AssertionError("nothing was pasted")


def test_only_classes_below_the_threshold_are_pasted_and_never_crowds(records):
    assert CopyPaste(records, threshold=0.5).classes.tolist() == [1]
    assert CopyPaste(records, threshold=2.0).classes.tolist() == [0, 1]
    nothing = mapper_of(records, threshold=0.01)
    np.random.seed(0)
    assert all(nothing(records[1])["instances"].gt_classes.tolist() == [0] for _ in range(9))


@pytest.mark.parametrize("masks", [True, False])
def test_what_is_pasted_is_where_its_box_and_mask_say(records, masks):
    result = pasted(mapper_of(records, masks), records[1])
    objects, image = result["instances"], result["image"].numpy()
    (index,) = (objects.gt_classes == 1).nonzero().squeeze(1).tolist()
    white = (image == 255).all(axis=0)
    assert white.sum() == 100
    assert objects.gt_boxes.tensor[index].tolist() == list(tight_box(white))
    assert objects.gt_classes.tolist() in ([0, 1], [1])  # counts: as before, and what was pasted
    if masks:
        assert np.array_equal(objects.gt_masks.tensor[index].numpy(), white)
        for i in range(len(objects)):  # objects do not share a pixel
            assert i == index or not (objects.gt_masks.tensor[i].numpy() & white).any()
    else:
        assert not objects.has("gt_masks")


def test_masks_of_covered_objects_are_cut_and_their_boxes_follow(records):
    mapper = mapper_of(records, max_objects=12)
    for seed in range(60):
        np.random.seed(seed)
        result = mapper(records[1])
        objects, white = result["instances"], (result["image"] == 255).all(dim=0)
        for box, mask in zip(objects.gt_boxes.tensor, objects.gt_masks.tensor, strict=True):
            assert list(tight_box(mask.numpy())) == box.tolist()
        assert (objects.gt_masks.tensor.sum(dim=0) <= 1).all()
        rare = objects.gt_classes == 1
        assert not (objects.gt_masks.tensor[~rare] & white).any()
        assert not (objects.gt_masks.tensor[rare] & ~white).any()


def test_an_image_is_no_source_of_its_own(records):
    mapper = mapper_of(records)
    for seed in range(20):
        np.random.seed(seed)
        assert mapper(records[0])["instances"].gt_classes.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("negative", "partial", "annotated", "expected"),
    [
        ([2, 3], [], False, ([3], [])),  # was verified absent, so that all of it is marked
        ([3], [], False, ([3], [2])),  # the image was not annotated for it
        ([3], [2], True, ([3], [2])),
        ([3], [], True, ([3], [])),  # annotated exhaustively
    ],
)
def test_image_level_labels_follow(records, negative, partial, annotated, expected):
    record = dict(records[1], neg_category_ids=negative, not_exhaustive_category_ids=partial)
    if annotated:
        record["annotations"] = [*record["annotations"], square(45, 2, 4, 1)]
    mapper = mapper_of(records, max_objects=1)
    for seed in range(40):
        np.random.seed(seed)
        result = mapper(record)
        if (result["image"] == 255).any():
            break
    found = result["neg_category_ids"], result["not_exhaustive_category_ids"]
    assert found == expected
    assert record["neg_category_ids"] == negative  # the dataset itself stays


def test_ids_of_labels_are_those_of_the_file(records):
    record = dict(records[1], neg_category_ids=[70, 90])
    mapper = mapper_of(records, raw_ids={0: 50, 1: 70, 2: 90})
    assert pasted(mapper, record)["neg_category_ids"] == [90]


def test_sets_without_image_level_labels_get_none(records):
    for record in records:
        del record["neg_category_ids"], record["not_exhaustive_category_ids"]
    result = pasted(mapper_of(records), records[1])
    assert "neg_category_ids" not in result and "not_exhaustive_category_ids" not in result


def test_an_image_without_objects_gets_those_that_are_pasted(records):
    for masks in (True, False):
        result = pasted(mapper_of(records, masks), dict(records[1], annotations=[]))
        assert result["instances"].gt_classes.tolist() == [1]
        assert result["instances"].has("gt_masks") == masks


def test_objects_without_a_mask_are_pasted_as_boxes(records):
    del records[0]["annotations"][2]["segmentation"]
    result = pasted(mapper_of(records), records[1])
    objects = result["instances"]
    assert objects.gt_has_mask[objects.gt_classes == 1].tolist() == [False]
    assert objects.gt_has_mask[objects.gt_classes == 0].all()


def test_regions_and_semantic_labels_are_cut(records):
    record = dict(records[1], ignore_boxes=np.array([[0, 0, 60, 60], [4, 4, 6, 6]], np.float32))
    mapper = mapper_of(records, ignore_value=255)
    seen = False
    for seed in range(2000):  # one image in two hundred has it over the small region
        np.random.seed(seed)
        result = mapper(record)
        white = (result["image"] == 255).all(dim=0)
        covered = bool(white[4:6, 4:6].all())
        assert len(result["ignore_boxes"]) == (1 if covered else 2)
        seen = covered
        if seen:
            break
    assert seen
    record = {"image": result["image"] * 0, "sem_seg": torch.zeros(SIZE, SIZE).long()}
    record["instances"] = result["instances"][:0]
    for seed in range(40):
        np.random.seed(seed)
        result = mapper.copy_paste(dict(record, sem_seg=record["sem_seg"].clone()), ())
        white = (result["image"] == 255).all(dim=0)
        assert torch.equal(result["sem_seg"] == 255, white)
        record["image"].zero_()


def test_sizes_and_flips_are_drawn_and_objects_may_be_larger_than_the_image(records):
    sizes, mapper = set(), mapper_of(records, scale=(0.1, 9.0))
    for seed in range(60):
        np.random.seed(seed)
        objects = mapper(records[1])["instances"]
        boxes = objects.gt_boxes.tensor[objects.gt_classes == 1]
        assert (boxes >= 0).all() and (boxes <= SIZE).all()
        sizes |= {int(side) for side in (boxes[:, 2:] - boxes[:, :2]).flatten()}
    assert min(sizes) < 6 and max(sizes) == SIZE


def test_the_scale_is_that_of_the_resized_image(records):
    mapper = mapper_of(records, augmentations=[T.Resize((2 * SIZE, 3 * SIZE))])
    objects = pasted(mapper, records[1])["instances"]
    (box,) = objects.gt_boxes.tensor[objects.gt_classes == 1].tolist()
    assert box[2] - box[0] == box[3] - box[1] == 20  # twice the ten pixels, by the shortest side


def test_the_cache_is_bounded_and_changes_nothing(records):
    results = []
    for cache in (0, 1 << 20):
        mapper = mapper_of(records, cache_bytes=cache, threshold=2.0, max_objects=4)
        for seed in range(15):
            np.random.seed(seed)
            results.append(mapper(records[1])["image"])
        cache = mapper.copy_paste._cache
        assert len(cache) == (1 if len(results) == 15 else len({*cache}))
    assert all(torch.equal(a, b) for a, b in zip(results[:15], results[15:], strict=True))


def test_a_source_that_cannot_be_read_is_named_and_nothing_is_pasted(records):
    Path(records[0]["file_name"]).write_bytes(b"no image")
    mapper = mapper_of(records)
    named = set()
    for seed in range(20):
        np.random.seed(seed)
        result = mapper(records[1])
        assert result["instances"].gt_classes.tolist() == [0]
        named |= {*result.get(SKIPPED, {}).items()}
    ((name, reason),) = named
    assert name == records[0]["file_name"] and "a source of DATALOADER.COPY_PASTE" in reason
