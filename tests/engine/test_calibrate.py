"""What `d2-balance calibrate` measures, and that a model takes it."""

import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from d2_balance.data.model_classes import ModelClasses
from d2_balance.deploy import load
from d2_balance.engine import BalancedTrainer
from d2_balance.engine.calibrate import measure
from d2_balance.engine.hooks.logit_statistics import CollectLogits
from d2_balance.modeling.postprocess.statistics import CalibrationStatistics

from ..conftest import CLASSES
from .conftest import run_cfg

NODE = "MODEL.BALANCE.CALIBRATION."


def test_statistics_of_a_model_are_measured_and_used(dataset, tmp_path):
    cfg = run_cfg(tmp_path, kind="faster")
    cfg.MODEL.WEIGHTS = ""
    dimensions = measure(cfg)
    assert dimensions.logit_mean is None
    assert all(1 <= value <= 2 for value in dimensions.fractal_dimension)
    torch.manual_seed(0)
    weights = build_model(cfg).state_dict()
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": weights}, cfg.MODEL.WEIGHTS)
    found = measure(cfg, max_iter=2)
    classes = len(found.class_names)
    assert found.fractal_dimension == dimensions.fractal_dimension
    assert len(found.logit_mean) == len(found.logit_variance) == classes
    assert all(value > 0 for value in found.logit_variance)
    path = str(tmp_path / "calibration.json")
    found.save(path)
    assert CalibrationStatistics.load(path) == found
    cfg.merge_from_list([NODE + "NAME", "logn", NODE + "STATISTICS", path])
    layers = build_model(cfg).roi_heads.box_predictor
    mean = torch.tensor(found.logit_mean)
    torch.testing.assert_close(layers.calibration.mean.float(), mean - mean.min())


def test_a_model_without_roi_heads_is_refused(dataset, tmp_path):
    cfg = run_cfg(tmp_path, kind="retinanet")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match="must be BalancedStandardROIHeads"):
        measure(cfg, max_iter=1)


def layers_of(model):
    return model.roi_heads._output_layers()


@pytest.mark.parametrize("kind", ["faster", "cascade"])
def test_a_training_collects_the_statistics_of_logn_at_its_end(dataset, tmp_path, kind):
    keys = [NODE + "NAME", "logn", NODE + "MAX_ITER", "2", "TEST.EVAL_PERIOD", "1"]
    keys += ["SOLVER.MAX_ITER", "2", "SOLVER.CHECKPOINT_PERIOD", "1"]
    cfg = run_cfg(tmp_path / "run", *keys, kind=kind)
    (tmp_path / "run").mkdir()
    trainer = BalancedTrainer(cfg)
    trainer.train()
    expected = [(one.calibration.mean, one.calibration.std) for one in layers_of(trainer.model)]
    assert all(len(mean) == CLASSES and (std > 0).all() for mean, std in expected)
    final, middle = (str(tmp_path / "run" / f"model_{name}.pth") for name in ("final", "0000000"))
    assert ModelClasses.of_weights(final).calibration["logit_mean"]
    assert "calibration" not in torch.load(middle)["classes"]
    # the statistics are those that the command measures on these weights
    again = cfg.clone()
    again.MODEL.WEIGHTS = final
    found = measure(again, max_iter=2)
    stages = found.logit_mean if kind == "cascade" else [found.logit_mean]
    for mean, (own, _) in zip(stages, expected, strict=True):
        torch.testing.assert_close(torch.tensor(mean).double() - min(mean), own)
    # a finished run that is resumed, and the checkpoint alone, have them without a file
    resumed = BalancedTrainer(cfg)
    resumed.resume_or_load(resume=True)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(cfg.dump())
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
    try:
        loaded = load(str(tmp_path / "run"), device="cpu").model
    finally:
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            DatasetCatalog.register(name, list)
    for model in (resumed.model, loaded):
        for one, (mean, std) in zip(layers_of(model), expected, strict=True):
            torch.testing.assert_close(one.calibration.mean, mean)
            torch.testing.assert_close(one.calibration.std, std)


def test_statistics_that_a_signal_cut_off_are_collected_by_the_resumed_run(
    dataset, tmp_path, monkeypatch
):
    keys = [NODE + "NAME", "logn", NODE + "MAX_ITER", "1", "SOLVER.MAX_ITER", "2"]
    cfg = run_cfg(tmp_path, *keys, kind="faster")
    with monkeypatch.context() as patch:
        patch.setattr(CollectLogits, "after_step", lambda self: None)
        BalancedTrainer(cfg).train()
    final = str(tmp_path / "model_final.pth")
    assert ModelClasses.of_weights(final).calibration is None
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    assert len(layers_of(trainer.model)[0].calibration.mean) == CLASSES
    assert ModelClasses.of_weights(final).calibration["logit_mean"]


def test_the_pass_at_the_end_changes_no_weight(dataset, tmp_path):
    weights = []
    for name in ("", "logn"):
        (tmp_path / f"run{name}").mkdir()
        keys = [NODE + "NAME", name, NODE + "MAX_ITER", "2", "SOLVER.MAX_ITER", "3"]
        torch.manual_seed(0)
        trainer = BalancedTrainer(run_cfg(tmp_path / f"run{name}", *keys, kind="faster"))
        trainer.train()
        weights.append(trainer.model.state_dict())
    for key, value in weights[0].items():
        assert torch.equal(value, weights[1][key]), key


def test_fractal_dimensions_are_saved_with_the_model(dataset, tmp_path):
    keys = [NODE + "NAME", "fracal", "SOLVER.MAX_ITER", "1"]
    cfg = run_cfg(tmp_path / "run", *keys, kind="faster")
    (tmp_path / "run").mkdir()
    trainer = BalancedTrainer(cfg)
    trainer.train()
    shift = layers_of(trainer.model)[0].calibration.shift
    (tmp_path / "run" / "config.yaml").write_text(cfg.dump())
    final = str(tmp_path / "run" / "model_final.pth")
    saved = ModelClasses.of_weights(final).calibration["fractal_dimension"]
    assert saved == list(measure(cfg).fractal_dimension)
    for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
        DatasetCatalog.remove(name)
    try:
        for statistics in ("", "gone.json"):
            overrides = [NODE + "STATISTICS", statistics]
            loaded = load(str(tmp_path / "run"), device="cpu", overrides=overrides).model
            torch.testing.assert_close(layers_of(loaded)[0].calibration.shift, shift)
        stock = cfg.clone()
        stock.MODEL.WEIGHTS = final
        predictor = DefaultPredictor(stock)
        torch.testing.assert_close(layers_of(predictor.model)[0].calibration.shift, shift)
    finally:
        for name in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST):
            DatasetCatalog.register(name, list)
