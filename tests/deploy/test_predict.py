"""`d2-balance predict`: what it writes, and what it refuses."""

import json
import os
import signal
import subprocess
import sys
import time

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from d2_balance.cli.main import main
from d2_balance.deploy import Predictor, load
from d2_balance.deploy import predict as predict_module
from d2_balance.utils import progress as progress_module
from d2_balance.utils.progress import progress
from tests.deploy.conftest import IDS, NAMES, make_run
from tests.deploy.test_load import LOW


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A trained Mask R-CNN's directory."""
    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("predict")
    make_run(directory, "mask", "MODEL.BALANCE.CLS_LOSS", "EQL", *LOW)
    return str(directory / "run")


@pytest.fixture
def images(tmp_path):
    """A directory of three images, one below another one."""
    directory = tmp_path / "images"
    (directory / "more").mkdir(parents=True)
    for i, name in enumerate(["b.png", "a.jpg", "more/c.png"]):
        pixels = np.random.default_rng(i).integers(0, 256, (50 + 10 * i, 70, 3), np.uint8)
        Image.fromarray(pixels).save(directory / name)
    return directory


def predict(run, images, output, *options):
    return main(
        ["predict", *map(str, images), "--model", run, "--output", str(output), "--quiet", *options]
    )


def read(output, name):
    return json.loads((output / name).read_text())


@pytest.mark.parametrize("options", [("--workers", "0", "--batch-size", "2"), ("--workers", "2")])
def test_writes_the_detections_of_the_model(run, images, tmp_path, options):
    output = tmp_path / "out"
    assert predict(run, [images], output, *options) == 0
    dataset = read(output, "images.json")
    assert [i["file_name"] for i in dataset["images"]] == ["a.jpg", "b.png", "more/c.png"]
    assert [c["id"] for c in dataset["categories"]] == list(IDS)
    assert [c["name"] for c in dataset["categories"]] == list(NAMES)
    found = read(output, "predictions.json")
    predictor = load(run)
    for record in dataset["images"]:
        pixels = cv2.imread(str(images / record["file_name"]))
        assert (record["height"], record["width"]) == pixels.shape[:2]
        instances = predictor(pixels)["instances"]
        own = [d for d in found if d["image_id"] == record["id"]]
        assert len(own) == len(instances) > 0
        assert [d["score"] for d in own] == pytest.approx(instances.scores.tolist(), abs=1e-5)
        classes = [IDS[k] for k in instances.pred_classes]
        assert [d["category_id"] for d in own] == classes
        boxes = instances.pred_boxes.tensor.clone()
        boxes[:, 2:] -= boxes[:, :2]
        assert np.allclose([d["bbox"] for d in own], boxes, atol=1e-2)
        assert own[0]["segmentation"]["size"] == [record["height"], record["width"]]
    names = sorted(p.relative_to(output / "drawn").as_posix() for p in output.rglob("drawn/**/*.*"))
    assert names == ["a.png", "b.png", "more/c.png"]


def test_ids_of_an_annotation_file(run, images, tmp_path):
    file = tmp_path / "annotations.json"
    records = [{"id": 7, "file_name": "a.jpg"}, {"id": 9, "file_name": "b.png"}]
    file.write_text(json.dumps({"images": records}))
    paths = [images / "a.jpg", images / "b.png"]
    options = ("--annotations", str(file), "--no-drawing", "--workers", "0")
    assert predict(run, paths, tmp_path / "out", *options) == 0
    found = read(tmp_path / "out", "predictions.json")
    assert {d["image_id"] for d in found} == {7, 9}
    assert not (tmp_path / "out" / "drawn").exists()


def test_thresholds_of_classes(run, images, tmp_path, capsys):
    options = ["--no-drawing", "--workers", "0", "--score-threshold", "1"]
    output = tmp_path / "out"
    assert predict(run, [images], output, *options, "--class-threshold", "dog=0") == 0
    assert {d["category_id"] for d in read(output, "predictions.json")} == {IDS[1]}
    assert predict(run, [images], tmp_path / "b", *options, "--class-threshold", "dot=0.5") == 2
    assert "did you mean dog?" in capsys.readouterr().err


def test_unreadable_images_are_listed_and_the_rest_predicted(run, images, tmp_path, capsys):
    (images / "broken.jpg").write_bytes(b"\xff\xd8 no image")
    output = tmp_path / "out"
    assert predict(run, [images], output, "--no-drawing") == 1
    error = capsys.readouterr().err
    assert f"could not be read: {images / 'broken.jpg'}" in error
    assert len(read(output, "images.json")["images"]) == 3


@pytest.mark.parametrize("name", ["predictions.json", "images.json", "drawn"])
def test_output_that_exists_is_refused(run, images, tmp_path, capsys, name):
    output = tmp_path / "out"
    output.mkdir()
    (output / name).write_text("mine")
    assert predict(run, [images], output) == 2
    assert "nothing is overwritten" in capsys.readouterr().err
    assert (output / name).read_text() == "mine"
    assert len(list(output.iterdir())) == 1


def test_sources_that_cannot_be_used(run, images, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for paths, message in (
        ([tmp_path / "empty"], "holds no image"),
        ([tmp_path / "nothing.png"], "does not exist"),
        ([images, images / "a.jpg"], "given twice"),
    ):
        assert predict(run, paths, tmp_path / "out") == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_video(run, tmp_path):
    path = str(tmp_path / "film.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (96, 64))
    for i in range(5):
        writer.write(np.random.default_rng(i).integers(0, 256, (64, 96, 3), np.uint8))
    writer.release()
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    output = tmp_path / "out"
    assert predict(run, [path, tmp_path / "broken.mp4"], output, "--batch-size", "2") == 1
    records = read(output, "images.json")["images"]
    assert [r["file_name"] for r in records] == [f"film.avi#{i}" for i in range(5)]
    ids = [r["id"] for r in records]
    assert {d["image_id"] for d in read(output, "predictions.json")} == set(ids)
    drawn = cv2.VideoCapture(str(output / "drawn" / "film.mp4"))
    assert drawn.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    count = 0
    while drawn.read()[0]:
        count += 1
    assert count == 5
    assert sorted(p.name for p in (output / "drawn").iterdir()) == ["film.mp4"]


def test_ctrl_c_keeps_what_was_done(run, images, tmp_path, monkeypatch, caplog):
    forward = Predictor.forward

    def stopping(self, inputs, **kwargs):
        outputs = forward(self, inputs, **kwargs)
        monkeypatch.setattr(Predictor, "forward", interrupt)
        return outputs

    def interrupt(self, inputs, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(Predictor, "forward", stopping)
    options = ("--batch-size", "1", "--workers", "0")
    assert predict(run, [images], tmp_path / "out", *options) == 130
    assert len(read(tmp_path / "out", "images.json")["images"]) == 1
    assert {d["image_id"] for d in read(tmp_path / "out", "predictions.json")} == {1}
    assert "holds the 1 images that were done" in caplog.text


def test_ctrl_c_keeps_what_the_workers_have_begun(run, images, tmp_path, monkeypatch):
    submit = predict_module._Workers.submit

    def stopping(self, job):
        if job.name.startswith("more"):
            raise KeyboardInterrupt
        return submit(self, job)

    monkeypatch.setattr(predict_module._Workers, "submit", stopping)
    assert predict(run, [images], tmp_path / "out", "--workers", "2") == 130
    names = [image["file_name"] for image in read(tmp_path / "out", "images.json")["images"]]
    assert names == ["a.jpg", "b.png"]


def test_sigterm_to_workers_too_keeps_what_was_done(run, images, tmp_path):
    for number in range(300):
        os.link(images / "b.png", images / f"{number}.png")
    output = tmp_path / "out"
    started = subprocess.Popen(
        [sys.executable, "-m", "d2_balance", "predict", str(images), "--model", run, "--output",
         str(output), "--workers", "2"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        while started.poll() is None and not list((output / "drawn").glob("*.png")):
            time.sleep(0.01)
        os.killpg(started.pid, signal.SIGTERM)  # as schedulers do it
        text, _ = started.communicate(timeout=100)
    finally:
        started.kill()
    assert started.returncode == 143, text
    assert "Traceback" not in text and "images that were done" in text
    done = {image["file_name"] for image in read(output, "images.json")["images"]}
    assert 0 < len(done) < 303
    drawn = {path.name for path in (output / "drawn").iterdir()}
    assert {name.replace(".jpg", ".png") for name in done} == drawn


def test_workers_write_what_one_process_writes(run, images, tmp_path):
    assert predict(run, [images], tmp_path / "one", "--workers", "0", "--batch-size", "1") == 0
    assert predict(run, [images], tmp_path / "two", "--workers", "2") == 0
    for file in (p for p in (tmp_path / "one").rglob("*") if p.is_file()):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes(), file


def test_numbers_out_of_range_are_refused(run, images, tmp_path, capsys):
    for option, value in (("--workers", "-1"), ("--batch-size", "0")):
        assert predict(run, [images], tmp_path / "out", option, value) == 2
        assert "must be at least 1 and 0" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_progress_in_a_pipe_is_a_line_now_and_then(capsys, monkeypatch):
    monkeypatch.delenv(progress_module.QUIET, raising=False)
    clock = iter([0.0, 4.0, 11.0, 15.0, 22.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(clock))
    assert list(progress("abcd", "predicting")) == list("abcd")
    assert capsys.readouterr().err.splitlines() == [
        "predicting: 1 of 4 images (25%), 0 min 33 s left",
        "predicting: 3 of 4 images (75%), 0 min 7 s left",
    ]
    assert list(progress("abcd", "predicting", quiet=True)) == list("abcd")
    assert capsys.readouterr().err == ""
