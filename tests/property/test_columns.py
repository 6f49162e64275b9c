"""Prediction files as columns hold what the JSON holds, in its order."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from d2_balance.data.annotations import read_annotations
from d2_balance.evaluation.predictions import DetectionTexts, capped, read_predictions

IMAGES = [{"id": 7, "width": 100, "height": 80}, {"id": 3, "width": 60, "height": 90}]
CATEGORIES = [{"id": 5, "name": "a"}, {"id": 9, "name": "b"}]

detections = st.lists(
    st.fixed_dictionaries(
        {
            "image_id": st.sampled_from([7, 3]),
            "category_id": st.sampled_from([5, 9]),
            "score": st.floats(0, 1, allow_nan=False),
            "bbox": st.lists(st.floats(0.5, 50), min_size=4, max_size=4),
        }
    ),
    max_size=15,
)


def truth_in(directory):
    path = directory / "truth.json"
    truth = {"images": IMAGES, "categories": CATEGORIES, "annotations": []}
    path.write_text(json.dumps(truth))
    return read_annotations(str(path))


def columns_of(directory, entries, indent=None):
    path = directory / "predictions.json"
    path.write_text(json.dumps(entries, indent=indent))
    return read_predictions(str(path), truth_in(directory))


@given(detections, st.sampled_from([None, 0, 2]))
def test_columns_are_the_fields_of_the_file(tmp_path_factory, entries, indent):
    columns = columns_of(tmp_path_factory.mktemp("columns"), entries, indent)
    assert len(columns) == len(entries)
    assert columns.category.tolist() == [entry["category_id"] for entry in entries]
    assert columns.score.tolist() == [entry["score"] for entry in entries]
    assert columns.box.tolist() == [entry["bbox"] for entry in entries]
    assert [IMAGES[i]["id"] for i in columns.image] == [entry["image_id"] for entry in entries]
    assert not columns.has_mask.any()


@given(detections.filter(bool))
def test_texts_are_read_from_where_they_stand(tmp_path_factory, entries):
    columns = columns_of(tmp_path_factory.mktemp("columns"), entries)
    with DetectionTexts(columns) as texts:
        assert [json.loads(texts.text(index)) for index in range(len(entries))] == entries


@given(detections, st.integers(1, 6))
def test_the_cap_keeps_the_best_of_each_image(tmp_path_factory, entries, cap):
    columns = columns_of(tmp_path_factory.mktemp("columns"), entries)
    kept = capped(columns, columns.score, cap)
    assert len(set(kept.tolist())) == len(kept)
    for image in (0, 1):
        scores = columns.score[kept[columns.image[kept] == image]]
        everything = np.sort(columns.score[columns.image == image])[::-1]
        assert scores.tolist() == everything[:cap].tolist()


@given(detections.filter(bool), st.data())
def test_a_file_that_is_cut_off_is_refused(tmp_path_factory, entries, data):
    path = tmp_path_factory.mktemp("columns") / "predictions.json"
    text = json.dumps(entries)
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    with pytest.raises(ValueError, match=r"predictions\.json"):
        read_predictions(str(path), truth_in(path.parent))
