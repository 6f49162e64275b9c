"""Bad input: one message that names the key or file and says what it must be."""

import json
import re

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.file_io import PathManager

from d2_balance.data import register_json
from d2_balance.engine.setup.validate import validate

from .conftest import TRAIN, run_cfg, write_dataset

BALANCE = "MODEL.BALANCE."
CLS = [BALANCE + "CLS_LOSS", "SigmoidCE"]


def message(cfg, **arguments):
    with pytest.raises(ValueError) as error:
        validate(cfg, **arguments)
    return str(error.value)


@pytest.fixture
def register(tmp_path):
    """Registers a changed copy of the small dataset; returns its name."""
    names = []

    def make(change):
        name = f"changed_{len(names)}"
        json_file, images = write_dataset(tmp_path / name)
        with open(json_file) as file:
            data = json.load(file)
        change(data)
        with open(json_file, "w") as file:
            json.dump(data, file)
        names.append(name)
        register_json(name, json_file, images)
        return name

    yield make
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize("kind", ["retinanet", "faster", "mask", "cascade"])
def test_a_good_config_passes(dataset, tmp_path, kind):
    validate(run_cfg(tmp_path, *CLS, kind=kind))


@pytest.mark.parametrize(
    ("kind", "stock", "expected"),
    [
        (
            "retinanet",
            ["MODEL.META_ARCHITECTURE", "RetinaNet"],
            "set MODEL.META_ARCHITECTURE BalancedRetinaNet in place of RetinaNet",
        ),
        (
            "faster",
            ["MODEL.META_ARCHITECTURE", "GeneralizedRCNN"],
            "set MODEL.META_ARCHITECTURE BalancedRCNN in place of GeneralizedRCNN",
        ),
        (
            "faster",
            ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"],
            "set MODEL.ROI_HEADS.NAME BalancedStandardROIHeads in place of StandardROIHeads",
        ),
        (
            "cascade",
            ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads"],
            "set MODEL.ROI_HEADS.NAME BalancedCascadeROIHeads in place of CascadeROIHeads",
        ),
        (
            "faster",
            ["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"],
            "ROI_HEADS.NAME BalancedRes5ROIHeads in place of Res5ROIHeads",
        ),
        (
            "faster",
            [
                "MODEL.META_ARCHITECTURE",
                "GeneralizedRCNN",
                "MODEL.ROI_HEADS.NAME",
                "StandardROIHeads",
            ],
            "BalancedRCNN in place of GeneralizedRCNN and MODEL.ROI_HEADS.NAME BalancedStandard",
        ),
    ],
)
@pytest.mark.parametrize(
    "loss",
    [
        CLS,
        [BALANCE + "BOX_LOSS", "GIoU"],
        [BALANCE + "BETA_DECAY.ENABLED", "True"],
    ],
)
def test_a_stock_model_that_would_ignore_the_loss_is_refused(
    dataset, tmp_path, kind, stock, expected, loss
):
    text = message(run_cfg(tmp_path, *stock, *loss, kind=kind))
    assert text.startswith(loss[0]) and expected in text
    validate(run_cfg(tmp_path, *stock, kind=kind))  # without a loss it is Detectron2 as ever


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["MODEL.META_ARCHITECTURE", "BalancedRetina"], r"did you mean BalancedRetinaNet"),
        (["MODEL.ROI_HEADS.NAME", "BalancedROIHeads"], r"ROI_HEADS.NAME.*did you mean Balanced"),
        (
            ["MODEL.BACKBONE.NAME", "x"],
            r"MODEL.BACKBONE.NAME: 'x' is unknown; must be one of build_",
        ),
        ([BALANCE + "CLS_LOSS", "Fokal"], r"MODEL.BALANCE.CLS_LOSS: 'Fokal' is unknown"),
        (
            [BALANCE + "BOX_LOSS", "L3"],
            r"MODEL.BALANCE.BOX_LOSS: 'L3' is unknown; must be one of.*GIoU",
        ),
        ([BALANCE + "REWEIGHTERS", "['X']"], r"MODEL.BALANCE.REWEIGHTERS: 'X' is unknown"),
        (
            [BALANCE + "CLS_LOSS", "GHMC", BALANCE + "GHMC.BINS", "0"],
            r"MODEL.BALANCE.GHMC: .*bins is 0; must be an integer of at least 1",
        ),
        (
            [BALANCE + "CLS_LOSS", "EQL", BALANCE + "EQL.LAMBDA", "2.0"],
            r"MODEL.BALANCE.EQL: .*lambda_ is 2.0; must be",
        ),
        (
            [BALANCE + "BETA_DECAY.ENABLED", "True", BALANCE + "BETA_DECAY.PERIOD", "0"],
            r"MODEL.BALANCE.BETA_DECAY.PERIOD is 0",
        ),
        (
            [BALANCE + "CLS_LOSS_WEIGHT", "-1.0"],
            r"MODEL.BALANCE.CLS_LOSS_WEIGHT is -1.0; must be .* 0",
        ),
        (
            [BALANCE + "BOX_LOSS_WEIGHT", "-0.5"],
            r"MODEL.BALANCE.BOX_LOSS_WEIGHT is -0.5; must be .* 0",
        ),
        ([BALANCE + "PRIOR_PROB", "1.0"], r"MODEL.BALANCE.PRIOR_PROB is 1.0; .* in \(0, 1\)"),
        (["MODEL.RETINANET.PRIOR_PROB", "0."], r"MODEL.RETINANET.PRIOR_PROB is 0.0; .*\(0, 1\)"),
        (
            [*CLS[:1], "EQL", BALANCE + "CLASS_COUNTS_FILE", "checkpoint"],
            r"CLASS_COUNTS_FILE \"checkpoint\" is for --eval-only; in training it must be",
        ),
        (["SOLVER.AMP.PRECISION", "half"], r"SOLVER.AMP.PRECISION is 'half'; .* 'fp16', 'bf16'"),
        (["SOLVER.AMP.INIT_SCALE", "0.0"], r"SOLVER.AMP.INIT_SCALE is 0.0; .* above 0"),
        (
            ["SOLVER.GRAD_ACCUM_STEPS", "3"],
            r"SOLVER.GRAD_ACCUM_STEPS is 3; .*IMS_PER_BATCH 2 over 1 proc",
        ),
        (
            ["DATALOADER.SAMPLER_TRAIN", "ClassAwareSampler"],
            r"SAMPLER_TRAIN: 'ClassAwareSampler' is unknown; must be one of TrainingSampler, "
            r"RepeatFactorTrainingSampler, .*ClassAwareTrainingSampler",
        ),
        (
            ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"],
            r"DATALOADER.REPEAT_THRESHOLD is 0.0, with which .* repeats no image; must be",
        ),
        (["DATASETS.TRAIN", "()"], r"DATASETS.TRAIN is empty"),
        (
            ["DATASETS.TRAIN", "('engine_trian',)"],
            r"DATASETS.TRAIN: the dataset 'engine_trian' is not registered; did you mean "
            r"engine_train.*DATASETS.REGISTER",
        ),
        (["DATASETS.TEST", "('coco_2017_vall',)"], r"DATASETS.TEST: .*coco_2017_val"),
        (
            ["MODEL.WEIGHTS", "nowhere/model.pth"],
            r"MODEL.WEIGHTS: the file 'nowhere/model.pth' does not exist; must be",
        ),
        (
            ["MODEL.RETINANET.NUM_CLASSES", "80"],
            r"'engine_train' has 6 classes, but MODEL.RETINANET.NUM_CLASSES is 80: set "
            r"MODEL.RETINANET.NUM_CLASSES to 6",
        ),
    ],
)
def test_the_key_and_what_is_allowed_are_named(dataset, tmp_path, overrides, expected):
    assert re.search(expected, message(run_cfg(tmp_path, *overrides)))


def test_a_data_set_whose_file_is_not_there_is_named(dataset, tmp_path, monkeypatch):
    text = message(run_cfg(tmp_path, "DATASETS.TRAIN", "('coco_2014_train',)"))
    assert "'coco_2014_train' cannot be loaded from" in text and "$DETECTRON2_DATASETS" in text
    assert "instances_train2014.json" in text


def test_unreadable_json_is_named(dataset, tmp_path, register):
    name = register(lambda data: None)
    path = MetadataCatalog.get(name).json_file
    with open(path, "w") as file:
        file.write('{"images": [')
    text = message(run_cfg(tmp_path, "DATASETS.TEST", f"('{name}',)"))
    assert path in text and "not valid JSON" in text


def test_missing_images_are_named(dataset, tmp_path, register):
    name = register(lambda data: data["images"][0].update(file_name="lost.png"))
    text = message(run_cfg(tmp_path, "DATASETS.TRAIN", f"('{name}',)"))
    assert "1 of 12 images are missing" in text and "lost.png" in text


@pytest.mark.parametrize("loss", ["EQL", "Federated"])
def test_image_level_labels_are_used_where_the_data_have_them(
    dataset, tmp_path, register, loss, log
):
    def strip(data):
        for image in data["images"]:
            image["neg_category_ids"] = []

    name = register(strip)
    overrides = ["DATASETS.TRAIN", f"('{TRAIN}', '{name}')", BALANCE + "CLS_LOSS", loss]
    key = f"{BALANCE}{loss.upper()}.USE_IMAGE_LEVEL_LABELS"
    text = message(run_cfg(tmp_path, *overrides, key, "always"))
    assert repr(name) in text and f"set {key} never" in text
    validate(run_cfg(tmp_path, *overrides, key, "never"))
    log.clear()
    cfg = run_cfg(tmp_path, *overrides)
    assert cfg.MODEL.BALANCE[loss.upper()].USE_IMAGE_LEVEL_LABELS == "auto"
    validate(cfg)
    (used, unused) = [text for text in log if text.startswith(f"{key} is auto")]
    assert used == f"{key} is auto: {TRAIN} has image-level labels, and the loss uses them."
    assert unused == f"{key} is auto: {name} has none."


def test_categories_of_training_and_test_must_agree(dataset, tmp_path, register):
    name = register(lambda data: data["categories"][2].update(name="zebra"))
    text = message(run_cfg(tmp_path, "DATASETS.TEST", f"('{name}',)"))
    assert repr(name) in text and "'zebra'" in text and "'engine_train'" in text


def test_a_training_set_without_annotations_is_named(dataset, tmp_path, register):
    name = register(lambda data: data["annotations"].clear())
    text = message(run_cfg(tmp_path, "DATASETS.TRAIN", f"('{name}',)"))
    assert f"{name!r} has 12 images and no annotation" in text


def test_mask_heads_need_masks(dataset, tmp_path, register):
    def strip(data):
        for annotation in data["annotations"]:
            del annotation["segmentation"]

    train = ["DATASETS.TRAIN", f"('{register(strip)}',)"]
    assert "MODEL.MASK_ON False" in message(run_cfg(tmp_path, *train, kind="mask"))
    validate(run_cfg(tmp_path, *train, kind="faster"))
    validate(run_cfg(tmp_path, *train, "MODEL.MASK_ON", "True"))  # RetinaNet has no masks


def test_evaluation_needs_weights_and_no_training_set(dataset, tmp_path):
    cfg = run_cfg(tmp_path, "DATASETS.TRAIN", "('gone',)")
    assert "--eval-only needs MODEL.WEIGHTS" in message(cfg, eval_only=True)
    (tmp_path / "w.pth").touch()
    cfg.MODEL.WEIGHTS = str(tmp_path / "w.pth")
    validate(cfg, eval_only=True)
    cfg.DATASETS.TEST = ()
    assert "DATASETS.TEST is empty" in message(cfg, eval_only=True)


def test_a_checkpoint_to_resume_from_makes_weights_needless(dataset, tmp_path):
    cfg = run_cfg(tmp_path, "MODEL.WEIGHTS", "nowhere.pth")
    (tmp_path / "last_checkpoint").write_text("model_final.pth")
    validate(cfg, resume=True)
    assert "MODEL.WEIGHTS" in message(cfg)


def test_weights_that_cannot_be_downloaded_are_named(dataset, tmp_path, monkeypatch):
    def fail(path):
        raise OSError("no route to host")

    monkeypatch.setattr(PathManager, "get_local_path", fail)
    text = message(run_cfg(tmp_path, "MODEL.WEIGHTS", "https://example.org/model.pkl"))
    assert "MODEL.WEIGHTS: https://example.org/model.pkl cannot be downloaded" in text
    assert "no route to host" in text


def test_images_of_another_size_stop_the_run_before_it_starts(register, tmp_path, dataset):
    name = register(lambda data: data["images"][4].update(width=65))
    cfg = run_cfg(tmp_path, *CLS, "DATASETS.TRAIN", (name,))
    text = message(cfg)
    assert text.startswith(f"{name}: 1 of 12 checked images are not of the size")
    assert "image 5 (" in text and "is 64 x 48, not 65 x 48; give the images that" in text


def test_classes_that_training_never_saw_are_named(register, tmp_path, caplog, dataset):
    def change(data):
        data["annotations"] = [a for a in data["annotations"] if a["category_id"] != 1]

    name = register(change)
    validate(run_cfg(tmp_path, *CLS, "DATASETS.TRAIN", (name,)))
    assert f"without an object in {name}, where AP will be 0: class0; add training" in caplog.text
    caplog.clear()
    validate(run_cfg(tmp_path, *CLS))
    assert "have no object" not in caplog.text
