"""The project's recipes, and the datasets that stages make."""

import pytest

from d2_balance.data.catalog.metadata import target_categories
from d2_balance.data.class_map import load_class_map
from d2_balance.engine.resume.data_stream import check_weights_of_sets
from d2_balance.recipes.datasets import keep_classes, split
from d2_balance.recipes.recipe import Recipe
from d2_balance.recipes.training import read_training_config

from .recipes import ROOT, annotations


@pytest.mark.parametrize("name", sorted(p.name for p in ROOT.glob("configs/recipes/*.yaml")))
def test_recipes_name_configs_and_keys_that_exist(name):
    found = Recipe.read(str(ROOT / "configs/recipes" / name))
    configs = [read_training_config(s, found) for s in found.stages if s.kind == "train"]
    assert len(configs) >= 2
    kinds = {stage.kind for stage in found.stages}
    assert {"train", "predict", "ensemble", "fit", "rescore"} <= kinds


def test_the_recipe_of_2019_has_what_the_authors_describe():
    found = Recipe.read(str(ROOT / "configs/recipes/lvis_v0.5_2019.yaml"))
    stage = next(s for s in found.stages if s.name == "lvis_model")
    cfg = read_training_config(stage, found)
    node = cfg.MODEL.RESNETS
    assert (node.DEPTH, node.NUM_GROUPS, node.WIDTH_PER_GROUP) == (101, 64, 4)
    assert node.DEFORM_ON_PER_STAGE == [False, True, True, True] and node.NORM == "SyncBN"
    assert cfg.MODEL.BALANCE.CLS_LOSS == "EQL" and "RepeatFactor" in cfg.DATALOADER.SAMPLER_TRAIN
    # what ignores regions, and trains boxes that have no mask
    assert cfg.MODEL.PROPOSAL_GENERATOR.NAME == "BalancedRPN"
    assert cfg.MODEL.ROI_HEADS.NAME == "BalancedStandardROIHeads"
    (regions,), (external,) = cfg.DATASETS.IGNORE_REGIONS, cfg.DATASETS.EXTERNAL
    assert regions[0] == external["TARGET"] == "lvis_rest"
    assert list(cfg.DATASETS.TRAIN) == ["lvis_rest", external["NAME"]]
    check_weights_of_sets(cfg)
    # the class map fits both sides
    files = {ROOT / regions[2]}
    for other in found.stages:
        for entry in other["inputs"] or []:
            if entry.get("classes") == "coco_2017_val":
                files.add((ROOT / "configs/recipes" / entry["map"]).resolve())
    (file,) = files
    classes = load_class_map(
        str(file), target_categories("coco_2017_val"), target_categories("lvis_v0.5_train")
    )
    assert len(classes.matched) == 78 and classes.left_out == ["hot dog", "oven"]
    assert ("tv", "television_set") in classes.matched


def test_classes_that_are_left_out_leave_no_trace():
    data = annotations(1, 8)
    found = keep_classes(data, None, [2, 1], "x")
    assert [c["name"] for c in found["categories"]] == ["common", "other"]
    assert {a["category_id"] for a in found["annotations"]} == {2, 4}
    assert {i["id"] for i in found["images"]} == {a["image_id"] for a in found["annotations"]}
    assert all(set(i["neg_category_ids"]) <= {2, 4} for i in found["images"])
    with pytest.raises(ValueError, match="'oftn'.*did you mean 'often'"):
        keep_classes(data, ["oftn"], None, "x")
    with pytest.raises(ValueError, match="give keep"):
        keep_classes(data, None, None, "x")


def test_a_split_has_each_image_once():
    data = annotations(1, 20)
    rest, held = split(data, 0.25, 0)
    ids = [{i["id"] for i in part["images"]} for part in (rest, held)]
    assert len(ids[1]) == 5 and not ids[0] & ids[1] and ids[0] | ids[1] == set(range(1, 21))
    for part, own in zip((rest, held), ids, strict=True):
        assert {a["image_id"] for a in part["annotations"]} == own
    assert split(data, 0.25, 0)[1] == held != split(data, 0.25, 1)[1]
    with pytest.raises(ValueError, match="fraction is 1"):
        split(data, 1, 0)
    with pytest.raises(ValueError, match="leaves a part empty"):
        split(data, 0.01, 0)
