"""Mixed precision on the CPU: overflows skip a step, a loss that is not finite ends the run."""

import json
import math

import pytest
import torch
from detectron2.engine import HookBase

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer, NonFiniteLossError
from d2_balance.engine.resume.random_state import seed_everything
from d2_balance.engine.step import widen_inputs_of_strided_convs

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg
from .test_trainer import trained

AMP = ["SOLVER.AMP.ENABLED", "True"]
BF16 = [*AMP, "SOLVER.AMP.PRECISION", "bf16"]
# at the usual scale of 65536 gradients of a small model may overflow by themselves
FP16 = [*AMP, "SOLVER.AMP.PRECISION", "fp16", "SOLVER.AMP.INIT_SCALE", "1024.0"]
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


class Overflow(HookBase):
    """Makes a gradient infinite in some iterations; belongs to the inner trainer."""

    def __init__(self, iterations):
        self.iterations = iterations

    def after_backward(self):
        if self.trainer.iter in self.iterations:
            _name, parameter = next(
                (n, p) for n, p in self.trainer.model.named_parameters() if "cls_score.w" in n
            )
            parameter.grad.view(-1)[0] = math.inf


class Weights(HookBase):
    """Copies of a weight after every iteration."""

    def __init__(self):
        self.seen = []

    def after_step(self):
        for name, value in self.trainer.model.named_parameters():
            if name.endswith("head.bbox_pred.weight"):
                self.seen.append(value.detach().clone())


def start(directory, *overrides, iterations=(), kind="retinanet"):
    seed_everything(7)
    trainer = BalancedTrainer(run_cfg(directory, *overrides, kind=kind))
    trainer.test = lambda cfg, model: {}
    trainer._trainer.register_hooks([Overflow(iterations)])
    weights = Weights()
    trainer.register_hooks([weights])
    return trainer, weights


def logged(directory):
    lines = (directory / "metrics.json").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["retinanet", "fcos", "mask", "cascade"])
def test_half_precision_trains_as_float32_does(dataset, tmp_path, kind, precision):
    short = ["SOLVER.MAX_ITER", "3"]
    logs = []
    for name, extra in (("full", []), ("half", precision)):
        trained(run_cfg(tmp_path / name, *short, *extra, kind=kind))
        logs.append(logged(tmp_path / name)[-1])
    names = [name for name in logs[0] if "loss" in name]
    if kind in ("mask", "cascade"):  # which proposals are drawn hangs on the last bit of a score
        names = ["total_loss", "loss_rpn_cls"]
    assert names
    for name in names:  # medians of three steps on weights that start equal
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.1, abs=0.02), name


@pytest.mark.gpu
@GPU
@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
def test_half_precision_on_a_gpu(dataset, tmp_path, precision):
    device = ["MODEL.DEVICE", "cuda"]
    trainer, weights = start(tmp_path, *precision, *device, iterations=(2,))
    trainer.train()
    skipped = torch.equal(weights.seen[2], weights.seen[1])
    assert skipped == (precision is FP16)


def test_a_planted_overflow_skips_one_step_and_the_run_ends_well(dataset, tmp_path):
    trainer, weights = start(tmp_path, *FP16, iterations=(2,))
    trainer.train()
    assert len(weights.seen) == 6
    moved = [not torch.equal(a, b) for a, b in zip(weights.seen, weights.seen[1:], strict=False)]
    assert moved == [True, False, True, True, True]  # after iteration 1, 2, ... 5
    assert all(w.isfinite().all() for w in weights.seen)
    last = logged(tmp_path)[-1]
    assert last["amp/skipped_steps"] == 1
    assert last["amp/scale"] == 512  # 1024, halved once
    assert math.isfinite(last["total_loss"])


def test_a_scale_that_is_too_large_comes_down_by_itself(dataset, tmp_path):
    # 2^40 times any gradient above 6e-8 is beyond 65504, the largest float16
    cfg = [*FP16, "SOLVER.AMP.INIT_SCALE", str(2.0**30), "SOLVER.MAX_ITER", "25"]
    trainer, weights = start(tmp_path, *cfg)
    trainer.train()
    last = logged(tmp_path)[-1]
    assert 1 <= last["amp/skipped_steps"] < 25
    assert last["amp/scale"] == 2.0 ** (30 - last["amp/skipped_steps"])
    assert not torch.equal(weights.seen[-1], weights.seen[0])


def test_gradients_that_never_become_finite_end_the_run(dataset, tmp_path):
    limit = ["SOLVER.AMP.MAX_SKIPPED", "3"]
    trainer, _ = start(tmp_path, *FP16, *limit, iterations=range(100))
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    assert error.value.iteration == 2
    text = str(error.value)
    assert "3 steps in a row" in text and "that of head.cls_score.weight." in text
    assert "SOLVER.AMP.PRECISION bf16" in text


def test_an_overflow_of_the_forward_pass_is_told_from_a_broken_run(dataset, tmp_path):
    trainer, _ = start(tmp_path, *FP16)
    with torch.no_grad():  # 1e6 is beyond float16; the next layer multiplies it by 1e-6 and less
        trainer.model.backbone.fpn_lateral3.bias.fill_(1e6)
        trainer.model.backbone.fpn_output3.weight.mul_(1e-6)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.train()
    text = str(error.value)
    assert "In float32 the loss of this batch is finite" in text
    assert "SOLVER.AMP.PRECISION bf16" in text and "SOLVER.BASE_LR" not in text


def test_bad_input_is_not_blamed_on_half_precision(dataset, tmp_path):
    from .test_nonfinite import Planted, bad_box

    trainer, _ = start(tmp_path, *FP16)
    trainer.data_loader = Planted(trainer.data_loader, 2, bad_box)
    with pytest.raises(NonFiniteLossError, match="a ground truth box is not finite.*Fix these"):
        trainer.train()


def test_scale_and_count_survive_a_kill(dataset, tmp_path):
    overrides = [*FP16, "SOLVER.CHECKPOINT_PERIOD", "2", "SOLVER.AMP.INIT_SCALE", str(2.0**34)]
    whole = trained(run_cfg(tmp_path / "whole", *overrides))
    cfg = run_cfg(tmp_path / "parts", *overrides)
    trained(cfg, kill_at=5)
    resumed = trained(cfg, resume=True)
    expected, found = whole._trainer.state_dict(), resumed._trainer.state_dict()
    assert found["grad_scaler"] == expected["grad_scaler"]
    assert found["skipped"] == expected["skipped"] and found["skipped"][0] > 0
    weights = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (4, 1), (3, 2)])
def test_strided_convolutions_of_narrow_maps_have_sound_gradients(size):
    """Without the widening, some are memory that was never written (torch 2.14, no AMX)."""
    torch.manual_seed(1)
    conv = torch.nn.Conv2d(16, 16, 3, stride=2, padding=1)
    x = torch.randn(2, 16, *size)
    expected = conv(x)
    expected.sum().backward()
    gradient, conv.weight.grad = conv.weight.grad, None
    widen_inputs_of_strided_convs(conv)
    assert torch.equal(conv(x), expected)
    for _ in range(5):
        junk = [torch.full((10000,), 1e30) for _ in range(8)]
        del junk
        with torch.autocast("cpu", dtype=torch.bfloat16):
            conv(x).float().sum().backward()
    torch.testing.assert_close(conv.weight.grad / 5, gradient, rtol=0.02, atol=0.1)


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        # behind the reduction of DDP: the other rank knows nothing of it
        iterations = (1,) if rank == 1 else ()
        trainer, _ = start(f"{directory}/out", *FP16, "SOLVER.MAX_ITER", "3", iterations=iterations)
        trainer.train()
        state = {"skipped": trainer._trainer._skipped, "scale": trainer._trainer.scaler.get_scale()}
        state["weight"] = trainer.model.module.state_dict()["head.cls_score.weight"]
        torch.save(state, f"{directory}/rank{rank}.pth")


def test_an_overflow_on_one_rank_skips_the_step_on_all(dataset_files, tmp_path):
    start_ranks(_rank, (str(tmp_path), dataset_files))
    first, second = (torch.load(tmp_path / f"rank{rank}.pth") for rank in range(2))
    assert first["skipped"] == second["skipped"] == 1
    assert first["scale"] == second["scale"] == 512
    assert torch.equal(first["weight"], second["weight"])
