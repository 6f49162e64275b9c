"""Class counts of annotation files, and the cache of their columns: never stale, never torn."""

import json
import multiprocessing
import os
import time
from pathlib import Path

import pytest

from d2_balance.data import ClassCounts
from d2_balance.data import annotations as module
from d2_balance.data import cache as cache_module
from d2_balance.data.annotations import read_annotations
from d2_balance.data.catalog.register import register_json

from .conftest import coco_data, lvis_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("D2_BALANCE_CACHE", str(tmp_path / "cache"))
    forget()
    yield tmp_path / "cache"
    forget()


def forget():
    """What this process has read, as a new process would not know it."""
    module._read.clear()


def file_counts(path):
    """Image count, instance count, images, images with objects and names, read anew."""
    forget()
    file = read_annotations(path)
    counts = file.class_counts()
    return (
        tuple(counts.image_count.tolist()),
        tuple(counts.instance_count.tolist()),
        counts.images,
        counts.images_with_objects,
        tuple(file.class_names.values()),
        file.file_groups,
    )


@pytest.fixture
def parses(monkeypatch):
    """Paths that were parsed."""
    seen = []
    parse = module.parse_columns

    def watched(content, path, masks):
        seen.append(path)
        return parse(content, path, masks)

    monkeypatch.setattr(module, "parse_columns", watched)
    return seen


def age(path, seconds=60):
    """Makes a file old enough for its times to be trusted, as far as a test can: not its ctime."""
    os.utime(path, (time.time() - seconds,) * 2)


@pytest.fixture
def no_wait(monkeypatch):
    """Times are trusted at once; a test cannot wait two seconds for each file."""
    monkeypatch.setattr(cache_module, "_RACY_NS", 0)


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
    assert file_counts(path) == ((1, 2), (1, 3), 3, 2, ("cat", "dog"), None)


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
    monkeypatch.setattr(module, "read_bytes", lambda path: pytest.fail("read again"))
    assert file_counts(path) == first and parses == [path]


def test_a_young_file_is_hashed_again(write, parses, monkeypatch):
    path, _ = write(coco_data())  # a change within the same tick of the clock would not show
    first = file_counts(path)
    reads = []
    monkeypatch.setattr(module, "read_bytes", lambda p: reads.append(p) or Path(p).read_bytes())
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
    assert file_counts(path)[1] == (1, 2)
    data["annotations"][1]["category_id"] = 3
    with open(path, "w") as file:
        json.dump(data, file)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # hides the change, but for ctime
    after = os.stat(path)
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert file_counts(path)[1] == (2, 1)


def test_a_file_that_changes_while_it_is_read_is_no_known_place(write, no_wait, monkeypatch):
    path, _ = write(coco_data())
    read = module.read_bytes

    def change(path):
        content = read(path)
        with open(path, "a") as file:
            file.write(" ")
        return content

    monkeypatch.setattr(module, "read_bytes", change)
    file_counts(path)
    assert not os.path.exists(cache_module._place_file(path))


def test_loading_a_set_fills_the_cache(write, names, parses, no_wait, cfg):
    from detectron2.data import DatasetCatalog

    path, directory = write(coco_data())
    name = names()
    register_json(name, path, directory)
    DatasetCatalog.get(name)
    cfg.DATASETS.TRAIN, cfg.MODEL.ROI_HEADS.NUM_CLASSES = (name,), 2
    assert ClassCounts.from_config(cfg).image_count.tolist() == [1, 2]
    assert parses == [path]  # once, for the records and the counts


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": 3}', '{"images": [1]}'])
def test_corrupt_entries_are_read_again(content, write, cache, no_wait):
    path, _ = write(coco_data())
    first = file_counts(path)
    entries = list(cache.rglob("*.json"))
    assert len(entries) == 2  # a header and a place
    for entry in entries:
        entry.write_text(content)
    assert file_counts(path) == first


@pytest.mark.parametrize("change", ["cut", "flip", "remove"])
def test_torn_columns_are_read_again(change, write, cache, no_wait, parses):
    data = coco_data()
    data["annotations"][0]["segmentation"] = [[1, 2, 11, 2, 11, 14]]
    path, _ = write(data)
    first = file_counts(path)
    columns = [p for p in cache.rglob("*") if p.suffix in (".npy", ".bin")]
    assert len(columns) > 10
    for number, column in enumerate(columns, start=2):
        content = column.read_bytes()
        if change == "remove":
            column.unlink()
        elif change == "cut":
            column.write_bytes(content[:-1])
        else:
            column.write_bytes(content[:-1] + bytes([content[-1] ^ 1]) if content else b"x")
        assert file_counts(path) == first
        assert read_annotations(path).segmentation(0) == [[1, 2, 11, 2, 11, 14]]
        assert len(parses) == number


def test_a_full_disk_leaves_nothing_and_says_so_once(write, cache, monkeypatch, caplog):
    import errno

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cache_module.np, "save", full)
    monkeypatch.setattr(cache_module, "_told", set())
    path, _ = write(coco_data())
    with caplog.at_level("WARNING", logger="d2_balance.data.cache"):
        assert file_counts(path)[2] == file_counts(path)[2] == 2
    [record] = [r for r in caplog.records if "are not kept" in r.getMessage()]
    assert "No space left" in record.getMessage() and "D2_BALANCE_CACHE" in record.getMessage()
    assert not [p for p in cache.rglob("*") if p.is_dir() and p.name.endswith(".tmp")]


def test_a_directory_that_cannot_be_written_costs_nothing_but_time(write, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("D2_BALANCE_CACHE", str(tmp_path / "file" / "below"))
    path, _ = write(coco_data())
    assert file_counts(path)[2] == 2


def _count_often(path, queue):
    for _ in range(20):
        queue.put(file_counts(path))


def test_processes_share_a_cold_cache(write, cache):
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
    assert not [p for p in cache.rglob("*.tmp*")]


def _write_slowly(path, started):
    build = cache_module._write

    def slow(entry, make):
        build(entry, make)
        os.remove(os.path.join(entry, "header.json"))  # everything but the last file
        started.set()
        time.sleep(60)

    cache_module._write = slow
    file_counts(path)


def test_a_process_that_is_killed_while_it_writes_leaves_nothing_that_is_read(write, cache):
    path, _ = write(coco_data())
    context = multiprocessing.get_context("fork")
    started = context.Event()
    worker = context.Process(target=_write_slowly, args=(path, started))
    worker.start()
    assert started.wait(30)
    worker.kill()
    worker.join()
    assert [p for p in cache.rglob("*.tmp")]
    assert file_counts(path) == ((1, 2), (1, 2), 2, 2, ("cat", "dog"), None)
    assert not [p for p in cache.rglob("*.tmp")]  # removed with the next writing


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
