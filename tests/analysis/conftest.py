"""Small datasets whose figures can be counted by hand."""

import json

import numpy as np
import pytest

from d2_balance.analysis.table import DataTable
from d2_balance.data.annotations import parse_annotations


def annotations(data):
    """The columns of a file's content."""
    return parse_annotations(json.dumps(data).encode(), "made.json")


def coco(shown, sizes=(100, 100), box=(10, 10, 20, 20)):
    """COCO content: `shown[n]` lists the classes 0..K-1 of image n, one box each."""
    classes = 1 + max(k for labels in shown for k in labels)
    annotations = [
        {"image_id": n, "category_id": k + 1, "bbox": [box[0] + 3 * i, *box[1:]]}
        for n, labels in enumerate(shown)
        for i, k in enumerate(labels)
    ]
    return {
        "images": [
            {"id": n, "file_name": f"{n}.png", "height": sizes[0], "width": sizes[1]}
            for n in range(len(shown))
        ],
        "annotations": [{"id": 100 + n, **a} for n, a in enumerate(annotations)],
        "categories": [{"id": k + 1, "name": f"class{k}"} for k in range(classes)],
    }


@pytest.fixture
def table():
    """table(shown) -> DataTable of `coco(shown)`."""

    def make(shown, **options):
        return DataTable.from_annotations("made", annotations(coco(shown, **options)))

    return make


@pytest.fixture
def random_table(table):
    """200 images of up to 4 of 12 classes, of falling frequency."""
    rng = np.random.default_rng(0)
    share = 1 / np.arange(1, 13) ** 1.5
    return table(
        [rng.choice(12, rng.integers(1, 5), p=share / share.sum()).tolist() for _ in range(199)]
        + [[11]]
    )
