"""A loss that is not finite ends the run and says which loss, which image and which class."""

import dataclasses
import json
import math
import os

import pytest
import torch

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer, NonFiniteLossError
from d2_balance.engine.resume.random_state import seed_everything

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg

KINDS = ["retinanet", "faster"]


class Planted:
    """Batches, of which one is changed before the model gets it."""

    def __init__(self, batches, at, change):
        self.batches, self.at, self.change = batches, at, change

    def __iter__(self):
        for index, batch in enumerate(self.batches):
            if index == self.at:
                self.change(batch)
            yield batch


def start(directory, *overrides, kind="retinanet", at=3, change=None, action=None):
    """A trainer whose batch (`change`) or model (`action`) is corrupt at an iteration."""
    seed_everything(7)
    trainer = BalancedTrainer(run_cfg(directory, *overrides, kind=kind))
    trainer.test = lambda cfg, model: {}
    change = change or (lambda batch: action(trainer.model))
    trainer.data_loader = Planted(trainer.data_loader, at, change)
    return trainer


def failure(trainer):
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    return error.value


def bad_box(batch):
    batch[1]["instances"].gt_boxes.tensor[0, 2] = math.nan


def bad_pixel(batch):
    batch[1]["image"] = batch[1]["image"].float()
    batch[1]["image"][0, 3, 3] = math.inf


def mark(batch):
    """For `spoil_samples` and `spoil_masks`; the inputs stay finite."""
    batch[1]["marked"] = True


def nan_weights(model):
    with torch.no_grad():
        model.backbone.fpn_lateral3.weight[0] = math.nan


def nan_bias(model):
    """Class 3 only."""
    layers = [m for name, m in model.named_modules() if name.endswith("cls_score")]
    with torch.no_grad():
        layers[0].bias[3] = math.nan


def last_batch(trainer):
    return [record["file_name"] for record in trainer._finite_losses._batch]


@pytest.mark.parametrize("kind", [*KINDS, "cascade"])
def test_a_box_of_the_annotations_is_named_with_its_image_and_class(dataset, tmp_path, kind):
    seen = []
    trainer = start(tmp_path, kind=kind, change=lambda b: (bad_box(b), seen.append(b[1])))
    error = failure(trainer)
    name = f"class{seen[0]['instances'].gt_classes[0]}"
    allowed = {
        "retinanet": [("loss_box_reg",)],
        "faster": [("loss_rpn_loc",)],
        "cascade": [(), ("loss_rpn_loc",)],  # some releases stop at boxes that are not finite
    }
    assert error.losses in allowed[kind]
    assert error.images == (seen[0]["file_name"],)
    assert error.classes == (name,)
    assert error.iteration == 3
    text = str(error)
    assert f"Classes: {name}. Images: {seen[0]['file_name']} (a ground truth box is not" in text
    assert "at iteration 3: " in text and "Fix these images" in text
    assert "SOLVER.BASE_LR" not in text


@pytest.mark.parametrize("kind", KINDS)
def test_a_image_with_an_infinite_pixel_is_named(dataset, tmp_path, kind):
    # batch norm carries it to the other image, which is not to blame
    seen = []
    trainer = start(tmp_path, kind=kind, change=lambda b: (bad_pixel(b), seen.append(b[1])))
    error = failure(trainer)
    assert error.images == (seen[0]["file_name"],) and error.classes == ()
    assert "pixels are not finite" in str(error)
    if kind == "retinanet":
        assert error.losses == ("loss_cls", "loss_box_reg")
        assert "loss_cls = nan, loss_box_reg = nan." in str(error)
    else:
        assert "Predicted boxes or scores contain Inf/NaN" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_named(dataset, tmp_path, kind):
    error = failure(start(tmp_path, kind=kind, action=nan_weights))
    assert "the first such parameter is backbone.fpn_lateral3.weight. " in str(error)
    assert "Lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True." in str(error)
    assert error.classes == ()  # every class is as bad


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_of_a_corrupt_classifier_is_named(dataset, tmp_path, kind):
    trainer = start(tmp_path, kind=kind, action=nan_bias)
    error = failure(trainer)
    assert error.classes == ("class3",) and error.losses == ("loss_cls",)
    assert "cls_score.bias" in str(error) and "Classes: class3." in str(error)
    assert set(error.images) == set(last_batch(trainer))


def spoil_samples(model, change):
    """Passes the samples of marked images through `change(samples, rows)`; returns the marks."""
    head = getattr(model, "roi_heads", None)
    head = model if head is None else head.box_predictor
    preprocess, gather = model.preprocess_image, head.samples
    marks = []

    def look(inputs):
        marks[:] = [i for i, record in enumerate(inputs) if record.get("marked")]
        return preprocess(inputs)

    def corrupt(*arguments, **known):
        samples = gather(*arguments, **known)
        return change(samples, torch.isin(samples.image_index, torch.tensor(marks).long()))

    model.preprocess_image, head.samples = look, corrupt
    return marks


def nan_scores(samples, rows):
    """Of class 2, in the marked images."""
    logits = samples.logits.clone()
    logits[rows, 2] = math.nan
    return dataclasses.replace(samples, logits=logits)


def nan_deltas(samples, rows):
    deltas = samples.pred_deltas.clone()
    deltas[rows[samples.pos], 0] = math.nan
    return dataclasses.replace(samples, pred_deltas=deltas)


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        ("retinanet", "Focal"),
        ("retinanet", "GHMC"),
        ("retinanet", "DR"),
        ("retinanet", "AP"),
        ("retinanet", "RankSort"),
        ("faster", "SoftmaxCE"),
        ("faster", "EQLv2"),
    ],
)
def test_scores_of_one_class_in_one_image_are_found(dataset, tmp_path, kind, loss):
    trainer = start(tmp_path, "MODEL.BALANCE.CLS_LOSS", loss, kind=kind, change=mark)
    spoil_samples(trainer.model, nan_scores)
    error = failure(trainer)
    assert "loss_cls" in error.losses
    assert error.classes == ("class2",)
    assert error.images == (last_batch(trainer)[1],)
    assert "class scores are not finite" in str(error)


@pytest.mark.parametrize("kind", KINDS)
def test_predicted_boxes_are_found_by_the_labels_of_their_rows(dataset, tmp_path, kind):
    seen = []
    trainer = start(tmp_path, kind=kind, change=lambda b: (mark(b), seen.append(b[1])))
    spoil_samples(trainer.model, nan_deltas)
    error = failure(trainer)
    assert error.losses == ("loss_box_reg",)
    assert error.images == (seen[0]["file_name"],)
    classes = {f"class{c}" for c in seen[0]["instances"].gt_classes.tolist()}
    assert error.classes and set(error.classes) <= classes
    assert "a predicted box is not finite" in str(error)


def test_a_loss_of_another_head_is_found_image_by_image(dataset, tmp_path):
    trainer = start(tmp_path, kind="mask", change=mark)
    marks = spoil_samples(trainer.model, lambda samples, rows: samples)
    heads = trainer.model.roi_heads
    forward = heads._forward_mask

    def corrupt(*arguments):
        return {name: v * (math.nan if marks else 1) for name, v in forward(*arguments).items()}

    heads._forward_mask = corrupt
    error = failure(trainer)
    assert error.losses == ("loss_mask",) and error.classes == ()
    assert len(error.images) == 1 and error.images[0] == last_batch(trainer)[1]
    assert "its loss is not finite when it is run alone" in str(error)


def checkpoints(directory):
    return {path.name: torch.load(path)["model"] for path in directory.glob("*.pth")}


@pytest.mark.parametrize("at", [3, 5])
@pytest.mark.parametrize("period", [1, 100])  # how often Detectron2 itself looks at the losses
def test_the_step_is_not_taken_and_nothing_corrupt_is_saved(dataset, tmp_path, at, period):
    trainer = start(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "1", at=at, change=bad_box)
    trainer._trainer.gather_metric_period = period
    evaluations = []
    trainer.test = lambda cfg, model: evaluations.append(1) or {}
    failure(trainer)
    saved = checkpoints(tmp_path)
    assert sorted(saved) == [f"model_{i:07d}.pth" for i in range(at)]
    assert all(v.isfinite().all() for state in saved.values() for v in state.values())
    last = saved[f"model_{at - 1:07d}.pth"]
    assert all(torch.equal(p, last[name]) for name, p in trainer.model.named_parameters())
    assert evaluations == []  # in the last iteration Detectron2 would run it


@pytest.mark.parametrize("at", [3, 5])
def test_a_gradient_that_is_not_finite_is_not_saved(dataset, tmp_path, at):
    def spoil(model):
        model.head.bbox_pred.weight.register_hook(lambda gradient: gradient * math.nan)

    trainer = start(tmp_path, "SOLVER.CHECKPOINT_PERIOD", "2", at=at, action=spoil)
    error = failure(trainer)
    assert error.iteration == at and error.losses == ()
    assert "the first such parameter is head.bbox_pred.weight" in str(error)
    assert set(error.images) == set(last_batch(trainer))
    assert sorted(checkpoints(tmp_path)) == [f"model_{i:07d}.pth" for i in (1, 3) if i < at]


def test_the_diagnosis_leaves_the_buffers_as_the_step_left_them(dataset, tmp_path):
    trainer = start(tmp_path, "MODEL.BALANCE.CLS_LOSS", "GHMC", change=mark)
    spoil_samples(trainer.model, nan_scores)
    states = []
    report = trainer._finite_losses._report

    def watched_report():
        states.append({k: v.clone() for k, v in trainer.model.state_dict().items()})
        return report()

    trainer._finite_losses._report = watched_report
    failure(trainer)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value.nan_to_num(-1.0), states[0][name].nan_to_num(-1.0)), name


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), AssertionError("of a bug")])
def test_other_errors_stay_what_they_are(dataset, tmp_path, error):
    def fail(model):
        model.preprocess_image = lambda inputs: (_ for _ in ()).throw(error)

    with pytest.raises(type(error)) as raised:
        start(tmp_path, action=fail).train()
    assert raised.value is error


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        change = bad_box if rank == 1 else lambda batch: None
        trainer = start(f"{directory}/out", "SOLVER.IMS_PER_BATCH", "4", at=1, change=change)
        error = failure(trainer)
        found = error.losses, error.images, error.classes, str(error), last_batch(trainer)
        with open(os.path.join(directory, f"rank{rank}.json"), "w") as file:
            json.dump(found, file)


def test_all_ranks_end_with_the_image_of_one(dataset_files, tmp_path):
    start_ranks(_rank, (str(tmp_path), dataset_files))
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert first[:4] == second[:4]
    losses, images, classes, text, batch = second
    assert losses == ["loss_box_reg"] and len(images) == len(classes) == 1
    assert images[0] in batch and images[0] not in first[4]
    assert f"Images: {images[0]} (a ground truth box is not finite)." in text
