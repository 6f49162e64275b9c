"""Clipping the gradient norm of all parameters together."""

import pytest
import torch
from torch import nn

from d2_balance.engine import BalancedTrainer

from ..conftest import small_cfg


def step(clip_type, value, gradients=(3.0, 4.0)):
    """The changes of two parameters after one step of plain SGD at learning rate 1."""
    keys = ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip_type]
    keys += ["SOLVER.CLIP_GRADIENTS.CLIP_VALUE", value, "SOLVER.BASE_LR", 1.0]
    keys += ["SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0]
    model = nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in gradients])
    optimizer = BalancedTrainer.build_optimizer(small_cfg("retinanet", *keys), model)
    before = torch.cat([p.detach().clone().flatten() for p in model.parameters()])
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        parameter.grad = torch.full_like(parameter, gradient)
    optimizer.step()
    return (before - torch.cat([p.detach().flatten() for p in model.parameters()])).tolist()


def test_full_model_clips_the_norm_of_all_parameters():
    # norm of (3, 4) is 5: clipped at 1 both become a fifth
    assert step("full_model", 1.0) == pytest.approx([0.6, 0.8], rel=1e-4)
    assert step("full_model", 10.0) == pytest.approx([3.0, 4.0], rel=1e-4)


def test_norm_is_still_detectron2s_of_each_parameter():
    assert step("norm", 1.0) == pytest.approx([1.0, 1.0], rel=1e-4)


def test_another_type_of_clipping_is_refused_with_those_allowed():
    with pytest.raises(ValueError, match="CLIP_TYPE is 'whole'; must be .* value, norm, full_mode"):
        step("whole", 1.0)
