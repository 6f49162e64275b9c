"""A directory with images and configs, and stand-ins for training and prediction."""

import json

import pytest
from PIL import Image

from ..conftest import FASTER
from .recipes import SMALL, Fakes, annotations


@pytest.fixture
def directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for name, first, count in (("train", 1, 10), ("val", 101, 4)):
        (tmp_path / f"{name}.json").write_text(json.dumps(annotations(first, count)))
        for i in range(first, first + count):
            Image.new("RGB", (64, 64), (i, 90, 200 - i)).save(tmp_path / f"images/{i}.jpg")
    model = FASTER.replace("META_ARCHITECTURE: GeneralizedRCNN", "META_ARCHITECTURE: BalancedRCNN")
    model = model.replace("StandardROIHeads", "BalancedStandardROIHeads")
    model = model.replace(
        "BATCH_SIZE_PER_IMAGE: 24",
        "BATCH_SIZE_PER_IMAGE: 24, SCORE_THRESH_TEST: 0.0, NUM_CLASSES: 4",
    )
    (tmp_path / "small.yaml").write_text(model.rstrip() + SMALL)
    return tmp_path


@pytest.fixture
def fakes(directory, monkeypatch):
    return Fakes(monkeypatch)
