"""`d2-balance convert-weights` on models that are given other projects' names and orders here."""

import re

import pytest
import torch
from detectron2.model_zoo import get_config_file
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from d2_balance.cli.main import main
from d2_balance.deploy import load
from d2_balance.deploy.convert import convert
from d2_balance.engine.setup.config_file import read_config

CLASSES = 5
NAMES = ["a", "b", "c", "d", "e"]
ZOO = {
    "mask": "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "faster": "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml",
    "retinanet": "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
}


def original(kind, *overrides):
    """Tensors of a random model of the zoo, the buffers of its anchors left out."""
    keys = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    keys += ["MODEL.ROI_HEADS.NUM_CLASSES", CLASSES, "MODEL.RETINANET.NUM_CLASSES", CLASSES]
    state = build_model(read_config(get_config_file(ZOO[kind]), [*keys, *overrides])).state_dict()
    for name, value in state.items():
        if "norm." in name:  # random statistics, so that no two layers are the same
            value.copy_(torch.rand_like(value) + 0.5)
    return {k: v for k, v in state.items() if "anchor" not in k or "anchor_deltas" in k}


def mmdet_name(name):
    """mmdet's name of a tensor, roi_head. included."""
    rules = [
        (r"backbone\.bottom_up\.stem\.conv1\.norm\.", "backbone.bn1."),
        (r"backbone\.bottom_up\.stem\.", "backbone."),
        (r"backbone\.bottom_up\.res(\d)", lambda m: f"backbone.layer{int(m[1]) - 1}"),
        (r"conv(\d)\.norm\.", r"bn\1."),
        (r"shortcut\.norm", "downsample.1"),
        (r"shortcut", "downsample.0"),
        (r"proposal_generator\.rpn_head\.conv", "rpn_head.rpn_conv"),
        (r"proposal_generator\.rpn_head\.objectness_logits", "rpn_head.rpn_cls"),
        (r"proposal_generator\.rpn_head\.anchor_deltas", "rpn_head.rpn_reg"),
        (
            r"roi_heads\.box_head\.fc(\d)",
            lambda m: f"roi_head.bbox_head.shared_fcs.{int(m[1]) - 1}",
        ),
        (r"roi_heads\.box_predictor\.cls_score", "roi_head.bbox_head.fc_cls"),
        (r"roi_heads\.box_predictor\.bbox_pred", "roi_head.bbox_head.fc_reg"),
        (
            r"roi_heads\.mask_head\.mask_fcn(\d)",
            lambda m: f"roi_head.mask_head.convs.{int(m[1]) - 1}.conv",
        ),
        (r"roi_heads\.mask_head\.deconv", "roi_head.mask_head.upsample"),
        (r"roi_heads\.mask_head\.predictor", "roi_head.mask_head.conv_logits"),
    ]
    for pattern, new in rules:
        name = re.sub(pattern, new, name)
    return name


def two_stage(state):
    """The tensors of Faster or Mask R-CNN under mmdet's names."""
    named = {}
    for name, value in state.items():
        new = mmdet_name(name)
        new = re.sub(
            r"backbone\.fpn_lateral(\d)", lambda m: f"neck.lateral_convs.{int(m[1]) - 2}.conv", new
        )
        new = re.sub(
            r"backbone\.fpn_output(\d)", lambda m: f"neck.fpn_convs.{int(m[1]) - 2}.conv", new
        )
        named[new] = value
        if new.endswith("running_var"):
            counter = new.replace("running_var", "num_batches_tracked")
            named[counter] = torch.tensor(7)
    return named


def save(tmp_path, state, **meta):
    path = str(tmp_path / "other.pth")
    torch.save({"state_dict": state, "meta": meta}, path)
    return path


def assert_loaded(directory, state):
    """The converted directory loads, and gives the model its original tensors."""
    predictor = load(str(directory))
    assert predictor.names == NAMES
    own = predictor.model.state_dict()
    for name, value in state.items():
        assert torch.equal(own[name], value), name
    return predictor


@pytest.mark.parametrize("kind", ["faster", "mask"])
@pytest.mark.parametrize("meta", [{"CLASSES": NAMES}, {"dataset_meta": {"classes": NAMES}}])
def test_two_stage_of_mmdet(tmp_path, kind, meta):
    state = original(kind)
    path = save(tmp_path, two_stage(state), **meta)
    assert (
        main(["convert-weights", path, "--source", "mmdet", "--output", str(tmp_path / "o")]) == 0
    )
    predictor = assert_loaded(tmp_path / "o", state)
    assert predictor.input_format == "RGB"
    assert predictor.cfg.MODEL.PIXEL_STD == [58.395, 57.12, 57.375]
    block = predictor.model.backbone.bottom_up.res3[0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))
    image = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8).numpy()
    assert predictor(image)["instances"].image_size == (64, 96)


def test_resnext_101_and_caffe(tmp_path):
    keys = ("MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.NUM_GROUPS", 32)
    state = original("faster", *keys, "MODEL.RESNETS.WIDTH_PER_GROUP", 4)
    path = save(tmp_path, two_stage(state), CLASSES=NAMES)
    convert(path, "mmdet", str(tmp_path / "o"), style="caffe")
    predictor = assert_loaded(tmp_path / "o", state)
    assert predictor.input_format == "BGR"
    assert predictor.cfg.MODEL.RESNETS.STRIDE_IN_1X1


def mmdet1(state):
    """The tensors of mmdet 1: no roi_head., background first, with boxes and masks of its own."""
    named = {k.removeprefix("roi_head."): v for k, v in two_stage(state).items()}
    for part in ("weight", "bias"):
        key = f"bbox_head.fc_cls.{part}"
        named[key] = torch.cat([named[key][-1:], named[key][:-1]])
        for key, size in ((f"bbox_head.fc_reg.{part}", 4), (f"mask_head.conv_logits.{part}", 1)):
            named[key] = torch.cat([torch.rand_like(named[key][:size]), named[key]])
    return named


def test_mmdet_1_has_background_first(tmp_path):
    state = original("mask")
    path = save(tmp_path, mmdet1(state), CLASSES=NAMES)
    (note,) = convert(path, "mmdet", str(tmp_path / "o"))
    assert "rounds its anchors" in note
    predictor = assert_loaded(tmp_path / "o", state)
    heads = predictor.model.roi_heads
    for pooler in (heads.box_pooler, heads.mask_pooler):
        assert {(p.sampling_ratio, p.aligned) for p in pooler.level_poolers} == {(2, False)}
    assert_anchors_of_mmdet_1(predictor.model.proposal_generator.anchor_generator, [8.0])


def assert_anchors_of_mmdet_1(generator, scales):
    """Equal anchors but for rounding; a box of mmdet 1 ends in the middle of its last pixel."""
    sizes = [torch.zeros(1, 1, 2, 3) for _ in generator.strides]
    for boxes, stride in zip(generator(sizes), generator.strides, strict=True):
        expected = []
        center = (stride - 1) / 2
        for cell in range(3):  # of the first of two lines
            for scale in scales:
                for ratio in (0.5, 1.0, 2.0):
                    width, height = stride * scale / ratio**0.5, stride * scale * ratio**0.5
                    box = [center - (width - 1) / 2, center - (height - 1) / 2]
                    box += [center + (width - 1) / 2, center + (height - 1) / 2]
                    box = torch.tensor(box).round() + torch.tensor([cell * stride, 0.0] * 2)
                    expected.append(box + torch.tensor([0.0, 0.0, 1.0, 1.0]))
        difference = boxes.tensor[: len(expected)] - torch.stack(expected)
        assert difference.abs().max() <= 0.5 + 1e-4


@pytest.mark.parametrize("version", ["1.2.0+3a1f3b5", "3.3.0"])
def test_anchors_of_a_retinanet_of_mmdet(tmp_path, version):
    path = save(tmp_path, retinanet(original("retinanet")), CLASSES=NAMES, mmdet_version=version)
    notes = convert(path, "mmdet", str(tmp_path / "o"))
    generator = load(str(tmp_path / "o")).model.anchor_generator
    if version.startswith("1."):
        assert len(notes) == 2 and "rounds its anchors" in notes[1]
        assert_anchors_of_mmdet_1(generator, [4 * 2 ** (k / 3) for k in range(3)])
    else:
        assert len(notes) == 1
        with pytest.raises(AssertionError):
            assert_anchors_of_mmdet_1(generator, [4 * 2 ** (k / 3) for k in range(3)])


def retinanet(state):
    """The tensors of RetinaNet under mmdet's names, anchors in its order."""
    named = {}
    for name, value in state.items():
        new = mmdet_name(name)
        # levels from C3; P6 and P7 follow the others
        new = re.sub(
            r"backbone\.fpn_lateral(\d)", lambda m: f"neck.lateral_convs.{int(m[1]) - 3}.conv", new
        )
        new = re.sub(
            r"backbone\.(?:fpn_output|top_block\.p)(\d)",
            lambda m: f"neck.fpn_convs.{int(m[1]) - 3}.conv",
            new,
        )
        for ours, theirs in (("cls_subnet", "cls_convs"), ("bbox_subnet", "reg_convs")):
            new = re.sub(
                rf"head\.{ours}\.(\d)",
                lambda m, t=theirs: f"bbox_head.{t}.{int(m[1]) // 2}.conv",
                new,
            )
        if match := re.fullmatch(r"head\.(cls_score|bbox_pred)\.(\w+)", new):
            new = f"bbox_head.retina_{'cls' if match[1] == 'cls_score' else 'reg'}.{match[2]}"
            size = len(value) // 9
            parts = []
            for ratio in range(3):  # mmdet: by ratio, then size
                for scale in range(3):
                    anchor = scale * 3 + ratio  # Detectron2: by size, then ratio
                    parts.append(value[anchor * size : (anchor + 1) * size])
            value = torch.cat(parts)
        named[new] = value
    return named


def test_retinanet_of_mmdet(tmp_path):
    state = original("retinanet")
    path = save(tmp_path, retinanet(state), CLASSES=NAMES)
    (note,) = convert(path, "mmdet", str(tmp_path / "o"))
    assert "no ReLU before P7" in note
    assert_loaded(tmp_path / "o", state)


def test_anchors_of_detectron2_go_by_size_then_ratio():
    generator = DefaultAnchorGenerator(
        sizes=[[32, 64]], aspect_ratios=[[0.25, 1.0]], strides=[8], offset=0.0
    )
    (boxes,) = generator.cell_anchors
    width, height = (boxes[:, 2:] - boxes[:, :2]).unbind(1)
    # ratio 0.25 is height / width: 32 * 2 by 32 / 2
    assert width.tolist() == [64, 32, 128, 64]
    assert height.tolist() == [16, 32, 32, 64]


def test_eql_release_has_detectron2_names_and_no_background(tmp_path):
    keys = ["MODEL.META_ARCHITECTURE", "BalancedRCNN"]
    keys += ["MODEL.ROI_HEADS.NAME", "BalancedStandardROIHeads"]
    keys += ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE", "MODEL.BALANCE.BACKGROUND_COLUMN", False]
    state = original("mask", *keys)
    state = {k: v for k, v in state.items() if "cls_loss" not in k and "box_loss" not in k}
    assert len(state["roi_heads.box_predictor.cls_score.bias"]) == CLASSES
    path = str(tmp_path / "eql.pth")
    torch.save({"model": state}, path)
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    arguments = ["--source", "eql", "--names", str(tmp_path / "names.txt")]
    assert main(["convert-weights", path, *arguments, "--output", str(tmp_path / "o")]) == 0
    predictor = assert_loaded(tmp_path / "o", state)
    assert predictor.activation == "sigmoid"


def test_bags_release_gives_the_scores_of_its_own_rule(tmp_path):
    state = original("faster")
    # classes 0 and 3 in the first bin, 1 in the second, none in the third, 2 and 4 in the last
    bins = torch.zeros(5, CLASSES + 1, dtype=torch.int64)
    bins[0, 1:] = 1
    members = [[0, 3], [1], [], [2, 4]]
    for row, classes in enumerate(members, start=1):
        for place, k in enumerate(classes, start=1):
            bins[row, k + 1] = place
    torch.save(bins, tmp_path / "label2binlabel.pt")
    named = mmdet1(
        {
            **state,
            **{f"roi_heads.mask_head.predictor.{p}": torch.rand(5) for p in ("weight", "bias")},
        }
    )
    named = {k: v for k, v in named.items() if not k.startswith("mask_head")}
    outputs = CLASSES + 1 + 5  # background, foreground, and others of each bin
    named["bbox_head.fc_cls.weight"] = torch.randn(outputs, 1024)
    named["bbox_head.fc_cls.bias"] = torch.randn(outputs)
    path = save(tmp_path, named, CLASSES=NAMES)
    convert(path, "bags", str(tmp_path / "o"), bins=str(tmp_path / "label2binlabel.pt"))
    predictor = load(str(tmp_path / "o"))
    features = torch.randn(3, 1024)
    theirs = features @ named["bbox_head.fc_cls.weight"].T + named["bbox_head.fc_cls.bias"]
    foreground = theirs[:, :2].softmax(dim=1)[:, 1]
    expected = torch.zeros(3, CLASSES)
    start = 2
    for classes in members:
        part = theirs[:, start : start + 1 + len(classes)].softmax(dim=1)
        for place, k in enumerate(classes, start=1):
            expected[:, k] = foreground * part[:, place]
        start += 1 + len(classes)
    head = predictor.model.roi_heads.box_predictor
    with torch.no_grad():
        scores = head.cls_loss.probabilities(head.cls_score(features))[:, :CLASSES]
    assert torch.allclose(scores, expected, atol=1e-5)


class TestRefused:
    def test_another_architecture(self, tmp_path, capsys):
        path = save(tmp_path, {"bbox_head.transformer.weight": torch.ones(1)}, CLASSES=NAMES)
        arguments = ["convert-weights", path, "--source", "mmdet", "--output", str(tmp_path / "o")]
        assert main(arguments) == 2
        assert "bbox_head.transformer.weight" in capsys.readouterr().err
        assert not (tmp_path / "o").exists()

    def test_no_names(self, tmp_path):
        path = save(tmp_path, two_stage(original("faster")))
        with pytest.raises(ValueError, match="has 5 classes and it holds no class names"):
            convert(path, "mmdet", str(tmp_path / "o"))

    def test_sigmoid_head(self, tmp_path):
        state = two_stage(original("faster"))
        state["roi_head.bbox_head.fc_cls.bias"] = torch.zeros(CLASSES + 2)
        with pytest.raises(ValueError, match="must be a softmax"):
            convert(save(tmp_path, state, CLASSES=NAMES), "mmdet", str(tmp_path / "o"))

    def test_softmax_model_of_the_eql_release(self, tmp_path):
        path = str(tmp_path / "baseline.pth")
        torch.save({"model": original("faster")}, path)
        with pytest.raises(ValueError, match="Detectron2's own: they load without conversion"):
            convert(path, "eql", str(tmp_path / "o"), names=NAMES)

    def test_existing_output(self, tmp_path):
        (tmp_path / "o").mkdir()
        (tmp_path / "o" / "mine").write_text("")
        with pytest.raises(FileExistsError):
            convert("any.pth", "mmdet", str(tmp_path / "o"))

    def test_file_that_runs_code(self, tmp_path):
        path = str(tmp_path / "other.pth")
        torch.save({"state_dict": {"a": torch.ones(1)}, "meta": {"call": print}}, path)
        with pytest.raises(ValueError, match="if you trust it"):
            convert(path, "mmdet", str(tmp_path / "o"))
