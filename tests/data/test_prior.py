"""The foreground prior: formulas by hand, counts against the models' own labels in training."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.data.detection_utils import annotations_to_instances, transform_instance_annotations
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from d2_balance.data.priors.foreground import ForegroundPrior, PartCount, middle_edge

from ..conftest import CLASSES, small_cfg

SIZES = [(60, 80), (120, 50), (64, 64), (30, 200)]  # height, width


def records(seed=0, objects=4):
    """Images of several shapes; the second has no object, the first a crowd besides."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for index, (height, width) in enumerate(SIZES):
        annotations = []
        for _ in range(0 if index == 1 else objects):
            corner = torch.rand(2, generator=generator) * torch.tensor([width - 15.0, height - 15])
            x, y = corner.tolist()
            side = (torch.rand(2, generator=generator) * 25 + 6).tolist()  # may leave the image
            category = int(torch.randint(CLASSES, (1,), generator=generator))
            box = {"bbox": [x, y, *side], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 0}
            annotations.append({**box, "category_id": category})
        if index == 0:
            annotations.append({**annotations[0], "bbox": [0, 0, 30, 30], "iscrowd": 1})
        record = {"file_name": f"{index}.png", "image_id": index, "height": height, "width": width}
        found.append({**record, "annotations": annotations})
    return found


@pytest.fixture
def dataset(names):
    name = names()
    DatasetCatalog.register(name, records)
    MetadataCatalog.get(name).thing_classes = [f"class{i}" for i in range(CLASSES)]
    return name


def counted_cfg(kind, dataset, *overrides):
    cfg = small_cfg(kind, *overrides)
    cfg.DATASETS.TRAIN = (dataset,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40, 48, 90), 130
    return cfg


def labels_in_training(cfg, kind):
    """(positives, rows) by the model: resized, padded, through the backbone, labelled."""
    model = build_model(cfg).eval()
    augmentation = T.ResizeShortestEdge(48, 130)
    positives = rows = 0
    for record in records():
        image = T.AugInput(np.zeros((record["height"], record["width"], 3), np.uint8))
        transforms = augmentation(image)
        height, width = image.image.shape[:2]
        objects = [
            transform_instance_annotations(a, transforms, (height, width))
            for a in record["annotations"]
            if not a["iscrowd"]
        ]
        instances = annotations_to_instances(objects, (height, width))
        images = model.preprocess_image([{"image": torch.zeros(3, height, width)}])
        with torch.no_grad():
            features = model.backbone(images.tensor)
        if kind == "faster":
            rpn = model.proposal_generator
            rpn._subsample_labels = lambda label: label
            anchors = rpn.anchor_generator([features[f] for f in rpn.in_features])
            (labels,), _ = rpn.label_and_sample_anchors(anchors, [instances])
            foreground = labels == 1
        else:
            anchors = model.anchor_generator([features[f] for f in model.head_in_features])
            (labels,), _ = model.label_anchors(anchors, [instances])
            foreground = (labels >= 0) & (labels < CLASSES)
        positives += int(foreground.sum())
        rows += int((labels >= 0).sum())
    return positives, rows


@pytest.mark.parametrize(
    ("kind", "part", "overrides"),
    [
        ("retinanet", "RetinaNet", ()),
        ("retinanet", "RetinaNet", ("MODEL.RETINANET.IOU_THRESHOLDS", [0.5])),
        ("faster", "RPN", ()),
        ("faster", "RPN", ("MODEL.RPN.BOUNDARY_THRESH", 0)),
        ("fcos", "FCOS", ()),
    ],
)
def test_counts_equal_the_labels_of_the_model(kind, part, overrides, dataset):
    if "MODEL.RETINANET.IOU_THRESHOLDS" in overrides:
        overrides += ("MODEL.RETINANET.IOU_LABELS", [0, 1])
    cfg = counted_cfg(kind, dataset, *overrides)
    count = ForegroundPrior.from_config(cfg).parts[part]
    assert (count.positives, count.samples) == labels_in_training(cfg, kind)
    assert count.outputs == (1 if part == "RPN" else CLASSES)


def test_roi_heads_have_the_proposals_and_the_objects(dataset):
    prior = ForegroundPrior.from_config(counted_cfg("faster", dataset))
    # 4 images of 40 proposals, 3 of them with 4 objects
    assert prior.parts["ROIHeads"] == PartCount(12, 4 * 40 + 12, CLASSES)


def test_backbone_takes_no_memory(dataset, monkeypatch):
    import d2_balance.data.priors.sample_counts as module

    built = []

    def build(cfg):
        built.append(module_build(cfg))
        return built[-1]

    module_build = module.build_backbone
    monkeypatch.setattr(module, "build_backbone", build)
    ForegroundPrior.from_config(counted_cfg("faster", dataset))
    assert all(p.is_meta for p in built[0].parameters())


def test_best_prior_is_the_minimum_of_the_loss():
    count = PartCount(positives=10, samples=10_000, outputs=80)  # N / N_f = 1000
    assert count.prior == pytest.approx(1.25e-5)
    grid = [count.prior * factor for factor in (0.5, 0.9, 0.99, 1.0, 1.01, 1.1, 2.0)]
    assert min(grid, key=count.loss) == count.prior
    assert count.bias == pytest.approx(-math.log(80_000 - 1))
    assert 1 / (1 + math.exp(-count.bias)) == pytest.approx(count.prior)


@pytest.mark.parametrize(
    ("prior", "positive", "background"),
    [(0.5, 0.69, 55451), (0.01, 4.61, 804), (1e-5, 11.5, 0.80)],  # published beside the formula
)
def test_loss_at_the_start_as_published(prior, positive, background):
    loss = PartCount(10, 10_000, 80).loss(prior)
    assert loss == pytest.approx(positive + background, rel=3e-4, abs=0.02)


def test_softmax_starts_at_the_share_of_foreground():
    count = PartCount(positives=2, samples=100, outputs=5)
    logits = torch.tensor([0.0] * 5 + [count.background_bias])
    expected = torch.tensor([0.02 / 5] * 5 + [0.98])
    torch.testing.assert_close(logits.softmax(0), expected)


def test_class_thresholds_share_the_foreground():
    prior = ForegroundPrior({"RetinaNet": PartCount(2, 100, 3)}, (6, 3, 1), ("a", "b", "c"), 5, 5)
    # 0.02 times 6/10, 3/10, 1/10
    expected = torch.tensor([0.012, 0.006, 0.002], dtype=torch.float64)
    torch.testing.assert_close(prior.class_thresholds("RetinaNet"), expected)


def test_a_sample_is_drawn_once_and_for_all(dataset):
    cfg = counted_cfg("retinanet", dataset)
    one, same = (ForegroundPrior.from_config(cfg, max_images=2) for _ in range(2))
    assert one == same and (one.num_images, one.total_images) == (2, 4)
    everything = ForegroundPrior.from_config(cfg, max_images=0)
    assert everything.num_images == 4 and everything.instance_count == one.instance_count
    assert sum(one.instance_count) == 12  # the crowd is no object


def test_middle_of_the_training_sizes():
    assert middle_edge((640, 672, 704, 736, 768, 800), "choice") == 736
    assert middle_edge((800, 640), "range") == 720
    assert middle_edge(240, "choice") == 240


def test_round_trip_and_no_silent_overwrite(tmp_path, dataset):
    path = str(tmp_path / "prior.json")
    prior = ForegroundPrior.from_config(counted_cfg("faster", dataset))
    prior.save(path)
    assert ForegroundPrior.load(path) == prior
    with pytest.raises(FileExistsError, match="overwrite"):
        prior.save(path)
    prior.save(path, overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["prior.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": {"Mask": {}}}, "parts must be counts by name"),
        (
            {"parts": {"RPN": {"positives": 1, "samples": 9}}},
            "parts.RPN: lacks the field `outputs`",
        ),
        ({"parts": {"RPN": {"positives": 0, "samples": 9, "outputs": 1}}}, "RPN: 0 positives"),
        ({"classes": []}, "classes must be `array` of length >= 1"),
        (
            {"classes": [{"name": "a", "instance_count": -1}]},
            r"classes\[0\].instance_count must be",
        ),
        ({"num_images": None}, "num_images must be `int`, got `null`"),
    ],
)
def test_damaged_files_are_named_with_the_field(tmp_path, change, message):
    path = tmp_path / "prior.json"
    part = {"RPN": {"positives": 1, "samples": 9, "outputs": 1}}
    classes = [{"name": "a", "instance_count": 3}]
    data = {"num_images": 1, "total_images": 1, "parts": part, "classes": classes}
    path.write_text(json.dumps(data))
    assert ForegroundPrior.load(str(path)).parts["RPN"].samples == 9
    path.write_text(json.dumps(data | change))
    with pytest.raises(ValueError, match=message) as error:
        ForegroundPrior.load(str(path))
    assert str(path) in str(error.value)


def test_no_positive_anchor_is_refused(dataset):
    cfg = counted_cfg("retinanet", dataset)
    DatasetCatalog.pop(dataset)
    DatasetCatalog.register(dataset, lambda: [r | {"annotations": []} for r in records()])
    with pytest.raises(ValueError, match="RetinaNet: 0 positives.*do the anchors fit"):
        ForegroundPrior.from_config(cfg)


def test_other_models_are_refused(dataset):
    cfg = counted_cfg("retinanet", dataset)
    cfg.MODEL.META_ARCHITECTURE = "SemanticSegmentor"
    with pytest.raises(ValueError, match="MODEL.META_ARCHITECTURE SemanticSegmentor has no anchor"):
        ForegroundPrior.from_config(cfg)
