"""AP-fixed, AP-pool and boundary AP against the authors' figures and slow oracles."""

import json
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2_balance.cli import main as cli
from d2_balance.data.annotations import read_annotations
from d2_balance.data.resolve import load_annotations
from d2_balance.evaluation.boundary import match, rim, rim_width
from d2_balance.evaluation.evaluate import measure
from d2_balance.evaluation.matching import GroundTruth, Ranked, select
from d2_balance.evaluation.predictions import read_predictions

from .small_sets import official, rle, small_dataset, small_detections

REFERENCE = Path(__file__).parent.parent / "reference"


def load(name):
    return np.load(REFERENCE / f"{name}.npz")


def written(directory, dataset, detections, style=None):
    (directory / "truth.json").write_text(json.dumps(dataset))
    (directory / "found.json").write_text(json.dumps(detections))
    path = str(directory / "truth.json")
    truth = load_annotations(path, style=style) if style else read_annotations(path)
    return truth, read_predictions(str(directory / "found.json"), truth)


def lvis_dataset(reference, objects, groups, size):
    """A dataset of a reference file; ids are one above its indices."""
    count, classes = int(reference["num_images"]), int(reference["num_classes"])
    listed = {name: [[] for _ in range(count)] for name in ("negative", "not_exhaustive")}
    for name, labels in listed.items():
        for image, category in reference[name].tolist():
            labels[image].append(category + 1)
    return {
        "images": [
            {
                "id": n + 1,
                "height": size[0],
                "width": size[1],
                "neg_category_ids": listed["negative"][n],
                "not_exhaustive_category_ids": listed["not_exhaustive"][n],
            }
            for n in range(count)
        ],
        "categories": [
            {"id": k + 1, "name": f"class {k}", "frequency": groups[k]} for k in range(classes)
        ],
        "annotations": [{"id": n, **ann} for n, ann in enumerate(objects, start=1)],
    }


@pytest.fixture(scope="module")
def pooled(tmp_path_factory):
    reference = load("ap_fixed_pool")
    objects = [
        {"image_id": int(i) + 1, "category_id": int(k) + 1, "bbox": box, "area": box[2] * box[3]}
        for i, k, *box in reference["gt"].tolist()
    ]
    dataset = lvis_dataset(reference, objects, reference["group"].tolist(), (200, 200))
    detections = [
        {"image_id": int(i) + 1, "category_id": int(k) + 1, "bbox": box, "score": score}
        for i, k, *box, score in reference["detections"].tolist()
    ]
    return reference, *written(tmp_path_factory.mktemp("pooled"), dataset, detections)


@pytest.mark.parametrize("limit", [10000, 20])
def test_ap_fixed_and_ap_pool_equal_the_authors(pooled, limit):
    reference, truth, predictions = pooled
    found = measure(truth, predictions, ap=("fixed", "pool"), per_class=limit).evaluation
    results = found.results
    assert results["bbox"]["AP"] == pytest.approx(100 * float(reference["ordinary_AP"]), abs=1e-6)
    for metric in ("AP", "AP50", "AP75", "APr", "APc", "APf"):
        expected = 100 * float(reference[f"fixed{limit}_{metric}"])
        assert results["bbox_fixed"][metric] == pytest.approx(expected, abs=1e-6)
    by_class = [record["AP_bbox_fixed"] for record in found.classes.values()]
    np.testing.assert_allclose(by_class, 100 * reference[f"fixed{limit}_ap_per_class"], atol=1e-6)
    for metric, pool in (("AP", "all"), ("APr", "r"), ("APc", "c"), ("APf", "f")):
        expected = 100 * float(reference[f"pool{limit}_{pool}"])
        assert results["bbox_pool"][metric] == pytest.approx(expected, abs=1e-6)


@pytest.fixture(scope="module")
def boundary(tmp_path_factory):
    reference = load("boundary_ap")
    size = int(reference["height"]), int(reference["width"])

    def unpacked(name, count):
        bits = np.unpackbits(reference[name])[: count * size[0] * size[1]]
        return bits.reshape(count, *size).astype(bool)

    true = unpacked("gt_masks", len(reference["gt"]))
    masks = unpacked("det_masks", len(reference["detections"]))
    objects = [
        {
            "image_id": int(i) + 1,
            "category_id": int(k) + 1,
            "bbox": box_of(mask),
            "area": float(mask.sum()),
            "segmentation": rle(mask),
        }
        for (i, k), mask in zip(reference["gt"].tolist(), true, strict=True)
    ]
    detections = [
        {
            "image_id": int(i) + 1,
            "category_id": int(k) + 1,
            "score": score,
            "segmentation": rle(mask),
        }
        for (i, k, score), mask in zip(reference["detections"].tolist(), masks, strict=True)
    ]
    dataset = lvis_dataset(reference, objects, "rcfr", size)
    return reference, *written(tmp_path_factory.mktemp("boundary"), dataset, detections), detections


def box_of(mask):
    y, x = np.nonzero(mask)
    if not len(x):
        return [0, 0, 1, 1]
    return [int(v) for v in (x.min(), y.min(), np.ptp(x) + 1, np.ptp(y) + 1)]


@pytest.mark.parametrize("ratio", [0.02, 0.05])
def test_rims_equal_the_authors(boundary, ratio):
    reference, _, _, _ = boundary
    size = int(reference["height"]), int(reference["width"])
    packed = np.concatenate([np.unpackbits(reference[k]) for k in ("gt_masks", "det_masks")])
    count = len(reference["gt"]) + len(reference["detections"])
    masks = packed[: count * size[0] * size[1]].reshape(count, *size)
    expected = np.unpackbits(reference[f"boundary{ratio}"])[: masks.size].reshape(masks.shape)
    for mask, own in zip(masks, expected, strict=True):
        assert (mask_util.decode(rim(rle(mask), rim_width(*size, ratio))) == own).all()


def test_boundary_ap_equals_the_authors(boundary):
    reference, truth, predictions, _ = boundary
    results = measure(truth, predictions, ap=("boundary",)).evaluation.results
    for task in ("boundary", "segm"):
        for metric in ("AP", "AP50", "AP75"):
            expected = 100 * float(reference[f"{task}_{metric}"])
            assert results[task][metric] == pytest.approx(expected, abs=1e-6)


def best_of_classes(detections, limit):
    """The `limit` best detections of each class."""
    kept = []
    for category in {d["category_id"] for d in detections}:
        own = [d for d in detections if d["category_id"] == category]
        kept += sorted(own, key=lambda d: -d["score"])[:limit]
    return kept


def slow_rim(mask):
    """Pixels with a pixel outside of the mask, or of the image, in the square around them."""
    height, width = mask.shape
    d = max(1, round(0.02 * (height**2 + width**2) ** 0.5))
    rim = mask.copy()
    for y, x in zip(*np.nonzero(mask), strict=True):
        rows, columns = range(y - d, y + d + 1), range(x - d, x + d + 1)
        inside = rows[0] >= 0 and columns[0] >= 0 and rows[-1] < height and columns[-1] < width
        rim[y, x] = (
            not inside or not mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        )
    return rim


def slow_iou(one, other, crowd):
    joint = (one & other).sum()
    total = one.sum() if crowd else (one | other).sum()
    return joint / total if total else 0.0


def slow_statuses(dataset, detections, lvis, threshold, boundary):  # noqa: C901  one loop
    """(score, image, class, right) of the detections that count, and objects by class."""
    images = sorted(i["id"] for i in dataset["images"])
    listed = {i["id"]: i for i in dataset["images"]}
    statuses, objects = [], {}
    for image in images:
        for category in sorted(c["id"] for c in dataset["categories"]):

            def of(records, image=image, category=category):
                pair = image, category
                return [r for r in records if (r["image_id"], r["category_id"]) == pair]

            true, found = of(dataset["annotations"]), of(detections)
            if lvis:
                true = [a for a in true if a["area"] > 0]
                if not true and category not in listed[image]["neg_category_ids"]:
                    continue
            ignore = [bool(a.get("ignore", 0) if lvis else a["iscrowd"]) for a in true]
            objects[category] = objects.get(category, 0) + ignore.count(False)
            partial = lvis and category in listed[image]["not_exhaustive_category_ids"]
            free = set(range(len(true)))
            for detection in sorted(found, key=lambda d: -d["score"]):
                mask = mask_util.decode(detection["segmentation"]).astype(bool)
                if lvis and not mask.sum():
                    continue
                best, at = (False, min(threshold, 1 - 1e-10)), -1
                for n in sorted(free):
                    crowd = not lvis and true[n]["iscrowd"]
                    other = mask_util.decode(true[n]["segmentation"]).astype(bool)
                    iou = slow_iou(mask, other, crowd)
                    if boundary and not crowd:
                        iou = min(iou, slow_iou(slow_rim(mask), slow_rim(other), False))
                    if iou >= min(threshold, 1 - 1e-10) and (not ignore[n], iou) >= best:
                        best, at = (not ignore[n], iou), n
                if at >= 0 and (lvis or not true[at]["iscrowd"]):
                    free.discard(at)
                if not (partial if at < 0 else ignore[at]):
                    statuses.append((detection["score"], image, category, at >= 0))
    return statuses, objects


def slow_ap(statuses, objects):
    """AP of one list; `statuses` in the order of their scores."""
    if not objects:
        return np.nan
    right = np.cumsum([s[-1] for s in statuses])
    precision = right / np.arange(1, len(statuses) + 1)
    values = []
    for recall in np.linspace(0, 1, 101):
        reached = [p for p, n in zip(precision, right, strict=True) if n / objects >= recall]
        values.append(max(reached, default=0.0))
    return float(np.mean(values))


@pytest.mark.parametrize("lvis", [False, True])
@pytest.mark.parametrize("boundary", [False, True])
def test_measures_equal_a_slow_oracle_on_small_sets(tmp_path, lvis, boundary):
    compared = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        dataset = small_dataset(rng, lvis)
        detections = small_detections(rng, dataset)
        if not detections:
            continue
        limit = int(rng.integers(1, 6))
        truth, predictions = written(tmp_path, dataset, detections, "lvis" if lvis else "coco")
        ground = GroundTruth(truth, "boundary" if boundary else "segm")
        matcher = match(ground, select(ground, predictions, None, per_class=limit))
        table, ranked = matcher.table().values[..., 0], Ranked(matcher)
        np.testing.assert_allclose(ranked.average_precision(), table, atol=1e-9)
        kept = best_of_classes(detections, limit)
        for t in (0, 3, 8):
            threshold = matcher.iou_thresholds[t]
            statuses, objects = slow_statuses(dataset, kept, lvis, threshold, boundary)
            # equal scores: by image, then class
            statuses.sort(key=lambda s: (-s[0], s[1], s[2]))
            for k, category in enumerate(ground.class_ids):
                own = [s for s in statuses if s[2] == category]
                expected = slow_ap(own, objects.get(category, 0))
                np.testing.assert_allclose(table[t, k], expected, atol=1e-9, err_msg=f"{seed}")
            pool = slow_ap(statuses, sum(objects.values()))
            every = ranked.pooled(np.ones(len(ground.class_ids), dtype=bool))
            np.testing.assert_allclose(every[t], pool, atol=1e-9, err_msg=f"{seed}")
        compared += 1
    assert compared > 20


@pytest.mark.parametrize("lvis", [False, True])
def test_ap_fixed_of_all_sizes_equals_the_official_code_without_its_limit(
    tmp_path, lvis, monkeypatch
):
    monkeypatch.setattr(np, "float", float, raising=False)
    for seed in range(20):
        rng = np.random.default_rng(100 + seed)
        dataset = small_dataset(rng, lvis)
        detections = small_detections(rng, dataset)
        if not detections:
            continue
        limit = int(rng.integers(1, 6))
        truth, predictions = written(tmp_path, dataset, detections, "lvis" if lvis else "coco")
        kept = best_of_classes(detections, limit)
        results = measure(truth, predictions, ap=("fixed",), per_class=limit).evaluation.results
        for task in ("bbox", "segm"):
            expected, _ = official(dataset, kept, task, lvis, 10**6)
            for metric, value in expected.items():
                if lvis or metric[2:] not in ("r", "c", "f"):
                    own = results[f"{task}_fixed"][metric]
                    assert own == pytest.approx(value, abs=1e-6, nan_ok=True), (seed, metric)


def run(directory, *arguments):
    files = directory / "found.json", "--dataset", directory / "truth.json"
    return cli.main(["eval", *map(str, (*files, *arguments))])


def test_the_command_writes_every_measure_and_says_what_is_too_low(tmp_path, capsys):
    rng = np.random.default_rng(5)
    dataset = small_dataset(rng, lvis=True)
    while len(dataset["images"]) < 3 or len(dataset["annotations"]) < 5:
        dataset = small_dataset(rng, lvis=True)
    written(tmp_path, dataset, small_detections(rng, dataset))
    out = tmp_path / "figures.json"
    measures = ["--ap", "fixed", "pool", "boundary", "--json", out]
    assert run(tmp_path, *measures) == 0
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    tasks = ["bbox", "segm", "boundary"]
    expected = {f"{task}{suffix}" for task in tasks for suffix in ("", "_fixed", "_pool")}
    assert set(found["results"]) == expected and found["per_class"] == 10_000
    assert "| boundary, fixed |" in printed and "| mask, pool " in printed
    assert "have fewer than 10,000 detections; predict with TEST.DETECTIONS_PER_CLASS" in printed
    record = next(iter(found["classes"].values()))
    assert {"AP", "AP_segm", "AP_boundary", "AP50_bbox_fixed"} <= set(record)


def test_minival_is_an_evaluation_of_its_images_alone(tmp_path):
    rng = np.random.default_rng(5)
    dataset = small_dataset(rng, lvis=True)
    while len(dataset["images"]) < 4:
        dataset = small_dataset(rng, lvis=True)
    detections = small_detections(rng, dataset)
    written(tmp_path, dataset, detections)
    ids = [image["id"] for image in dataset["images"]][:2]
    (tmp_path / "ids.txt").write_text("\n".join(map(str, ids)))
    assert run(tmp_path, "--ids", tmp_path / "ids.txt", "--json", tmp_path / "part.json") == 0
    part = {
        **dataset,
        "images": [i for i in dataset["images"] if i["id"] in ids],
        "annotations": [a for a in dataset["annotations"] if a["image_id"] in ids],
    }
    written(tmp_path, part, [d for d in detections if d["image_id"] in ids])
    assert run(tmp_path, "--json", tmp_path / "whole.json") == 0
    one, other = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("part", "whole"))
    assert one["results"] == other["results"] and one["images"] == other["images"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ap", "fixed", "--per-class", "0"], "detections per class must be at least 1, not 0"),
        (["--ap", "boundary"], "boundary AP needs masks; there are detections of"),
        (["--ids", "ids.txt"], "1 of 1 image ids are no images of"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    dataset = small_dataset(rng, lvis=True)
    boxes = [{**d, "segmentation": None} for d in small_detections(rng, dataset)]
    written(tmp_path, dataset, boxes)
    (tmp_path / "ids.txt").write_text("999")
    assert run(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
