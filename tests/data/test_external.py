"""External sets: classes, image-level labels, crowds, and what is refused."""

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog

from d2_balance.data import ImageLabels, check_categories_match, register_from_config, register_json
from d2_balance.data.catalog.external import is_external, register_external

from .conftest import coco_data, lvis_data

NEG, PARTLY = "neg_category_ids", "not_exhaustive_category_ids"


def external_data():
    """Dog, Kitten and Car under other ids; a.png has a dog, a crowd of kittens and a car."""
    return {
        "images": [
            {"id": 5, "file_name": "a.png", "width": 40, "height": 30, NEG: [1], PARTLY: []},
            {"id": 6, "file_name": "b.png", "width": 40, "height": 30, NEG: [2, 30], PARTLY: [1]},
        ],
        "annotations": [
            {"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 2, 10, 12]},
            {"id": 2, "image_id": 5, "category_id": 2, "bbox": [3, 4, 20, 20], "iscrowd": 1},
            {"id": 3, "image_id": 5, "category_id": 30, "bbox": [3, 4, 5, 6]},
        ],
        "categories": [
            {"id": 1, "name": "Dog"},
            {"id": 2, "name": "Kitten"},
            {"id": 30, "name": "Car"},
        ],
    }


MAP = "Dog: dog\nKitten: cat\nCar: null\n"


@pytest.fixture
def make(write, names):
    """make(data, class map, ...) -> (name of the target, name of the external set)."""

    def register(data=None, class_map=MAP, target=None, **more):
        target_name, name = names(), names()
        register_json(target_name, *write(target or lvis_data(), "target.json"))
        path, directory = write(data or external_data(), "external.json")
        class_map = write(class_map, "map.yaml")[0] if class_map else ""
        register_external(name, path, directory, target_name, class_map, **more)
        return target_name, name

    return register


def test_annotations_and_labels_have_the_ids_of_the_target(make):
    target, name = make()
    a, b = DatasetCatalog.get(name)  # cat is class 0 (id 3) and dog class 1 (id 7) of the target
    assert [x["category_id"] for x in a["annotations"]] == [1, 0]
    assert (a[NEG], a[PARTLY]) == ([], [3])  # the dog is there; the crowd is not marked singly
    assert (b[NEG], b[PARTLY]) == ([3], [7])
    assert a["ignore_boxes"].tolist() == [[3, 4, 23, 24]]
    assert "ignore_boxes" not in b
    assert MetadataCatalog.get(name).thing_classes == ["cat", "dog"]
    check_categories_match([target, name], [])
    assert is_external(name) and not is_external(target)


@pytest.mark.parametrize("target", [lvis_data, coco_data])
def test_classes_that_are_not_shared_are_unknown(make, target):
    """The target has a third class, of which the external set says nothing."""
    data = target()
    data["categories"].append({"id": 9, "name": "bus"})
    target_name, name = make(target=data)
    labels = ImageLabels([target_name, name], 3)
    records = DatasetCatalog.get(name)
    assert labels.verified(records, "cpu").tolist() == [[True, False, False], [True, True, False]]


def test_without_labels_absence_is_known_of_exhaustive_sets_only(make):
    data = external_data()
    for image in data["images"]:
        del image[NEG], image[PARTLY]
    _, name = make(data)
    assert [r[NEG] for r in DatasetCatalog.get(name)] == [[], []]
    _, name = make(data, exhaustive=True)
    a, b = DatasetCatalog.get(name)
    assert (a[NEG], a[PARTLY], b[NEG], b[PARTLY]) == ([], [3], [3, 7], [])


def test_a_class_of_several_sources_is_absent_where_all_of_them_are(make):
    _, name = make(class_map="Dog: dog\nKitten: cat\nCar: cat\n")
    a, b = DatasetCatalog.get(name)
    assert [x["category_id"] for x in a["annotations"]] == [1, 0, 0]
    assert b[NEG] == [3]  # Kitten and Car
    data = external_data()
    data["images"][1][NEG] = [2]
    _, name = make(data, class_map="Dog: dog\nKitten: cat\nCar: cat\n")
    assert DatasetCatalog.get(name)[1][NEG] == []


def test_without_a_map_names_and_synsets_decide(make):
    data, target = external_data(), lvis_data()
    data["categories"][1]["synset"] = "cat.n.01"
    target["categories"][1]["synset"] = "cat.n.01"
    _, name = make(data, class_map="", target=target)
    assert [x["category_id"] for x in DatasetCatalog.get(name)[0]["annotations"]] == [1, 0]


def test_the_config_registers_external_sets_after_the_others(cfg, write, names):
    target, name = names(), names()
    json_file, directory = write(lvis_data())
    path, _ = write(external_data(), "external.json")
    class_map, _ = write(MAP, "map.yaml")
    cfg.DATASETS.REGISTER = [[target, json_file, directory]]
    entry = {
        "NAME": name,
        "JSON": path,
        "IMAGES": directory,
        "TARGET": target,
        "CLASS_MAP": class_map,
    }
    cfg.DATASETS.EXTERNAL = [entry]
    for _ in range(2):  # the same entries may come again
        assert register_from_config(cfg) == [target, name]
    assert len(DatasetCatalog.get(name)) == 2
    cfg.DATASETS.EXTERNAL = [entry | {"EXHAUSTIVE": True}]
    with pytest.raises(ValueError, match="is taken by another dataset"):
        register_from_config(cfg)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"TARGET": "nobody"}, r"EXTERNAL\[0\]: TARGET 'nobody' must be a registered dataset"),
        ({"JSON": "no.json"}, r"EXTERNAL\[0\]: the annotation file 'no.json' does not exist"),
        ({"CLASS_MAP": "no.yaml"}, r"EXTERNAL\[0\]: the class map 'no.yaml' does not exist"),
        ({"EXHAUSTIVE": "yes"}, r"EXTERNAL\[0\] is .* must be \{NAME"),
        ({"MAP": "x"}, r"EXTERNAL\[0\] is .* must be \{NAME"),
    ],
)
def test_entries_that_cannot_work_are_refused(cfg, write, names, change, text):
    target = names()
    json_file, directory = write(lvis_data())
    register_json(target, json_file, directory)
    path, _ = write(external_data(), "external.json")
    entry = {"NAME": names(), "JSON": path, "IMAGES": directory, "TARGET": target}
    cfg.DATASETS.EXTERNAL = [entry | change]
    with pytest.raises(ValueError, match=text):
        register_from_config(cfg)


@pytest.mark.parametrize(
    ("class_map", "text"),
    [
        ("Dog: dgo\n", "map.yaml: 'Dog': .* has no class 'dgo'; did you mean 'dog'"),
        ("Dgo: dog\n", "map.yaml: 'Dgo': .* has no class 'Dgo'"),
        ("Car: null\n", "external.json: .* shares no class with"),
    ],
)
def test_maps_that_cannot_work_are_refused(make, class_map, text):
    _, name = make(class_map=class_map)
    with pytest.raises(ValueError, match=text):
        DatasetCatalog.get(name)


def test_losses_take_the_mask_of_a_mixed_batch(make):
    target, name = make()
    batch = DatasetCatalog.get(target)[:1] + DatasetCatalog.get(name)[1:]
    listed = ImageLabels([target, name], 2).verified(batch, "cpu")
    assert listed.tolist() == [[False, False], [True, True]]
    assert listed.dtype == torch.bool
