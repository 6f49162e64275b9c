"""SyncBN on the CPU: a batch norm on one process, a message on several."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.events import EventStorage

from d2_balance.engine.setup.norms import NORMS, check_norms

from ..conftest import make_inputs, small_cfg


@pytest.mark.parametrize("key", NORMS)
def test_several_processes_on_the_cpu_are_told_what_works(monkeypatch, key):
    cfg = small_cfg("mask", f"MODEL.{key}", "SyncBN")
    check_norms(cfg)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=f"MODEL.{key} SyncBN cannot join 2 .* naiveSyncBN"):
        check_norms(cfg)
    cfg.MODEL.DEVICE = "cuda"
    check_norms(cfg)


def test_on_one_process_it_is_a_batch_norm():
    found = []
    for norm in ("SyncBN", "BN"):
        torch.manual_seed(0)
        model = build_model(small_cfg("faster", "MODEL.RESNETS.NORM", norm)).train()
        torch.manual_seed(1)
        with EventStorage():
            found.append(model(make_inputs()))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[1])
