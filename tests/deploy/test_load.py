"""`deploy.load` and Detectron2's DefaultPredictor on a machine without the training set."""

import os

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_lvis_instances
from detectron2.engine import DefaultPredictor
from PIL import Image

from d2_balance import add_balance_config
from d2_balance.data.priors.foreground import ForegroundPrior, PartCount
from d2_balance.deploy import load
from tests.deploy.conftest import IDS, NAMES, make_run

# a threshold of 0 makes untrained models return detections
LOW = ("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0)
FCOS = ("MODEL.FCOS.SCORE_THRESH_TEST", 0.0)
# every classification loss whose constructor takes counts of the training set
COUNTED = ("EQL", "BAGS", "BalancedSoftmax", "DropLoss", "Federated", "LogitAdjusted", "SoftmaxEQL")


def detections(outputs):
    instances = outputs["instances"].to("cpu")
    fields = [instances.pred_boxes.tensor, instances.scores, instances.pred_classes]
    return fields + ([instances.pred_masks] if instances.has("pred_masks") else [])


def assert_equal(first, second):
    assert len(first[0]) > 0
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def stock_predictor(directory, *overrides):
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.merge_from_file(str(directory / "run" / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(directory / "run" / "model_final.pth")
    cfg.merge_from_list(list(overrides))
    return DefaultPredictor(cfg)


@pytest.mark.parametrize("loss", COUNTED)
def test_predicts_without_training_files(tmp_path, image, loss):
    model = make_run(tmp_path, "mask", "MODEL.BALANCE.CLS_LOSS", loss, *LOW)
    predictor = load(str(tmp_path / "run"))
    assert predictor.names == list(NAMES)
    assert predictor.category_ids == list(IDS)
    with torch.inference_mode():
        expected = model([predictor.preprocess(image)])[0]
    assert_equal(detections(predictor(image)), detections(expected))
    for name, value in model.state_dict().items():
        assert torch.equal(predictor.model.state_dict()[name], value), name


@pytest.mark.parametrize("loss", COUNTED)
@pytest.mark.parametrize("classes", [True, False])
def test_default_predictor_works_without_training_files(tmp_path, image, loss, classes):
    model = make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", loss, *LOW, classes=classes)
    predictor = stock_predictor(tmp_path)
    assert predictor.metadata.get("thing_classes") == (list(NAMES) if classes else None)
    for name, value in model.state_dict().items():
        assert torch.equal(predictor.model.state_dict()[name], value), name
    if classes:
        ours = load(str(tmp_path / "run"))
        assert_equal(detections(ours(image)), detections(predictor(image)))


def test_default_predictor_works_if_a_name_is_registered_without_its_file(tmp_path, image):
    make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "EQL", *LOW)
    name = f"train of {tmp_path.name}"
    # as Detectron2 registers lvis_v1_train
    register_lvis_instances(name, {}, str(tmp_path / "gone.json"), str(tmp_path))
    try:
        assert_equal(
            detections(load(str(tmp_path / "run"))(image)),
            detections(stock_predictor(tmp_path)(image)),
        )
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("kind", "loss", "activation"),
    [
        ("retinanet", "EQL", "sigmoid"),
        ("fcos", "Focal", "sigmoid"),
        ("cascade", "BalancedSoftmax", "softmax"),
        ("faster", "", "softmax"),
    ],
)
def test_equals_default_predictor(tmp_path, image, kind, loss, activation):
    make_run(tmp_path, kind, "MODEL.BALANCE.CLS_LOSS", loss, *LOW, *FCOS)
    predictor = load(str(tmp_path / "run" / "model_final.pth"))
    assert predictor.activation == activation
    assert_equal(detections(predictor(image)), detections(stock_predictor(tmp_path)(image)))


def test_norcal_takes_the_saved_counts(tmp_path, image):
    keys = ("MODEL.BALANCE.CLS_LOSS", "SoftmaxCE", "MODEL.BALANCE.NORCAL.GAMMA", 0.5)
    make_run(tmp_path, "faster", *keys, *LOW)
    predictor = load(str(tmp_path / "run"))
    counts = torch.tensor([6.0, 5, 4, 3, 2, 1], dtype=torch.float64)
    for model in (predictor.model, stock_predictor(tmp_path).model):
        assert torch.equal(model.roi_heads.box_predictor.class_count, counts)


@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_a_prior_whose_file_is_gone_lies_in_the_weights(tmp_path, image, kind):
    count = PartCount(20, 100, 6)
    parts = {"RetinaNet": count, "ROIHeads": count, "RPN": PartCount(5, 1000, 1)}
    path = tmp_path / "prior.json"
    ForegroundPrior(parts, (40, 30, 20, 6, 3, 1), tuple("abcdef"), 10, 10).save(str(path))
    keys = ("MODEL.BALANCE.PRIOR_FILE", str(path), "MODEL.BALANCE.CLASS_THRESHOLDS", True)
    model = make_run(tmp_path, kind, *keys, "MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
    thresholds = torch.tensor([0.08, 0.06, 0.04, 0.012, 0.006, 0.002])
    path.unlink()
    for predictor in (load(str(tmp_path / "run")), stock_predictor(tmp_path)):
        saved = predictor.model.state_dict()
        for name, value in saved.items():
            assert torch.equal(value, model.state_dict()[name]), name
        owner = predictor.model if kind == "retinanet" else predictor.model.roi_heads.box_predictor
        found = torch.as_tensor(owner.test_score_thresh)
        torch.testing.assert_close(found.expand(6), thresholds)
    with pytest.raises(ValueError, match=r"MODEL\.BALANCE\.PRIOR_FILE: .*prior\.json"):
        stock_predictor(tmp_path, "MODEL.WEIGHTS", "")


def test_checkpoint_alone_is_enough(tmp_path, image):
    make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "EQL", *LOW)
    expected = detections(load(str(tmp_path / "run"))(image))
    alone = tmp_path / "alone.pth"
    os.rename(tmp_path / "run" / "model_final.pth", alone)
    predictor = load(str(alone))
    assert predictor.names == list(NAMES)
    assert_equal(detections(predictor(image)), expected)


def test_score_threshold_of_each_class(tmp_path, image):
    make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "SoftmaxCE", *LOW)
    predictor = load(str(tmp_path / "run"))
    everything = predictor(image)["instances"]
    assert set(everything.pred_classes.tolist()) >= {0, 2}
    median = everything.scores[everything.pred_classes == 2].median().item()
    predictor.set_score_threshold({"Bär": median, "cat": 1.0})
    assert predictor.score_thresholds == pytest.approx([1.0, 0, median, 0, 0, 0])
    kept = predictor(image)["instances"]
    assert 0 not in kept.pred_classes.tolist()
    assert (kept.scores[kept.pred_classes == 2] > median).all()
    predictor.set_score_threshold(0.0)
    assert_equal(detections({"instances": everything}), detections(predictor(image)))
    with pytest.raises(ValueError, match="no class 'bear'"):
        predictor.set_score_threshold({"bear": 0.5})
    with pytest.raises(ValueError, match=r"must be a number in \[0, 1\]"):
        predictor.set_score_threshold(1.5)


def test_batches_and_workers_change_no_detection(tmp_path):
    make_run(tmp_path, "mask", "MODEL.BALANCE.CLS_LOSS", "EQL", *LOW)
    predictor = load(str(tmp_path / "run"))
    with torch.no_grad():  # scores that lie apart: no two detections change places by rounding
        predictor.model.roi_heads.box_predictor.cls_score.weight.mul_(10)
    paths = []
    for i, size in enumerate([(50, 70), (70, 50), (50, 70), (50, 70), (40, 90)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths.insert(2, str(tmp_path / "broken.png"))
    single = {p.index: p for p in predictor.predict(paths)}
    batched = {p.index: p for p in predictor.predict(paths, batch_size=2, num_workers=2)}
    assert sorted(single) == sorted(batched) == list(range(6))
    for index, prediction in single.items():
        other = batched[index]
        assert prediction.source == other.source == paths[index]
        if index == 2:
            assert "cannot identify image" in prediction.error
            assert prediction.error == other.error
            continue
        for a, b in zip(
            detections({"instances": prediction.instances}),
            detections({"instances": other.instances}),
            strict=True,
        ):
            assert len(a) > 0
            assert torch.allclose(a.float(), b.float(), atol=1e-3)


def test_exif_orientation_is_applied_as_detectron2_does(tmp_path):
    make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "EQL", *LOW)
    predictor = load(str(tmp_path / "run"))
    pixels = np.random.default_rng(3).integers(0, 256, (40, 60, 3), np.uint8)
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[274] = 6  # to be turned by 90 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")
    names = [str(tmp_path / f"{name}.png") for name in ("turned", "upright")]
    first, second = (p.instances for p in predictor.predict(names))
    assert first.image_size == second.image_size == (60, 40)
    assert_equal(detections({"instances": first}), detections({"instances": second}))


class TestRefused:
    def test_directory_without_weights(self, tmp_path):
        make_run(tmp_path, "faster")
        os.remove(tmp_path / "run" / "model_final.pth")
        with pytest.raises(ValueError, match="holds no weights"):
            load(str(tmp_path / "run"))

    def test_directory_without_config(self, tmp_path):
        make_run(tmp_path, "faster")
        path = tmp_path / "run" / "model_final.pth"
        saved = torch.load(path)
        del saved["config"]
        torch.save(saved, path)
        os.remove(tmp_path / "run" / "config.yaml")
        with pytest.raises(ValueError, match=r"config\.yaml is missing"):
            load(str(tmp_path / "run"))

    def test_no_names(self, tmp_path, image):
        make_run(tmp_path, "faster", *LOW, classes=False)
        with pytest.raises(ValueError, match="holds no class names"):
            load(str(tmp_path / "run"))
        assert load(str(tmp_path / "run"), names=NAMES).names == list(NAMES)
        with pytest.raises(ValueError, match="has 6 classes, and 2 names"):
            load(str(tmp_path / "run"), names=NAMES[:2])

    def test_another_architecture(self, tmp_path):
        make_run(tmp_path, "faster")
        with pytest.raises(ValueError, match="checkpoint of another model"):
            load(str(tmp_path / "run"), overrides=["MODEL.MASK_ON", True])

    def test_another_classifier(self, tmp_path):
        make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "EQL")
        with pytest.raises(ValueError, match="trained with sigmoid scores"):
            load(str(tmp_path / "run"), overrides=["MODEL.BALANCE.CLS_LOSS", ""])

    def test_no_such_source(self, tmp_path):
        with pytest.raises(ValueError, match="does not exist"):
            load(str(tmp_path / "nothing"))
        make_run(tmp_path, "faster")
        with pytest.raises(ValueError, match="did you mean model_final.pth"):
            load(str(tmp_path / "run"), weights="model_finl.pth")


def test_default_predictor_without_counts_and_weights_names_both(tmp_path):
    make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "EQL", classes=False)
    with pytest.raises(ValueError, match="DATASETS.TRAIN"):
        stock_predictor(tmp_path, "MODEL.WEIGHTS", "")


def test_metadata_of_registered_sets_stays(tmp_path):
    make_run(tmp_path, "faster", "MODEL.BALANCE.CLS_LOSS", "EQL")
    before = MetadataCatalog.get("mini_lvis_val").thing_classes
    stock_predictor(tmp_path, "DATASETS.TEST", ("mini_lvis_val",))
    assert MetadataCatalog.get("mini_lvis_val").thing_classes == before
