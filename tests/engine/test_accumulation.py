"""Micro-batches give the gradients and the state of the whole batch, where the formula allows."""

from itertools import chain

import pytest
import torch
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils.events import EventStorage

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.step import StepTrainer
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.compatibility import has_class_columns_only
from d2_balance.utils.distributed import MicroBatches, sum_across_ranks, world_size

from ..conftest import make_inputs, small_cfg
from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg
from .test_trainer import trained

ALONE = ["MODEL.RESNETS.NORM", "LN"]  # batch norm would see the micro-batch
# every proposal and anchor trains, so that nothing is drawn
WHOLE = ["MODEL.BALANCE.SAMPLING_FREE", "True"]
WHOLE += ["MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN", "MODEL.BALANCE.RPN.SAMPLING_FREE", "True"]


def joining():
    """Every loss whose mean is across all ranks, in a model that takes it."""
    for name, cls in CLS_LOSSES:
        if cls.all_reduced:
            kind = "retinanet" if has_class_columns_only(cls) else "faster"
            yield pytest.param(kind, ["MODEL.BALANCE.CLS_LOSS", name], id=name)
    for name, _ in BOX_LOSSES:
        yield pytest.param("retinanet", ["MODEL.BALANCE.BOX_LOSS", name], id=name)
    ghm = ["MODEL.BALANCE.CLS_LOSS", "GHMC"]
    yield pytest.param("fcos", ghm, id="FCOS")
    focal = ["MODEL.BALANCE.CLS_LOSS", "Focal"]
    yield pytest.param("retinanet", [*focal, "MODEL.BALANCE.GUIDED_SCALE", "1.0"], id="guided")
    yield pytest.param("faster", ["MODEL.BALANCE.RPN.CLS_LOSS", "GHMC"], id="RPN")
    yield pytest.param("cascade", ["MODEL.BALANCE.CLS_LOSS", "EQLv2"], id="cascade")


def steps(kind, overrides, micro_batches, counts_file):
    """Gradients of two steps on four images, and the buffers at the end."""
    seed_everything(3)
    if kind in ("faster", "cascade"):
        overrides = [*WHOLE, *overrides]
    counts = ["MODEL.BALANCE.CLASS_COUNTS_FILE", counts_file]
    model = BalancedTrainer.build_model(small_cfg(kind, *ALONE, *counts, *overrides)).double()
    for module in model.modules():  # proposals as the loss of the RPN leaves them
        if hasattr(module, "pixel_mean"):
            module.pixel_mean, module.pixel_std = module.pixel_mean.double(), module.pixel_std
    # an image without objects, so that one micro-batch has fewer positives
    batches = [make_inputs(4, seed=i, empty=(1,) if i else (2, 3)) for i in range(2)]
    for record in chain.from_iterable(batches):
        record["image"] = record["image"].double()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    trainer = StepTrainer(model, batches, optimizer, micro_batches=micro_batches, seed=5)
    gradients = []
    with EventStorage() as trainer.storage:
        for trainer.iter in range(2):
            trainer.run_step()
            gradients.append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )
    return gradients, dict(model.named_buffers()), trainer.storage.latest()


@pytest.fixture
def doubles(monkeypatch):
    """Lets the RPN work in float64: its boxes are float32, and NMS wants one type of both."""
    nms = proposal_utils.batched_nms
    monkeypatch.setattr(
        proposal_utils,
        "batched_nms",
        lambda boxes, scores, *more: nms(boxes, scores.float(), *more),
    )


@pytest.mark.parametrize(("kind", "overrides"), joining())
def test_micro_batches_equal_the_whole_batch(doubles, kind, overrides, counts_file):
    whole, state, log = steps(kind, overrides, 1, counts_file)
    parts, parts_state, parts_log = steps(kind, overrides, 2, counts_file)
    for expected, found in zip(whole, parts, strict=True):
        largest = max(g.abs().max() for g in expected.values())
        assert expected.keys() == found.keys() and largest > 0
        for name, gradient in expected.items():
            torch.testing.assert_close(
                found[name], gradient, rtol=1e-4, atol=1e-6 * largest.item(), msg=name
            )
    for name, value in state.items():
        torch.testing.assert_close(parts_state[name], value, rtol=1e-5, atol=1e-8, msg=name)
    assert parts_log["total_loss"][0] == pytest.approx(log["total_loss"][0], rel=1e-5)


def test_losses_that_rank_their_own_rows_train_as_on_so_many_ranks():
    """AP-loss ranks each micro-batch by itself: the result is the mean over both."""
    names = [name for name, cls in CLS_LOSSES if not cls.all_reduced]
    assert "AP" in names
    overrides = ["MODEL.BALANCE.CLS_LOSS", "AP"]
    parts, _, log = steps("retinanet", overrides, 4, "")
    assert all(g.isfinite().all() for g in parts[1].values())
    assert log["total_loss"][0] > 0


def test_a_sum_counts_every_micro_batch_as_a_rank():
    sums = MicroBatches(2)
    for value in (3.0, 4.0):
        with sums.counting():
            assert world_size() == 2
            # not known yet: as if both were like this one
            assert sum_across_ranks([torch.tensor(value), None])[0] == 2 * value
    sums.total()
    assert world_size() == 1
    for value in (3.0, 4.0):
        with sums.summed():
            found = sum_across_ranks([torch.tensor(value), None])
            assert found[0] == 7 and found[1] is None  # 3 + 4
            with pytest.raises(RuntimeError, match="has not seen"):
                sum_across_ranks([torch.tensor(value)])


def test_a_killed_run_continues_exactly(dataset, tmp_path):
    overrides = ["SOLVER.GRAD_ACCUM_STEPS", "2", "SOLVER.CHECKPOINT_PERIOD", "2"]
    overrides += ["MODEL.BALANCE.CLS_LOSS", "GHMC"]
    whole = trained(run_cfg(tmp_path / "whole", *overrides))
    cfg = run_cfg(tmp_path / "parts", *overrides)
    trained(cfg, kill_at=5)
    resumed = trained(cfg, resume=True)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert [key for key in expected if not torch.equal(expected[key], found[key])] == []


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        for count in (1, 2):
            overrides = ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.GRAD_ACCUM_STEPS", str(count), *ALONE]
            overrides += ["SOLVER.MAX_ITER", "3", "MODEL.BALANCE.CLS_LOSS", "GHMC"]
            # images of one size: a whole batch is padded to its largest, and padding has anchors
            overrides += ["INPUT.MIN_SIZE_TRAIN", "(48,)"]
            trainer = trained(run_cfg(f"{directory}/out{count}", *overrides))
            torch.save(trainer.model.module.state_dict(), f"{directory}/{count}_{rank}.pth")


def test_micro_batches_of_two_ranks_equal_whole_batches_of_two_ranks(dataset_files, tmp_path):
    start_ranks(_rank, (str(tmp_path), dataset_files))
    states = {(c, r): torch.load(tmp_path / f"{c}_{r}.pth") for c in (1, 2) for r in (0, 1)}
    for name, value in states[1, 0].items():
        assert torch.equal(states[2, 0][name], states[2, 1][name]), name
        torch.testing.assert_close(states[2, 0][name], value, rtol=1e-4, atol=1e-6, msg=name)
