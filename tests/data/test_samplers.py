"""Class-aware sampling, and Detectron2's repeat factors on the images that are left."""

import itertools
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.data.build import get_detection_dataset_dicts
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm

from d2_balance.data import ClassAwareTrainingSampler
from d2_balance.data.records import objects_of
from d2_balance.data.samplers import (
    class_factors,
    images_by_class,
    repeat_factors,
    weighted_repeat_factors,
)
from d2_balance.engine import TrainStream, build_train_stream
from d2_balance.engine.resume.data_stream import check_sampler
from d2_balance.engine.setup.rules import RULES
from d2_balance.utils.rules import check_values

from ..conftest import small_cfg

CLASS_AWARE, REPEAT = "ClassAwareTrainingSampler", "RepeatFactorTrainingSampler"


def record(index, *classes, crowd=()):
    """An image with one object of each class, and crowds."""
    annotations = [{"category_id": c, "iscrowd": 0} for c in classes]
    annotations += [{"category_id": c, "iscrowd": 1} for c in crowd]
    return {
        "file_name": f"{index}.png",
        "image_id": index,
        "width": 60 if index % 3 else 40,
        "height": 50,
        "annotations": annotations,
    }


# class 0 in images 0, 1, 2, 3; class 4 in 3 and 5; class 9 in 5; 4 is empty, 6 has a crowd only
IMAGES = [
    record(0, 0),
    record(1, 0, 0),
    record(2, 0),
    record(3, 4, 0),
    record(4),
    record(5, 9, 4, crowd=[7]),
    record(6, crowd=[0]),
]


def take(sampler, count):
    return list(itertools.islice(iter(sampler), count))


def test_classes_list_each_image_once_and_crowds_do_not_count():
    starts, images = images_by_class(IMAGES)
    lists = [images[a:b].tolist() for a, b in itertools.pairwise(starts.tolist())]
    assert lists == [[0, 1, 2, 3], [3, 5], [5]]


def test_images_are_drawn_by_class_and_then_by_image():
    # P(image) = sum over its classes of 1 / 3 / images of the class
    expected = {
        0: 1 / 12,
        1: 1 / 12,
        2: 1 / 12,
        3: 1 / 12 + 1 / 6,
        5: 1 / 6 + 1 / 3,
    }
    count = 60_000
    drawn = Counter(take(ClassAwareTrainingSampler(IMAGES, seed=0), count))
    assert drawn.keys() == expected.keys()  # neither the empty image nor the one with a crowd
    for image, share in expected.items():
        # five standard deviations of a binomial share
        assert abs(drawn[image] / count - share) < 5 * math.sqrt(share * (1 - share) / count)


def test_the_stream_depends_on_the_seed_alone():
    torch.manual_seed(1)
    first = take(ClassAwareTrainingSampler(IMAGES, seed=3), 9000)  # more than one chunk
    torch.manual_seed(2)
    sampler = ClassAwareTrainingSampler(IMAGES, seed=3)
    assert take(sampler, 9000) == first == take(sampler, 9000)
    assert take(ClassAwareTrainingSampler(IMAGES, seed=4), 9000) != first
    assert first[:4096] != first[4096:8192]  # the second chunk is not the first once more


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_share_out_one_stream(monkeypatch, ranks):
    whole = take(ClassAwareTrainingSampler(IMAGES, seed=3), 60)
    monkeypatch.setattr(comm, "get_world_size", lambda: ranks)
    for rank in range(ranks):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        part = take(ClassAwareTrainingSampler(IMAGES, seed=3), 60 // ranks)
        assert part == whole[rank::ranks]


@pytest.mark.parametrize("images", [[], [record(0), record(1, crowd=[2])]])
def test_a_set_without_annotations_is_refused(images):
    with pytest.raises(ValueError, match="DATALOADER.SAMPLER_TRAIN .* needs annotations"):
        ClassAwareTrainingSampler(images, seed=0)


def test_the_size_of_lvis_takes_seconds():
    classes = torch.randint(1203, (100_000, 12), generator=torch.Generator().manual_seed(0))
    images = [
        {"annotations": [{"category_id": c} for c in row], "file_name": ""}
        for row in classes.tolist()
    ]
    start = time.perf_counter()
    sampler = ClassAwareTrainingSampler(images, seed=0)
    built = time.perf_counter()
    take(sampler, 100_000)
    drawn = time.perf_counter()
    assert built - start < 30 and drawn - built < 5  # 2.3 s and 0.02 s on a busy core


def stream_cfg(sampler, *overrides):
    cfg = small_cfg("retinanet")
    cfg.DATASETS.TRAIN = ("sampler_train",)
    cfg.SEED, cfg.SOLVER.IMS_PER_BATCH, cfg.DATALOADER.NUM_WORKERS = 3, 2, 0
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD = sampler, 0.5
    cfg.merge_from_list(list(overrides))
    return cfg


@pytest.fixture
def registered():
    DatasetCatalog.register("sampler_train", lambda: IMAGES)
    yield
    DatasetCatalog.remove("sampler_train")


def batches(stream, count, start=0):
    return list(itertools.islice(stream.batches(), start, start + count))


@pytest.mark.parametrize("sampler", [CLASS_AWARE, REPEAT])
def test_a_resumed_stream_skips_what_was_seen(registered, sampler):
    whole = build_train_stream(stream_cfg(sampler))
    assert isinstance(whole, TrainStream)
    resumed = build_train_stream(stream_cfg(sampler))
    # the images need not exist: the stream is compared before they are loaded
    assert batches(resumed, 8, start=5) == batches(whole, 13)[5:]
    drawn = {index for batch in batches(whole, 40) for _, index in batch}
    filtered = 5  # images 4 and 6 are taken out by FILTER_EMPTY_ANNOTATIONS
    assert drawn == set(range(filtered))


def test_a_data_set_that_is_no_list_is_refused():
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return IMAGES[index]

    DatasetCatalog.register("sampler_train", lambda: Images())
    try:
        with pytest.raises(ValueError, match="SAMPLER_TRAIN ClassAware.* lists of dicts"):
            build_train_stream(
                stream_cfg(CLASS_AWARE, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", "False")
            )
    finally:
        DatasetCatalog.remove("sampler_train")


@pytest.mark.parametrize("filter_empty", [True, False])
def test_repeat_factors_follow_the_paper_on_the_images_that_are_left(registered, filter_empty):
    dicts = get_detection_dataset_dicts(["sampler_train"], filter_empty=filter_empty)
    assert len(dicts) == (5 if filter_empty else 7)
    threshold = 0.5
    factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(dicts, threshold)
    assert len(factors) == len(dicts)
    # by the paper: f = images with the class / images left, r(c) = max(1, sqrt(t / f)),
    # r(I) = max over the classes of the image; Detectron2 counts crowds as well
    expected = []
    for image in dicts:
        repeat = 1.0
        for c in {a["category_id"] for a in image["annotations"]}:
            having = sum(c in {a["category_id"] for a in d["annotations"]} for d in dicts)
            repeat = max(repeat, math.sqrt(threshold * len(dicts) / having))
        expected.append(repeat)
    assert factors.tolist() == pytest.approx(expected)
    by_name = {d["image_id"]: f for d, f in zip(dicts, factors.tolist(), strict=True)}
    # class 9 in one of 5 or 7 images: sqrt(.5 * 5) or sqrt(.5 * 7)
    assert by_name[5] == pytest.approx(math.sqrt(2.5 if filter_empty else 3.5))
    assert by_name.get(4, 1.0) == 1.0  # an empty image that is kept comes once
    sampler = RepeatFactorTrainingSampler(factors, seed=0)
    assert max(take(sampler, 300)) == len(dicts) - 1


def test_weighted_repeat_factors_count_classes_over_all_sets():
    # 4 + 3 images; class 0 in 4 of 7, class 4 in 2, class 9 in 1; Detectron2 counts crowds too,
    # so class 7 is in 1 and class 0 in 5. t = 0.5: r(0) = 1, r(4) = sqrt(0.5 * 7 / 2), and so on
    sources = ["a"] * 4 + ["b"] * 3
    found = weighted_repeat_factors(IMAGES, sources, {"b": 0.25}, 0.5)
    common, rare = math.sqrt(0.5 * 7 / 2), math.sqrt(0.5 * 7)
    expected = [1, 1, 1, common, 0.25, rare * 0.25, 0.25]
    assert found.tolist() == pytest.approx(expected)


def test_the_stream_takes_weights_of_data_sets_on_top_of_repeat_factors(registered_sets):
    cfg = small_cfg("faster")
    cfg.DATASETS.TRAIN = registered_sets
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    cfg.DATALOADER.SAMPLER_TRAIN = "WeightedRepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 1e-6  # repeats nothing
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = [[registered_sets[1], 3.0]]
    cfg.DATALOADER.NUM_WORKERS, cfg.SEED = 0, 1
    check_sampler(cfg)
    stream = build_train_stream(cfg)
    count = Counter(take(stream._sampler, 6 + 3 * 6))  # one epoch of 6 images once, 6 three times
    assert [count[i] for i in range(12)] == [1] * 6 + [3] * 6


@pytest.mark.parametrize(
    ("factors", "sampler", "text"),
    [
        ([["c", 2.0]], "WeightedTrainingSampler", "entry .'c', 2.0.; must be .* DATASETS.TRAIN: a"),
        ([["a", 0]], "WeightedTrainingSampler", "a factor above 0"),
        ([["a"]], "WeightedTrainingSampler", "must be .name, factor."),
        ([["a", 2.0]], "TrainingSampler", "would not use it; must be one of Weighted"),
    ],
)
def test_weights_that_cannot_work_are_refused(factors, sampler, text):
    cfg = small_cfg("faster")
    cfg.DATASETS.TRAIN = ("a",)
    cfg.DATALOADER.SAMPLER_TRAIN = sampler
    cfg.DATASETS.TRAIN_REPEAT_FACTOR = factors
    with pytest.raises(ValueError, match=f"TRAIN_REPEAT_FACTOR.*{text}"):
        check_sampler(cfg)


@pytest.fixture
def registered_sets():
    """Names of two sets of the six images with an annotation that is no crowd, or without."""
    names = ("weighted_of_test_a", "weighted_of_test_b")
    for name in names:
        DatasetCatalog.register(name, lambda: [dict(p) for p in IMAGES[:6]])
    yield names
    for name in names:
        DatasetCatalog.pop(name)


@pytest.mark.parametrize("threshold", [0.001, 0.3, 2.0])
def test_repeat_factors_from_columns_equal_those_of_detectron2(threshold):
    stock = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency
    crowd = {"category_id": 2, "iscrowd": 1}
    records = [*IMAGES, {"annotations": [crowd, crowd]}, {"annotations": []}]
    assert torch.equal(repeat_factors(records, threshold), stock(records, threshold))


def _reference(name):
    data = np.load(Path(__file__).parents[1] / "reference" / f"{name}.npz")
    records = [{"annotations": []} for _ in range(int(data["num_images"]))]
    for image, category in zip(data["image_of_object"], data["class_of_object"], strict=True):
        records[image]["annotations"].append({"category_id": int(category)})
    return data, records


@pytest.mark.parametrize("form", ["rfs", "rfs_linear"])
def test_repeat_factors_equal_the_reference(form):
    data, records = _reference("repeat_factors")
    wanted = data["factors_sqrt" if form == "rfs" else "factors_linear"]
    found = repeat_factors(records, float(data["threshold"]), form)
    assert found.tolist() == pytest.approx(wanted.tolist(), rel=1e-6)


@pytest.mark.parametrize(("alpha", "threshold"), [(2.0, 1e-4), (1.0, 1e-2)])
def test_eirfs_equals_the_reference(alpha, threshold):
    data, records = _reference("eirfs")
    key = f"alpha{alpha}_t{threshold}"
    found = repeat_factors(records, threshold, "eirfs", alpha)
    assert found.tolist() == pytest.approx(data[f"{key}_weights"].tolist(), rel=1e-6)
    objects = objects_of(records)
    factors = class_factors(objects.counts(int(data["num_classes"])), threshold, "eirfs", alpha)
    assert factors.tolist() == pytest.approx(data[f"{key}_class_weights"].tolist(), rel=1e-9)


def test_irfs_by_hand():
    # class 0: 2 of 4 images, 3 of 4 objects; class 1: 1 of 4 images, 1 of 4 objects; t = 1
    # g_0 = sqrt(1/2 * 3/4) = .612, factor sqrt(1 / .612) = 1.278; g_1 = 1/4, factor 2
    records = [record(0, 0, 0), record(1, 0), record(2, 1), record(3)]
    found = repeat_factors(records, 1.0, "irfs").tolist()
    assert found == pytest.approx([1.2779, 1.2779, 2.0, 1.0], rel=1e-4)


def test_a_form_that_draws_few_images_only_warns(caplog):
    records = [record(n, 0) for n in range(400)] + [record(400, 1)]
    with caplog.at_level("WARNING", logger="d2_balance.data.samplers"):
        repeat_factors(records, 0.1, "eirfs", 6.0)
    assert "times as often as the median" in caplog.text


def test_forms_that_cannot_work_are_refused():
    cfg = small_cfg("faster")
    for key, value in (("REPEAT_FORM", "rsf"), ("REPEAT_FORM", "irfs"), ("REPEAT_ALPHA", 0.0)):
        bad = cfg.clone()
        bad.DATALOADER[key] = value
        with pytest.raises(ValueError, match=f"DATALOADER.({key}|REPEAT_FORM)"):
            check_values(bad, RULES)
            check_sampler(bad)
    cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_FORM = REPEAT, "irfs"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.1
    check_sampler(cfg)
