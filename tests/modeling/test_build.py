"""Bad configuration is refused when the model is built, with a message that names the key."""

import json

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, BalancedSoftmaxLoss, EQLLoss
from d2_balance.modeling import BalancedFastRCNNOutputLayers, BalancedRetinaNet
from d2_balance.reweight import REWEIGHTERS, Reweighter

from ..conftest import CLASSES, small_cfg


def refuse(match, kind, *overrides, error=ValueError):
    with pytest.raises(error, match=match):
        build_model(small_cfg(kind, *overrides))


@pytest.mark.parametrize("key", ["CLS_LOSS", "BOX_LOSS"])
@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_unknown_loss_lists_the_known_ones(kind, key):
    known = {"CLS_LOSS": "DR, .*EQL", "BOX_LOSS": "GHMR, GIoU"}[key]
    refuse(
        rf"MODEL\.BALANCE\.{key}: 'Fokal' is unknown; must be one of .*{known}",
        kind,
        f"MODEL.BALANCE.{key}",
        "Fokal",
    )


def test_unknown_reweighter_is_named():
    refuse(
        r"MODEL\.BALANCE\.REWEIGHTERS: 'Nobody' is unknown; must be one of ",
        "faster",
        "MODEL.BALANCE.REWEIGHTERS",
        ["Nobody"],
    )


@pytest.mark.parametrize("key", ["MODEL.BALANCE.CLSLOSS", "MODEL.BALANCE.GHMC.BIN", "MODEL.BALANS"])
def test_unknown_key_is_named(key):
    with pytest.raises(ValueError, match=key.split(".")[-1]):
        small_cfg("faster", key, "1")


def test_a_key_of_an_earlier_version_says_the_new_name():
    with pytest.raises(ValueError, match=r"MODEL\.BALANCE\.EQL\.LAMBDA;"):
        small_cfg("faster", "MODEL.BALANCE.EQL.LAMBDA_", "0.1")


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("GHMC.BINS", 0, "bins is 0; must be an integer of at least 1"),
        ("GHMC.MOMENTUM", 1.5, r"momentum is 1.5; must be a number in \[0, 1\)"),
        ("GHMC.EMA_MODE", "fast", "ema_mode is 'fast'; must be one of official"),
        ("DR.TAU", -1.0, "tau is -1.0; must be a number above 0"),
        ("DR.SCOPE", "gpu", "scope is 'gpu'; must be one of image, batch"),
        ("EQL.LAMBDA", 2.0, r"lambda_ is 2.0; must be a number in \[0, 1\]"),
        ("EQL.THRESHOLD", "hard", "threshold is 'hard'; must be one of step"),
        ("FOCAL.GAMMA", -1.0, "gamma is -1.0; must be a number of at least 0"),
    ],
)
def test_values_out_of_range_name_the_node(key, value, rule, counts_file):
    node = key.split(".")[0]
    name = {cls.upper(): cls for cls, _ in CLS_LOSSES}[node]
    overrides = ["MODEL.BALANCE.CLS_LOSS", name, f"MODEL.BALANCE.{key}", value]
    overrides += ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    refuse(rf"MODEL\.BALANCE\.{node}: {name}: {rule}", "retinanet", *overrides)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("GHMR.BINS", -2, "bins is -2; must be an integer of at least 1"),
        ("GHMR.MU", 0.0, "mu is 0.0; must be a number above 0"),
        ("SMOOTHL1.BETA", -0.1, "beta is -0.1; must be a number of at least 0"),
    ],
)
@pytest.mark.parametrize("kind", ["retinanet", "faster"])
def test_values_of_box_losses_out_of_range_name_the_node(kind, key, value, rule):
    node = key.split(".")[0]
    name = {cls.upper(): cls for cls, _ in BOX_LOSSES}[node]
    overrides = ["MODEL.BALANCE.BOX_LOSS", name, f"MODEL.BALANCE.{key}", value]
    refuse(rf"MODEL\.BALANCE\.{node}: {name}: {rule}", kind, *overrides)


def test_softmax_loss_on_a_sigmoid_head():
    refuse(
        r"CLS_LOSS SoftmaxCE is a softmax loss and RetinaNet has a sigmoid head; losses that work "
        r"there: .*Focal",
        "retinanet",
        "MODEL.BALANCE.CLS_LOSS",
        "SoftmaxCE",
    )


def test_loss_with_outputs_besides_the_classes_on_a_head_without():
    refuse(
        r"CLS_LOSS EQLv2 needs outputs besides those of the classes and RetinaNet has none; losses "
        r"that work there: .*EFL, EQL, Federated, .*SigmoidCE",
        "retinanet",
        "MODEL.BALANCE.CLS_LOSS",
        "EQLv2",
    )


@pytest.mark.parametrize(("key", "name"), [("CLS_LOSS", "GHMC"), ("BOX_LOSS", "GHMR")])
def test_levels_on_a_head_without_levels(key, name):
    refuse(
        rf"{name}\.PER_LEVEL True needs feature levels and RoI heads have none; set it to False",
        "faster",
        f"MODEL.BALANCE.{key}",
        name,
        f"MODEL.BALANCE.{name}.PER_LEVEL",
        True,
    )


@pytest.mark.parametrize(
    ("key", "name", "works"), [("CLS_LOSS", "DR", "Focal"), ("BOX_LOSS", "GHMR", "SmoothL1")]
)
def test_sample_weights_on_a_loss_over_a_set(monkeypatch, key, name, works):
    class Halve(Reweighter):
        def forward(self, samples, cls, box):
            return torch.full_like(samples.labels, 0.5, dtype=cls.dtype), None

    monkeypatch.setitem(REWEIGHTERS._obj_map, "Halve", Halve)
    refuse(
        rf"REWEIGHTERS Halve weights single samples and {key} {name} has no loss per sample; {key} "
        rf"that work: .*{works}",
        "retinanet",
        "MODEL.BALANCE.REWEIGHTERS",
        ["Halve"],
        f"MODEL.BALANCE.{key}",
        name,
    )
    model = build_model(small_cfg("retinanet", "MODEL.BALANCE.REWEIGHTERS", ["Halve"]))
    assert len(model.reweighters) == 1


def test_class_statistics_of_another_length(tmp_path):
    path = tmp_path / "counts.json"
    row = {"name": "a", "image_count": 1, "instance_count": 1}
    rows = [{**row, "name": f"c{i}"} for i in range(4)]
    path.write_text(json.dumps({"num_images": 10, "classes": rows}))
    refuse(
        r"CLASS_COUNTS_FILE: .*counts.json has 4 classes, but MODEL.ROI_HEADS.NUM_CLASSES is 6",
        "faster",
        "MODEL.BALANCE.CLS_LOSS",
        "EQL",
        "MODEL.BALANCE.CLASS_COUNTS_FILE",
        str(path),
    )


@pytest.mark.parametrize(
    ("kind", "cls", "loss", "name"),
    [
        (
            "faster",
            BalancedFastRCNNOutputLayers,
            EQLLoss(class_frequency=[0.1] * 4),
            "class_frequency",
        ),
        ("faster", BalancedFastRCNNOutputLayers, EQLLoss(class_frequency=[0.1]), "class_frequency"),
        (
            "faster",
            BalancedFastRCNNOutputLayers,
            BalancedSoftmaxLoss(class_count=[1]),
            "class_count",
        ),
        ("retinanet", BalancedRetinaNet, EQLLoss(class_frequency=[0.1] * 7), "class_frequency"),
    ],
)
def test_class_quantities_of_another_length_from_python(kind, cls, loss, name):
    cfg = small_cfg(kind)
    shape = () if kind == "retinanet" else (ShapeSpec(channels=8),)
    with pytest.raises(
        ValueError, match=rf"{name} has \d entries; must be one for each of the model's 6 class"
    ):
        cls(cfg, *shape, cls_loss=loss)


@pytest.mark.parametrize("values", [[0.1, 1.5], [-0.1], [[0.1, 0.2]], [float("nan")]])
def test_class_frequency_that_is_no_list_of_shares(values):
    with pytest.raises(
        ValueError, match=r"EQL: class_frequency is .*; must be K numbers in \[0, 1\]"
    ):
        EQLLoss(class_frequency=values)


def test_eql_without_counts_says_what_to_give():
    refuse(
        r"class statistics need DATASETS.TRAIN, which is empty: give "
        r"MODEL.BALANCE.CLASS_COUNTS_FILE",
        "faster",
        "MODEL.BALANCE.CLS_LOSS",
        "EQL",
    )


def test_eql_on_a_torch_data_set_says_what_to_give():
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 1

    DatasetCatalog.register("torch_images", Images)
    try:
        refuse(
            r"torch_images is a Images and no list of dicts: give "
            r"MODEL.BALANCE.CLASS_COUNTS_FILE",
            "faster",
            "MODEL.BALANCE.CLS_LOSS",
            "EQL",
            "DATASETS.TRAIN",
            ("torch_images",),
        )
    finally:
        DatasetCatalog.remove("torch_images")


def test_statistics_from_the_checkpoint_need_no_data():
    keys = ["MODEL.BALANCE.CLS_LOSS", "EQL", "MODEL.BALANCE.CLASS_COUNTS_FILE", "checkpoint"]
    model = build_model(small_cfg("faster", *keys))
    assert model.roi_heads.box_predictor.cls_loss.class_frequency.shape == (CLASSES,)


@pytest.mark.parametrize("prior", [0.0, 1.0, -0.1])
def test_prior_out_of_range(prior):
    refuse(
        r"MODEL\.BALANCE\.PRIOR_PROB: .* is not in \(0, 1\)",
        "faster",
        "MODEL.BALANCE.CLS_LOSS",
        "SigmoidCE",
        "MODEL.BALANCE.PRIOR_PROB",
        prior,
    )


@pytest.mark.parametrize("prior", [0.001, 0.3])
@pytest.mark.parametrize("name", ["SigmoidCE", "GumbelCE"])
def test_classes_start_at_the_initial_probability(name, prior):
    keys = ["MODEL.BALANCE.CLS_LOSS", name, "MODEL.BALANCE.PRIOR_PROB", prior]
    predictor = build_model(small_cfg("faster", *keys)).roi_heads.box_predictor
    scores = predictor.probabilities(predictor.cls_score.bias.unsqueeze(0))
    torch.testing.assert_close(scores[0, :-1], torch.full((CLASSES,), prior))


def test_gumbel_scores_on_a_sigmoid_head():
    refuse(
        "CLS_LOSS GumbelCE is a gumbel loss and RetinaNet has a sigmoid head; losses that work",
        "retinanet",
        "MODEL.BALANCE.CLS_LOSS",
        "GumbelCE",
    )


@pytest.mark.parametrize("key", ["USE_SIGMOID_CE", "USE_FED_LOSS"])
def test_detectron2_switches_for_other_losses_are_refused(key, monkeypatch):
    overrides = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]
    if key == "USE_FED_LOSS":
        monkeypatch.setattr(
            "detectron2.modeling.roi_heads.fast_rcnn.get_fed_loss_cls_weights",
            lambda dataset_names, freq_weight_power: torch.ones(CLASSES),
        )
        overrides += ["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", True]
    refuse("name the loss in MODEL.BALANCE.CLS_LOSS", "faster", *overrides)
