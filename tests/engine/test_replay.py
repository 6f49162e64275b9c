"""`d2-balance replay` runs a saved batch again, and finds what had ended the run."""

import copy

import numpy as np
import pytest
import torch
from detectron2.structures import PolygonMasks

from d2_balance.cli.main import main
from d2_balance.engine.replay.saved_batch import BatchSaver, load_saved_batch

from ..conftest import make_inputs
from .test_nonfinite import bad_box, failure, nan_bias, nan_weights, start


def saved_file(directory):
    (path,) = directory.glob("replay_*_rank0.pt")
    return str(path)


@pytest.mark.parametrize("kind", ["retinanet", "mask"])
def test_a_planted_nan_is_reproduced_with_its_image_and_class(dataset, tmp_path, capsys, kind):
    seen = []
    trainer = start(tmp_path, kind=kind, change=lambda b: (bad_box(b), seen.append(b[1])))
    error = failure(trainer)
    path = saved_file(tmp_path)
    assert f"d2-balance replay {path}" in str(error)
    capsys.readouterr()
    assert main(["replay", path]) == 0
    text = capsys.readouterr().out
    assert "iteration 3, 2 images, fp32" in text and "The loss is not finite:" in text
    name = f"class{seen[0]['instances'].gt_classes[0]}"
    assert f"  {seen[0]['file_name']}: a ground truth box is not finite, {name}\n" in text


def test_corrupt_weights_are_reproduced(dataset, tmp_path, capsys):
    failure(start(tmp_path, action=nan_weights))
    capsys.readouterr()
    assert main(["replay", saved_file(tmp_path)]) == 0
    assert "weights: backbone.fpn_lateral3.weight is not finite" in capsys.readouterr().out


@pytest.mark.parametrize("loss", ["GHMC", "EQLv2"])
def test_the_class_of_a_corrupt_classifier_is_reproduced(dataset, tmp_path, capsys, loss):
    kind = "faster" if loss == "EQLv2" else "retinanet"
    failure(start(tmp_path, "MODEL.BALANCE.CLS_LOSS", loss, kind=kind, action=nan_bias))
    capsys.readouterr()
    assert main(["replay", saved_file(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "loss_cls = nan" in text and "class scores are not finite, class3\n" in text


def test_a_batch_that_is_sound_is_called_finite(dataset, tmp_path, capsys):
    """With the random numbers of the step, its losses come out as they were."""
    trainer = start(tmp_path, kind="faster", change=lambda batch: None)
    losses, forward = {}, trainer._trainer._forward

    def watched(model, data):
        if trainer.iter == 2:
            arguments = {"key": trainer._trainer.random_key, "iteration": 2, "precision": None}
            trainer._finite_losses._saver.save(data, **arguments)
        found = forward(model, data)
        if trainer.iter == 2:
            losses.update(copy.deepcopy({k: v.item() for k, v in found.items()}))
        return found

    trainer._trainer._forward = watched
    trainer.train()
    capsys.readouterr()
    assert main(["replay", saved_file(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert "The loss is finite." in text
    assert all(f"  {name} = {value:g}\n" in text for name, value in losses.items())


def test_records_come_back_as_they_were(tmp_path):
    batch = make_inputs(2, empty=(1,))
    polygons = [[np.array([0.0, 0, 9, 0, 9, 9])], [np.array([1.0, 1, 5, 1, 5, 5])] * 2, []]
    batch[0]["instances"].gt_polygons = PolygonMasks(polygons)
    batch[0] |= {"image_id": 17, "neg_category_ids": [1, 4], "height": np.int64(9)}
    saver = BatchSaver(torch.nn.Linear(1, 1), "", str(tmp_path))
    path = saver.save(batch, key=(1, 0, 2), iteration=2, precision=torch.float16)
    saved = load_saved_batch(path)
    assert saved["precision"] == "fp16" and saved["key"] == [1, 0, 2]
    first, before = saved["batch"][0], batch[0]
    assert torch.equal(first["image"], before["image"])
    assert first["image_id"] == 17 and first["neg_category_ids"] == [1, 4] and first["height"] == 9
    ours, theirs = first["instances"], before["instances"]
    assert ours.image_size == theirs.image_size
    assert torch.equal(ours.gt_boxes.tensor, theirs.gt_boxes.tensor)
    assert torch.equal(ours.gt_masks.tensor, theirs.gt_masks.tensor)
    for found, expected in zip(ours.gt_polygons.polygons, polygons, strict=True):
        assert [p.tolist() for p in found] == [p.tolist() for p in expected]
    assert len(saved["batch"][1]["instances"]) == 0


@pytest.mark.parametrize("content", [None, b"no file of torch", {"model": {}}])
def test_other_files_are_refused(tmp_path, capsys, content):
    path = tmp_path / "file.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    assert main(["replay", str(path)]) == 2
    assert "d2-balance replay: error: " in capsys.readouterr().err
