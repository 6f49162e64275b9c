"""train_net.py with an external set of boxes and ignore regions in one run."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead

from d2_balance.modeling.meta_arch.rcnn import BalancedRCNN
from d2_balance.modeling.roi_heads.fast_rcnn import BalancedFastRCNNOutputLayers

from .conftest import BALANCED, CLASSES, MASK
from .engine.conftest import write_dataset
from .test_train_net import clean_up, run  # noqa: F401  a fixture of the script

OWN, MORE = "second_train", "second_more"
CONFIG = """
  DEVICE: cpu
  WEIGHTS: ""
  PROPOSAL_GENERATOR: {{NAME: BalancedRPN}}
  BALANCE: {{CLS_LOSS: EQL, EQL: {{LAMBDA: 0.5, USE_IMAGE_LEVEL_LABELS: always}}}}
DATASETS:
  TRAIN: [second_train, second_more]
  TEST: []
  REGISTER: [[second_train, {directory}/own/data.json, {directory}/own/images]]
  EXTERNAL:
    - {{NAME: second_more, JSON: {directory}/more/data.json, IMAGES: {directory}/more/images,
        TARGET: second_train, CLASS_MAP: {directory}/map.yaml}}
  IGNORE_REGIONS: [[second_train, {directory}/regions.json]]
DATALOADER: {{NUM_WORKERS: 0}}
INPUT: {{MIN_SIZE_TRAIN: [48], MIN_SIZE_TEST: 48}}
SOLVER: {{IMS_PER_BATCH: 3, MAX_ITER: 8, STEPS: [], WARMUP_ITERS: 2}}
SEED: 7
VERSION: 2
"""


@pytest.fixture
def config(tmp_path):
    """Own images have classes 0 to 3, external ones 3 to 5; half of the own are one region."""
    write_dataset(tmp_path / "own")
    more = Path(write_dataset(tmp_path / "more", 6, seed=1)[0])
    data = json.loads(more.read_text())
    for category in data["categories"]:
        category["name"] = category["name"].replace("class", "thing")
    for annotation in data["annotations"]:
        del annotation["segmentation"]
    more.write_text(json.dumps(data))
    classes = {"thing0": "class5", "thing1": "class4", "thing2": "class3", "thing3": None}
    (tmp_path / "map.yaml").write_text(yaml.safe_dump(classes))

    regions = json.loads((tmp_path / "own/data.json").read_text())
    regions["categories"] = [{"id": 1, "name": "something else"}]
    regions["annotations"] = [
        {"id": i["id"], "image_id": i["id"], "category_id": 1}
        | {"bbox": [0, 0, i["width"], i["height"]]}
        for i in regions["images"][::2]
    ]
    for image in regions["images"]:
        del image["neg_category_ids"]
    (tmp_path / "regions.json").write_text(json.dumps(regions))

    text = MASK.replace(
        "BATCH_SIZE_PER_IMAGE: 24", f"BATCH_SIZE_PER_IMAGE: 24, NUM_CLASSES: {CLASSES}"
    )
    for stock in ("GeneralizedRCNN", "StandardROIHeads"):
        text = text.replace(stock, BALANCED[stock])
    (tmp_path / "config.yaml").write_text(text.rstrip() + CONFIG.format(directory=tmp_path))
    yield str(tmp_path / "config.yaml")
    for name in (OWN, MORE):
        if name in DatasetCatalog:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


class Seen:
    """What the model, the box head and the mask head got in each iteration."""

    def __init__(self, monkeypatch):
        self.images, self.boxes, self.listed, self.masks = [], [], [], []
        self._wrap(monkeypatch, BalancedRCNN, "forward", self._images)
        self._wrap(monkeypatch, BalancedFastRCNNOutputLayers, "losses", self._boxes)
        self._wrap(monkeypatch, MaskRCNNConvUpsampleHead, "forward", self._masks)

    @staticmethod
    def _wrap(monkeypatch, owner, name, note):
        method = getattr(owner, name)

        def noted(self, *arguments):
            note(self, *arguments)
            return method(self, *arguments)

        monkeypatch.setattr(owner, name, noted)

    def _images(self, model, inputs):
        self.images.append(inputs)

    def _boxes(self, layer, predictions, proposals):
        self.boxes.append([p.gt_classes for p in proposals])
        self.listed.append(layer.verified)

    def _masks(self, head, x, instances):
        self.masks.append([p.gt_classes for p in instances])


def test_external_boxes_and_ignore_regions_train_together(config, tmp_path, monkeypatch):
    seen = Seen(monkeypatch)
    run(config, "OUTPUT_DIR", tmp_path / "out")

    assert len(seen.images) == len(seen.boxes) == len(seen.masks) == 8
    kinds = {"external": 0, "region": 0, "own": 0}
    trained, masked = set(), set()
    for step, inputs in enumerate(seen.images):
        for place, record in enumerate(inputs):
            labels, with_mask = seen.boxes[step][place], seen.masks[step][place]
            positive = labels[labels < CLASSES]
            assert len(positive)
            if f"{tmp_path}/more/" in record["file_name"]:
                kinds["external"] += 1
                assert {*positive.tolist()} <= {3, 4, 5} and len(with_mask) == 0
                trained |= {*positive.tolist()}
                # of the other classes nothing is known; the map names four, one of them null
                assert not seen.listed[step][place, :3].any()
            elif len(record["ignore_boxes"]):
                kinds["region"] += 1
                assert len(positive) == len(labels) and len(with_mask)
            else:
                kinds["own"] += 1
                assert len(positive) < len(labels) and len(with_mask)
            masked |= {*with_mask.tolist()}
    assert all(kinds.values()), kinds
    assert {4, 5} <= trained and masked <= {0, 1, 2, 3} and len(masked) > 1

    lines = [json.loads(x) for x in (tmp_path / "out/metrics.json").read_text().splitlines()]
    losses = {key: value for key, value in lines[-1].items() if "loss" in key}
    assert {"loss_cls", "loss_box_reg", "loss_mask", "loss_rpn_cls"} <= losses.keys()
    assert torch.tensor([*losses.values()]).isfinite().all() and losses["loss_mask"] > 0
