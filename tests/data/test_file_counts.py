"""Counts of annotation files and their cache: equal to those of the loaded set, never stale."""

import dataclasses
import json
import multiprocessing
import os
import time

import pytest

from d2_balance.data import ClassCounts
from d2_balance.data import file_counts as module
from d2_balance.data.catalog.register import register_json
from d2_balance.data.file_counts import FileCounts, file_counts

from .conftest import coco_data, lvis_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2_BALANCE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def parses(monkeypatch):
    """Paths that were parsed."""
    seen = []

    def parse(content, path):
        seen.append(path)
        return json.loads(content)

    monkeypatch.setattr(module, "parse_json", parse)
    return seen


def age(path, seconds=60):
    """Makes a file old enough for its times to be trusted, as far as a test can: not its ctime."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def no_wait(monkeypatch):
    """Times are trusted at once; a test cannot wait two seconds for each file."""
    monkeypatch.setattr(module, "_RACY_NS", 0)


def test_counts_by_hand(write):
    data = coco_data()  # ids 3 cat and 7 dog
    data["images"].append({"id": 3, "file_name": "c.png", "width": 40, "height": 30})
    new = [
        {"id": 14, "image_id": 1, "category_id": 7, "bbox": [0, 0, 5, 5]},  # dog, again in 1
        {"id": 15, "image_id": 3, "category_id": 3, "bbox": [0, 0, 5, 5], "iscrowd": 1},
        {"id": 16, "image_id": 3, "category_id": 3, "bbox": [0, 0, 5, 5], "ignore": 1},
        {"id": 17, "image_id": 3, "category_id": 3, "bbox": [0, 0, -5, 5]},  # broken
    ]
    data["annotations"] += new
    path, _ = write(data)
    assert file_counts(path) == FileCounts((1, 2), (1, 3), 3, 2, ("cat", "dog"), None)


@pytest.mark.parametrize("filter_empty", [True, False])
@pytest.mark.parametrize("make", [coco_data, lvis_data])
def test_statistics_equal_those_of_the_loaded_set(make, filter_empty, write, names, cfg):
    from detectron2.data import DatasetCatalog, get_detection_dataset_dicts

    data = make()
    data["images"].append({**data["images"][0], "id": 9})  # no object
    path, directory = write(data)
    name = names()
    register_json(name, path, directory)
    cfg.DATASETS.TRAIN = (name,)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filter_empty
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    found = ClassCounts.from_config(cfg)
    records = get_detection_dataset_dicts(name, filter_empty=filter_empty)
    wanted = ClassCounts.from_dataset_dicts(records, 2)
    assert found.image_count.tolist() == wanted.image_count.tolist()
    assert found.instance_count.tolist() == wanted.instance_count.tolist()
    assert found.num_images == wanted.num_images == (2 if filter_empty else 3)
    assert found.class_names == ("cat", "dog")
    assert found.file_groups == (("r", "f") if make is lvis_data else None)
    assert DatasetCatalog.get(name)


def test_several_files_count_together(write, names, cfg):
    for number in range(2):
        path, directory = write(coco_data(), f"{number}.json")
        name = names()
        register_json(name, path, directory)
        cfg.DATASETS.TRAIN += (name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    found = ClassCounts.from_config(cfg)
    assert (found.num_images, found.image_count.tolist()) == (4, [2, 4])


def test_files_of_other_classes_are_refused(write, names, cfg):
    other = coco_data()
    other["categories"][0]["name"] = "wolf"
    for number, data in enumerate((coco_data(), other)):
        path, directory = write(data, f"{number}.json")
        name = names()
        register_json(name, path, directory)
        cfg.DATASETS.TRAIN += (name,)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    with pytest.raises(ValueError, match="1.json has other class names than .*0.json"):
        ClassCounts.from_config(cfg)


def test_the_same_file_is_read_once(write, parses, no_wait, monkeypatch):
    path, _ = write(coco_data())
    first = file_counts(path)
    monkeypatch.setattr(module, "read_content", lambda path: pytest.fail("read again"))
    assert file_counts(path) == first and parses == [path]


def test_a_young_file_is_hashed_again(write, parses, monkeypatch):
    path, _ = write(coco_data())  # a change within the same tick of the clock would not show
    first = file_counts(path)
    reads = []
    monkeypatch.setattr(module, "read_content", lambda p: reads.append(p) or open(p, "rb").read())
    assert file_counts(path) == first and parses == reads == [path]


def test_moved_and_touched_files_are_found_by_content(write, parses, no_wait, tmp_path):
    path, _ = write(coco_data())
    first = file_counts(path)
    age(path)
    assert file_counts(path) == first
    moved = str(tmp_path / "moved.json")
    os.rename(path, moved)
    assert file_counts(moved) == first
    assert parses == [path]


def test_a_change_of_the_same_size_and_time_is_seen(write, no_wait):
    data = coco_data()
    path, _ = write(data)
    age(path)
    before = os.stat(path)
    assert file_counts(path).instance_count == (1, 2)
    data["annotations"][1]["category_id"] = 3
    with open(path, "w") as file:
        json.dump(data, file)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # hides the change, but for ctime
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file_counts(path).instance_count == (2, 1)


def test_a_file_that_changes_while_it_is_read_is_no_known_place(write, no_wait, monkeypatch):
    path, _ = write(coco_data())
    read = module.read_content

    def change(path):
        content = read(path)
        with open(path, "a") as file:
            file.write(" ")
        return content

    monkeypatch.setattr(module, "read_content", change)
    file_counts(path)
    assert module._read(module._place_file(path)) is None


def test_loading_a_set_fills_the_cache(write, names, parses, no_wait, cfg):
    from detectron2.data import DatasetCatalog

    path, directory = write(coco_data())
    name = names()
    register_json(name, path, directory)
    DatasetCatalog.get(name)
    cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES = (name,), 2
    assert ClassCounts.from_config(cfg).image_count.tolist() == [1, 2]
    assert parses == []


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": 3}', '{"images": [1]}'])
def test_spoilt_entries_are_counted_again(content, write, cache, no_wait):
    path, _ = write(coco_data())
    first = file_counts(path)
    entries = [entry for entry in cache.rglob("*.json")]
    assert len(entries) == 2
    for entry in entries:
        entry.write_text(content)
    assert file_counts(path) == first


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(write, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D2_BALANCE_CACHE", str(tmp_path / "file" / "below"))
    path, _ = write(coco_data())
    assert file_counts(path).images == 2


def _count_often(path, queue):
    for _ in range(20):
        queue.put(dataclasses.astuple(file_counts(path)))


def test_processes_share_a_cache(write, cache):
    path, _ = write(coco_data())
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    workers = [context.Process(target=_count_often, args=(path, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    found = {queue.get() for _ in range(60)}
    for worker in workers:
        worker.join()
    assert found == {((1, 2), (1, 2), 2, 2, ("cat", "dog"), None)}
    assert not list(cache.rglob("*.tmp"))


def test_a_cut_file_is_named(write):
    path, _ = write(json.dumps(coco_data())[:-40])
    with pytest.raises(ValueError, match="a.json: not valid JSON .*the file ends too early"):
        file_counts(path)


def test_a_set_without_an_object_is_refused(write, names, cfg):
    path, directory = write(coco_data() | {"annotations": []})
    name = names()
    register_json(name, path, directory)
    cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES = (name,), 2
    with pytest.raises(ValueError, match="a.json: class statistics need an object to train on"):
        ClassCounts.from_config(cfg)
