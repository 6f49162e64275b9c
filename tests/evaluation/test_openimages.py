"""AP50 of Open Images against a slow oracle from the challenge's page."""

import json

import numpy as np
import pytest

from d2_balance.cli import main as cli
from d2_balance.data.resolve import load_annotations
from d2_balance.evaluation.evaluate import measure
from d2_balance.evaluation.predictions import read_predictions

# animal above dog and cat, dog above puppy; thing stands alone
LABELS = {1: "/m/animal", 2: "/m/dog", 3: "/m/cat", 4: "/m/puppy", 5: "/m/thing"}
ABOVE = {2: [1], 3: [1], 4: [1, 2]}
HIERARCHY = {
    "LabelName": "/m/root",
    "Subcategory": [
        {
            "LabelName": "/m/animal",
            "Subcategory": [
                {"LabelName": "/m/dog", "Subcategory": [{"LabelName": "/m/puppy"}]},
                {"LabelName": "/m/cat"},
            ],
        },
        {"LabelName": "/m/thing"},
    ],
}


def random_box(rng):
    w, h = rng.integers(6, 40, 2).tolist()
    return [int(rng.integers(0, 100 - w)), int(rng.integers(0, 80 - h)), w, h]


def random_set(rng):
    """Boxes with those of the classes above, groups, verified absences; detections of leaves."""
    images, annotations, detections = [], [], []
    for number in range(1, int(rng.integers(2, 6))):
        shown = set()
        for _ in range(int(rng.integers(0, 5))):
            category, box = int(rng.integers(1, 6)), random_box(rng)
            group = bool(rng.random() < 0.3)
            for k in (category, *ABOVE.get(category, ())):
                shown.add(k)
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": k,
                        "bbox": box,
                        "area": box[2] * box[3],
                    }
                    | ({"iscrowd": 1, "ignore": 1} if group else {})
                )
            for _ in range(int(rng.integers(0, 4))):
                if group:  # inside of it, or partly
                    w, h = box[2] // 2, box[3] // 2
                    near = [box[0] + int(rng.integers(-3, 9)), box[1], w, h]
                else:
                    near = [v + int(rng.integers(-3, 4)) for v in box]
                near = [max(v, 0) for v in near[:2]] + [max(v, 1) for v in near[2:]]
                other = category if rng.random() < 0.8 else int(rng.integers(1, 6))
                detections.append((number, other, near))
        for _ in range(int(rng.integers(0, 4))):
            detections.append((number, int(rng.integers(1, 6)), random_box(rng)))
        images.append(
            {
                "id": number,
                "width": 100,
                "height": 80,
                "neg_category_ids": [k for k in LABELS if k not in shown and rng.random() < 0.4],
                "not_exhaustive_category_ids": [],
            }
        )
    scores = rng.permutation(len(detections)) / (len(detections) + 1)
    found = [
        {"image_id": i, "category_id": k, "bbox": box, "score": float(s)}
        for (i, k, box), s in zip(detections, scores, strict=True)
    ]
    categories = [
        {"id": k, "name": label[3:], "label": label, "frequency": "f"}
        for k, label in LABELS.items()
    ]
    return {"images": images, "annotations": annotations, "categories": categories}, found


def intersection(a, b):
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(w, 0) * max(h, 0)


def iou(a, b):
    both = intersection(a, b)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def slow_ap50(dataset, detections, category):
    outcomes, total = [], 0
    for image in dataset["images"]:
        own = [
            a
            for a in dataset["annotations"]
            if (a["image_id"], a["category_id"]) == (image["id"], category)
        ]
        if not own and category not in image["neg_category_ids"]:
            continue
        boxes = [a["bbox"] for a in own if not a.get("iscrowd")]
        groups = [a["bbox"] for a in own if a.get("iscrowd")]
        total += len(own)
        found = [d for d in detections if d["image_id"] == image["id"]]
        found = [d for d in found if d["category_id"] == category]
        taken, best_of_group = set(), {}
        for d in sorted(found, key=lambda d: -d["score"]):
            overlaps = [iou(d["bbox"], b) for b in boxes]
            if overlaps and max(overlaps) >= 0.5 and overlaps.index(max(overlaps)) not in taken:
                taken.add(overlaps.index(max(overlaps)))
                outcomes.append((d["score"], True))
                continue
            area = d["bbox"][2] * d["bbox"][3]
            shares = [intersection(d["bbox"], g) / area for g in groups]
            if shares and max(shares) >= 0.5:
                group = shares.index(max(shares))
                best_of_group[group] = max(best_of_group.get(group, 0), d["score"])
                continue
            outcomes.append((d["score"], False))
        outcomes += [(score, True) for score in best_of_group.values()]
    if not total:
        return np.nan
    outcomes.sort(key=lambda o: -o[0])
    # area below the precision that does not rise with recall
    recalls, precisions, right = [0.0], [0.0], 0
    for n, (_, hit) in enumerate(outcomes, start=1):
        right += hit
        recalls.append(right / total)
        precisions.append(right / n)
    area = 0.0
    for n in range(1, len(recalls)):
        area += (recalls[n] - recalls[n - 1]) * max(precisions[n:])
    return area


def expanded(detections):
    return [
        d | {"category_id": k}
        for d in detections
        for k in (d["category_id"], *ABOVE.get(d["category_id"], ()))
    ]


def write(directory, dataset, detections):
    contents = {"truth": dataset, "found": detections, "hierarchy": HIERARCHY}
    for name, content in contents.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize("hierarchy", [False, True])
@pytest.mark.parametrize("style", ["lvis", "coco"])
def test_ap50_equals_a_slow_oracle_on_random_sets(tmp_path, hierarchy, style):
    compared = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        dataset, detections = random_set(rng)
        if not detections:
            continue
        write(tmp_path, dataset, detections)
        truth = load_annotations(str(tmp_path / "truth.json"), style=style)
        found = measure(
            truth,
            read_predictions(str(tmp_path / "found.json"), truth),
            ap=("openimages",),
            hierarchy=str(tmp_path / "hierarchy.json") if hierarchy else "",
        ).evaluation
        if style == "coco":  # every class counts in every image
            for image in dataset["images"]:
                image["neg_category_ids"] = list(LABELS)
        used = expanded(detections) if hierarchy else detections
        expected = {LABELS[k][3:]: 100 * slow_ap50(dataset, used, k) for k in LABELS}
        for name, value in expected.items():
            own = found.classes[name]["AP50_openimages"]
            assert own == pytest.approx(value, abs=1e-9, nan_ok=True), (seed, name)
        known = [v for v in expected.values() if not np.isnan(v)]
        mean = np.mean(known) if known else np.nan
        ap50 = found.results["bbox_openimages"]["AP50"]
        assert ap50 == pytest.approx(mean, abs=1e-9, nan_ok=True)
        compared += 1
    assert compared > 50


def run(directory, *arguments):
    files = directory / "found.json", "--dataset", directory / "truth.json"
    return cli.main(["eval", *map(str, (*files, *arguments))])


def test_the_command_shows_a_row_and_refuses_what_is_no_hierarchy(tmp_path, capsys):
    dataset, detections = random_set(np.random.default_rng(1))
    write(tmp_path, dataset, detections)
    hierarchy = ["--hierarchy", tmp_path / "hierarchy.json"]
    assert run(tmp_path, "--ap", "openimages", *hierarchy) == 0
    assert "| box, openimages |" in capsys.readouterr().out
    assert run(tmp_path, *hierarchy) == 2
    assert "--hierarchy is for --ap openimages" in capsys.readouterr().err
    for category in dataset["categories"]:
        del category["label"]
    write(tmp_path, dataset, detections)
    assert run(tmp_path, "--ap", "openimages", *hierarchy) == 2
    assert "has none of the labels of" in capsys.readouterr().err
