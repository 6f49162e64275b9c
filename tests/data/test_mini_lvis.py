import json
import os
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from lvis import LVIS, LVISEval
from PIL import Image
from pycocotools import mask as mask_util

from d2_balance.data.mini_lvis import dataset as mini_lvis
from d2_balance.data.mini_lvis.scene import MIN_VISIBLE, Scene, mask_to_polygons, polygon_area
from d2_balance.data.mini_lvis.shapes import CLASSES

SMALL = {"train": 24, "val": 12}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """The whole set, rendered once for this file."""
    directory = tmp_path_factory.mktemp("mini_lvis")
    mini_lvis.build_mini_lvis(str(directory))
    return str(directory)


@pytest.fixture(scope="module", params=["train", "val"])
def split(request, root):
    with open(mini_lvis.build_mini_lvis(root)[f"mini_lvis_{request.param}"]) as f:
        return json.load(f)


@pytest.fixture
def clean_catalog():
    yield
    for name in mini_lvis.NAMES:
        DatasetCatalog.pop(name, None)
        MetadataCatalog.pop(name, None)
    mini_lvis.register_mini_lvis()


def contents(directory):
    found = {}
    for path, _, files in os.walk(directory):
        for name in files:
            with open(os.path.join(path, name), "rb") as f:
                found[os.path.relpath(os.path.join(path, name), directory)] = f.read()
    return found


def per_class(data):
    """Images and instances of each category id, counted from the annotations."""
    images, instances = defaultdict(set), Counter()
    for annotation in data["annotations"]:
        images[annotation["category_id"]].add(annotation["image_id"])
        instances[annotation["category_id"]] += 1
    return {i: len(found) for i, found in images.items()}, instances


def rasterise(annotation, image):
    size = image["height"], image["width"]
    return mask_util.decode(
        mask_util.merge(mask_util.frPyObjects(annotation["segmentation"], *size))
    )


def test_two_renderings_are_equal_to_the_byte(tmp_path):
    for name in ("a", "b"):
        mini_lvis._build(str(tmp_path / name), SMALL)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert len([name for name in first if name.endswith(".jpg")]) == 36  # 24 + 12
    assert first == second


def test_a_image_depends_on_its_own_generator_only():
    rng = [np.random.default_rng([1, 2]) for _ in range(2)]
    first, second = (mini_lvis.render_image(1, [0, 7], set(), r) for r in rng)
    assert first[0].tobytes() == second[0].tobytes()
    assert first[1:] == second[1:]


def test_training_counts_fall_off_with_the_promised_groups(root):
    with open(mini_lvis.build_mini_lvis(root)["mini_lvis_train"]) as f:
        data = json.load(f)
    images, instances = per_class(data)
    assert [images[i] for i in range(1, 31)] == mini_lvis.train_image_counts()
    assert max(images.values()) == 400 and min(images.values()) == 5
    by_rank = sorted(range(30), key=lambda j: CLASSES[j].rank)
    counts = [images[j + 1] for j in by_rank]
    assert counts == sorted(counts, reverse=True)
    # Zipf-like: half of all (class, image) pairs belong to the first 4 of 30 classes.
    assert sum(counts[:4]) > 0.5 * sum(counts)
    groups = Counter(category["frequency"] for category in data["categories"])
    assert groups == {"f": 6, "c": 15, "r": 9}
    for category in data["categories"]:
        n = images[category["id"]]
        assert category["image_count"] == n
        assert category["instance_count"] == instances[category["id"]]
        assert category["frequency"] == ("r" if n <= 10 else "c" if n <= 100 else "f")


def test_validation_set_has_enough_of_every_class_and_the_training_groups(root):
    paths = mini_lvis.build_mini_lvis(root)
    with open(paths["mini_lvis_train"]) as f, open(paths["mini_lvis_val"]) as g:
        train, val = json.load(f), json.load(g)
    images, instances = per_class(val)
    assert val["categories"] == train["categories"]
    assert min(images.values()) >= 16
    assert min(instances.values()) >= 16
    assert max(images.values()) == 100  # 400 / 4
    ids = [{image["id"] for image in data["images"]} for data in (train, val)]
    assert not ids[0] & ids[1]


def test_every_rare_class_has_a_frequent_look_alike_and_a_known_detail():
    counts = mini_lvis.train_image_counts()
    group = {cls: mini_lvis.frequency_group(n) for cls, n in zip(CLASSES, counts, strict=True)}
    rare = [cls for cls in CLASSES if group[cls] == "r"]
    assert len(rare) == 9
    for cls in rare:
        family = [other for other in CLASSES if other.shape == cls.shape and not other.detail]
        assert [group[other] for other in family] == ["f"]
        same_detail = [other for other in CLASSES if other.detail == cls.detail]
        assert any(group[other] == "c" for other in same_detail)


def test_format_has_the_fields_of_lvis(split):
    assert set(split) == {"info", "images", "annotations", "categories"}
    assert [category["id"] for category in split["categories"]] == list(range(1, 31))
    keys = {"id", "name", "synonyms", "synset", "def", "image_count", "instance_count", "frequency"}
    assert all(set(category) == keys for category in split["categories"])
    ids = [annotation["id"] for annotation in split["annotations"]]
    assert len(set(ids)) == len(ids)
    with_objects = {annotation["image_id"] for annotation in split["annotations"]}
    assert with_objects == {image["id"] for image in split["images"]}


def test_images_have_the_written_sizes(split, root):
    assert len(split["images"]) in (600, 200)
    sizes = Counter((image["width"], image["height"]) for image in split["images"])
    assert set(sizes) == {(160, 160), (160, 128), (128, 160)}
    for image in split["images"][::10]:
        with Image.open(os.path.join(root, mini_lvis.VERSION, image["file_name"])) as opened:
            assert opened.size == (image["width"], image["height"])


def test_boxes_polygons_and_areas_agree_and_lie_inside(split):
    images = {image["id"]: image for image in split["images"]}
    for annotation in split["annotations"]:
        image = images[annotation["image_id"]]
        corners = np.concatenate([np.reshape(p, (-1, 2)) for p in annotation["segmentation"]])
        assert all(len(p) >= 6 and len(p) % 2 == 0 for p in annotation["segmentation"])
        assert corners.min() >= 0
        assert (corners.max(0) <= (image["width"], image["height"])).all()
        extent = [*corners.min(0), *(corners.max(0) - corners.min(0))]
        assert annotation["bbox"] == extent
        assert annotation["bbox"][2] >= 4 and annotation["bbox"][3] >= 4
        assert annotation["area"] <= annotation["bbox"][2] * annotation["bbox"][3]


def test_masks_fill_their_area_and_do_not_overlap(split):
    objects = defaultdict(list)
    for annotation in split["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    for image in split["images"][::5]:
        masks = [rasterise(annotation, image) for annotation in objects[image["id"]]]
        for mask, annotation in zip(masks, objects[image["id"]], strict=True):
            # Outlines run between pixels; drawing them again moves at most a few edge pixels.
            assert abs(int(mask.sum()) - annotation["area"]) <= 6 + 0.05 * annotation["area"]
        assert (np.sum(masks, axis=0) > 1).sum() <= 0.03 * np.sum(masks)


def test_verified_absent_classes_are_absent(split):
    present = defaultdict(set)
    for annotation in split["annotations"]:
        present[annotation["image_id"]].add(annotation["category_id"])
    for image in split["images"]:
        negative = image["neg_category_ids"]
        assert 4 <= len(negative) <= 8 and len(set(negative)) == len(negative)
        assert not present[image["id"]] & set(negative)
        assert set(image["not_exhaustive_category_ids"]) <= present[image["id"]]
    verified = Counter(i for image in split["images"] for i in image["neg_category_ids"])
    assert min(verified[i] for i in range(1, 31)) >= 20


def test_few_images_are_not_exhaustive_and_never_for_a_rare_class(split):
    listed = [i for image in split["images"] for i in image["not_exhaustive_category_ids"]]
    assert 0.01 <= len(listed) / len(split["images"]) <= 0.06
    group = {category["id"]: category["frequency"] for category in split["categories"]}
    assert all(group[i] != "r" for i in listed)


def test_lvis_package_evaluates_its_own_truth_as_perfect(root, monkeypatch):
    monkeypatch.setattr(np, "float", float, raising=False)  # lvis 0.5.3 needs it; numpy dropped it
    truth = LVIS(mini_lvis.build_mini_lvis(root)["mini_lvis_val"])
    results = [
        {key: annotation[key] for key in ("image_id", "category_id", "bbox")} | {"score": 1.0}
        for annotation in truth.dataset["annotations"]
    ]
    evaluation = LVISEval(truth, results, "bbox")
    evaluation.run()
    for group in ("AP", "APr", "APc", "APf"):
        assert evaluation.results[group] == pytest.approx(1.0)


def test_registering_renders_nothing_and_can_be_repeated(tmp_path, clean_catalog):
    for _ in range(2):
        mini_lvis.register_mini_lvis(str(tmp_path / "a"))
    assert not os.listdir(tmp_path)
    metadata = MetadataCatalog.get("mini_lvis_train")
    assert metadata.evaluator_type == "lvis"
    assert metadata.thing_classes[:2] == ["disc", "disc_dotted"]
    assert metadata.thing_dataset_id_to_contiguous_id == {i: i - 1 for i in range(1, 31)}
    assert metadata.class_image_count[0] == {"id": 1, "image_count": 400}
    mini_lvis.register_mini_lvis(str(tmp_path / "b"))
    assert MetadataCatalog.get("mini_lvis_val").json_file.startswith(str(tmp_path / "b"))


def test_catalog_gives_dicts_with_raw_ids_of_image_labels(root, clean_catalog):
    mini_lvis.register_mini_lvis(root)
    records = DatasetCatalog.get("mini_lvis_val")
    with open(MetadataCatalog.get("mini_lvis_val").json_file) as f:
        data = json.load(f)
    assert len(records) == 200
    assert all(os.path.isfile(record["file_name"]) for record in records)
    for record, image in zip(records, data["images"], strict=True):
        assert record["neg_category_ids"] == image["neg_category_ids"]
        assert record["not_exhaustive_category_ids"] == image["not_exhaustive_category_ids"]
    classes = [a["category_id"] for record in records for a in record["annotations"]]
    assert set(classes) == set(range(30))
    assert len(classes) == len(data["annotations"])


def test_an_interrupted_rendering_leaves_nothing_half_made(tmp_path, monkeypatch):
    real, calls = mini_lvis.render_image, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(mini_lvis, "render_image", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mini_lvis._build(str(tmp_path), SMALL)
    assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []
    mini_lvis._build(str(tmp_path), SMALL)
    assert len(os.listdir(tmp_path / mini_lvis.VERSION / "train")) == 24


def test_what_a_killed_run_left_is_removed(tmp_path):
    leftover = tmp_path / f"{mini_lvis.VERSION}.part"
    (leftover / "train").mkdir(parents=True)
    mini_lvis._build(str(tmp_path), SMALL)
    assert not leftover.exists()


def test_concurrent_builds_render_once_and_both_end_complete(tmp_path, monkeypatch):
    real, calls = mini_lvis._render, []

    def counted(*args):
        calls.append(args)
        return real(*args)

    monkeypatch.setattr(mini_lvis, "_render", counted)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(mini_lvis._build, str(tmp_path), SMALL) for _ in range(2)]
        paths = [job.result() for job in jobs]
    assert len(calls) == 1
    assert paths[0] == paths[1]
    assert all(os.path.isfile(path) for path in paths[0].values())


def test_a_set_that_is_there_is_kept_unless_forced(tmp_path, monkeypatch):
    paths = mini_lvis._build(str(tmp_path), SMALL)
    before = os.stat(paths["mini_lvis_val"]).st_ino
    mini_lvis._build(str(tmp_path), SMALL)
    assert os.stat(paths["mini_lvis_val"]).st_ino == before
    mini_lvis._build(str(tmp_path), {"train": 30, "val": 12}, force=True)
    assert len(os.listdir(tmp_path / mini_lvis.VERSION / "train")) == 30
    assert sorted(os.listdir(tmp_path)) == [mini_lvis.VERSION, f"{mini_lvis.VERSION}.lock"]


def test_messages_name_the_directory(tmp_path):
    paths = mini_lvis._build(str(tmp_path), SMALL)
    os.remove(paths["mini_lvis_val"])
    with pytest.raises(FileNotFoundError, match="mini_lvis_val.json is missing; delete .*v1"):
        mini_lvis._build(str(tmp_path), SMALL)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="cannot be rendered into .*file.*DETECTRON2_DATASETS"):
        mini_lvis._build(str(tmp_path / "file"), SMALL)


def test_objects_stay_recognisable_in_a_crowd():
    scene = Scene(128, 128, np.random.default_rng(3))
    for j in range(30):
        scene.add(j, required=False)
    assert len(scene.objects) >= 8
    share = [(scene.owner == i).sum() / obj.full_area for i, obj in enumerate(scene.objects)]
    assert min(share) >= MIN_VISIBLE
    assert min(share) < 1  # some object is covered in part


def test_mask_with_a_hole_is_outlined_without_it():
    mask = np.zeros((12, 12), dtype=bool)
    mask[1:11, 1:11] = True
    mask[4:8, 4:8] = False
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2  # cut through the hole
    # 10 x 10 - 4 x 4 pixels = 84. The outlines cut corners: each half is a U with 6 convex corners
    # that lose a triangle of 1/8 and 2 concave ones that gain it: 84 - 12 / 8 + 4 / 8.
    assert sum(polygon_area(p) for p in polygons) == pytest.approx(83)
    drawn = mask_util.decode(
        mask_util.merge(mask_util.frPyObjects([p.ravel().tolist() for p in polygons], 12, 12))
    )
    assert not drawn[5:7, 5:7].any()
    assert (drawn.astype(bool) != mask).sum() <= 12  # corners at most
