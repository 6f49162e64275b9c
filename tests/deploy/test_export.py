"""`d2-balance export`: exported models give what the eager one gives, or nothing is written."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from d2_balance.cli.main import main
from d2_balance.deploy import export as export_module
from d2_balance.deploy import load
from d2_balance.deploy.export import (
    BOX_TOLERANCE,
    ENDINGS,
    ONNX,
    SCORE_TOLERANCE,
    SCRIPT,
    TRACE,
    compare,
    export,
    run_exported,
)
from tests.deploy.conftest import IDS, NAMES, make_run

# few detections, whose scores lie apart, so that no two change places by rounding
FEW = (
    *("TEST.DETECTIONS_PER_IMAGE", 8, "MODEL.RETINANET.TOPK_CANDIDATES_TEST", 30),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0),
    *("MODEL.FCOS.SCORE_THRESH_TEST", 0.0),
)
MODELS = {
    "mask EQL": ("mask", "EQL"),
    "faster": ("faster", ""),
    "faster BAGS": ("faster", "BAGS"),
    "cascade": ("cascade", "BalancedSoftmax"),
    "retinanet": ("retinanet", "EQL"),
    "fcos": ("fcos", "Focal"),
}


@pytest.fixture
def images(tmp_path):
    """Four images of different sizes."""
    paths = []
    for i, size in enumerate([(50, 70), (70, 50), (64, 96), (40, 40)]):
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels).save(paths[-1])
    return paths


def trained(tmp_path, name, *overrides):
    kind, loss = MODELS[name]
    make_run(tmp_path, kind, "MODEL.BALANCE.CLS_LOSS", loss, *FEW, *overrides)
    predictor = load(str(tmp_path / "run"))
    # scores that lie apart, so that no two detections change places by rounding
    with torch.no_grad():
        for parameter_name, parameter in predictor.model.named_parameters():
            if loss == "EQL" and parameter_name.endswith("box_predictor.cls_score.weight"):
                parameter.mul_(3)
            if parameter_name == "head.cls_score.weight":
                parameter.mul_(0.2)
            if parameter_name == "head.bbox_pred.bias":
                parameter.add_(1)  # FCOS clips sizes at 0, and drops empty boxes
    return predictor


@pytest.mark.parametrize("model_format", [TRACE, ONNX])
@pytest.mark.parametrize("name", list(MODELS))
def test_exported_model_is_the_eager_one(tmp_path, images, name, model_format):
    predictor = trained(tmp_path, name)
    path = str(tmp_path / f"model{ENDINGS[model_format]}")
    difference = export(predictor, model_format, path, images)
    assert difference.images == 4
    assert difference.detections > 0
    if model_format == TRACE:
        assert difference.boxes == difference.scores == (difference.masks or 0) == 0
    assert difference.boxes <= BOX_TOLERANCE
    assert difference.scores <= SCORE_TOLERANCE
    assert not predictor.model.training
    labels = json.loads((tmp_path / "model.json").read_text())
    assert labels["names"] == list(NAMES)
    assert labels["category_ids"] == list(IDS)
    assert labels["score_thresholds"] == [0.0] * 6
    assert labels["outputs"] == [
        "boxes",
        "scores",
        "classes",
        *(["masks"] if "mask" in name else []),
    ]
    assert labels["difference"]["images"] == 4


@pytest.mark.parametrize("model_format", [TRACE, SCRIPT, ONNX])
def test_exported_model_takes_any_number_of_proposals(tmp_path, images, model_format):
    # no limit is reached, so that NMS leaves another number of proposals in each image
    limits = ("MODEL.RPN.PRE_NMS_TOPK_TEST", 1000, "MODEL.RPN.POST_NMS_TOPK_TEST", 1000)
    predictor = trained(tmp_path, "faster", *limits)
    with torch.no_grad():  # scores of 1 are ties, which NMS may keep in any order
        predictor.model.roi_heads.box_predictor.cls_score.weight.mul_(0.01)
    counts = []
    hook = predictor.model.proposal_generator.register_forward_hook(
        lambda module, inputs, output: counts.append(len(output[0][0]))
    )
    for path in images:
        predictor(np.asarray(Image.open(path)))
    hook.remove()
    assert len(set(counts)) > 1
    difference = export(predictor, model_format, str(tmp_path / "model"), images)
    assert difference.images == 4
    assert difference.detections > 0
    if model_format == TRACE:
        assert difference.boxes == difference.scores == 0


@pytest.mark.parametrize("name", ["mask EQL", "faster", "faster BAGS", "retinanet"])
def test_scripted_model_is_the_eager_one(tmp_path, images, name):
    predictor = trained(tmp_path, name)
    difference = export(predictor, SCRIPT, str(tmp_path / "model.pt"), images)
    assert difference.detections > 0
    assert difference.boxes <= BOX_TOLERANCE
    assert difference.scores <= SCORE_TOLERANCE


@pytest.mark.parametrize("name", ["cascade", "fcos"])
def test_models_whose_stock_forms_do_not_script_are_refused(tmp_path, images, name):
    predictor = trained(tmp_path, name)
    with pytest.raises(ValueError, match="cannot be scripted; export it with torchscript-trace"):
        export(predictor, SCRIPT, str(tmp_path / "out" / "model.pt"), images)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("model_format", [TRACE, ONNX])
def test_thresholds_of_classes_are_exported(tmp_path, images, model_format):
    predictor = trained(tmp_path, "faster")
    layer = predictor.model.roi_heads.box_predictor.cls_score
    with torch.no_grad():  # two classes with scores that lie close, so that both are detected
        for parameter in (layer.weight, layer.bias):
            parameter[1] = parameter[3]
        layer.bias[1] -= 0.05
    image = predictor.preprocess(np.array(Image.open(images[0]))[:, :, ::-1])["image"].float()
    every = export_module._eager(predictor)(image)
    present = every[2].unique().tolist()
    assert len(present) > 1
    predictor.set_score_threshold({NAMES[present[0]]: 1.0})
    path = str(tmp_path / f"model{ENDINGS[model_format]}")
    export(predictor, model_format, path, images)
    classes = run_exported(path, model_format)(image)[2].unique().tolist()
    assert classes
    assert present[0] not in classes


def test_command(tmp_path, images, capsys):
    trained(tmp_path, "mask EQL")
    arguments = ["export", "--model", str(tmp_path / "run"), "--format", TRACE, "--images", *images]
    assert main(arguments) == 0
    assert "boxes 0 pixels, scores 0, masks 0" in capsys.readouterr().out
    run = tmp_path / "run"
    assert (run / "model_final.pt").is_file()
    assert (run / "model_final.json").is_file()
    assert main(arguments) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert main([*arguments[:5], "--output", str(tmp_path / "other.pt")]) == 2
    assert "the test set of the config is not here" in capsys.readouterr().err


def test_another_result_writes_nothing(tmp_path, images, monkeypatch):
    predictor = trained(tmp_path, "faster")
    write = export_module._write_trace

    def write_another(predictor, image, path):
        weight = predictor.model.roi_heads.box_predictor.cls_score.weight
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(0.5)
            write(predictor, image, path)
            weight.copy_(before)

    monkeypatch.setitem(export_module._WRITERS, TRACE, write_another)
    with pytest.raises(ValueError, match="the exported model"):
        export(predictor, TRACE, str(tmp_path / "out" / "model.pt"), images)
    assert list((tmp_path / "out").iterdir()) == []


def test_compare_by_hand():
    boxes = torch.tensor([[0.0, 0, 4, 4], [1, 1, 3, 3]])
    ours = (boxes, torch.tensor([0.5, 0.25]), torch.tensor([1, 0]))
    theirs = (boxes + torch.tensor([0, 0.5, 0, -1]), torch.tensor([0.5, 0.375]), ours[2])
    difference = compare(lambda image: ours, lambda image: theirs, [torch.zeros(3, 4, 4)] * 2)
    assert (difference.images, difference.detections) == (2, 4)
    assert (difference.boxes, difference.scores, difference.masks) == (1.0, 0.125, None)
    swapped = tuple(column.flip(0) for column in theirs)
    assert compare(lambda image: ours, lambda image: swapped, [torch.zeros(3, 4, 4)]).boxes == 1.0
    fewer = tuple(column[:1] for column in ours)
    with pytest.raises(
        ValueError, match="detects 1 objects in image 0 where the eager model detects 2"
    ):
        compare(lambda image: ours, lambda image: fewer, [torch.zeros(3, 4, 4)])
