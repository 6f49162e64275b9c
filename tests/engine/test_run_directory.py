"""What a run leaves in its directory, one test image of which cannot be read."""

import glob
import importlib.util
import json
import os
import re
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from d2_balance.data import register_json
from d2_balance.data.model_classes import ModelClasses
from d2_balance.engine import BalancedTrainer, write_summary
from d2_balance.engine.hooks.example_detections import short_names
from d2_balance.engine.hooks.writers import check_logs
from d2_balance.engine.resume.checkpoint import load_trained

from ..conftest import CLASSES
from .conftest import TEST, TRAIN, run_cfg, write_dataset

CUT = "5.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Config and results of a run of four iterations with an evaluation in between."""
    directory = tmp_path_factory.mktemp("left")
    sound, broken = directory / "train", directory / "test"
    files = {TRAIN: write_dataset(sound), TEST: write_dataset(broken, seed=1)}
    image = broken / "images" / CUT
    image.write_bytes(image.read_bytes()[:200])
    settings = ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "TEST.LOSS.PERIOD", "2"]
    settings += ["SOLVER.CHECKPOINT_PERIOD", "2", "TEST.BEST.METRIC", "bbox/AP"]
    settings += ["LOG.IMAGES", "7", "LOG.IMAGES_MIN_SCORE", "0.0", "SOLVER.EMA.ENABLED", "True"]
    settings += ["MODEL.BALANCE.CLS_LOSS", "EQL"]
    cfg = run_cfg(directory / "out", *settings)
    if importlib.util.find_spec("mlflow"):
        cfg.LOG.MLFLOW_EXPERIMENT = "tails"
    check_logs(cfg)
    for name, paths in files.items():
        register_json(name, *paths)
    try:
        trainer = BalancedTrainer(cfg)
        trainer.resume_or_load(resume=False)
        results = trainer.train()
        write_summary(cfg, results)
        yield cfg, results, Path(cfg.OUTPUT_DIR)
    finally:
        for name in files:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def test_names_and_counts_lie_in_the_directory_and_in_every_checkpoint(run):
    _cfg, _, out = run
    saved = json.loads((out / "classes.json").read_text())
    assert saved["activation"] == "sigmoid" and saved["num_images"] == 12
    assert [c["name"] for c in saved["classes"]] == [f"class{k}" for k in range(CLASSES)]
    assert [c["category_id"] for c in saved["classes"]] == list(range(1, CLASSES + 1))
    assert [c["image_count"] for c in saved["classes"]] == [4, 8, 8, 4, 0, 0]
    names = {path.name for path in out.glob("*.pth")}
    assert names == {
        "model_0000001.pth", "model_0000003.pth", "model_final.pth", "model_best.pth",
        "model_final_ema.pth",
    }  # fmt: skip
    for name in names:
        assert torch.load(out / name, weights_only=True)["classes"] == saved, name
        assert ModelClasses.of_weights(str(out / name)).names[1] == "class1"
    assert not list(out.glob("*.tmp"))


def test_an_unreadable_test_image_is_left_out_named_and_counted(run):
    _, results, out = run
    assert results["bbox"]["AP"] >= 0
    (file,) = (out / "inference").glob("evaluation_*.json")
    evaluation = json.loads(file.read_text())
    assert evaluation["images"] == 11
    (note,) = [n for n in evaluation["notes"] if "left out" in n]
    assert note.startswith(f"1 of 12 images of {TEST} cannot be read and are left out: ")
    assert CUT in note and "OSError" in note
    assert f"- {note}." in (out / "summary.md").read_text()
    objects = [record["instances"] for record in evaluation["classes"].values()]
    assert sum(objects) == 22  # two of each image that was read
    losses = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert any("val_loss/total_loss" in record for record in losses)


def test_the_summary_lists_the_ap_of_few_classes(run):
    _, _, out = run
    text = (out / "summary.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| class(\d| )", line)]
    assert len(lines) == 1 + CLASSES and "training images" in lines[0] and "box AP" in lines[0]
    assert lines[1].split("|")[2].strip() == "0"  # the rarest comes first


def test_example_detections_go_to_tensorboard_and_mlflow(run):
    _cfg, _, out = run
    (path,) = glob.glob(str(out / "events.out.tfevents.*"))
    found = EventAccumulator(path, size_guidance={"images": 0})
    found.Reload()
    images = [tag for tag in found.Tags()["images"] if tag.startswith("detections/")]
    assert len(images) == 6  # of seven, one cannot be read
    assert [event.step for event in found.Images(images[0])] == [1, 4]

    import mlflow

    known = json.loads((out / "mlflow_run.json").read_text())
    client = mlflow.MlflowClient(known["uri"])
    run_info = client.get_run(known["run_id"])
    assert run_info.info.status == "FINISHED"
    assert run_info.data.params["cls_loss"] == "EQL"
    assert [m.step for m in client.get_metric_history(known["run_id"], "total_loss")] == [3]
    assert {"bbox/AP", "val_loss/total_loss"} <= set(run_info.data.metrics)
    pngs = [os.path.basename(p) for p in glob.glob(str(out / "mlruns/**/*.png"), recursive=True)]
    assert sorted(pngs) == ["0000001.png"] * 6 + ["0000004.png"] * 6


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/val/a.jpg", "/data/val/b.jpg"], ["a.jpg", "b.jpg"]),
        (["val/a/1.jpg", "val/ab/1.jpg"], ["a_1.jpg", "ab_1.jpg"]),
        (["/1.jpg", "2.jpg", "image_id 3"], ["1.jpg", "2.jpg", "image_id 3"]),
        ([], []),
    ],
)
def test_example_images_have_short_names(paths, names):
    assert short_names(paths) == names


def test_scores_made_in_another_way_are_refused(run):
    cfg, _, out = run
    other = run_cfg(out, "MODEL.BALANCE.CLS_LOSS", "", kind="faster")
    model = BalancedTrainer.build_model(other)  # softmax
    with pytest.raises(ValueError, match="trained with sigmoid scores, and the config makes soft"):
        load_trained(model, str(out / "model_final.pth"))
    same = BalancedTrainer.build_model(cfg)
    load_trained(same, str(out / "model_final.pth"))
    saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
    assert all(torch.equal(saved[name], value) for name, value in same.state_dict().items())


@pytest.mark.usefixtures("run")
def test_a_classifier_that_goes_on_with_other_scores_is_mentioned(tmp_path, log):
    start = run_cfg(tmp_path / "a", "SOLVER.MAX_ITER", "1", kind="faster")  # softmax
    trainer = BalancedTrainer(start)
    trainer.test = lambda cfg, model: {}
    trainer.train()
    weights = ["MODEL.WEIGHTS", str(tmp_path / "a/model_final.pth")]
    for more, warns in ((["MODEL.BALANCE.REINITIALIZE", "['cls_score']"], False), ([], True)):
        log.clear()
        loss = ["MODEL.BALANCE.CLS_LOSS", "SigmoidCE"]
        own = run_cfg(tmp_path / "b", *weights, *more, *loss, kind="faster")
        BalancedTrainer(own).resume_or_load(resume=False)
        assert warns == any("trained with softmax scores" in text for text in log), more


def test_weights_under_state_dict_are_loaded_and_other_content_is_named(run, tmp_path):
    cfg, _, out = run
    saved = torch.load(out / "model_final.pth", weights_only=True)["model"]
    path = str(tmp_path / "lightning.ckpt")
    torch.save({"epoch": 3, "state_dict": saved}, path)
    model = BalancedTrainer.build_model(cfg)
    load_trained(model, path)
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    torch.save({"epoch": 3, "net": saved}, path)
    with pytest.raises(ValueError, match=r"lightning.ckpt has no 'model' or 'state_dict', .*epoch"):
        load_trained(model, path)
