"""`d2-balance analyze`: tail ratios and thresholds by hand, and what is refused."""

import pytest
import torch

from d2_balance import cli
from d2_balance.data import ClassStatistics
from d2_balance.losses.eql import lambda_for_tail_ratio, tail_ratio, tail_weight

COUNT = torch.tensor([50, 2, 30, 8, 8, 2])  # sorted: 2, 2, 8, 8, 30, 50; sum 100


@pytest.fixture
def saved(tmp_path):
    path = str(tmp_path / "counts.json")
    ClassStatistics(COUNT, COUNT * 3, 200, tuple("abcdef")).save(path)
    return path


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (0.03, 0.0),  # the two rarest classes together hold 4 %
        (0.04, (2 + 8) / 2 / 200),
        (0.19, (2 + 8) / 2 / 200),  # the next two would make it 20 %
        (0.20, (8 + 30) / 2 / 200),
        (1.0, (50 / 200 + 1) / 2),
    ],
)
def test_lambda_is_the_largest_whose_ratio_fits(ratio, expected):
    value = lambda_for_tail_ratio(COUNT / 200, COUNT, ratio)
    assert value == pytest.approx(expected)
    reached = tail_ratio(tail_weight(COUNT / 200, value, "step"), COUNT)
    assert reached <= ratio + 1e-9


def test_the_command_prints_the_ratio_of_a_lambda_and_the_lambda_of_a_ratio(saved, capsys):
    assert cli.main(["analyze", saved, "--lambda", "0.1", "--tail-ratio", "0.05"]) == 0
    out = capsys.readouterr().out
    assert "200 pictures, 300 objects, 6 classes" in out
    assert "| rare     |         4 | 2 to 8" in out and "| common   |         2 | 30 to 50" in out
    # below 20 pictures: 4 classes with 20 of 100; 5 % fits the two classes of 2 pictures
    assert "| 0.1                         | 4              | 20.0 % |" in out
    assert "| 0.025                       | 2              | 4.0 %  |" in out


def test_registered_sets_are_counted(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    from detectron2.data import DatasetCatalog, MetadataCatalog

    records = [{"annotations": [{"category_id": 0}]}, {"annotations": [{"category_id": 1}]}]
    DatasetCatalog.register("analyze_me", lambda: records)
    MetadataCatalog.get("analyze_me").thing_classes = ["x", "y"]
    try:
        assert cli.main(["analyze", "analyze_me"]) == 0
    finally:
        DatasetCatalog.remove("analyze_me")
        MetadataCatalog.remove("analyze_me")
    assert "2 pictures, 2 objects, 2 classes" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    assert cli.main(["analyze", "nowhere"]) == 2
    assert "neither a registered data set nor a file; --register" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--lambda", "--tail-ratio"])
def test_shares_out_of_range_are_refused(saved, option, capsys):
    with pytest.raises(SystemExit):
        cli.main(["analyze", saved, option, "1.5"])
    assert "1.5 is not in [0, 1]" in capsys.readouterr().err
