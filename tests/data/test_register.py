import json
import re
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.structures import BoxMode

from d2_balance.data import annotation_style, load_json, register_from_config, register_json

from .conftest import coco_data, lvis_data

REAL = Path(__file__).parents[2] / ".." / "shared" / "data"
needs_real_data = pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")


def test_yaml_takes_mappings_and_lists(cfg, write, names, tmp_path):
    (json_file, images), (first, second) = write(coco_data()), (names(), names())
    (tmp_path / "config.yaml").write_text(
        "DATASETS:\n  REGISTER:\n"
        f"  - {{NAME: {first}, JSON: {json_file}, IMAGES: {images}}}\n"
        f"  - [{second}, {json_file}, {images}]\n"
    )
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    assert register_from_config(cfg) == [first, second]
    assert DatasetCatalog.get(first) == DatasetCatalog.get(second)


@pytest.mark.parametrize(
    "form", ["[['{}', '{}', '{}']]", "[{{'NAME': '{}', 'JSON': '{}', 'IMAGES': '{}'}}]"]
)
def test_command_line_takes_mappings_and_lists(cfg, write, names, form):
    name = names()
    cfg.merge_from_list(["DATASETS.REGISTER", form.format(name, *write(coco_data()))])
    assert register_from_config(cfg) == [name]
    assert len(DatasetCatalog.get(name)) == 2


def test_config_with_entries_survives_its_own_dump(cfg, write, names):
    cfg.DATASETS.REGISTER = [{"NAME": names(), "JSON": "a", "IMAGES": "b"}, [names(), "a", "b"]]
    other = cfg.clone()
    other.DATASETS.REGISTER = []
    other.merge_from_other_cfg(cfg.load_cfg(cfg.dump()))
    assert other.DATASETS.REGISTER == cfg.DATASETS.REGISTER


@pytest.mark.parametrize(
    "entries",
    [
        ["my_train"],
        [["my_train", "a.json"]],
        [["my_train", "a.json", 3]],
        [["", "a.json", "images"]],
        [{"NAME": "my_train", "JSON": "a.json"}],
        [{"NAME": "my_train", "JSON": "a.json", "DIRECTORY": "images"}],
    ],
)
def test_entry_of_another_form_is_named(cfg, entries):
    cfg.DATASETS.REGISTER = entries
    with pytest.raises(ValueError, match=r"REGISTER\[0\].*must be \{NAME: name, JSON: file"):
        register_from_config(cfg)


def test_single_entry_in_place_of_list_is_named(cfg):
    cfg.DATASETS.REGISTER = "my_train"
    with pytest.raises(ValueError, match="DATASETS.REGISTER must be a list of"):
        register_from_config(cfg)


def test_missing_file_or_directory_fails_at_registration(cfg, write, names):
    json_file, images = write(coco_data())
    cfg.DATASETS.REGISTER = [[names(), json_file + "x", images]]
    with pytest.raises(ValueError, match=r"REGISTER\[0\]: the annotation file .*a.jsonx.*exist"):
        register_from_config(cfg)
    cfg.DATASETS.REGISTER = [[names(), json_file, images + "x"]]
    with pytest.raises(ValueError, match=r"REGISTER\[0\]: the image directory .*imagesx.*exist"):
        register_from_config(cfg)


def test_paths_below_working_directory_and_detectron2_datasets(write, names, tmp_path, monkeypatch):
    write(coco_data())
    below, here = names(), names()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_json(below, "a.json", "images")
    monkeypatch.setenv("DETECTRON2_DATASETS", "no/such/directory")
    monkeypatch.chdir(tmp_path)
    register_json(here, "a.json", "images")
    monkeypatch.chdir("/")  # a registered set does not depend on the working directory
    assert DatasetCatalog.get(below) == DatasetCatalog.get(here)
    assert MetadataCatalog.get(here).image_root == str(tmp_path / "images")


def test_equal_entry_again_changes_nothing_and_another_one_is_an_error(write, names):
    name = names()
    json_file, images = write(coco_data())
    register_json(name, json_file, images)
    loader = DatasetCatalog[name]
    register_json(name, json_file, images)
    assert DatasetCatalog[name] is loader
    other, _ = write(coco_data(), "other.json")
    with pytest.raises(ValueError, match=f"{name}' is taken by another dataset .*a.json"):
        register_json(name, other, images)


def test_name_of_a_set_of_detectron2_is_an_error(write):
    with pytest.raises(ValueError, match="'coco_2017_val' is taken by another dataset"):
        register_json("coco_2017_val", *write(coco_data()))


def test_file_is_parsed_only_when_asked_for(write, names):
    name = names()
    register_json(name, *write('{"images": ['))
    with pytest.raises(ValueError, match="not valid JSON"):
        DatasetCatalog.get(name)


@pytest.mark.parametrize(
    "change, style",
    [
        (lambda data: None, "coco"),
        (lambda data: data["images"][1].update(neg_category_ids=[]), "lvis"),
        (lambda data: data["categories"][0].update(frequency="c"), "lvis"),
        # a number is no LVIS group
        (lambda data: data["categories"][0].update(frequency=12), "coco"),
        (lambda data: data["categories"][0].update(name="neg_category_ids"), "coco"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_style_is_recognised(write, names, change, style, indent):
    data = coco_data()
    change(data)
    json_file, images = write(json.dumps(data, indent=indent))
    assert annotation_style(json_file) == style
    name = names()
    register_json(name, json_file, images)
    assert MetadataCatalog.get(name).evaluator_type == style


def test_an_empty_file_is_named(write, names):
    name = names()
    register_json(name, *write(""))
    with pytest.raises(ValueError, match="a.json: the file is empty"):
        DatasetCatalog.get(name)


def test_coco_style_gives_standard_dicts_and_metadata(write, names):
    name = names()
    json_file, images = write(coco_data())
    register_json(name, json_file, images)
    first, second = DatasetCatalog.get(name)
    assert first["file_name"] == f"{images}/a.png"
    assert (first["height"], first["width"], first["image_id"]) == (30, 40, 1)
    assert first["annotations"] == [
        {"bbox": [1, 2, 10, 12], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0},
        {"bbox": [5, 5, 8.5, 9], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1},
    ]
    assert "neg_category_ids" not in second
    metadata = MetadataCatalog.get(name)
    assert metadata.json_file == json_file and metadata.image_root == images
    assert metadata.thing_classes == ["cat", "dog"]  # by ascending id, not as in the file
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}
    # cat is in image 1, dog in both
    assert metadata.class_image_count == [
        {"id": 3, "image_count": 1},
        {"id": 7, "image_count": 2},
    ]


def test_lvis_style_keeps_raw_image_level_labels_and_counts_of_the_file(write, names):
    name = names()
    json_file, images = write(lvis_data())
    register_json(name, json_file, images)
    first, second = DatasetCatalog.get(name)
    assert (first["neg_category_ids"], first["not_exhaustive_category_ids"]) == ([], [])
    assert (second["neg_category_ids"], second["not_exhaustive_category_ids"]) == ([3], [7])
    metadata = MetadataCatalog.get(name)
    assert metadata.class_image_count == [
        {"id": 3, "image_count": 4},
        {"id": 7, "image_count": 400},
    ]
    assert metadata.class_group == ["r", "f"]


def test_image_is_found_by_file_name_then_directory_and_name_then_name_of_the_url(write, tmp_path):
    data = lvis_data()
    data["images"][0]["file_name"] = "COCO_train_a.png"  # as in LVIS v0.5: no such file
    json_file, images = write(data)
    assert load_json(json_file, images)[0]["file_name"] == f"{images}/a.png"
    (Path(images) / "train").mkdir()
    (Path(images) / "a.png").rename(Path(images) / "train" / "a.png")
    assert load_json(json_file, images)[0]["file_name"] == f"{images}/train/a.png"
    (Path(images) / "COCO_train_a.png").touch()
    assert load_json(json_file, images)[0]["file_name"] == f"{images}/COCO_train_a.png"


def test_records_come_by_image_id_and_metadata_survive_a_second_load(write, names):
    data = coco_data()
    data["images"].reverse()
    name = names()
    register_json(name, *write(data))
    assert [record["image_id"] for record in DatasetCatalog.get(name)] == [1, 2]
    assert DatasetCatalog.get(name) == DatasetCatalog.get(name)


def test_crowds_ignored_objects_and_masks_are_passed_on(write):
    data = coco_data()
    polygon = [[1, 2, 11, 2, 11, 14]]
    # counts of an RLE run down the columns: 40 * 30 = 1200 = 600 zeros + 600 ones
    rle = {"size": [30, 40], "counts": [600, 600]}
    data["annotations"][0] |= {"iscrowd": 0, "segmentation": polygon}
    data["annotations"][1] |= {"iscrowd": 1, "segmentation": rle}
    data["annotations"][2] |= {"ignore": 1, "segmentation": []}
    first, second = load_json(*write(data))
    plain, crowd = first["annotations"]
    assert (plain["iscrowd"], plain["segmentation"]) == (0, polygon)
    assert crowd["iscrowd"] == 1 and isinstance(crowd["segmentation"]["counts"], bytes)
    assert second["annotations"][0]["iscrowd"] == 1
    assert "segmentation" not in second["annotations"][0]


def test_mapper_of_detectron2_reads_the_records(cfg, write):
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (30,), "none"
    record = load_json(*write(lvis_data()))[1]
    mapped = DatasetMapper(cfg, is_train=True)(record)
    assert mapped["instances"].gt_classes.tolist() == [1]
    assert mapped["instances"].gt_boxes.tensor.tolist() == [[0, 0, 40, 30]]
    assert mapped["neg_category_ids"] == [3]


@needs_real_data
@pytest.mark.parametrize(
    "json_file, directory",
    [
        ("tiny_coco/instances_train2017.json", "tiny_coco/train2017"),
        ("tiny_coco/instances_val2017.json", "tiny_coco/val2017"),
        ("bccd/instances_train.json", "bccd/images"),
    ],
)
def test_real_coco_files_give_what_detectron2_gives(names, json_file, directory):
    ours, theirs = names(), names()
    register_json(ours, str(REAL / json_file), str(REAL / directory))
    dataset_dicts = DatasetCatalog.get(ours)
    reference = load_coco_json(
        MetadataCatalog.get(ours).json_file, MetadataCatalog.get(ours).image_root, theirs
    )
    assert dataset_dicts == reference
    for key in ("thing_classes", "thing_dataset_id_to_contiguous_id"):
        assert MetadataCatalog.get(ours).get(key) == MetadataCatalog.get(theirs).get(key)


@needs_real_data
def test_real_lvis_style_file_is_complete(names):
    """50 images, 465 annotations and 49 classes, as shared/README.md and the file say."""
    name = names()
    register_json(name, str(REAL / "tiny_coco/lvis_style_train.json"), str(REAL / "tiny_coco"))
    dataset_dicts = DatasetCatalog.get(name)
    metadata = MetadataCatalog.get(name)
    assert len(dataset_dicts) == 50 and metadata.evaluator_type == "lvis"
    assert sum(len(record["annotations"]) for record in dataset_dicts) == 465
    assert len(metadata.thing_classes) == 49 == len(metadata.class_group)
    assert all(re.search(r"train2017/\d+\.jpg$", r["file_name"]) for r in dataset_dicts)
    assert any(record["neg_category_ids"] for record in dataset_dicts)
