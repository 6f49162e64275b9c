"""What `d2-balance calibrate` measures, and that a model takes it."""

import pytest
import torch
from detectron2.modeling import build_model

from d2_balance.engine.calibrate import measure
from d2_balance.modeling.postprocess.statistics import CalibrationStatistics

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


def test_a_cascade_has_no_single_classifier(dataset, tmp_path):
    cfg = run_cfg(tmp_path, kind="cascade")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    torch.save({"model": build_model(cfg).state_dict()}, cfg.MODEL.WEIGHTS)
    with pytest.raises(ValueError, match="must be BalancedStandardROIHeads"):
        measure(cfg, max_iter=1)
