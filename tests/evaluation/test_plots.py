"""The plot of AP by training count is an image of its own size and refuses what it cannot draw."""

import math

import numpy as np
import pytest
from PIL import Image

from d2_balance.evaluation.plots import plot_ap_by_count

COLOURS = {"r": (213, 94, 0), "c": (0, 158, 115), "f": (0, 114, 178)}


def record(group, count, ap):
    return {"group": group, "train_image_count": count, "instances": 3, "AP": ap}


def has_colour(path, colour):
    image = np.asarray(Image.open(path).convert("RGB")).astype(int)
    return bool((np.abs(image - colour).max(axis=2) < 3).any())


def test_only_groups_with_points_are_drawn(tmp_path):
    path = str(tmp_path / "plots/ap.png")
    per_class = {
        "a": record("r", 0, 10.0),
        "b": record("r", 8, 20.0),
        "c": record("f", 1500, 50.0),
        "no ground truth": record("c", 50, math.nan),
        "no count": record("c", None, 30.0),
    }
    plot_ap_by_count(per_class, path, title="test")
    assert [has_colour(path, COLOURS[g]) for g in "rcf"] == [True, False, True]
    assert [p.name for p in (tmp_path / "plots").iterdir()] == ["ap.png"]


@pytest.mark.parametrize("counts", [[1], [100, 100], [0, 0, 0], [2, 3], [1, 100_000]])
def test_any_range_of_counts_is_drawn(tmp_path, counts):
    path = str(tmp_path / "ap.png")
    per_class = {f"c{i}": record(None, n, 0.0) for i, n in enumerate(counts)}
    plot_ap_by_count(per_class, path)
    assert has_colour(path, (0x66, 0x66, 0x66))


def test_records_without_counts_are_refused_with_the_reason(tmp_path):
    path = tmp_path / "ap.png"
    with pytest.raises(ValueError, match="no class has both AP_segm and a number of training"):
        plot_ap_by_count({"a": record("r", 3, 10.0)}, str(path), metric="AP_segm")
    assert not path.exists()
