"""Recipes and class maps that cannot work are refused before the first stage."""

import os
import re
from pathlib import Path

import pytest
import yaml
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_balance.data import register_json
from d2_balance.recipes import class_maps
from d2_balance.recipes.datasets import DataSets
from d2_balance.recipes.fields import FIELDS, OWN
from d2_balance.recipes.recipe import KINDS, Recipe

from .recipes import NAMES, recipe, run, with_second_files


@pytest.mark.parametrize(
    "place, value, message",
    [
        ((0, "kind"), "clases", "kind 'clases' is unknown; did you mean classes"),
        ((0, "name"), "a b", "a name has letters, digits"),
        ((1, "name"), "two", "another stage has this name"),
        ((1, "fracton"), 1, "unknown field 'fracton'; did you mean fraction"),
        ((1, "fraction"), None, "split needs fraction"),
        ((2, "config"), "gone.yaml", "config 'gone.yaml' does not exist in"),
        ((2, "train"), ["nothing"], "stage expert: the dataset 'nothing' is neither registered"),
        ((2, "overrides"), {"SOLVER": {"MAX": 1}}, "stage expert: overrides: .*SOLVER.MAX"),
        ((4, "model"), "modell", "held.: model: 'modell' is no stage of kind train before this"),
        ((7, "inputs"), [{"predictions": "model"}], r"inputs\[0\]: 'model' is no stage of kind"),
        ((8, "dataset"), "challenge_val", "dataset 'challenge_val' is one of test; it must have"),
        ((0, "keep"), [], "classes needs one of keep and every"),
        ((0, "every"), [2, 0], "classes needs one of keep and every"),
        ((9, "factors"), "merged", "factors: 'merged' is no stage of kind fit"),
    ],
)
def test_recipes_that_cannot_work_are_refused(directory, fakes, capsys, place, value, message):
    content = recipe()
    content["stages"][place[0]][place[1]] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run() == 2 and fakes.calls == [] and not os.path.exists("out")
    error = capsys.readouterr().err
    assert re.search(message, error), error


@pytest.mark.parametrize(
    "kind, key, value, allowed",
    [
        ("classes", "from", ["challenge_train"], "a text"),
        ("classes", "keep", "rare", "a list of names"),
        ("classes", "every", [0, 1], r"\[n, first\], two integers"),
        ("split", "fraction", 1, r"a number in \(0, 1\)"),
        ("split", "fraction", "half", r"a number in \(0, 1\)"),
        ("split", "seed", 0.5, "an integer"),
        ("train", "config", 3, "a text"),
        ("train", "train", "parts_rest", "a list of names"),
        ("train", "test", ["challenge_val", 3], "a list of names"),
        ("train", "overrides", ["SOLVER.BASE_LR", 1], "config keys with their values"),
        ("train", "weights", 4, "a text"),
        ("predict", "dataset", ["challenge_val"], "a text"),
        ("ensemble", "method", "mean", "one of 'nms', 'soft-nms', 'wbf'"),
        ("ensemble", "iou", 1, r"a number in \[0, 1\)"),
        ("ensemble", "inputs", "model", "a list of inputs"),
        ("ensemble", "max_dets", -1, "an integer of at least 0"),
        ("fit", "method", "wbf", "one of 'groups', 'norcal'"),
        ("fit", "metric", "AP50", "one of 'AP', 'APr', 'APc', 'APf'"),
        ("rescore", "max_dets", "all", "an integer of at least 0"),
        ("evaluate", "train", ["challenge_train"], "a text"),
    ],
)
def test_values_that_a_field_cannot_have_are_refused(
    directory, fakes, capsys, kind, key, value, allowed
):
    content = recipe()
    stage = next(stage for stage in content["stages"] if stage["kind"] == kind)
    stage[key] = value
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--check") == 2 and fakes.calls == []
    expected = rf"recipe.yaml: stage \d+ \({stage['name']}\): {key} is .*; must be {allowed}"
    assert re.search(expected, capsys.readouterr().err)


def test_every_field_has_its_values():
    known = {key for kind in KINDS.values() for key in kind.required + kind.optional}
    own = {key for _, key in OWN}
    assert known | {"map"} == set(FIELDS) | own


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"regions": "gone.json"},
            r"IGNORE_REGIONS\[0\]: the annotation file 'gone.json' does not",
        ),
        ({"external": {"JSON": "gone.json"}}, r"EXTERNAL\[0\]: the annotation file 'gone.json'"),
        ({"external": {"CLASS_MAP": "gone.yaml"}}, r"EXTERNAL\[0\]: the class map 'gone.yaml'"),
        ({"external": {"TARGET": "parts"}}, r"EXTERNAL\[0\]: TARGET 'parts' is no dataset of the"),
        ({"external": {"NAME": "mor"}}, "the dataset 'more' is neither registered"),
        ({"counts": "gone.json"}, "CLASS_COUNTS_FILE: the file 'gone.json' does not exist"),
    ],
)
def test_second_files_are_looked_for_before_the_first_stage(
    directory, fakes, capsys, changes, message
):
    with_second_files(recipe(), **changes)
    assert run() == 2 and fakes.calls == [] and not os.path.exists("out")
    assert re.search(f"recipe.yaml: stage model: .*{message}", capsys.readouterr().err)
    with_second_files(recipe())
    assert run() == 0


def with_maps(content):
    """Class maps for the external set, for ignore regions, and for both inputs of an ensemble."""
    with_second_files(content)
    Path("regions.yaml").write_text("rare: rare\nother: null\n")
    content["stages"][3]["overrides"]["DATASETS"]["IGNORE_REGIONS"][0].append("regions.yaml")
    Path("two.yaml").write_text("often: often\nrare: common\n")
    content["stages"][7]["inputs"][1]["map"] = "two.yaml"
    Path("recipe.yaml").write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    "file, text, message",
    [
        (
            "map.yaml",
            "a rar: rare",
            r"model: DATASETS.EXTERNAL\[0\]: .*map.yaml: 'a rar': .*more.json",
        ),
        (
            "map.yaml",
            "a rare: rar",
            r"model: .*'a rare': parts_rest has no class 'rar'; did you me",
        ),
        ("map.yaml", "- rare", r"model: .*map.yaml: a class map has lines 'source class: target"),
        (
            "regions.yaml",
            "oftn: rare",
            r"model: DATASETS.IGNORE_REGIONS\[0\]: .*regions.yaml: 'oftn",
        ),
        (
            "regions.yaml",
            "rare: frequent",
            r"model: .*regions.yaml: 'rare': parts_rest has no class 'frequ",
        ),
        # the expert knows two of the classes
        ("two.yaml", "other: rare", r"merged: inputs\[1\]: .*two.yaml: 'other': two has no class"),
        ("two.yaml", "often: oft", r"merged: inputs\[1\]: .*'often': challenge_val has no class"),
    ],
)
def test_class_maps_are_checked_before_the_first_stage(
    directory, fakes, capsys, file, text, message
):
    with_maps(recipe())
    Path(file).write_text(text + "\n")
    assert run() == 2 and fakes.calls == [] and not os.path.exists("out")
    assert re.search(f"recipe.yaml: stage {message}", capsys.readouterr().err)


def test_class_maps_of_classes_that_are_not_known_yet_are_left_to_their_stage(
    directory, fakes, monkeypatch
):
    with_maps(recipe())
    monkeypatch.setattr(DataSets, "file", lambda self, name: None)
    Path("two.yaml").write_text("other: rare\n")
    assert run() == 1
    assert fakes.calls == ["expert", "model", "held", "val", "expert_val"]


def test_classes_are_known_of_files_and_of_what_stages_make_of_them(directory):
    recipe()
    found = Recipe.read("recipe.yaml")
    lists = class_maps.ClassLists(found, DataSets(found.datasets))
    register_json("challenge_known", "train.json", "images")
    try:
        for name in ("challenge_train", "challenge_known", "parts_rest", "parts_held"):
            assert [c["name"] for c in lists.of_set(name)] == NAMES
        assert [c["name"] for c in lists.of_set("challenge_known", trains=True)] == NAMES
        assert [c["name"] for c in lists.of_set("two")] == ["rare", "often"]
        os.remove("train.json")
        assert lists.of_set("challenge_known") is None
    finally:
        DatasetCatalog.remove("challenge_known")
        MetadataCatalog.remove("challenge_known")
    assert lists.of_set("nothing") is None


def test_maps_of_finished_stages_are_not_read_again(directory, fakes, monkeypatch):
    with_maps(recipe())
    assert run() == 0
    monkeypatch.setattr(class_maps, "read_class_map", None)
    assert run("--resume") == 0


def test_check_knows_data_sets_without_their_files(directory, capsys):
    content = recipe()
    with_second_files(content)
    for file in ("train.json", "val.json", "more.json"):
        os.remove(file)
    assert run("--check") == 0 and "11 stages" in capsys.readouterr().out
    content["stages"][3]["test"] = ["challenge_vla"]
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--check") == 2
    message = capsys.readouterr().err
    assert "recipe.yaml: stage model: the dataset 'challenge_vla' is neither" in message
    content["stages"][3]["test"] = ["challenge_val"]
    external = content["stages"][3]["overrides"]["DATASETS"]["EXTERNAL"]
    external[0]["TARGET"] = "parts_rets"
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--check") == 2
    message = capsys.readouterr().err
    assert "stage model: DATASETS.EXTERNAL[0]: TARGET 'parts_rets' is no dataset" in message
    external[0] = "more"
    Path("recipe.yaml").write_text(yaml.safe_dump(content))
    assert run("--check") == 2
    assert "stage model: DATASETS.EXTERNAL[0] is 'more'; must be" in capsys.readouterr().err
    assert not os.path.exists("out")
