"""Compiled losses equal plain ones, and plain ones take over where a compiler fails."""

from functools import partial

import pytest
import torch

from d2_balance.engine import BalancedTrainer
from d2_balance.engine.setup.compiled import compile_losses
from d2_balance.losses import (
    BAGSLoss,
    FocalLoss,
    GHMCLoss,
    Samples,
    SeesawLoss,
    SmoothL1Loss,
    SoftmaxEQLLoss,
)

from ..conftest import make_inputs, small_cfg

COMPILE = ["MODEL.BALANCE.COMPILE", "True", "MODEL.BALANCE.CLS_LOSS", "GHMC"]


def samples(rows, seed=0, columns=5):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, columns, generator=generator, requires_grad=True)
    labels = torch.randint(0, 6, (rows,), generator=generator)
    return Samples(logits=logits, labels=labels, num_classes=5)


def ours_among(caplog):
    """Messages of this package; PyTorch's compiler has warnings of its own."""
    return [r.getMessage() for r in caplog.records if r.name.startswith("d2_balance")]


class Model(torch.nn.Module):
    def __init__(self, *losses):
        super().__init__()
        self.losses = torch.nn.ModuleList(losses)
        self.weight = torch.nn.Parameter(torch.ones(1))


def test_one_warning_and_the_plain_losses_where_compiling_raises(monkeypatch, caplog):
    def fails(*args, **kwargs):
        raise RuntimeError("no C++ compiler\nand a long tail")

    monkeypatch.setattr(torch, "compile", fails)
    with caplog.at_level("WARNING", logger="d2_balance"):
        model = BalancedTrainer.build_model(small_cfg("retinanet", *COMPILE))
        losses = model(make_inputs())
    torch.manual_seed(0)
    plain = BalancedTrainer.build_model(small_cfg("retinanet", *COMPILE[2:]))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert len([r for r in caplog.records if "COMPILE" in r.getMessage()]) == 1
    assert "no C++ compiler" in caplog.text and "long tail" not in caplog.text
    assert losses["loss_cls"].isfinite()


def test_losses_that_fail_later_share_one_warning(monkeypatch, caplog):
    """The small function compiles; the losses themselves do not."""
    calls = []

    def compile(function, **kwargs):
        def run(*inputs):
            calls.append(function)
            if len(calls) > 1:
                raise NotImplementedError("an operator")
            return function(*inputs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    model = Model(FocalLoss(), GHMCLoss())
    batch = samples(7)
    with caplog.at_level("WARNING", logger="d2_balance"):
        compile_losses(model)
        found = [loss(batch) for loss in model.losses]
        again = model.losses[0](batch)
    assert len(caplog.records) == 1 and "Focal" in caplog.text and len(calls) == 2
    expected = [loss(batch) for loss in (FocalLoss(), GHMCLoss())]
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
    assert torch.equal(again, expected[0])


def test_errors_of_the_loss_itself_are_no_failures_of_the_compiler(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    model = Model(FocalLoss())

    def wrong(samples):
        raise ValueError("wrong input")

    model.losses[0].compute = wrong
    with caplog.at_level("WARNING", logger="d2_balance"):
        compile_losses(model)
        with pytest.raises(ValueError, match="wrong input"):
            model.losses[0](samples(3))
    assert not caplog.records


def test_checkpoints_have_the_same_names(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **kwargs: function)
    compiled = BalancedTrainer.build_model(small_cfg("retinanet", *COMPILE)).state_dict()
    plain = BalancedTrainer.build_model(small_cfg("retinanet", *COMPILE[2:])).state_dict()
    assert compiled.keys() == plain.keys()


@pytest.mark.slow
def test_compiled_losses_and_gradients_equal_plain_ones(caplog):
    model, plain = Model(FocalLoss(), SmoothL1Loss()), (FocalLoss(), SmoothL1Loss())
    with caplog.at_level("WARNING", logger="d2_balance"):
        compile_losses(model)
    if warnings := ours_among(caplog):
        pytest.skip(f"no compiler here: {warnings[0]}")
    for rows in (9, 23):
        ours, theirs = samples(rows), samples(rows)
        model.losses[0](ours).sum().backward()
        plain[0](theirs).sum().backward()
        torch.testing.assert_close(ours.logits.grad, theirs.logits.grad, rtol=1e-5, atol=1e-6)
        pred, target = torch.randn(rows, 4), torch.randn(rows, 4)
        torch.testing.assert_close(model.losses[1](pred, target), plain[1](pred, target))
    assert not ours_among(caplog)


@pytest.mark.parametrize(
    "make",
    [
        lambda: BAGSLoss(instance_count=[1, 20, 200, 2000, 5], beta=0.0),
        lambda: SeesawLoss(num_classes=5),
        lambda: SoftmaxEQLLoss(class_frequency=[0.0001, 0.5, 0.0001, 0.2, 0.9], gamma=1.0),
    ],
    ids=["BAGS", "Seesaw", "SoftmaxEQL"],
)
def test_softmax_losses_keep_their_gradients(make, monkeypatch, caplog):
    """The compiler's own treatment of views and gradients, without machine code."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, plain = Model(make()), make()
    with caplog.at_level("WARNING", logger="d2_balance"):
        compile_losses(model)
        for rows in (17, 33):
            ours, theirs = (samples(rows, columns=plain.num_outputs(5)) for _ in range(2))
            value, expected = model.losses[0](ours), plain(theirs)
            value.sum().backward()
            expected.sum().backward()
            torch.testing.assert_close(value, expected)
            torch.testing.assert_close(ours.logits.grad, theirs.logits.grad, rtol=1e-5, atol=1e-6)
    assert not ours_among(caplog)
