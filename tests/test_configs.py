"""Every file of configs/ builds its model and takes one training step on the CPU.

Models have their full width, but for the second stages of the challenge: the first ones have it.
"""

import functools
from pathlib import Path

import pytest
import torch
from detectron2 import model_zoo
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage

from d2_balance.data.class_counts import ClassCounts
from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.hooks.beta_decay import BetaDecay
from d2_balance.engine.setup.validate import check_losses_are_used, check_registered_names
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.postprocess.statistics import CalibrationStatistics
from d2_balance.reweight import REWEIGHTERS
from d2_balance.sampling import ANCHOR_SAMPLERS, PROPOSAL_SAMPLERS
from d2_balance.utils.config_tree import leaves

from .conftest import BALANCED

CONFIGS = Path(__file__).parents[1] / "configs"
FILES = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob("*.yaml")
    if path.parent.name not in ("recipes", "sweeps")  # see tests/recipes and tests/sweep
)
QUICK = [file for file in FILES if file.startswith("quick_schedules/")]
# The demo trains until it has learned something.
DEMO = [file for file in QUICK if file.endswith("_demo.yaml") or "Base-mini_lvis" in file]
SMOKE = [f for f in QUICK if f not in DEMO and "Base-" not in f]
# These files are the EQL release and its baselines; other methods have their own schedules.
LVIS = [
    file
    for file in FILES
    if file.startswith("LVIS")
    and any(f"_{n}" in file for n in ("eql_", "eql.", "softmax.", "sigmoid."))
    and "softmax_eql" not in file
    and "balanced_softmax" not in file
]
HEIGHT, WIDTH = 96, 128
MAX_LINES, MAX_QUICK_ITERATIONS = 15, 40


@functools.cache
def _read(file):
    return read_config(str(CONFIGS / file))


def read(file):
    return _read(file).clone()


def num_classes(cfg):
    dense = {"BalancedRetinaNet": "RETINANET", "BalancedFCOS": "FCOS"}
    return cfg.MODEL[dense.get(cfg.MODEL.META_ARCHITECTURE, "ROI_HEADS")].NUM_CLASSES


def cpu_cfg(file, directory):
    """The config of a file without weights and data, with few proposals."""
    cfg = read(file)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    for node in (cfg.MODEL.RESNETS, cfg.MODEL.FPN, cfg.MODEL.RETINANET):
        node.NORM = node.NORM.replace("SyncBN", "BN")  # what SyncBN is on one process
    for phase in ("TRAIN", "TEST"):
        cfg.MODEL.RPN[f"PRE_NMS_TOPK_{phase}"] = cfg.MODEL.RPN[f"POST_NMS_TOPK_{phase}"] = 20
    cfg.TEST.DETECTIONS_PER_IMAGE = 5
    if file.startswith("LVIS-challenge/lvis_"):
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    classes = num_classes(cfg)
    counts = torch.linspace(1000, 1, classes).long()
    names = tuple(f"class{i}" for i in range(classes))
    path = str(directory / "statistics.json")
    ClassCounts(counts, counts * 2, 100_000, names).save(path)
    cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = path
    if cfg.MODEL.BALANCE.CALIBRATION.NAME in ("fracal", "logn"):  # "" needs the training set
        path = str(directory / "calibration.json")
        CalibrationStatistics(tuple(names), *((1.5,) * classes,) * 3).save(path)
        cfg.MODEL.BALANCE.CALIBRATION.STATISTICS = path
    return cfg


def make_batch(cfg):
    """Two images of noise with three objects each, as the dataset mapper gives them."""
    corner = torch.tensor([[4.0, 4.0], [30.0, 20.0], [70.0, 40.0]])
    boxes = torch.cat(
        [corner, corner + torch.tensor([[24.0, 20.0], [36.0, 60.0], [48.0, 48.0]])], 1
    )
    batch = []
    for index in range(2):
        objects = Instances(
            (HEIGHT, WIDTH),
            gt_boxes=Boxes(boxes + index),
            gt_classes=torch.randint(num_classes(cfg), (3,)),
        )
        if cfg.MODEL.MASK_ON:
            objects.gt_masks = make_masks(objects.gt_boxes.tensor, cfg.INPUT.MASK_FORMAT)
        batch.append(
            {
                "image": torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8),
                "instances": objects,
                "neg_category_ids": [1],
                "not_exhaustive_category_ids": [2],
            }
        )
    return batch


def make_masks(boxes, mask_format):
    if mask_format == "polygon":
        corners = [[x0, y0, x1, y0, x1, y1, x0, y1] for x0, y0, x1, y1 in boxes.tolist()]
        return PolygonMasks([[corner] for corner in corners])
    masks = torch.zeros(len(boxes), HEIGHT, WIDTH, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.long().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    return BitMasks(masks)


def tame(model):
    """Gives frozen batch norms scales as trained weights have them.

    Untrained ones pass on what they get: images in [0, 255], and residual blocks that double the
    variance 33 times in R-101.
    """
    for name, module in model.named_modules():
        if isinstance(module, FrozenBatchNorm2d):
            if name.endswith("stem.conv1.norm"):
                module.weight.fill_(model.pixel_std.mean() / 57)
            elif name.endswith("conv3.norm"):
                module.weight.fill_(0.2)


@pytest.mark.parametrize("file", FILES)
def test_file_builds_takes_one_training_step_and_predicts(file, tmp_path):
    torch.manual_seed(0)
    cfg = cpu_cfg(file, tmp_path)
    model = build_model(cfg).train()
    tame(model)
    BetaDecay.from_config(cfg, model)
    optimizer = BalancedTrainer.build_optimizer(cfg, model)
    BalancedTrainer.build_lr_scheduler(cfg, optimizer)  # the first step is one of the warm-up
    batch = make_batch(cfg)
    if file.startswith("LVIS-challenge/"):
        del batch[1:]  # X-101 with deformable convolution takes seconds for each
    with EventStorage():
        losses = model(batch)
    assert all(torch.isfinite(loss) for loss in losses.values()), losses
    heads = ("loss_cls", "loss_box_reg", "loss_mask", "loss_fcos")
    found = [key for key in losses if key.startswith(heads)]
    assert any(key.startswith("loss_mask") for key in found) == cfg.MODEL.MASK_ON
    assert all(losses[key] > 0 for key in found), losses  # an object was matched everywhere
    sum(losses.values()).backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert [name for name, p in trained.items() if p.grad is None] == []
    assert [name for name, p in trained.items() if not p.grad.isfinite().all()] == []
    optimizer.step()
    assert [name for name, p in trained.items() if not p.isfinite().all()] == []
    with torch.no_grad():
        found = model.eval()(batch[:1])[0]["instances"]
    assert len(found) <= cfg.TEST.DETECTIONS_PER_IMAGE
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    assert found.has("pred_masks") == cfg.MODEL.MASK_ON


@pytest.mark.parametrize("file", FILES)
def test_names_are_registered_and_the_schedule_is_in_order(file):
    cfg = read(file)
    check_registered_names(cfg)
    check_losses_are_used(cfg)
    own = {
        entry["name"] if isinstance(entry, dict) else entry[0] for entry in cfg.DATASETS.REGISTER
    }
    unknown = {*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST} - own - set(DatasetCatalog.list())
    assert not unknown
    times = [0, *cfg.SOLVER.STEPS, cfg.SOLVER.MAX_ITER]
    assert times == sorted(set(times))


@pytest.mark.parametrize("file", [f for f in FILES if not Path(f).name.startswith("Base-")])
def test_file_is_a_short_difference_over_a_base(file):
    lines = (CONFIGS / file).read_text().splitlines()
    assert len(lines) <= MAX_LINES
    assert any(line.startswith("_BASE_: ") for line in lines)


@pytest.mark.parametrize("file", [f for f in QUICK if f not in DEMO])
def test_quick_schedule_takes_forty_iterations_at_most(file):
    assert read(file).SOLVER.MAX_ITER <= MAX_QUICK_ITERATIONS
    assert read(file).TEST.EVAL_PERIOD == 0  # once, at the end


def test_quick_schedules_write_to_directories_of_their_own():
    assert [read(file).OUTPUT_DIR for file in SMOKE] == [f"output/{Path(f).stem}" for f in SMOKE]


def test_every_registered_method_has_a_quick_schedule():
    nodes = [read(file).MODEL.BALANCE for file in SMOKE]
    used = {
        name
        for n in nodes
        for name in (
            n.CLS_LOSS,
            n.BOX_LOSS,
            *n.REWEIGHTERS,
            n.PROPOSAL_SAMPLER,
            n.ANCHOR_SAMPLER,
        )
    }
    registered = {
        name
        for part in (CLS_LOSSES, BOX_LOSSES, REWEIGHTERS, PROPOSAL_SAMPLERS, ANCHOR_SAMPLERS)
        for name, _ in part
    }
    assert registered - used == set()


RESAMPLING = {"DATALOADER.SAMPLER_TRAIN", "DATALOADER.REPEAT_THRESHOLD"}
SCHEDULE = {"SOLVER.STEPS", "SOLVER.MAX_ITER"}
BASELINES = [
    ("COCO-Detection/retinanet_R_50_FPN_1x_focal", "COCO-Detection/retinanet_R_50_FPN_1x", set()),
    ("COCO-Detection/retinanet_R_101_FPN_3x_focal", "COCO-Detection/retinanet_R_101_FPN_3x", set()),
    ("COCO-Detection/faster_rcnn_R_50_FPN_1x", "COCO-Detection/faster_rcnn_R_50_FPN_1x", set()),
    (
        "COCO-Detection/mask_rcnn_R_50_FPN_1x",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
        set(),
    ),
    (
        "COCO-Detection/cascade_mask_rcnn_R_50_FPN_1x",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x",
        set(),
    ),
    (
        "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_softmax",
        "LVISv0.5-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
        RESAMPLING,
    ),
    (
        "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_softmax",
        "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x",
        RESAMPLING | SCHEDULE,
    ),
]


@pytest.mark.parametrize(("file", "stock", "differences"), BASELINES)
def test_baselines_have_the_settings_of_the_model_zoo(file, stock, differences):
    expected = get_cfg()
    expected.merge_from_file(model_zoo.get_config_file(f"{stock}.yaml"))
    expected = dict(leaves(expected))
    for key in ("MODEL.META_ARCHITECTURE", "MODEL.ROI_HEADS.NAME"):
        expected[key] = BALANCED.get(expected[key], expected[key])
    # keys that this package adds are not among Detectron2's
    found = {key: value for key, value in leaves(read(f"{file}.yaml")) if key in expected}
    assert found.keys() == expected.keys()
    assert {key for key, value in found.items() if value != expected[key]} == differences


@pytest.mark.parametrize("file", LVIS)
def test_lvis_files_keep_the_settings_of_the_eql_release(file):
    cfg = read(file)
    v1 = file.startswith("LVISv1")
    assert (1203 if v1 else 1230) == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST == 0.0001
    assert cfg.TEST.DETECTIONS_PER_IMAGE == 300
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH) == (90000, 16)
    assert (cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler") == ("_rfs" in file)
    if "_rfs" in file:
        assert cfg.DATALOADER.REPEAT_THRESHOLD == 0.0005
    if "_eql" in file:
        assert cfg.MODEL.BALANCE.CLS_LOSS == "EQL"
        assert (0.0011 if v1 else 0.00177) == cfg.MODEL.BALANCE.EQL.LAMBDA
        assert ("_image_labels" in file) == (
            cfg.MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS == "always"
        )


# Values of the papers' releases; beta_decay has no published ones.
PUBLISHED = {
    "_focal": {
        "BALANCE.FOCAL.ALPHA": 0.25,
        "BALANCE.FOCAL.GAMMA": 2.0,
        "RETINANET.PRIOR_PROB": 0.01,
    },
    "_dr": {
        "BALANCE.DR.L": 6.0,
        "BALANCE.DR.TAU": 4.0,
        "BALANCE.DR.MARGIN": 0.5,
        "BALANCE.DR.SCOPE": "image",
        "RETINANET.IOU_THRESHOLDS": [0.5],
        "RETINANET.IOU_LABELS": [0, 1],
        "RETINANET.PRIOR_PROB": 0.5,
    },
    "_ghm": {
        "BALANCE.GHMC.BINS": 30,
        "BALANCE.GHMC.MOMENTUM": 0.75,
        "BALANCE.GHMC.PER_LEVEL": True,
        "BALANCE.GHMR.MU": 0.02,
        "BALANCE.GHMR.BINS": 10,
        "BALANCE.GHMR.MOMENTUM": 0.7,
        "BALANCE.GHMR.PER_LEVEL": True,
        "BALANCE.BOX_LOSS_WEIGHT": 10.0,
        "RETINANET.PRIOR_PROB": 0.01,
    },
}


@pytest.mark.parametrize("method", PUBLISHED)
def test_coco_files_keep_the_published_settings(method):
    files = [f for f in FILES if f.startswith("COCO-Detection/retinanet") and method in f]
    assert len(files) >= 2
    for file in files:
        found = dict(leaves(read(file).MODEL))
        assert {key: found[key] for key in PUBLISHED[method]} == PUBLISHED[method], file
        assert read(file).SOLVER.BASE_LR == 0.01


CHALLENGE = [f for f in FILES if f.startswith("LVIS-challenge/") and "Base-" not in f]
BACKBONES = {  # depth, groups, width of a group
    "_R_50_": (50, 1, 64),
    "_R_101_": (101, 1, 64),
    "_X_101_32x8d_": (101, 32, 8),
    "_X_101_64x4d_": (101, 64, 4),
}


def test_both_stages_of_the_challenge_have_every_backbone_with_both_heads():
    for stage in ("coco", "lvis_v0.5", "lvis_v1"):
        for heads in ("mask_rcnn", "cascade_mask_rcnn"):
            for backbone in BACKBONES:
                assert f"LVIS-challenge/{stage}_{heads}{backbone}FPN_dcn.yaml" in CHALLENGE


@pytest.mark.parametrize("file", CHALLENGE)
def test_challenge_files_are_what_their_names_say(file):
    cfg = read(file)
    node = cfg.MODEL.RESNETS
    (backbone,) = (value for part, value in BACKBONES.items() if part in file)
    assert backbone == (node.DEPTH, node.NUM_GROUPS, node.WIDTH_PER_GROUP)
    assert node.DEFORM_ON_PER_STAGE == [False, True, True, True]
    assert node.NORM == cfg.MODEL.FPN.NORM == "SyncBN" and cfg.MODEL.BACKBONE.FREEZE_AT == 0
    assert cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    heads = "BalancedCascadeROIHeads" if "cascade" in file else "BalancedStandardROIHeads"
    assert heads == cfg.MODEL.ROI_HEADS.NAME
    assert f"output/LVIS-challenge/{Path(file).stem}" == cfg.OUTPUT_DIR
    if "/coco_" in file:
        assert cfg.DATASETS.TRAIN == ("coco_2017_train",)
        return
    dataset, classes = ("lvis_v1", 1203) if "/lvis_v1_" in file else ("lvis_v0.5", 1230)
    assert (f"{dataset}_train",) == cfg.DATASETS.TRAIN
    assert classes == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    assert cfg.MODEL.BALANCE.CLS_LOSS == "EQL"
    assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
    first = "LVIS-challenge/coco_" + file.split("_", 2)[2]  # lvis_v0.5_ and lvis_v1_
    assert f"{read(first).OUTPUT_DIR}/model_final.pth" == cfg.MODEL.WEIGHTS
