"""Small annotation files with images, and names that are taken off the catalogs again."""

import itertools
import json

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from d2_balance import add_balance_config

_numbers = itertools.count()


def coco_data():
    """Two images of 40 x 30 pixels, two classes with ids 3 and 7, three boxes."""
    return {
        "images": [
            {"id": 1, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.png", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 11, "image_id": 1, "category_id": 3, "bbox": [1, 2, 10, 12]},
            {"id": 12, "image_id": 1, "category_id": 7, "bbox": [5, 5, 8.5, 9]},
            {"id": 13, "image_id": 2, "category_id": 7, "bbox": [0, 0, 40, 30]},
        ],
        "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    }


def lvis_data():
    """The same in LVIS style, with coco_url in place of file_name."""
    data = coco_data()
    for image, file_name in zip(data["images"], ("a.png", "b.png"), strict=True):
        del image["file_name"]
        image["coco_url"] = f"http://some.where/images/train/{file_name}"
        image["neg_category_ids"] = [3] if image["id"] == 2 else []
        image["not_exhaustive_category_ids"] = [7] if image["id"] == 2 else []
    for category, group in zip(data["categories"], "fr", strict=True):
        category |= {"frequency": group, "image_count": 400 if group == "f" else 4}
    return data


@pytest.fixture
def write(tmp_path):
    """write(data, name="a.json") -> (path of the JSON, directory of the images a.png and b.png)."""
    directory = tmp_path / "images"
    directory.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), (90, 120, 60)).save(directory / name)

    def write_json(data, name="a.json"):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return str(path), str(directory)

    return write_json


@pytest.fixture
def names():
    """names() -> a dataset name nobody has; whatever was registered is taken off at the end."""
    made = []

    def new_name():
        made.append(f"set_of_test_{next(_numbers)}")
        return made[-1]

    yield new_name
    for name in made:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)


@pytest.fixture
def cfg():
    config = get_cfg()
    add_balance_config(config)
    config.DATASETS.TRAIN = config.DATASETS.TEST = ()
    return config
