import pytest
from detectron2.data import MetadataCatalog

from d2_balance.data import (
    check_categories_match,
    check_masks,
    check_num_classes,
    load_json,
    register_json,
)

from .conftest import coco_data, lvis_data


@pytest.mark.parametrize(
    "text, position",
    [
        ('{"images": [{"id": 1}], "anno', 24),  # the start of the text that does not end
        ('{"images": [{"id": 1}', 21),
        ('{"images": [{"id": 1', 20),
        ('{"images": [{"id": tru', 19),
    ],
)
def test_truncated_json_gives_file_and_position(write, text, position):
    with pytest.raises(
        ValueError,
        match=f"a.json: not valid JSON at character {position} of {len(text)} .*ends too early",
    ):
        load_json(*write(text))


def test_broken_json_gives_line_and_column(write):
    with pytest.raises(ValueError, match=r"character 15 of 24 \(line 2, column 3\): .* value$"):
        load_json(*write('{"images": [\n  oops\n  ]}'))


def test_file_that_is_no_text_is_named(write):
    json_file, images = write("")
    with open(json_file, "wb") as file:
        file.write(b'{"images": "\xff"}')
    with pytest.raises(ValueError, match="a.json: not valid JSON at byte 12.*UTF-8"):
        load_json(json_file, images)


def test_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="no.json: cannot be read: No such file"):
        load_json(str(tmp_path / "no.json"), str(tmp_path))


def _with(change):
    data = lvis_data()
    change(data)
    return data


FATAL = {
    "top level": (lambda d: d.pop("images"), "'images' are missing or no lists; .*'categories'"),
    "no list": (lambda d: d.update(annotations={}), "'annotations' are missing or no lists"),
    "no category": (lambda d: d["categories"].clear(), "'categories' is empty"),
    "image id": (lambda d: d["images"][1].pop("id"), r"images\[1\] lacks the field 'id'"),
    "image twice": (lambda d: d["images"][1].update(id=1), "'images': the id.s. 1 occur more"),
    "annotation twice": (lambda d: d["annotations"][2].update(id=11), "'annotations': the id.* 11"),
    "category twice": (lambda d: d["categories"][0].update(id=3), "'categories': the id.s. 3"),
    "category id": (lambda d: d["categories"][0].update(id="7"), "'id' is '7'; .*integer"),
    "name twice": (
        lambda d: d["categories"][0].update(name="cat"),
        "categories 7 and 3 have the same name 'cat'",
    ),
    "no name": (lambda d: d["categories"][0].pop("name"), "category 7 has no 'name'"),
    "width": (lambda d: d["images"][0].update(width=0), "image 1: 'width' is 0; .*above 0"),
    "height": (lambda d: d["images"][0].pop("height"), "image 1: 'height' is None"),
    "size": (lambda d: d["images"][0].update(width=40.5), "image 1: 'width' is 40.5"),
    "unknown image": (
        lambda d: d["annotations"][1].update(image_id=5),
        r"'image_id' 5 of 1 annotation\(s\) \(ids 12\) is not in 'images'",
    ),
    "unknown category": (
        lambda d: [a.update(category_id=8) for a in d["annotations"][1:]],
        r"'category_id' 8 of 2 annotation\(s\) \(ids 12, 13\) is not in 'categories'",
    ),
    "field of annotation": (
        lambda d: d["annotations"][1].pop("category_id"),
        r"annotations\[1\] \(id 12\) lacks the field 'category_id'",
    ),
    "id of wrong type": (lambda d: d["images"][0].update(id=[1]), r"images\[0\]: 'id' is \[1\]"),
    "record of wrong type": (lambda d: d["images"].append(3), r"images\[2\] is 3; .*an object"),
    "negatives": (
        lambda d: d["images"][1].update(neg_category_ids=[3, 4]),
        "image 2: 'neg_category_ids' holds 4; only ids of the file's 'categories'",
    ),
    "not exhaustive": (
        lambda d: d["images"][1].update(not_exhaustive_category_ids=None),
        "image 2: 'not_exhaustive_category_ids' holds 'None'",
    ),
    "no file name": (
        lambda d: d["images"][0].pop("coco_url"),
        "image 1 has neither 'file_name' nor 'coco_url'",
    ),
}


@pytest.mark.parametrize("change, message", FATAL.values(), ids=FATAL)
def test_structure_that_cannot_be_trained_on_is_named_with_the_file(write, change, message):
    with pytest.raises(ValueError, match=f"a.json: .*{message}"):
        load_json(*write(_with(change)))


def test_top_level_list_is_named(write):
    with pytest.raises(ValueError, match="top level must be an object .* not a list"):
        load_json(*write([]))


def test_missing_images_are_counted_and_named(write):
    data = coco_data()
    data["images"] += [
        {"id": i, "file_name": f"no/{i}.png", "width": 4, "height": 3} for i in range(3, 11)
    ]
    json_file, images = write(data)
    with pytest.raises(
        ValueError,
        match=f"a.json: 8 of 10 images are missing below {images}: "
        r"no/3.png, no/4.png, no/5.png, no/6.png, no/7.png and 3 more;",
    ):
        load_json(json_file, images)


def test_whole_numbers_written_as_floats_are_fine(write):
    data = coco_data()
    data["images"][0] |= {"width": 40.0, "height": 30.0}
    record = load_json(*write(data))[0]
    assert (record["width"], type(record["width"])) == (40, int)


def test_file_without_annotations_loads(write):
    data = coco_data()
    data["annotations"] = []
    assert [record["annotations"] for record in load_json(*write(data))] == [[], []]


def _registered(write, names, change=lambda data: None):
    name, data = names(), coco_data()
    change(data)
    register_json(name, *write(data, f"{name}.json"))
    return name


def test_categories_of_both_files_must_agree(write, names):
    train = _registered(write, names)
    check_categories_match([train], [_registered(write, names)])
    check_categories_match([], [train])

    more = _registered(write, names, lambda d: d["categories"].append({"id": 9, "name": "ox"}))
    with pytest.raises(
        ValueError, match=f"1 categories of '{more}' are not in .*'{train}'.*9 'ox'"
    ):
        check_categories_match([train], [more])
    # without class 9 in the validation file, the model's class 2 has no id there
    with pytest.raises(ValueError, match=f"'{train}' and .*'{more}' number .*absent.*: 9 'ox'"):
        check_categories_match([more], [train])
    renamed = _registered(write, names, lambda d: d["categories"][0].update(name="wolf"))
    with pytest.raises(ValueError, match="7 'wolf'; give both files the same 'categories'"):
        check_categories_match([train], [renamed])
    with pytest.raises(ValueError, match=f"categories of '{renamed}' are not in"):
        check_categories_match([train, renamed], [])


def test_own_sets_of_detectron2_match_without_being_loaded():
    check_categories_match(["lvis_v1_train"], ["lvis_v1_val"])
    check_categories_match(["coco_2017_train"], ["coco_2017_val"])
    with pytest.raises(ValueError, match="are not in the training set 'lvis_v1_train'"):
        check_categories_match(["lvis_v1_train"], ["coco_2017_val"])


def test_unregistered_set_is_named():
    with pytest.raises(ValueError, match="'no_such_set' is not registered: add it to DATASETS.REG"):
        check_categories_match(["no_such_set"], [])
    MetadataCatalog.pop("no_such_set")


@pytest.mark.parametrize(
    "architecture, key",
    [
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("BalancedRetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
    ],
)
def test_number_of_classes_names_the_key_and_the_value(cfg, write, names, architecture, key):
    name = _registered(write, names)
    cfg.MODEL.META_ARCHITECTURE = architecture
    cfg.DATASETS.TEST = (name,)
    with pytest.raises(
        ValueError, match=f"'{name}' has 2 classes, but {key} is 80: set {key} to 2"
    ):
        check_num_classes(cfg)
    cfg.merge_from_list([key, 2])
    check_num_classes(cfg)


def test_masks_must_be_there_and_in_the_configured_format(write):
    data = coco_data()
    json_file, images = write(data)
    with pytest.raises(ValueError, match="without 'segmentation' in 2 image.*a.png: set MODEL.M"):
        check_masks(load_json(json_file, images), "my_train")
    for annotation in data["annotations"]:
        annotation["segmentation"] = {"size": [30, 40], "counts": [600, 600]}
    dataset_dicts = load_json(*write(data))
    check_masks(dataset_dicts, "my_train", "bitmask")
    with pytest.raises(
        ValueError, match="'my_train' has RLE masks .*set INPUT.MASK_FORMAT bitmask"
    ):
        check_masks(dataset_dicts, "my_train", "polygon")
    for annotation in data["annotations"]:
        annotation["iscrowd"] = 1  # crowds are not trained on
    check_masks(load_json(*write(data)), "my_train", "polygon")


def test_equal_ids_and_synsets_are_one_class(write, names):
    def with_synset(name, synset):
        def change(data):
            data["categories"][0] |= {"name": name, "synset": synset}

        return change

    train = _registered(write, names, with_synset("horned_cow", "bull.n.11"))
    check_categories_match([train], [_registered(write, names, with_synset("bull", "bull.n.11"))])
    other = _registered(write, names, with_synset("bull", "bull.n.01"))
    with pytest.raises(ValueError, match="7 'bull'; give both files"):
        check_categories_match([train], [other])
    without = _registered(write, names, lambda d: d["categories"][0].update(name="bull"))
    with pytest.raises(ValueError, match="7 'bull'; give both files"):
        check_categories_match([train], [without])
