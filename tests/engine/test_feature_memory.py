"""A run with LOCE's feature memory resumes exactly; another run does not inherit the memory."""

import torch

from d2_balance.engine import BalancedTrainer

from .conftest import run_cfg
from .test_trainer import trained

NODE = "MODEL.BALANCE.LOCE_MEMORY."
MEMORY = ["MODEL.BALANCE.CLS_LOSS", "LOCE", NODE + "ENABLED", True, NODE + "CAPACITY", 30]


def test_a_killed_run_continues_as_if_nothing_had_happened(dataset, tmp_path):
    keys = [*MEMORY, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.MAX_ITER", "5"]
    whole = trained(run_cfg(tmp_path / "whole", *keys, kind="faster"))
    cfg = run_cfg(tmp_path / "parts", *keys, kind="faster")
    trained(cfg, kill_at=4)
    resumed = trained(cfg, resume=True)
    assert resumed.start_iter == 4
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []
    assert expected["roi_heads.box_predictor.memory.count"].sum() > 0
    # another run with its weights starts with empty queues
    weights = ["MODEL.WEIGHTS", str(tmp_path / "whole" / "model_final.pth")]
    other = BalancedTrainer(run_cfg(tmp_path / "other", *keys, *weights, kind="faster"))
    other.resume_or_load(resume=False)
    state = other.model.state_dict()
    assert state["roi_heads.box_predictor.memory.count"].sum() == 0
    assert (state["roi_heads.box_predictor.cls_loss.mean_score"] == 0.01).all()
