"""build_evaluator chooses by the dataset's metadata."""

import json

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import CityscapesInstanceEvaluator, COCOEvaluator

from d2_balance.config import add_balance_config
from d2_balance.data import register_json
from d2_balance.evaluation import COCOGroupEvaluator, LVISGroupEvaluator, build_evaluator


@pytest.fixture
def cfg(tmp_path):
    cfg = get_cfg()
    add_balance_config(cfg)
    cfg.OUTPUT_DIR = str(tmp_path / "run")
    cfg.MODEL.META_ARCHITECTURE = "RetinaNet"
    return cfg


@pytest.fixture
def coco_sets(tmp_path):
    """A training file with counts 12, 3, 0 (common, rare, rare) and a validation file."""
    names = []
    for split, shown in (("train", [[1]] * 9 + [[1, 2]] * 3), ("val", [[1, 2]])):
        images = [
            {"id": n, "height": 100, "width": 200, "file_name": f"{n}.jpg"}
            for n in range(len(shown))
        ]
        annotations = [
            {
                "id": 10 * n + c,
                "image_id": n,
                "category_id": c,
                "bbox": [40 * c, 10, 20, 20],
                "area": 400,
                "iscrowd": 0,
            }
            for n, classes in enumerate(shown)
            for c in classes
        ]
        categories = [{"id": c, "name": f"c{c}"} for c in (1, 2, 3)]
        dataset = {"images": images, "annotations": annotations, "categories": categories}
        (tmp_path / f"{split}.json").write_text(json.dumps(dataset))
        for image in images:
            (tmp_path / image["file_name"]).touch()
        names.append(f"build_test_{tmp_path.name}_{split}")
        register_json(names[-1], str(tmp_path / f"{split}.json"), str(tmp_path))
    yield names
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def test_groups_of_a_coco_set_are_counted_on_the_training_sets(cfg, coco_sets, tmp_path):
    train, val = coco_sets
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (train,), (val,)
    cfg.MODEL.RETINANET.NUM_CLASSES = 3
    evaluator = build_evaluator(cfg, val)
    assert type(evaluator) is COCOGroupEvaluator
    metrics = evaluator.evaluate()["bbox"]
    records = evaluator.per_class
    assert [records[f"c{k}"]["train_image_count"] for k in (1, 2, 3)] == [12, 3, 0]
    assert [records[f"c{k}"]["group"] for k in (1, 2, 3)] == ["c", "r", "r"]
    assert (metrics["APc"], metrics["APr"]) == (0.0, 0.0) and metrics["APf"] != metrics["APf"]
    assert (tmp_path / f"run/inference/per_class_ap_{val}.csv").exists()


def test_evaluation_works_where_the_training_set_is_not(cfg, coco_sets, caplog):
    cfg.DATASETS.TRAIN = ("build_test_not_registered",)
    evaluator = build_evaluator(cfg, coco_sets[1])
    assert evaluator.evaluate()["bbox"]["AP"] == 0.0
    assert "no class counts of ('build_test_not_registered',)" in caplog.text


def test_annotations_that_loading_left_out_are_not_evaluated(cfg, coco_sets, tmp_path):
    path = tmp_path / "val.json"
    dataset = json.loads(path.read_text())
    bad = {**dataset["annotations"][0], "id": 77, "category_id": 3, "bbox": [10, 10, 0, 5]}
    dataset["annotations"].append(bad)
    path.write_text(json.dumps(dataset))
    DatasetCatalog.get(coco_sets[1])
    evaluator = build_evaluator(cfg, coco_sets[1])
    evaluator.evaluate()
    assert [r["instances"] for r in evaluator.per_class.values()] == [1, 1, 0]


def test_lvis_sets_get_lvis_rules_and_a_directory_of_their_own(cfg, sets, rng, tmp_path):
    name = sets.register(sets.make_dataset(rng, 4, 4), "lvis")
    evaluator = build_evaluator(cfg, name, str(tmp_path / "elsewhere"))
    assert type(evaluator) is LVISGroupEvaluator
    evaluator.evaluate()
    assert (tmp_path / f"elsewhere/predictions_{name}.json").exists()
    assert not (tmp_path / "run").exists()


def test_the_limit_of_detections_can_be_set(cfg, sets, rng):
    name = sets.register(sets.make_dataset(rng, 4, 4), "lvis")
    assert build_evaluator(cfg, name)._max_dets == 300
    cfg.TEST.EVAL_MAX_DETS = 1000
    assert build_evaluator(cfg, name)._max_dets == 1000
    cfg.TEST.EVAL_MAX_DETS = -1
    with pytest.raises(ValueError, match="TEST.EVAL_MAX_DETS is -1; it must be 0"):
        build_evaluator(cfg, name)


def test_keypoint_models_and_other_types_get_detectron2s_evaluators(cfg, sets, rng):
    cfg.MODEL.KEYPOINT_ON = True
    name = sets.register(sets.make_dataset(rng, 4, 4, lvis=False), "coco")
    assert type(build_evaluator(cfg, name)) is COCOEvaluator
    MetadataCatalog.get("build_test_city").evaluator_type = "cityscapes_instance"
    assert type(build_evaluator(cfg, "build_test_city")) is CityscapesInstanceEvaluator


@pytest.mark.parametrize("kind", [None, "voxels"])
def test_a_type_without_evaluator_is_named_with_the_types_allowed(cfg, kind):
    name = f"build_test_{kind}"
    if kind:
        MetadataCatalog.get(name).evaluator_type = kind
    with pytest.raises(ValueError, match=f"'{name}' has evaluator_type {kind!r}.*coco, .*lvis"):
        build_evaluator(cfg, name)
