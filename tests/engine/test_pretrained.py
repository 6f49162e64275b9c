"""Weights of the model zoo, of torchvision and of files, and the table of what became of them."""

import math
import pickle

import numpy as np
import pytest
import torch
import torchvision
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.modeling import build_model
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import HTTPURLHandler

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.setup.pretrained import (
    LOADED,
    NEW,
    REINITIALIZED,
    RUN_STATE,
    SHAPE,
    UNUSED,
    WeightRow,
    cached_file,
    check_weights_file,
    load_pretrained,
    weights_table,
)
from d2_balance.engine.setup.torchvision_weights import torchvision_url

from ..conftest import small_cfg
from .conftest import run_cfg


def stock_checkpoint(directory, kind, classes=80, *overrides):
    """What stock Detectron2 saves of a model with as many classes."""
    cfg = small_cfg(kind, *overrides, balanced=False)
    cfg.MODEL.RETINANET.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    model = build_model(cfg)
    DetectionCheckpointer(model, str(directory)).save("stock", iteration=89999)
    return str(directory / "stock.pth"), model.state_dict()


def load(cfg, weights):
    cfg.MODEL.WEIGHTS = weights
    model = BalancedTrainer.build_model(cfg)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    rows = {row.name: row for row in load_pretrained(cfg, model)}
    return model.state_dict(), start, rows


def by_status(rows):
    found = {}
    for row in rows.values():
        found.setdefault(row.status, set()).add(row.name)
    return found


def test_a_stock_retinanet_loads_all_but_its_classifier(tmp_path):
    path, stock = stock_checkpoint(tmp_path, "retinanet")
    cfg = small_cfg("retinanet", "MODEL.BALANCE.CLS_LOSS", "Focal")
    now, start, rows = load(cfg, path)
    found = by_status(rows)
    classifier = {"head.cls_score.weight", "head.cls_score.bias"}
    assert found[SHAPE] == classifier
    assert found[LOADED] == stock.keys() - classifier
    assert found[NEW] == now.keys() - stock.keys()  # the normaliser, a buffer of ours
    assert rows["head.cls_score.bias"].shape == (3 * 6,)
    assert "(240,)" in rows["head.cls_score.bias"].reason  # 3 anchors x 80 classes
    assert all(torch.equal(now[name], stock[name]) for name in found[LOADED])
    assert all(torch.equal(now[name], start[name]) for name in classifier)
    prior = -math.log((1 - 0.01) / 0.01)  # MODEL.RETINANET.PRIOR_PROB
    torch.testing.assert_close(now["head.cls_score.bias"], torch.full((18,), prior))


def test_a_stock_mask_rcnn_loads_all_that_has_no_classes(tmp_path):
    path, stock = stock_checkpoint(tmp_path, "mask")
    cfg = small_cfg("mask", "MODEL.BALANCE.CLS_LOSS", "SigmoidCE")
    now, start, rows = load(cfg, path)
    found = by_status(rows)
    heads = ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
    with_classes = {f"roi_heads.{h}.{t}" for h in heads for t in ("weight", "bias")}
    assert found[SHAPE] == with_classes
    assert found[LOADED] == stock.keys() - with_classes
    assert all(torch.equal(now[name], stock[name]) for name in found[LOADED])
    assert all(torch.equal(now[name], start[name]) for name in with_classes)
    prior = -math.log((1 - 0.001) / 0.001)  # MODEL.BALANCE.PRIOR_PROB
    bias = now["roi_heads.box_predictor.cls_score.bias"]
    torch.testing.assert_close(bias, torch.full_like(bias, prior))


def test_as_many_other_classes_start_anew_where_asked_to(tmp_path):
    path, stock = stock_checkpoint(tmp_path, "retinanet", 6)
    cfg = small_cfg("retinanet", "MODEL.BALANCE.REINITIALIZE", "['cls_score']")
    now, start, rows = load(cfg, path)
    name = "head.cls_score.weight"
    assert rows[name].status == REINITIALIZED and "REINITIALIZE" in rows[name].reason
    assert torch.equal(now[name], start[name]) and not torch.equal(now[name], stock[name])
    now, _, rows = load(small_cfg("retinanet"), path)
    assert rows[name].status == LOADED and torch.equal(now[name], stock[name])


def test_a_layer_of_which_one_tensor_fits_starts_anew_as_a_whole(tmp_path):
    path, _stock = stock_checkpoint(tmp_path, "retinanet", 6)
    file = torch.load(path)
    file["model"]["head.cls_score.weight"] = torch.zeros(18, 32, 3, 3)
    file["model"]["head.cls_score.bias"] = torch.full((18,), 9.0)
    torch.save(file, path)
    now, start, rows = load(small_cfg("retinanet"), path)
    assert rows["head.cls_score.weight"].status == SHAPE
    assert rows["head.cls_score.bias"].status == REINITIALIZED
    assert torch.equal(now["head.cls_score.bias"], start["head.cls_score.bias"])  # the prior's


def test_state_of_another_run_and_tensors_of_another_head_are_named(dataset, tmp_path):
    cfg = run_cfg(tmp_path / "first", "MODEL.BALANCE.CLS_LOSS", "GHMC")
    first = BalancedTrainer(cfg)
    first.model.cls_loss.density.acc += 3
    path = str(tmp_path / "first.pth")
    weights = first.model.state_dict() | {"old.head.weight": torch.zeros(2)}
    torch.save({"model": weights}, path)
    cfg = run_cfg(tmp_path / "second", "MODEL.BALANCE.CLS_LOSS", "GHMC", "MODEL.WEIGHTS", path)
    second = BalancedTrainer(cfg)
    second.resume_or_load(resume=False)
    assert second.model.cls_loss.density.acc.sum() == 0
    state = dict(second.model.cls_loss.named_buffers(prefix="cls_loss"))
    rows = {row.name: row for row in load_pretrained(cfg, second.model, state)}
    assert rows["cls_loss.density.acc"].status == RUN_STATE
    assert rows["old.head.weight"] == WeightRow(
        "old.head.weight", UNUSED, "the model has none of this name", (2,)
    )


def test_the_table_counts_what_came_and_lists_what_did_not():
    rows = [WeightRow(f"backbone.fpn.{i}", LOADED, "", (1,)) for i in range(3)]
    rows += [WeightRow("head.cls_score.bias", SHAPE, "the file has (720,)", (27,))]
    table = weights_table(rows)
    assert "backbone.fpn.* (3)" in table
    assert "(27,)" in table and "the file has (720,)" in table
    assert table.splitlines()[-1] == "3 loaded, 1 skipped (shape)."


def test_weights_of_another_architecture_are_refused(tmp_path):
    path = str(tmp_path / "other.pth")
    torch.save({"encoder.weight": torch.zeros(2), "decoder.weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="other.pth is of another architecture.*encoder.weight"):
        load(small_cfg("retinanet"), path)


def test_an_entry_that_names_no_parameter_is_refused(tmp_path):
    path, _ = stock_checkpoint(tmp_path, "retinanet")
    cfg = small_cfg("retinanet", "MODEL.BALANCE.REINITIALIZE", "['cls_scor3']")
    with pytest.raises(ValueError, match="REINITIALIZE: 'cls_scor3'.*cls_score"):
        load(cfg, path)


# Detectron2's names of a ResNet-18 backbone
R18 = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64",
       "MODEL.RESNETS.STEM_OUT_CHANNELS", "64", "MODEL.RESNETS.WIDTH_PER_GROUP", "64",
       "MODEL.RESNETS.STRIDE_IN_1X1", "False"]  # fmt: skip


def test_a_resnet_of_torchvision_becomes_the_backbone(tmp_path, caplog):
    source = torchvision.models.resnet18(weights=None).eval()
    for module in source.modules():  # statistics that no start has
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)
            torch.nn.init.uniform_(module.running_var, 0.5, 2)
    torch.save(source.state_dict(), tmp_path / "resnet18.pth")
    cfg = small_cfg("retinanet", *R18)
    cfg.MODEL.WEIGHTS = str(tmp_path / "resnet18.pth")
    model = BalancedTrainer.build_model(cfg).eval()
    with caplog.at_level("WARNING", logger="d2_balance"):
        rows = load_pretrained(cfg, model)
    missing = [r.name for r in rows if r.status != LOADED and "bottom_up" in r.name]
    assert [name for name in missing if "num_batches" not in name] == []
    assert "INPUT.FORMAT" in caplog.text and "58.395" in caplog.text
    # the same features as torchvision's network computes
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        found = model.backbone.bottom_up(image)["res5"]
        x = source.maxpool(source.relu(source.bn1(source.conv1(image))))
        expected = source.layer4(source.layer3(source.layer2(source.layer1(x))))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_names_of_torchvision_lead_to_its_files():
    name = "torchvision://resnet50"
    assert torchvision_url(name) == torchvision.models.ResNet50_Weights.DEFAULT.url
    v1 = torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    assert torchvision_url(f"{name}/IMAGENET1K_V1") == v1
    with pytest.raises(ValueError, match="resnet50"):
        torchvision_url("torchvision://resnet55")
    with pytest.raises(ValueError, match="IMAGENET1K_V1, IMAGENET1K_V2"):
        torchvision_url(f"{name}/V9")


ZOO = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"


@pytest.mark.parametrize(
    ("weights", "url"),
    [
        (ZOO, "https://dl.fbaipublicfiles.com/detectron2/ImageNetPretrained/MSRA/R-50.pkl"),
        ("torchvision://resnet18", torchvision.models.ResNet18_Weights.DEFAULT.url),
    ],
)
def test_without_network_the_message_says_which_file_to_put_where(
    tmp_path, monkeypatch, weights, url
):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))

    def no_network(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("iopath.common.file_io.download", no_network)
    for handler in PathManager._path_handlers.values():
        if isinstance(handler, HTTPURLHandler):
            monkeypatch.setattr(handler, "cache_map", {})
    with pytest.raises(ValueError) as error:
        check_weights_file(weights)
    place = cached_file(url)
    assert url in str(error.value) and place in str(error.value)
    assert place.startswith(str(tmp_path))
    # and a file that was put there is found
    PathManager.mkdirs(place.rpartition("/")[0])
    with open(place, "wb") as file:
        file.write(b"weights")
    check_weights_file(weights)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere.pth.*torchvision://"):
        check_weights_file(str(tmp_path / "nowhere.pth"))


def test_weights_in_the_format_of_the_model_zoo_are_read(tmp_path):
    _, stock = stock_checkpoint(tmp_path, "retinanet")
    path = tmp_path / "zoo.pkl"
    arrays = {name: value.numpy() for name, value in stock.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    now, _, rows = load(small_cfg("retinanet"), str(path))
    assert rows["head.bbox_pred.bias"].status == LOADED
    assert np.array_equal(now["head.bbox_pred.bias"], arrays["head.bbox_pred.bias"])
