"""Records made from columns: the batches of a training are those of plain dicts, bit by bit."""

import json
import pickle
import random

import numpy as np
import pytest
import torch
from detectron2.data import get_detection_dataset_dicts
from detectron2.data.datasets import load_coco_json
from PIL import Image

from d2_balance.data import load_json, register_json
from d2_balance.data.records import Records, join, objects_of, subset
from d2_balance.data.training_set import sources, training_records
from d2_balance.engine.resume.data_stream import build_train_stream

from ..conftest import small_cfg
from .conftest import coco_data


@pytest.fixture
def dataset(tmp_path, names):
    """12 images in wide and high form with boxes, polygons and RLE; integers and floats."""
    rng = random.Random(0)
    (tmp_path / "images").mkdir()
    images, annotations = [], []
    for n in range(12):
        width, height = (48, 32) if n % 3 else (30, 44)
        pixels = np.random.default_rng(n).integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{n}.png")
        images.append({"id": 50 - n, "file_name": f"{n}.png", "width": width, "height": height})
        for k in range(n % 4):
            x, y, w, h = (
                rng.randint(0, 9),
                rng.randint(0, 9),
                rng.randint(6, 20),
                rng.randint(6, 20),
            )
            if k % 2:
                x, w = x + 0.25, w + 0.5
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": 50 - n,
                    "category_id": rng.choice([3, 7]),
                    "bbox": [x, y, w, h],
                    "iscrowd": int(n == 7 and k == 0),
                    "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
                }
            )
    data = {
        "images": images,
        "annotations": annotations,
        "categories": coco_data()["categories"],
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(data))
    name = names()
    register_json(name, str(path), str(tmp_path / "images"))
    return name, str(path), str(tmp_path / "images")


def config(name, masks=True, **keys):
    cfg = small_cfg("mask" if masks else "faster")
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (name,), ()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.MODEL.MASK_ON = 2, masks
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.DATALOADER.NUM_WORKERS = 2, 3, 0
    cfg.INPUT.CROP.ENABLED = True
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


def test_records_equal_those_of_detectron2_in_content_and_types(dataset, names):
    _, path, directory = dataset
    ours, stock = load_json(path, directory), load_coco_json(path, directory, names())
    stock.sort(key=lambda record: record["image_id"])
    assert isinstance(ours, Records) and len(ours) == len(stock) == 12
    assert ours == stock and list(ours) == stock and ours[-1] == stock[-1]
    assert ours[2:5] == stock[2:5]
    for mine, theirs in zip(ours, stock, strict=True):
        for a, b in zip(mine["annotations"], theirs["annotations"], strict=True):
            # integers are moved to other places than floats of equal values
            for x, y in ((a["bbox"], b["bbox"]), (a["segmentation"][0], b["segmentation"][0])):
                assert {float in map(type, x)} == {float in map(type, y)}
    with pytest.raises(IndexError):
        ours[12]


@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize("workers", [0, 4])
def test_batches_equal_those_of_plain_dicts(dataset, sampler, workers, monkeypatch):
    import d2_balance.engine.resume.data_stream as module

    cfg = config(
        dataset[0],
        DATALOADER__SAMPLER_TRAIN=sampler,
        DATALOADER__NUM_WORKERS=workers,
        DATALOADER__REPEAT_THRESHOLD=0.9,
    )

    def batches():
        stream = iter(build_train_stream(cfg))
        return [next(stream) for _ in range(12)]

    lazy = batches()
    plain = get_detection_dataset_dicts([dataset[0]], filter_empty=True)
    assert isinstance(plain, list)
    monkeypatch.setattr(module, "training_records", lambda cfg: plain)
    for mine, theirs in zip(lazy, batches(), strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert a["file_name"] == b["file_name"]
            assert torch.equal(a["image"], b["image"])
            for field in ("gt_boxes", "gt_classes"):
                x, y = (getattr(r["instances"], field) for r in (a, b))
                assert torch.equal(getattr(x, "tensor", x), getattr(y, "tensor", y))
            for x, y in zip(
                a["instances"].gt_masks.polygons, b["instances"].gt_masks.polygons, strict=True
            ):
                assert all(np.array_equal(p, q) for p, q in zip(x, y, strict=True))


@pytest.mark.parametrize("filter_empty", [True, False])
def test_training_records_are_those_that_detectron2_keeps(dataset, filter_empty):
    cfg = config(dataset[0], DATALOADER__FILTER_EMPTY_ANNOTATIONS=filter_empty)
    found = training_records(cfg)
    stock = get_detection_dataset_dicts([dataset[0]], filter_empty=filter_empty)
    assert isinstance(found, Records)
    assert list(found) == [record | {"dataset": dataset[0]} for record in stock]
    assert list(sources(found)) == [dataset[0]] * len(stock)


@pytest.mark.parametrize(
    "make", [lambda r: r, lambda r: join([r, r]), lambda r: subset(r, np.array([1, 5, 8]))]
)
def test_objects_are_those_of_the_dicts(dataset, make):
    records = make(load_json(*dataset[1:]))
    mine, theirs = records.objects, objects_of(list(records))
    assert len(mine.image) == len(theirs.image) and mine.images == theirs.images == len(records)
    for field in ("image", "category", "crowd", "mask", "bad_mask", "size", "labelled"):
        assert np.array_equal(getattr(mine, field), getattr(theirs, field)), field


def test_records_go_to_another_process(dataset):
    cfg = config(dataset[0])
    records = training_records(cfg)
    assert list(pickle.loads(pickle.dumps(records))) == list(records)


def test_a_bad_mask_trains_its_box_where_masks_are_not_trained(write, names):
    data = coco_data()
    for annotation in data["annotations"]:
        annotation["segmentation"] = [[1, 2, 11, 2, 11, 14]]
    data["annotations"][2]["segmentation"] = [[1, 2, 3, 4]]
    name = names()
    register_json(name, *write(data))
    boxes = training_records(config(name, masks=False))
    assert [len(r["annotations"]) for r in boxes] == [2, 1]
    masks = training_records(config(name))  # the second image has no object left
    assert [len(r["annotations"]) for r in masks] == [2]
