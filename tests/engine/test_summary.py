"""summary.md is made from the files of a run."""

import json
import math

import pytest

from d2_balance.data import register_json
from d2_balance.engine.summary import read_metrics, results_table, write_summary

from .conftest import TEST, run_cfg

NAN = math.nan
BOX = {"AP": 31.25, "AP50": 50.0, "AP75": 30.0, "APr": NAN, "APc": 20.0, "APf": 40.04}
RECORDS = {
    "class0": {"group": "f", "train_image_count": 200, "instances": 9, "AP": 40.0, "AP50": 60.0},
    "class1": {"group": "c", "train_image_count": 20, "instances": 4, "AP": 20.0, "AP50": 40.0},
    "class2": {"group": "r", "train_image_count": 2, "instances": 0, "AP": NAN, "AP50": NAN},
}


def test_the_table_has_a_row_per_task_and_a_reason_per_gap():
    text = results_table({"bbox": BOX, "segm": BOX | {"AP": 28.0}}, RECORDS, "val")
    cells = [
        [c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines() if "|" in line
    ]
    assert cells[0] == ["", "AP", "AP50", "AP75", "APr", "APc", "APf"]
    assert cells[2] == ["box", "31.2", "50.0", "30.0", "-", "20.0", "40.0"]
    assert cells[3][:2] == ["mask", "28.0"]
    assert text.endswith("- APr: val has no ground truth of rare classes.")


def test_a_group_without_a_class_is_left_out():
    records = {name: record for name, record in RECORDS.items() if record["group"] != "r"}
    text = results_table({"bbox": BOX}, records, "val")
    assert text.startswith("|     | AP   | AP50   | AP75   | APc   | APf   |")
    assert "rare" not in text


@pytest.mark.parametrize(
    ("results", "records", "reason"),
    [
        (dict.fromkeys(BOX, NAN), RECORDS, "- AP, AP50, AP75: val has no ground truth."),
        (
            BOX | {"APc": NAN, "APf": NAN},
            {"class0": {"group": None}},
            "- APr, APc, APf: the classes of val have no frequency groups",
        ),
        ({"AP": 1.0, "AP50": 2.0, "AP75": 3.0}, {}, "- APr, APc, APf: the evaluator of val does"),
    ],
)
def test_the_reasons_of_gaps(results, records, reason):
    assert reason in results_table({"bbox": results}, records, "val")


def test_results_of_other_evaluators_are_listed():
    text = results_table({"sem_seg": {"mIoU": 51.23}}, {}, "val")
    assert "sem_seg" in text and "51.2" in text
    assert "no results" in results_table({}, {}, "val")


def test_metrics_of_a_resumed_run_are_joined(tmp_path):
    path = tmp_path / "metrics.json"
    lines = [{"iteration": i, "total_loss": float(i)} for i in (19, 39, 59)]
    again = [{"iteration": i, "total_loss": i + 0.5} for i in (39, 59, 79)]
    text = "".join(json.dumps(r) + "\n" for r in lines) + '{"iteration": 7\n'
    path.write_text(text + "".join(json.dumps(r) + "\n" for r in again))
    records = read_metrics(str(path))
    assert [(r["iteration"], r["total_loss"]) for r in records] == [
        (19, 19.0),
        (39, 39.5),
        (59, 59.5),
        (79, 79.5),
    ]
    assert read_metrics(str(tmp_path / "missing.json")) == []


def finished_run(directory):
    """The files that a run with GHMC leaves behind."""
    (directory / "inference").mkdir(parents=True)
    nulls = {n: {k: None if v != v else v for k, v in r.items()} for n, r in RECORDS.items()}
    (directory / "inference" / f"per_class_ap_{TEST}.json").write_text(json.dumps(nulls))
    metrics = [{"iteration": i, "total_loss": 2.0, "time": 0.5} for i in (19, 39)]
    (directory / "metrics.json").write_text("".join(json.dumps(r) + "\n" for r in metrics))
    stats = {"GHMC": {"density": [9.0, 1.0, 0.0], "weight": [0.2, 1.8, 0.0]}}
    (directory / "loss_stats.json").write_text(json.dumps([{"iteration": 20, "stats": stats}]))


def test_a_run_is_told_with_its_plots(dataset, tmp_path):
    finished_run(tmp_path)
    loss = ["MODEL.BALANCE.CLS_LOSS", "GHMC", "MODEL.BALANCE.GHMC.BINS", "3"]
    path = write_summary(run_cfg(tmp_path, *loss), {"bbox": BOX}, config_file="configs/my.yaml")
    text = (tmp_path / "summary.md").read_text()
    assert path == str(tmp_path / "summary.md") and text.startswith("# my\n")
    for part in [
        "GHMC (BINS 3, MOMENTUM 0.75",
        "BalancedRetinaNet",
        "6, batch 2",
        "0:00:20",  # 40 iterations of half a second
        "12 images, 24 annotations of 6 classes",
        "torch",
    ]:
        assert part in text, part
    images = {p.name for p in tmp_path.glob("*.png")}
    assert images == {"losses.png", f"ap_by_count_{TEST}_box.png", "density_GHMC.png"}
    assert all(f"]({name})" in text for name in images)
    assert not list(tmp_path.glob("*.tmp"))


def test_an_evaluation_tells_nothing_of_training(dataset, tmp_path):
    finished_run(tmp_path)
    weights = ["MODEL.WEIGHTS", "my_weights.pth", "DATASETS.TRAIN", "('gone',)"]
    write_summary(run_cfg(tmp_path, *weights), {"bbox": BOX}, eval_only=True)
    text = (tmp_path / "summary.md").read_text()
    assert "evaluation only" in text and "my_weights.pth" in text
    assert "iterations" not in text and "losses.png" not in text and "gone" not in text


def test_bad_annotations_are_counted_with_reason_and_id(dataset_files, dataset, tmp_path):
    from detectron2.data import DatasetCatalog, MetadataCatalog

    with open(dataset_files[0]) as file:
        data = json.load(file)
    data["annotations"][3]["bbox"] = [5, 5, 0, 10]
    json_file = tmp_path / "bad.json"
    json_file.write_text(json.dumps(data))
    register_json("engine_bad", str(json_file), dataset_files[1])
    try:
        cfg = run_cfg(tmp_path, "DATASETS.TRAIN", "('engine_bad',)")
        write_summary(cfg, {"bbox": BOX})
    finally:
        DatasetCatalog.remove("engine_bad")
        MetadataCatalog.remove("engine_bad")
    text = (tmp_path / "summary.md").read_text()
    assert "1 bad annotation(s) skipped" in text
    assert "box of no area: 1 (annotation id 4)" in text
    assert "12 images, 23 annotations" in text


def test_several_test_sets_have_a_table_each(dataset, tmp_path):
    cfg = run_cfg(tmp_path, "DATASETS.TEST", f"('{TEST}', 'engine_train')")
    write_summary(cfg, {TEST: {"bbox": BOX}, "engine_train": {"bbox": BOX | {"AP": 77.7}}})
    text = (tmp_path / "summary.md").read_text()
    assert f"## Results on {TEST}" in text and "## Results on engine_train" in text
    assert "77.7" in text
