"""A dataset of twelve small random images, and a config that trains on it in seconds."""

import json
import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_balance.data import register_json
from d2_balance.engine.setup.config_file import merge_overrides

from ..conftest import CLASSES, small_cfg

TRAIN, TEST = "engine_train", "engine_test"


def write_dataset(directory, images=12, seed=0):
    """LVIS style: wide and high images, two objects each, image-level labels, polygons."""
    rng = np.random.default_rng(seed)
    (directory / "images").mkdir(parents=True)
    data = {
        "images": [],
        "annotations": [],
        "categories": [{"id": k + 1, "name": f"class{k}"} for k in range(CLASSES)],
    }
    for index in range(images):
        width, height = (64, 48) if index % 3 else (48, 64)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(image).save(directory / "images" / f"{index}.png")
        record = {"id": index + 1, "file_name": f"{index}.png", "width": width, "height": height}
        # the classes of the image's objects are index % 3 and index % 3 + 1
        record |= {"neg_category_ids": [CLASSES], "not_exhaustive_category_ids": []}
        data["images"].append(record)
        for k in range(2):
            x, y, w, h = 4 + 20 * k, 6 + 10 * k, 18, 22
            annotation = {
                "id": len(data["annotations"]) + 1,
                "image_id": index + 1,
                "category_id": index % 3 + k + 1,
                "bbox": [x, y, w, h],
                "area": w * h,
                "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]],
            }
            data["annotations"].append(annotation)
    (directory / "data.json").write_text(json.dumps(data))
    return str(directory / "data.json"), str(directory / "images")


@pytest.fixture(scope="session")
def dataset_files(tmp_path_factory):
    """(annotation file, image directory)."""
    return write_dataset(tmp_path_factory.mktemp("engine") / "data")


@pytest.fixture
def dataset(dataset_files):
    """The files under the names TRAIN and TEST; taken off the catalogs again."""
    for name in (TRAIN, TEST):
        register_json(name, *dataset_files)
    yield
    for name in (TRAIN, TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def run_cfg(output_dir, *overrides, kind="retinanet"):
    """A small config that trains for six iterations on the small images."""
    cfg = small_cfg(kind)
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN,), (TEST,)
    cfg.OUTPUT_DIR, cfg.SEED = str(output_dir), 7
    cfg.MODEL.WEIGHTS = ""
    cfg.DATALOADER.NUM_WORKERS, cfg.LOG.IMAGES = 0, 0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (48, 64), 48
    cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 2, 6, ()
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 0.01, 2
    merge_overrides(cfg, overrides, "test")
    return cfg


@pytest.fixture
def log():
    """Messages of the package, which Detectron2's loggers may keep from pytest's caplog."""
    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("d2_balance")
    logger.addHandler(handler)
    level = logger.level
    logger.setLevel(logging.INFO)
    yield messages
    logger.setLevel(level)
    logger.removeHandler(handler)
