"""A run's directory as a training leaves it, on a machine without the training set."""

import json
import shutil

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from d2_balance.data import register_json
from d2_balance.data.model_classes import CHECKPOINT_KEY, ModelClasses
from d2_balance.engine.resume.checkpoint import BalancedCheckpointer
from tests.conftest import small_cfg

NAMES = ("cat", "dog", "Bär", "owl", "fox", "猫")  # as many as the small models have
IDS = (3, 5, 7, 11, 13, 17)
SIZE = 64


def annotation_file(directory):
    """A COCO file of 6 classes with 6 down to 1 images, and its image directory."""
    (directory / "images").mkdir(parents=True)
    images, annotations = [], []
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (SIZE, SIZE + 8, 3), np.uint8)
        Image.fromarray(pixels).save(directory / "images" / f"{i}.png")
        images.append({"id": i + 1, "file_name": f"{i}.png", "width": SIZE + 8, "height": SIZE})
        for k in range(6 - i):
            x = 4 * k
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": i + 1,
                    "category_id": IDS[k],
                    "bbox": [x, 5, 20, 24],
                    "area": 480,
                    "iscrowd": 0,
                    "segmentation": [[x, 5, x + 20, 5, x + 20, 29, x, 29]],
                }
            )
    categories = [{"id": raw, "name": name} for raw, name in zip(IDS, NAMES, strict=True)]
    data = {"images": images, "annotations": annotations, "categories": categories}
    path = directory / "annotations.json"
    path.write_text(json.dumps(data))
    return str(path)


def make_run(directory, kind, *overrides, classes=True):
    """Write what a training of a small model writes, then take its dataset away.

    Returns:
        The model, as it was saved.
    """
    data = directory / "data"
    name = f"train of {directory.name}"
    register_json(name, annotation_file(data), str(data / "images"))
    cfg = small_cfg(kind, "INPUT.MIN_SIZE_TEST", SIZE, "INPUT.MAX_SIZE_TEST", 96, *overrides)
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
    cfg.OUTPUT_DIR = str(directory / "run")
    DatasetCatalog.get(name)
    try:
        model = build_model(cfg).eval()
        saved = ModelClasses.from_run(cfg, model)
        (directory / "run").mkdir()
        (directory / "run" / "config.yaml").write_text(cfg.dump())
        extra = {}
        if classes:
            extra = {CHECKPOINT_KEY: saved.as_dict()}
            saved.save(str(directory / "run" / "classes.json"))
        BalancedCheckpointer(model, cfg.OUTPUT_DIR, cfg=cfg).save("model_final", **extra)
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
        shutil.rmtree(data)
    return model


@pytest.fixture
def image():
    """(H, W, 3) uint8 in BGR order."""
    return np.random.default_rng(7).integers(0, 256, (50, 70, 3), np.uint8)
