"""What is suggested fits model and data, and trains."""

import json
import os
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_balance.analysis.remedies import RULES, Setting, decision_table, inert, suggestions
from d2_balance.analysis.report import analyze
from d2_balance.analysis.source import Source
from d2_balance.analysis.suggest import advice, settings, to_yaml
from d2_balance.analysis.table import DataTable
from d2_balance.data import register_from_config
from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.setup.validate import validate
from d2_balance.utils.blocks import with_blocks

from ..conftest import small_cfg as any_cfg
from .conftest import annotations, coco

ROOT = Path(__file__).parents[2]
QUICK = os.path.join(os.path.dirname(__file__), "..", "..", "configs", "quick_schedules")
LONG_TAIL = [[0]] * 30 + [[0, 1]] * 30 + [[1, 2]] * 2 + [[3]]


def small_cfg(*arguments, **options):
    """A small model on small images."""
    cfg = any_cfg(*arguments, **options)
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    return cfg


def lines_of(table, cfg=None, **options):
    found = analyze(Source("made", table), cfg, **options)
    return {line.key: line.value for line in settings(found)}, found


def lvis_table(shown):
    data = coco(shown)
    data["images"][0]["neg_category_ids"] = [1 + max(shown[0])]
    data["images"].append({"id": 999, "height": 9, "width": 9, "neg_category_ids": [1]})
    return DataTable.from_annotations("made", annotations(data))


def test_roi_heads_get_eql_and_repeats(table):
    cfg = small_cfg("faster", balanced=False)
    found, _ = lines_of(table(LONG_TAIL), cfg)
    # TR: 60, 32, 2 and 1 images, 95 in all. 3 / 95 = 3.2 %, with the 32 of class 1 36.8 %
    assert found["MODEL.BALANCE.EQL.LAMBDA"] == pytest.approx((2 / 63 + 32 / 63) / 2, abs=1e-3)
    assert found["MODEL.BALANCE.CLS_LOSS"] == "EQL"
    assert "MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS" not in found  # "auto" does without them
    assert found["MODEL.META_ARCHITECTURE"] == "BalancedRCNN"
    assert found["MODEL.ROI_HEADS.NAME"] == "BalancedStandardROIHeads"
    assert found["MODEL.ROI_HEADS.NUM_CLASSES"] == 4
    assert found["DATALOADER.SAMPLER_TRAIN"] == "RepeatFactorTrainingSampler"
    assert 1 / 63 < found["DATALOADER.REPEAT_THRESHOLD"] <= 1


def test_dense_heads_get_efl(table):
    found, _ = lines_of(table(LONG_TAIL), small_cfg("retinanet", balanced=False))
    assert found["MODEL.BALANCE.CLS_LOSS"] == "EFL"
    assert found["MODEL.META_ARCHITECTURE"] == "BalancedRetinaNet"
    assert found["MODEL.RETINANET.NUM_CLASSES"] == 4
    assert "MODEL.BALANCE.EQL.LAMBDA" not in found


def test_a_loss_that_the_user_chose_stays(table):
    found, analysis = lines_of(
        table(LONG_TAIL), small_cfg("faster", "MODEL.BALANCE.CLS_LOSS", "Seesaw")
    )
    assert "MODEL.BALANCE.CLS_LOSS" not in found
    assert any("CLS_LOSS stays Seesaw" in line for line in advice(analysis))


def test_nothing_against_a_tail_that_is_not_there(table):
    found, analysis = lines_of(table([[0, 1]] * 20), small_cfg("faster"))
    assert set(found) <= {"MODEL.ROI_HEADS.NUM_CLASSES", "MODEL.ANCHOR_GENERATOR.SIZES"}
    assert any("There is no tail" in line for line in advice(analysis))


def test_image_labels_keep_empty_images_and_the_limits_of_lvis():
    found, analysis = lines_of(lvis_table(LONG_TAIL), small_cfg("faster"))
    assert found["DATALOADER.FILTER_EMPTY_ANNOTATIONS"] is False
    assert analysis.statistics.num_images == 64  # and lambda is a fraction of these
    assert found["TEST.DETECTIONS_PER_IMAGE"] == 300
    assert found["MODEL.ROI_HEADS.SCORE_THRESH_TEST"] == 0.0001
    assert "MODEL.BALANCE.EQL.USE_IMAGE_LEVEL_LABELS" not in found


def test_masks_are_switched_off_where_there_are_none(table):
    found, _ = lines_of(table([[0, 1]] * 5), small_cfg("mask"))
    assert found["MODEL.MASK_ON"] is False


def test_cross_entropy_gets_the_best_prior(table):
    cfg = small_cfg("retinanet", "MODEL.BALANCE.CLS_LOSS", "SigmoidCE")
    found, analysis = lines_of(table([[0, 1]] * 5), cfg)
    prior = analysis.anchors.prior.prior
    assert found["MODEL.RETINANET.PRIOR_PROB"] == pytest.approx(prior, rel=5e-3)
    found, _ = lines_of(table([[0, 1]] * 5), small_cfg("retinanet"))  # focal loss
    assert "MODEL.RETINANET.PRIOR_PROB" not in found


def test_what_is_set_already_is_not_suggested_again(table):
    cfg = small_cfg("faster")
    found, _ = lines_of(table(LONG_TAIL), cfg)
    cfg.merge_from_list([part for line in found.items() for part in line])
    assert lines_of(table(LONG_TAIL), cfg)[0] == {}


def test_remedies_are_ranked_with_the_figure_of_the_data_and_the_effect(table):
    found = analyze(Source("made", table(LONG_TAIL)), small_cfg("faster", balanced=False))
    ranked = suggestions(found)
    assert [s.reach for s in ranked] == sorted((s.reach for s in ranked), reverse=True)
    named = {s.name: s for s in ranked}
    eql, repeats = named["EQL"], named["repeat factors"]
    # 60, 32, 2 and 1 images: two classes are tail, with 3 of 95; three are below the border
    assert eql.reason.startswith("2 classes of 4 hold 3.2 % of the images; the most frequent class")
    assert "60 times" in eql.reason and eql.reach == 2 / 4
    assert eql.fragment["MODEL"]["BALANCE"]["CLS_LOSS"] == "EQL"
    assert f"up to {found.repeat.factor.max():.1f}" in repeats.effect
    # what is set is not suggested again, and what it does is no longer news
    cfg = found.cfg.clone()
    cfg.merge_from_list([part for s in settings(found) for part in (s.key, s.value)])
    assert suggestions(analyze(Source("made", table(LONG_TAIL)), cfg)) == []


def test_out_of_reach_comes_first(table):
    cfg = small_cfg(
        "retinanet",
        "MODEL.ANCHOR_GENERATOR.SIZES",
        [[256], [300], [350], [400], [512]],
        balanced=False,
    )
    small = table(LONG_TAIL, box=(4, 4, 40, 40))
    first, *others = suggestions(analyze(Source("made", small), cfg))
    assert first.name == "anchor sizes" and "No anchor reaches" in first.reason
    assert all(first.reach >= other.reach for other in others)


def test_a_remedy_that_does_nothing_here_is_named(table):
    values = ["MODEL.BALANCE.CLS_LOSS", "EQL", "MODEL.BALANCE.EQL.LAMBDA", 0.01]
    values += ["DATALOADER.SAMPLER_TRAIN", "RepeatFactorTrainingSampler"]
    values += ["DATALOADER.REPEAT_THRESHOLD", 0.001]
    loss, sampler = inert(analyze(Source("made", table(LONG_TAIL)), small_cfg("faster", *values)))
    # the rarest class is in 1 of 63 images, 1.6 %
    assert "EQL: no class is below MODEL.BALANCE.EQL.LAMBDA 0.01; the rarest is in 1.5" in loss
    assert "No image is repeated" in sampler
    values[3] = 0.02
    assert len(inert(analyze(Source("made", table(LONG_TAIL)), small_cfg("faster", *values)))) == 1


def test_the_page_of_the_docs_holds_the_rules():
    page = (ROOT / "docs" / "analyze.md").read_text(encoding="utf-8")
    assert with_blocks(page, {"rules": decision_table()}) == page
    assert len(RULES) == len({rule.remedy for rule in RULES})


def test_yaml_has_a_reason_above_each_line():
    lines = [Setting("A.B.C", [[1.0, 2.0], [4.0, 8.0]], "Why " * 40), Setting("A.D", "x", "So.")]
    text = to_yaml(lines, "base.yaml")
    assert yaml.safe_load(text) == {
        "_BASE_": "base.yaml",
        "A": {"B": {"C": [[1.0, 2.0], [4.0, 8.0]]}, "D": "x"},
    }
    rows = text.splitlines()
    assert all(len(row) <= 100 for row in rows)
    assert rows[rows.index("  D: x") - 1] == "  # So."
    assert "Why" in rows[rows.index("    C:") - 1]


def long_tail_set(directory):
    """Images of `LONG_TAIL` with masks and image-level labels, as JSON and PNG."""
    from PIL import Image

    data = coco(LONG_TAIL, sizes=(96, 120))
    for image in data["images"]:
        image["neg_category_ids"] = [4] if image["id"] < 10 else []
        Image.new("RGB", (120, 96), (image["id"], 90, 60)).save(directory / image["file_name"])
    for annotation in data["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        annotation["area"] = w * h
    (directory / "train.json").write_text(json.dumps(data))


@pytest.mark.parametrize(
    "base",
    [
        "Base-RetinaNet-mini_lvis-smoke.yaml",
        "mask_rcnn_R_18_eql_mini_lvis.yaml",
        "Base-FCOS-mini_lvis-smoke.yaml",
    ],
)
def test_the_suggestion_trains(base, tmp_path):
    """With 4 classes of a set of its own, in a quick config of mini_lvis: two steps."""
    from d2_balance.cli.main import main

    long_tail_set(tmp_path)
    name = f"suggest_{base}"
    own = tmp_path / "own.yaml"
    own.write_text(
        f"_BASE_: {os.path.abspath(os.path.join(QUICK, base))}\n"
        f"DATASETS:\n  REGISTER: [[{name}, {tmp_path}/train.json, {tmp_path}]]\n"
        f"  TRAIN: ['{name}']\n  TEST: ['{name}']\n"
        "SOLVER: {IMS_PER_BATCH: 2, MAX_ITER: 2}\nMODEL: {DEVICE: cpu}\n"
    )
    out = tmp_path / "suggested.yaml"
    try:
        assert main(["analyze", name, "--config-file", str(own), "--yaml", str(out)]) == 0
        cfg = read_config(str(out), ["OUTPUT_DIR", str(tmp_path / "out")])
        assert cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler"
        assert ("EQL" if "rcnn" in base else "EFL") == cfg.MODEL.BALANCE.CLS_LOSS
        register_from_config(cfg)
        validate(cfg)
        os.makedirs(cfg.OUTPUT_DIR)
        trainer = BalancedTrainer(cfg)
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.resume_or_load(resume=False)
        trainer.test = lambda cfg, model: {}  # evaluation is not the matter here
        trainer.train()
        after = list(trainer.model.parameters())
        assert any((a != b).any() for a, b in zip(before, after, strict=True))
    finally:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
