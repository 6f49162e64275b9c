import json
import math
import os
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.samplers import RepeatFactorTrainingSampler

from d2_balance.data import ClassCounts, register_json

from .conftest import coco_data, lvis_data

REAL = Path(__file__).parents[2] / ".." / "shared" / "data"


def _records(*images):
    """One record per argument, a list of class indices; a negative one -k - 1 is a crowd of k."""
    return [
        {
            "annotations": [
                {"category_id": c, "iscrowd": 0}
                if c >= 0
                else {"category_id": -c - 1, "iscrowd": 1}
                for c in classes
            ]
        }
        for classes in images
    ]


def test_counts_images_and_instances():
    statistics = ClassCounts.from_dataset_dicts(
        _records([0, 0, 2], [0], [], [2, 2]), 4, ["a", "b", "c", "d"]
    )
    assert statistics.image_count.tolist() == [2, 0, 2, 0]
    assert statistics.instance_count.tolist() == [3, 0, 3, 0]
    assert statistics.image_count.dtype == statistics.instance_count.dtype == torch.int64
    assert (statistics.num_images, statistics.num_classes) == (4, 4)
    assert statistics.class_names == ("a", "b", "c", "d")
    # 2 of 4 images
    assert statistics.frequency.tolist() == [0.5, 0, 0.5, 0]
    assert statistics.frequency.dtype == torch.float64


def test_crowds_are_not_counted():
    statistics = ClassCounts.from_dataset_dicts(_records([0, -2], [-2, -2]), 2)
    assert statistics.image_count.tolist() == [1, 0]
    assert statistics.instance_count.tolist() == [1, 0]
    assert statistics.num_images == 2


def test_category_outside_the_classes_is_named():
    with pytest.raises(ValueError, match=r"category_id runs from 1 to 5; it must be in \[0, 3\)"):
        ClassCounts.from_dataset_dicts(_records([1, 5]), 3)


def test_no_image_is_an_error():
    with pytest.raises(ValueError, match="num_images must be at least 1, not 0"):
        ClassCounts.from_dataset_dicts([], 3)


def test_statistics_cannot_be_changed():
    statistics = ClassCounts.from_dataset_dicts(_records([0]), 1)
    with pytest.raises(AttributeError):
        statistics.num_images = 7


def _repeat_factors(statistics, dataset_dicts, threshold):
    """LVIS paper, appendix B.2: r(c) = max(1, sqrt(t / f)), r(I) = max over the classes in I."""
    frequency = statistics.frequency.tolist()
    return [
        max(
            (
                max(1.0, math.sqrt(threshold / frequency[a["category_id"]]))
                for a in r["annotations"]
            ),
            default=1.0,
        )
        for r in dataset_dicts
    ]


def test_frequencies_are_those_of_repeat_factor_sampling():
    generator = torch.Generator().manual_seed(0)
    skewed = (torch.rand(200, 6, generator=generator) ** 3 * 30).long().tolist()
    records = _records(*skewed, [], [29])
    statistics = ClassCounts.from_dataset_dicts(records, 30)
    theirs = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.2)
    assert theirs.tolist() == pytest.approx(_repeat_factors(statistics, records, 0.2), rel=1e-6)
    assert theirs.max() > 1.5  # the comparison is not one of ones


@pytest.mark.parametrize("filter_empty, num_images", [(True, 2), (False, 4)])
def test_config_counts_the_images_that_the_sampler_sees(
    cfg, write, names, filter_empty, num_images
):
    data = coco_data()
    for image_id, file_name in ((3, "a.png"), (4, "b.png")):
        data["images"].append({"id": image_id, "file_name": file_name, "width": 40, "height": 30})
    # image 3 shows a crowd only, image 4 nothing
    data["annotations"].append(
        {"id": 14, "image_id": 3, "category_id": 3, "bbox": [1, 1, 5, 5], "iscrowd": 1}
    )
    name = names()
    register_json(name, *write(data))
    _set(cfg, name, 2)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    statistics = ClassCounts.from_config(cfg)
    assert statistics.num_images == num_images
    assert statistics.image_count.tolist() == [1, 2]
    assert statistics.class_names == ("cat", "dog")


def _set(cfg, name, num_classes):
    cfg.DATASETS.TRAIN = (name,) if name else ()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = num_classes


def test_config_counts_once_per_process_and_anew_for_a_new_loader(cfg, names):
    name, calls = names(), []

    def loader(classes):
        def load():
            calls.append(name)
            return _records(classes)

        return load

    MetadataCatalog.get(name).thing_classes = ["a", "b"]
    DatasetCatalog.register(name, loader([0]))
    _set(cfg, name, 2)
    first = ClassCounts.from_config(cfg)
    assert ClassCounts.from_config(cfg) is first and len(calls) == 1
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, loader([1, 1]))
    assert ClassCounts.from_config(cfg).instance_count.tolist() == [0, 2]


@pytest.mark.parametrize("swap", [False, True])
def test_config_joins_several_training_sets(cfg, write, names, swap):
    first, second = names(), names()
    register_json(first, *write(coco_data(), "1.json"))
    register_json(second, *write(lvis_data(), "2.json"))
    _set(cfg, first, 2)
    cfg.DATASETS.TRAIN = (second, first) if swap else (first, second)
    statistics = ClassCounts.from_config(cfg)
    assert statistics.image_count.tolist() == [2, 4] and statistics.num_images == 4
    assert statistics.file_groups is None  # the groups of one file do not hold for both


def test_config_with_the_wrong_number_of_classes_names_the_key(cfg, write, names):
    name = names()
    register_json(name, *write(coco_data()))
    _set(cfg, name, 5)
    with pytest.raises(ValueError, match="set MODEL.ROI_HEADS.NUM_CLASSES to 2"):
        ClassCounts.from_config(cfg)


@pytest.mark.parametrize("name", ["lvis_v1_train", "no_such_set", ""])
def test_data_that_cannot_be_loaded_says_what_to_give(cfg, name, monkeypatch):
    if name == "lvis_v1_train":
        monkeypatch.setitem(DatasetCatalog.data, name, lambda: Path("no/such/file").read_text())
    _set(cfg, name, 1203)
    with pytest.raises(
        ValueError, match=f"DATASETS.TRAIN.*{name}.*give MODEL.BALANCE.CLASS_COUNTS_FILE"
    ):
        ClassCounts.from_config(cfg)


def test_message_about_a_bad_file_is_passed_on(cfg, write, names):
    name = names()
    register_json(name, *write("{"))
    _set(cfg, name, 2)
    with pytest.raises(ValueError, match="a.json: not valid JSON"):
        ClassCounts.from_config(cfg)


def test_cut_points_are_inclusive():
    counts = torch.tensor([0, 10, 11, 100, 101])
    statistics = ClassCounts(counts, counts, 200, tuple("abcde"))
    assert statistics.group() == ["r", "r", "c", "c", "f"]
    assert statistics.group((10, 10)) == ["r", "r", "f", "f", "f"]
    assert statistics.group(cuts=(0, 100)) == ["r", "c", "c", "c", "f"]
    with pytest.raises(ValueError, match=r"cuts must be \(a, b\) with 0 <= a <= b, not \(9, 3\)"):
        statistics.group((9, 3))


def test_groups_of_the_file_go_first_unless_cuts_are_given(cfg, write, names):
    name = names()
    register_json(name, *write(lvis_data()))
    _set(cfg, name, 2)
    statistics = ClassCounts.from_config(cfg)
    assert statistics.image_count.tolist() == [1, 2]  # counted, not the file's 4 and 400
    assert statistics.group() == ["r", "f"]
    assert statistics.group((10, 100)) == ["r", "r"]


@pytest.mark.parametrize("groups", [None, ("r", "f")])
def test_saved_statistics_come_back(cfg, tmp_path, groups):
    path = str(tmp_path / "statistics.json")
    statistics = ClassCounts.from_dataset_dicts(_records([0, 1, 1], [1]), 2, ["cat", "dög"], groups)
    statistics.save(path)
    cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = path
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    loaded = ClassCounts.from_config(cfg)
    assert loaded.image_count.tolist() == [1, 2] and loaded.instance_count.tolist() == [1, 3]
    assert (loaded.num_images, loaded.class_names) == (2, ("cat", "dög"))
    assert loaded.file_groups == groups
    assert [p.name for p in tmp_path.iterdir()] == ["statistics.json"]


def test_checkpoint_in_place_of_a_file_counts_the_training_set(cfg, write, names):
    name = names()
    register_json(name, *write(coco_data()))
    _set(cfg, name, 2)
    cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = "checkpoint"
    assert ClassCounts.from_config(cfg).image_count.tolist() == [1, 2]


def test_file_of_another_number_of_classes_is_named(cfg, tmp_path):
    path = str(tmp_path / "statistics.json")
    ClassCounts.from_dataset_dicts(_records([0]), 2).save(path)
    cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = path
    with pytest.raises(
        ValueError, match="CLASS_COUNTS_FILE: .*json has 2 classes, but MODEL.ROI_HEADS.* is 80"
    ):
        ClassCounts.from_config(cfg)


def test_file_is_not_overwritten_silently_nor_left_half_written(tmp_path, monkeypatch):
    path = tmp_path / "statistics.json"
    path.write_text("mine")
    statistics = ClassCounts.from_dataset_dicts(_records([0]), 1)
    with pytest.raises(FileExistsError, match="statistics.json exists; .*overwrite=True"):
        statistics.save(str(path))

    def fail(source, target):
        raise OSError("disk full")

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            statistics.save(str(path), overwrite=True)
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 1
    statistics.save(str(path), overwrite=True)
    assert ClassCounts.load(str(path)).num_images == 1


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "must be `object`, got `array`"),
        ({"classes": []}, "lacks the field `num_images`"),
        (
            {"num_images": 3, "classes": [{"image_count": 1}]},
            r"classes\[0\] lacks the field `instance_count`",
        ),
        (
            {"num_images": 3, "classes": [{"image_count": -1}]},
            r"classes\[0\].image_count must be `int` >= 0",
        ),
        (
            {"num_images": 3, "classes": [{"image_count": 4, "instance_count": 4}]},
            "image_count must not be above num_images",
        ),
        ({"num_images": 0, "classes": []}, "num_images must be at least 1"),
        (
            {
                "num_images": 3,
                "classes": [{"image_count": 1, "instance_count": 1, "frequency": "x"}],
            },
            "file_groups must be 1 letters",
        ),
    ],
)
def test_broken_file_of_statistics_names_the_field(tmp_path, data, message):
    path = tmp_path / "statistics.json"
    path.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=f"statistics.json: .*{message}"):
        ClassCounts.load(str(path))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real images are not here")
def test_real_lvis_style_counts_are_those_of_the_file(cfg, names):
    name = names()
    json_file = REAL / "tiny_coco/lvis_style_train.json"
    register_json(name, str(json_file), str(REAL / "tiny_coco"))
    _set(cfg, name, 49)
    statistics = ClassCounts.from_config(cfg)
    categories = json.loads(json_file.read_text())["categories"]
    assert statistics.image_count.tolist() == [c["image_count"] for c in categories]
    # instance_count of this file includes COCO's crowds, which it does not list as annotations
    assert statistics.instance_count.sum() == 465
    assert statistics.group() == [c["frequency"] for c in categories]
    records = [r for r in DatasetCatalog.get(name) if r["annotations"]]
    theirs = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(records, 0.1)
    assert theirs.tolist() == pytest.approx(_repeat_factors(statistics, records, 0.1), rel=1e-6)
