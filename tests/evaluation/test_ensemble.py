"""Merging of predictions: identities, the reference, masks, experts, and what is refused."""

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest

from d2_balance.cli import main as cli
from d2_balance.data.annotations import read_annotations
from d2_balance.evaluation.merge.ensemble import METHODS, Ensemble, cluster, overlap
from d2_balance.evaluation.predictions import (
    _spans,
    _spans_by_braces,
    read_objects,
    read_predictions,
)

REFERENCE = Path(__file__).parents[1] / "reference/ensemble_boxes.npz"
IMAGES = [{"id": i, "height": 60, "width": 80} for i in (3, 5, 9)]
TRUTH = {
    "images": IMAGES,
    "categories": [{"id": i, "name": f"class {i}"} for i in (1, 2, 4)],
    "annotations": [],
}
EXPERT = {  # class ids of its own, and a class that the target does not have
    "images": [{"id": 1, "height": 9, "width": 9}],
    "categories": [{"id": 7, "name": "Class_2"}, {"id": 8, "name": "zebra"}],
    "annotations": [],
}
OTHER = EXPERT | {"categories": [{"id": 11, "name": "class 1"}, {"id": 14, "name": "class 4"}]}


def mask(x, y, w, h):
    found = np.zeros((60, 80), np.uint8, order="F")
    found[int(y) : int(y + h), int(x) : int(x + w)] = 1
    rle = mask_util.encode(found)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def draw(seed, count=40, classes=(1, 2, 4)):
    """Detections with boxes of a model that overlap each other, equal scores, and masks."""
    noise = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        x, y, w, h = (noise.integers(0, 6, 4) * 4 + [0, 0, 12, 12]).tolist()
        score = round(float(noise.integers(1, 30)) / 30, 3)
        image, category = int(noise.choice([3, 5, 9])), int(noise.choice(classes))
        found.append(
            {"image_id": image, "category_id": category, "bbox": [x, y, w, h], "score": score}
            | {"segmentation": mask(x, y, w, h)}
        )
    return found


@pytest.fixture
def merge(tmp_path):
    """Runs the command on lists of detections and returns the merged list, or the exit status."""
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    (tmp_path / "expert.json").write_text(json.dumps(EXPERT))
    (tmp_path / "other.json").write_text(json.dumps(OTHER))
    calls = iter(range(99))

    def run(*models, experts=(), options=(), fails=False, files=("expert.json", "other.json")):
        call = next(calls)
        out = tmp_path / f"out{call}.json"
        arguments = []
        for kind, group in (("", models), ("--expert", experts)):
            for number, detections in enumerate(group):
                path = tmp_path / f"{call}{kind}{number}.json"
                path.write_text(
                    detections if isinstance(detections, str) else json.dumps(detections)
                )
                more = ["--expert", path, tmp_path / files[number]] if kind else [path]
                arguments += more
        arguments += ["--dataset", tmp_path / "truth.json", "--output", out, *options]
        status = cli.main(["ensemble", *map(str, arguments)])
        if fails:
            assert status == 2 and not out.exists()
            return None
        assert status == 0
        return json.loads(out.read_text())

    return run


def as_set(detections):
    return Counter(json.dumps(d, sort_keys=True) for d in detections)


@pytest.mark.parametrize("times", [1, 2, 3])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_with_itself_gives_itself(merge, method, times):
    found = draw(0)
    merged = merge(*[found] * times, options=["--method", method])
    assert as_set(merged) == as_set(found)


@pytest.mark.parametrize("method", METHODS)
def test_models_of_different_classes_give_the_union(merge, method):
    a, b = draw(1, classes=[1, 4]), draw(3, classes=[2])
    experts = [
        [d | {"category_id": 7} for d in b],
        [d | {"category_id": 10 + d["category_id"]} for d in a],
    ]
    merged = merge(experts=experts, options=["--method", method])
    assert as_set(merged) == as_set(a + b)


@pytest.mark.parametrize("method", METHODS)
def test_what_overlaps_nothing_of_another_model_stays_and_wbf_counts_who_did_not_see_it(
    merge, method
):
    a = draw(1, classes=[1, 2, 4])
    b = [d | {"bbox": [70, 50, 5, 5], "segmentation": mask(70, 50, 5, 5)} for d in draw(2, 6)]
    expert = [d | {"category_id": 7} for d in b]
    merged = merge(a, experts=[expert], options=["--method", method])
    # both know class 2, only the first the others
    share = 2 if method == "wbf" else 1
    expected = [
        d | {"score": d["score"] / (share if d["category_id"] == 2 else 1)}
        for d in a + [d | {"category_id": 2} for d in b]
    ]
    assert as_set(merged) == as_set(expected)


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_models_makes_no_difference(merge, method):
    a, b, c = draw(1), draw(2), draw(3)
    options = ["--method", method, "--iou", "0.3", "--max-dets", "20"]
    first, second = merge(a, b, c, options=options), merge(c, a, b, options=options)
    assert first == second and 0 < len(first) <= 60
    assert as_set(first) != as_set(a)


@pytest.mark.parametrize("masks", ["all", "some", "none"])
@pytest.mark.parametrize("iou", [0.2, 0.5])
def test_groups_of_one_cluster_merge_as_the_loop_merges_them(merge, monkeypatch, iou, masks):
    models = [draw(seed, count) for seed, count in enumerate((10, 12, 14))]
    for n, detection in enumerate([d for found in models for d in found]):
        if masks == "none" or (masks == "some" and n % 3 == 0):
            del detection["segmentation"]
    options, single = ["--iou", str(iou)], []
    original = Ensemble._single

    def counted(*args):
        single.append(original(*args))
        return single[-1]

    monkeypatch.setattr(Ensemble, "_single", counted)
    quick = merge(*models, options=options)
    assert sum(found.sum() for found in single) > 0
    monkeypatch.setattr(Ensemble, "_single", lambda *args: np.zeros_like(original(*args)))
    assert quick == merge(*models, options=options)


def reference_case(name):
    stored = np.load(REFERENCE)
    detections = stored["detections"]  # model, x0, y0, x1, y1, score, class
    files = []
    for model in range(3):
        rows = detections[detections[:, 0] == model]
        files.append(
            [
                {
                    "image_id": 3,
                    "category_id": [1, 2][int(label)],
                    "bbox": [x0, y0, x1 - x0, y1 - y0],
                    "score": s,
                }
                for _, x0, y0, x1, y1, s, label in rows.tolist()
            ]
        )
    return files, stored[name]


@pytest.mark.parametrize("iou", [0.5, 0.7])
@pytest.mark.parametrize("method", ["nms", "wbf"])
def test_equal_to_the_package_ensemble_boxes(merge, method, iou):
    """Version 1.0.9, where no model has two boxes of a class that overlap."""
    files, expected = reference_case(f"{method}_{iou}")
    merged = merge(*files, options=["--method", method, "--iou", iou])
    rows = []
    for d in merged:
        x, y, w, h = d["bbox"]
        rows.append([x, y, x + w, y + h, d["score"], {1: 0, 2: 1}[d["category_id"]]])
    found = np.array(sorted(rows, key=lambda r: (r[5], r[4])))
    expected = np.array(sorted(expected.tolist(), key=lambda r: (r[5], r[4])))
    np.testing.assert_allclose(found, expected, atol=2e-4)  # the package works in float32


BOX = {"image_id": 3, "category_id": 1}


def test_values_by_hand(merge):
    # IoU 80 / 120 = 2/3
    a = [BOX | {"bbox": [0, 0, 10, 10], "score": 0.9}]
    b = [BOX | {"bbox": [2, 0, 10, 10], "score": 0.6}]
    assert merge(a, b) == a
    assert as_set(merge(a, b, options=["--iou", "0.7"])) == as_set(a + b)
    soft = merge(a, b, options=["--method", "soft-nms"])
    assert soft[0] == a[0] and soft[1]["score"] == pytest.approx(0.6 / 3)
    (fused,) = merge(a, b, options=["--method", "wbf"])
    # x = (0.9 * 0 + 0.6 * 2) / 1.5
    assert fused["bbox"] == pytest.approx([0.8, 0, 10, 10])
    assert fused["score"] == pytest.approx(0.75)
    (alone,) = merge(a, [], options=["--method", "wbf"])
    assert alone["score"] == pytest.approx(0.45)  # one of two models that know the class


def test_a_class_that_one_model_knows_keeps_its_scores(merge):
    a = [BOX | {"bbox": [0, 0, 10, 10], "score": 0.8}]
    expert = [BOX | {"category_id": 7, "bbox": [0, 0, 10, 10], "score": 0.4}]
    merged = merge(experts=[expert], options=["--method", "wbf"])
    assert [d["score"] for d in merged] == [0.4]
    merged = merge(a, experts=[expert], options=["--method", "wbf"])
    # class 1 is known by the first model only, class 2 by both
    assert sorted((d["category_id"], d["score"]) for d in merged) == [(1, 0.8), (2, 0.2)]


def test_masks_are_those_of_the_best_member_that_has_one(merge):
    boxes = [[0, 0, 10, 10], [1, 0, 10, 10], [0, 1, 10, 10]]
    a, b, c = (
        [BOX | {"bbox": box, "score": s}] for box, s in zip(boxes, (0.9, 0.8, 0.7), strict=True)
    )
    b[0]["segmentation"], c[0]["segmentation"] = mask(*boxes[1]), mask(*boxes[2])
    (found,) = merge(a, b, c)
    assert found == a[0] | {"segmentation": mask(*boxes[1])}
    (fused,) = merge(c, b, a, options=["--method", "wbf"])
    assert fused["segmentation"] == mask(*boxes[1]) and fused["bbox"] not in boxes


def test_classes_that_are_not_shared_are_left_out_and_named(merge, capsys):
    expert = [BOX | {"category_id": c, "bbox": [0, 0, 9, 9], "score": 0.5} for c in (7, 8)]
    assert [d["category_id"] for d in merge(experts=[expert])] == [2]
    printed = capsys.readouterr().out
    assert "1 of 2 detections are of shared classes" in printed
    assert "without a match: zebra" in printed


@pytest.mark.parametrize(
    "detections, experts, options, message",
    [
        ([BOX | {"image_id": 77, "bbox": [0, 0, 9, 9], "score": 1}], [], [], "1 images that"),
        ([BOX | {"category_id": 3, "bbox": [0, 0, 9, 9], "score": 1}], [], [], "category_id that"),
        (
            [BOX | {"bbox": [0, 0, 9, 9], "score": 1, "segmentation": {"size": [9, 9]}}],
            [],
            [],
            "detection 0: segmentation must be an RLE",
        ),
        (
            [
                BOX | {"bbox": [0, 0, 9, 9], "score": 1},
                BOX | {"score": 1, "segmentation": {"size": [80, 60], "counts": "x"}},
            ],
            [],
            [],
            r"detection 1: the mask is \[80, 60\] pixels .* image 3 is \[60, 80\]",
        ),
        (
            [
                BOX | {"bbox": [0, 0, 9, 9], "score": 1},
                BOX | {"score": 1, "segmentation": {"size": [60, 80], "counts": "4"}},
            ],
            [],
            [],
            "detection 1: the mask is no RLE: its runs have 4 pixels",
        ),
        ([BOX | {"score": 1, "segmentation": mask(0, 0, 9, 9)}], [], [], "every detection needs a"),
        ('[{"image_id": 3,', [], [], "not valid JSON at byte 1"),
        ('{"images": []}', [], [], "must be a list of detections, not a dict"),
        ([], [[]], ["--expert", "0.json", "truth.json", "map.yaml"], "no class 'zebr'; did you"),
        ([], [], ["--iou", "1"], "the IoU threshold is 1.0"),
        ([], [], ["--max-dets", "-1"], "max_dets is -1"),
    ],
)
def test_what_cannot_be_merged_is_refused(
    merge, tmp_path, monkeypatch, capsys, detections, experts, options, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "0.json").write_text("[]")
    (tmp_path / "map.yaml").write_text("zebr: class 1\n")
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    if options[:1] == ["--expert"]:
        options = ["--expert", "0.json", "expert.json", "map.yaml"]
    merge(detections, experts=experts, options=options, fails=True)
    error = capsys.readouterr().err
    assert re.search(message, error), error


def test_an_expert_without_shared_classes_is_refused(merge, tmp_path, capsys):
    (tmp_path / "expert.json").write_text(
        json.dumps(EXPERT | {"categories": [{"id": 8, "name": "zebra"}]})
    )
    merge(experts=[[]], fails=True)
    assert "0.json: no class of" in capsys.readouterr().err


def test_a_file_that_is_there_stays(merge, tmp_path, capsys):
    (tmp_path / "out0.json").write_text("[1]")
    arguments = ["--dataset", str(tmp_path / "truth.json"), "--output"]
    (tmp_path / "a.json").write_text("[]")
    path = str(tmp_path / "out0.json")
    assert cli.main(["ensemble", str(tmp_path / "a.json"), *arguments, path]) == 2
    assert "exists, and nothing is overwritten" in capsys.readouterr().err
    assert (tmp_path / "out0.json").read_text() == "[1]"


@pytest.mark.parametrize("layout", [None, 1])
def test_files_are_read_chunk_by_chunk(tmp_path, monkeypatch, layout):
    monkeypatch.setattr("d2_balance.evaluation.predictions._CHUNK", 37)
    detections = [d | {"note": 'é{"] ['} for d in draw(5)]
    path = tmp_path / "found.json"
    path.write_text(json.dumps(detections, indent=layout, ensure_ascii=False), encoding="utf-8")
    found = list(read_objects(str(path)))
    assert [value for *_, value in found] == detections
    content = path.read_bytes()
    assert [json.loads(content[a:b]) for a, b, _ in found] == detections
    assert _spans(str(path)) == [(a, b) for a, b, _ in found]
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    columns = read_predictions(str(path), read_annotations(str(tmp_path / "truth.json")))
    assert columns.masks(np.arange(len(detections))) == [d["segmentation"] for d in detections]
    assert columns.score.tolist() == [d["score"] for d in detections]
    assert columns.has_mask.all() and columns.box.tolist() == [d["bbox"] for d in detections]


def test_one_detection_of_a_model_joins_a_cluster():
    boxes = [[0, 0, 10, 10], [0, 0, 10, 9], [0, 0, 10, 8], [0, 0, 10, 7]]
    # the third fits the second better (8/9) than the first (8/10); the fourth finds the first free
    assert cluster(boxes, [4, 3, 2, 1], [0, 0, 1, 1], 0.5, False) == [[0, 3], [1, 2]]
    assert overlap([0, 0, 0, 5], [0, 0, 0, 5]) == 1 and overlap([0, 0, 0, 5], [0, 0, 5, 5]) == 0


@pytest.mark.parametrize("note", [None, "}, {", {"a": 1}])
@pytest.mark.parametrize("layout", [None, 1])
def test_entries_are_where_their_braces_are(tmp_path, monkeypatch, note, layout):
    monkeypatch.setattr("d2_balance.evaluation.predictions._CHUNK", 37)
    detections = draw(6)
    for detection in detections[::2]:
        del detection["segmentation"]
    detections[3] |= {} if note is None else {"note": note}
    path = tmp_path / "found.json"
    path.write_text(json.dumps(detections, indent=layout))
    has_mask = np.array(["segmentation" in d for d in detections])
    spans = _spans_by_braces(str(path), has_mask)
    if note is None:
        assert list(map(tuple, spans.tolist())) == _spans(str(path))
    else:
        assert spans is None
    (tmp_path / "truth.json").write_text(json.dumps(TRUTH))
    columns = read_predictions(str(path), read_annotations(str(tmp_path / "truth.json")))
    assert columns.span.tolist() == list(map(list, _spans(str(path))))
