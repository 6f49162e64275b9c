"""What changes scores after training: values by hand, in models, and what is refused."""

import itertools
import json
import math

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils.events import EventStorage
from torchvision.ops import box_iou

from d2_balance.data.class_counts import ClassCounts
from d2_balance.modeling.postprocess.calibration import LogitStatistics, LogN, class_shift
from d2_balance.modeling.postprocess.norcal import norcal
from d2_balance.modeling.postprocess.soft_nms import soft_nms
from d2_balance.modeling.postprocess.statistics import (
    CalibrationStatistics,
    logit_statistics,
    measured_logits,
)
from d2_balance.modeling.roi_heads.cosine import CosineLinear, NormalizedConv2d

from ..conftest import CLASSES, make_inputs, small_cfg
from ..two_ranks import results_of_two_ranks

NODE = "MODEL.BALANCE.CALIBRATION."
NAME = NODE + "NAME"


def test_scores_by_hand():
    # .6 / 100^.5 = .06, .2 / 4^.5 = .1, background .2: divided by their sum .36
    probs = torch.tensor([[0.6, 0.2, 0.2]])
    value = norcal(probs, torch.tensor([100.0, 4.0]), 0.5)
    assert value[0].tolist() == pytest.approx([0.06 / 0.36, 0.1 / 0.36, 0.2 / 0.36])


def test_gamma_zero_changes_nothing_and_zeros_stay():
    probs = torch.tensor([[0.5, 0.0, 0.5], [0.0, 0.0, 1.0]])
    torch.testing.assert_close(norcal(probs, torch.tensor([9.0, 0.0]), 0.0), probs)
    assert norcal(probs, torch.tensor([9.0, 0.0]), 1.0)[:, 1].tolist() == [0, 0]


def test_a_model_without_it_and_with_it(counts_file):
    keys = ["MODEL.BALANCE.NORCAL.GAMMA", 1.0, "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    keys += ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    plain = build_model(small_cfg("faster", *keys[4:])).eval()
    torch.nn.init.normal_(plain.roi_heads.box_predictor.cls_score.weight, std=1e-4)
    ours = build_model(small_cfg("faster", *keys)).eval()
    ours.load_state_dict(plain.state_dict())  # the counts are not saved
    with torch.no_grad():
        before, after = (m(make_inputs(images=1))[0]["instances"] for m in (plain, ours))
    # the scores are almost equal: the least frequent class comes first with calibration
    assert before.pred_classes.bincount(minlength=6)[5] < len(before)
    assert (after.pred_classes[:5] == 5).all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["MODEL.BALANCE.NORCAL.GAMMA", -1.0], "NORCAL.GAMMA is -1.0; must be a number of at"),
        (
            ["MODEL.BALANCE.NORCAL.GAMMA", 0.5, NAME, "logit_adjustment"],
            "NAME is 'logit_adjustment' and MODEL.BALANCE.NORCAL.GAMMA 0.5: scores are calibrated",
        ),
        ([NAME, "iif"], "CALIBRATION.NAME is 'iif'; must be one of '', 'logit_adjustment'"),
        ([NODE + "LINK", "cube"], "CALIBRATION.LINK is 'cube'; must be one of '', 'raw', 'base2'"),
        ([NODE + "COUNT", "boxes"], "COUNT is 'boxes'; must be one of 'images', 'objects'"),
        ([NODE + "REFERENCE", "two"], "REFERENCE is 'two'; must be one of 'none', 'one'"),
        ([NODE + "MOMENTUM", 1.0], r"CALIBRATION.MOMENTUM is 1.0; must be a number in \[0, 1\)"),
        ([NODE + "MAX_ITER", -1], "CALIBRATION.MAX_ITER is -1; must be an integer of at least 0"),
        ([NODE + "TAU", -1.0], "CALIBRATION.TAU is -1.0; must be a number of at least 0"),
        ([NAME, "logn"], "'logn' needs MODEL.BALANCE.CALIBRATION.STATISTICS, which is empty"),
        ([NAME, "fracal"], "'fracal' counts on DATASETS.TRAIN, which is not here"),
        (
            [NAME, "logn", NODE + "STATISTICS", "gone.json"],
            "CALIBRATION.STATISTICS: gone.json cannot be read",
        ),
        (
            [NAME, "logit_adjustment", "MODEL.BALANCE.CLS_LOSS", "BAGS"],
            "NAME logit_adjustment calibrates class logits and CLS_LOSS BAGS has logits of groups",
        ),
        (["MODEL.BALANCE.CLASSIFIER", "cos"], "CLASSIFIER is 'cos'; must be one of 'linear', 'cos"),
        (["MODEL.BALANCE.COSINE.POWER", 0.0], "COSINE.POWER is 0.0; must be a number above 0"),
        (["MODEL.BALANCE.MASK_PREDICTOR", "normalized"], "'normalized' needs MODEL.MASK_ON True"),
        (["MODEL.BALANCE.MASKNESS", 0.5], "MASKNESS is 0.5 and MODEL.MASK_ON False; must be"),
        (["MODEL.BALANCE.TEST_NMS.METHOD", "soft"], "METHOD is 'soft'; must be one of 'hard'"),
        (["MODEL.BALANCE.TEST_NMS.SIGMA", 0.0], "TEST_NMS.SIGMA is 0.0; must be a number above 0"),
    ],
)
def test_what_cannot_work_is_refused(overrides, message, counts_file):
    keys = [*overrides, "MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg("faster", *keys))


IMAGES = torch.tensor([400.0, 120.0, 40.0, 8.0, 2.0, 1.0])  # as `counts_file`
DIMENSION = (2.0, 1.5, 1.2, 1.0, 1.0, 1.0)


@pytest.fixture
def statistics_file(tmp_path):
    mean = tuple(float(k) for k in range(CLASSES))
    names = tuple("abcdef")
    path = tmp_path / "calibration.json"
    CalibrationStatistics(names, DIMENSION, mean, tuple(m + 1 for m in mean)).save(str(path))
    return str(path)


def layers(*keys, kind="faster"):
    return build_model(small_cfg(kind, *keys)).roi_heads.box_predictor


@pytest.mark.parametrize("name", ["logit_adjustment", "fracal", "logn"])
def test_softmax_scores_of_a_head_are_calibrated(name, counts_file, statistics_file):
    keys = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file, NODE + "STATISTICS", statistics_file]
    predictor = layers(NAME, name, *keys)
    z = torch.randn(9, CLASSES + 1)
    total = ClassCounts.load(counts_file).num_images
    own = z[:, :CLASSES].double()
    if name == "logit_adjustment":
        expected = own - (IMAGES / total).double().log()
    elif name == "fracal":
        expected = own - (CLASSES * IMAGES / total).double().log10()
        expected = expected - 2 * torch.tensor(DIMENSION).double().log()
    else:
        mean = torch.arange(CLASSES).double()
        expected = (own - mean) / (mean + 1).sqrt()
    expected = torch.cat([expected, z[:, CLASSES:].double()], dim=1).softmax(dim=1)
    torch.testing.assert_close(predictor.probabilities(z).double(), expected, rtol=1e-4, atol=1e-6)
    plain = layers()
    plain.load_state_dict(predictor.state_dict())  # the counts are not saved
    torch.testing.assert_close(plain.probabilities(z), z.softmax(dim=1))


@pytest.mark.parametrize("loss", ["SigmoidCE", "EQLv2", "Seesaw"])
def test_other_columns_of_a_loss_stay_as_they_are(loss, counts_file):
    keys = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file, "MODEL.BALANCE.CLS_LOSS", loss]
    predictor, plain = layers(*keys, NAME, "logit_adjustment"), layers(*keys)
    z = torch.randn(5, predictor.cls_score.out_features)
    moved = z.clone()
    total = ClassCounts.load(counts_file).num_images
    moved[:, :CLASSES] -= (IMAGES / total).log()
    torch.testing.assert_close(predictor.probabilities(z), plain.probabilities(moved))


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize("calibration", [("NORCAL.GAMMA", 0.5), ("CALIBRATION.NAME", "fracal")])
def test_dense_heads_are_calibrated_before_their_scores(
    kind, calibration, counts_file, statistics_file
):
    key, value = calibration
    keys = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file, NODE + "STATISTICS", statistics_file]
    keys += ["MODEL.RETINANET.SCORE_THRESH_TEST", 0.0, "MODEL.FCOS.SCORE_THRESH_TEST", 0.0]
    ours = build_model(small_cfg(kind, *keys, "MODEL.BALANCE." + key, value)).eval()
    plain = build_model(small_cfg(kind, *keys)).eval()
    for name, parameter in ours.named_parameters():
        if "cls_score" in name:
            torch.nn.init.zeros_(parameter)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        before, after = (m(make_inputs(images=1))[0]["instances"] for m in (plain, ours))
    # logits of 0 everywhere: only calibrated scores tell classes apart
    assert (after.pred_classes[:5] == CLASSES - 1).all()
    if value == 0.5 and kind == "retinanet":
        # sigmoid(0 - .5 log n): 1 / 2 for the class of one image, 1 / (1 + 20) for that of 400
        assert after.scores[0].item() == pytest.approx(0.5)
        assert before.scores[0].item() == pytest.approx(0.5)
        frequent = after.scores[after.pred_classes == 0]
        assert not len(frequent) or frequent[0].item() == pytest.approx(1 / 21)


def test_classes_without_data_keep_their_logits():
    shift = class_shift(torch.tensor([0.0, 10.0, 100.0]), 100.0, "prob", "average")
    assert shift[0] == 0 and shift.isfinite().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("class_names"), "STATISTICS: .*: lacks the field `class_names`"),
        (lambda data: data["fractal_dimension"].pop(), "fractal_dimension must be 6 numbers"),
        (
            lambda data: data.update(logit_mean=None),
            "has no logit_mean; run `d2-balance calibrate`",
        ),
    ],
)
def test_a_bad_file_of_statistics_is_named(change, message, statistics_file, counts_file):
    with open(statistics_file) as file:
        data = json.load(file)
    change(data)
    with open(statistics_file, "w") as file:
        json.dump(data, file)
    keys = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file, NODE + "STATISTICS", statistics_file]
    with pytest.raises(ValueError, match=message):
        layers(NAME, "logn", *keys)


def test_the_pass_collects_what_the_head_sees_and_changes_nothing():
    model = build_model(small_cfg("faster", "MODEL.BALANCE.CLS_LOSS", "Seesaw")).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    seen = []
    predictor = model.roi_heads.box_predictor
    hook = predictor.register_forward_hook(lambda m, i, out: seen.append(out[0][:, :CLASSES]))
    batches = [make_inputs(seed=0), make_inputs(seed=1, empty=(0,))]
    (statistics,) = logit_statistics(model, batches, CLASSES)
    hook.remove()
    every = torch.cat(seen).double()
    torch.testing.assert_close(statistics.mean, every.mean(0))
    torch.testing.assert_close(statistics.variance, every.var(0))
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.raises(ValueError, match="must be BalancedStandardROIHeads"):
        logit_statistics(build_model(small_cfg("retinanet")), batches, CLASSES)


def test_every_stage_of_a_cascade_has_statistics_of_its_own(tmp_path):
    cfg = small_cfg("cascade")
    model = build_model(cfg).train()
    stages, seen = model.roi_heads.box_predictor, {0: [], 1: [], 2: []}
    for number, stage in enumerate(stages):
        torch.nn.init.constant_(stage.cls_score.bias, float(number))
        stage.register_forward_hook(lambda m, i, out, n=number: seen[n].append(out[0][:, :CLASSES]))
    found = logit_statistics(model, [make_inputs(seed=0), make_inputs(seed=1)], CLASSES)
    for number, one in enumerate(found):
        torch.testing.assert_close(one.mean, torch.cat(seen[number]).double().mean(0))
    path = str(tmp_path / "calibration.json")
    statistics = CalibrationStatistics(
        tuple("abcdef"), DIMENSION, *map(_tuples, measured_logits(found).values())
    )
    statistics.save(path)
    assert CalibrationStatistics.load(path) == statistics
    cfg = small_cfg("cascade", NAME, "logn", NODE + "STATISTICS", path)
    for one, stage in zip(found, build_model(cfg).roi_heads.box_predictor, strict=True):
        torch.testing.assert_close(stage.calibration.mean, one.mean - one.mean.min())
        torch.testing.assert_close(stage.calibration.std, one.variance.sqrt())
    two = [values[:2] for values in (statistics.logit_mean, statistics.logit_variance)]
    CalibrationStatistics(statistics.class_names, DIMENSION, *two).save(path)
    with pytest.raises(ValueError, match="statistics of 2 cascade stages and the model has more"):
        build_model(cfg)


def _tuples(values):
    return tuple(map(tuple, values))


def test_logn_without_statistics_waits_for_those_of_the_training():
    layer, logits = LogN(), torch.randn(4, 3)
    with pytest.raises(
        ValueError, match="the loaded weights hold no statistics of logits; set MOD"
    ):
        layer(logits)
    layer.forget()
    assert torch.equal(layer(logits), logits)
    layer.fill(torch.tensor([1.0, 3.0, 2.0]), torch.tensor([4.0, 0.0, 1.0]))
    expected = (logits - torch.tensor([0.0, 2.0, 1.0])) / torch.tensor([2.0, 1.0, 1.0])
    torch.testing.assert_close(layer(logits), expected)
    assert layer(logits.half()).dtype == torch.float16 and not layer.state_dict()


def batches_of(rank):
    return torch.randn(5, 13, 4, generator=torch.Generator().manual_seed(rank))


def collected(rank):
    found = {}
    for momentum in (None, 0.3):
        statistics = LogitStatistics(4, momentum)
        for batch in batches_of(rank) if rank != 1 or momentum else batches_of(rank)[:2]:
            statistics.add(batch)
        statistics.merge_ranks()
        found[momentum] = statistics.mean, statistics.variance
    return found


def test_statistics_of_two_ranks_are_those_of_all_samples(tmp_path):
    first, second = results_of_two_ranks(collected, tmp_path)
    every = torch.cat([batches_of(0).flatten(0, 1), batches_of(1)[:2].flatten(0, 1)]).double()
    for found in (first, second):
        torch.testing.assert_close(found[None], (every.mean(0), every.var(0)))
    torch.testing.assert_close(first[0.3], second[0.3])  # the first rank's, as the release saves


SCORES = {"": "softmax", "SigmoidCE": "sigmoid", "GumbelCE": "gumbel"}


@pytest.mark.parametrize(("own", "other"), itertools.permutations(SCORES, 2))
def test_weights_of_other_scores_are_refused_at_inference(own, other):
    trained = build_model(small_cfg("faster", "MODEL.BALANCE.CLS_LOSS", own))
    model = build_model(small_cfg("faster", "MODEL.BALANCE.CLS_LOSS", other))
    model.load_state_dict(trained.state_dict())
    message = f"trained for {SCORES[own]} scores and .* has {SCORES[other]} scores"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model.eval()(make_inputs(images=1))
    with EventStorage():
        model.train()(make_inputs())  # fine-tuning
    with torch.no_grad():
        model.eval()(make_inputs(images=1))


@pytest.mark.parametrize("kind", ["faster", "cascade", "retinanet", "fcos"])
def test_soft_nms_keeps_what_hard_nms_drops(kind):
    keys = ["TEST.DETECTIONS_PER_IMAGE", 10000]
    for node in ("ROI_HEADS", "RETINANET", "FCOS"):
        keys += [f"MODEL.{node}.NMS_THRESH_TEST", 0.05, f"MODEL.{node}.SCORE_THRESH_TEST", 0.0]
    hard = build_model(small_cfg(kind, *keys)).eval()
    spread_boxes(hard)
    counts = {}
    for method in ("linear", "gaussian"):
        soft = build_model(small_cfg(kind, *keys, "MODEL.BALANCE.TEST_NMS.METHOD", method,
                                     "MODEL.BALANCE.TEST_NMS.MIN_SCORE", 0.0)).eval()  # fmt: skip
        soft.load_state_dict(hard.state_dict())
        with torch.no_grad():
            one, two = (m(make_inputs(images=1))[0]["instances"] for m in (hard, soft))
        counts[method] = len(two)
        assert len(two) > len(one)
        assert (two.scores.diff() <= 0).all()
        torch.testing.assert_close(two.scores[0], one.scores[0])
    assert counts["linear"] == counts["gaussian"]


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize("method", ["linear", "gaussian"])
def test_soft_nms_of_dense_heads_equals_the_loop(kind, method):
    node = f"MODEL.{kind.upper()}."
    keys = [node + "SCORE_THRESH_TEST", 0.0, node + "TOPK_CANDIDATES_TEST", 60]
    keys += ["MODEL.BALANCE.TEST_NMS.METHOD", method, "MODEL.BALANCE.TEST_NMS.MIN_SCORE", 0.0]
    model = build_model(small_cfg(kind, *keys, "TEST.DETECTIONS_PER_IMAGE", 25)).eval()
    torch.nn.init.normal_(model.head.cls_score.weight, std=0.05)
    spread_boxes(model)
    before, after = [], []
    decode, single = model._decode_multi_level_predictions, model.inference_single_image
    model._decode_multi_level_predictions = lambda *a: before.append(decode(*a)) or before[-1]
    model.inference_single_image = lambda *a: after.append(single(*a)) or after[-1]
    with torch.no_grad():
        model(make_inputs(images=1))
    scores = before[0].scores.double().tolist()
    boxes, classes = before[0].pred_boxes.tensor.double(), before[0].pred_classes.tolist()
    iou = box_iou(boxes, boxes).nan_to_num().tolist()
    expected, left = [], set(range(len(scores)))
    while left:
        best = max(left, key=lambda i: scores[i])
        expected.append(scores[best])
        left.remove(best)
        for i in left:
            if classes[i] == classes[best] and method == "gaussian":
                scores[i] *= math.exp(-(iou[best][i] ** 2) / 0.5)
            elif classes[i] == classes[best] and iou[best][i] > 0.3:
                scores[i] *= 1 - iou[best][i]
    assert len(after[0]) == 25 < len(expected)
    expected = torch.tensor(expected[:25])
    torch.testing.assert_close(after[0].scores, expected, rtol=1e-4, atol=1e-6)


def spread_boxes(model):
    """Let an untrained FCOS predict boxes that overlap."""
    if type(model).__name__ == "BalancedFCOS":
        torch.nn.init.constant_(model.head.bbox_pred.bias, 2.0)


def test_soft_nms_and_maskness_are_refused_in_exports():
    keys = ["MODEL.BALANCE.TEST_NMS.METHOD", "linear"]
    for kind in ("retinanet", "fcos", "faster"):
        model = build_model(small_cfg(kind, *keys)).eval()
        module = model if kind != "faster" else model.roi_heads.box_predictor
        with pytest.raises(ValueError, match="METHOD 'linear' .* cannot be exported; must be 'ha"):
            module.__prepare_scriptable__()
    boxes = torch.tensor([[0.0, 0.0, 4.0, 4.0]])
    with pytest.raises(ValueError, match="cannot be exported"):
        torch.jit.trace(lambda b, s: soft_nms(b, s, s.long()), (boxes, torch.ones(1)))
    model = build_model(small_cfg("mask", "MODEL.BALANCE.MASKNESS", 0.5)).eval()
    with pytest.raises(ValueError, match=r"MASKNESS 0.5 cannot be scripted; must be 0, or trace"):
        model.roi_heads.__prepare_scriptable__()


def test_maskness_sorts_by_the_new_scores():
    keys = ["MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    plain = build_model(small_cfg("mask", *keys)).eval()
    ours = build_model(small_cfg("mask", *keys, "MODEL.BALANCE.MASKNESS", 0.5)).eval()
    ours.load_state_dict(plain.state_dict())
    with torch.no_grad():
        one, two = (
            m.inference(make_inputs(images=1), do_postprocess=False)[0] for m in (plain, ours)
        )
    inside = one.pred_masks > 0.5
    mean = (one.pred_masks * inside).sum((1, 2, 3)) / inside.sum((1, 2, 3)).clamp(min=1)
    expected = (one.scores * mean).sort(descending=True).values
    torch.testing.assert_close(two.scores, expected)


@pytest.mark.parametrize("kind", ["mask", "cascade"])
@pytest.mark.parametrize("loss", ["", "SigmoidCE", "Seesaw"])
def test_cosine_heads_train_and_keep_their_initial_bias(kind, loss):
    keys = ["MODEL.BALANCE.CLASSIFIER", "cosine", "MODEL.BALANCE.CLS_LOSS", loss]
    keys += ["MODEL.BALANCE.MASK_PREDICTOR", "normalized"] if kind == "mask" else []
    model = build_model(small_cfg(kind, *keys)).train()
    heads = model.roi_heads
    for predictor in heads._output_layers():
        assert isinstance(predictor.cls_score, CosineLinear)
        prior = predictor.cls_score.bias.sigmoid()[0].item()
        assert prior == pytest.approx(0.001 if loss == "SigmoidCE" else 0.5, rel=1e-4)
        assert "cls_score.temperature" in predictor.state_dict()
    with EventStorage():
        sum(model(make_inputs()).values()).backward()
    assert all(layer.cls_score.weight.grad.abs().sum() > 0 for layer in heads._output_layers())
    if kind == "mask":
        assert isinstance(heads.mask_head.predictor, NormalizedConv2d)
        assert heads.mask_head.predictor.weight.grad.abs().sum() > 0
    with torch.no_grad():
        model.eval()(make_inputs(images=1))


def test_disalign_starts_as_the_model_that_it_aligns():
    plain = build_model(small_cfg("faster")).eval()
    ours = build_model(small_cfg("faster", "MODEL.BALANCE.DISALIGN", True)).eval()
    missing = ours.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert missing and all("box_predictor.align." in name for name in missing)
    with torch.no_grad():
        one, two = (m(make_inputs(images=1))[0]["instances"] for m in (plain, ours))
    assert torch.equal(one.scores, two.scores)
    with EventStorage():
        sum(ours.train()(make_inputs()).values()).backward()
    align = ours.roi_heads.box_predictor.align
    assert all(p.grad.abs().sum() > 0 for p in (align.logit_scale, align.logit_bias))


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize(
    "override",
    [
        ("CLASSIFIER", "cosine"),
        ("MASK_PREDICTOR", "normalized"),
        ("DISALIGN", True),
        ("MASKNESS", 0.5),
    ],
)
def test_dense_heads_refuse_what_roi_heads_have(kind, override):
    key, value = override
    with pytest.raises(ValueError, match=f"MODEL.BALANCE.{key} {value} works in RoI heads"):
        build_model(small_cfg(kind, "MODEL.BALANCE." + key, value))
