"""Hard negative mining: the figures of mmdet's SSD head, a slow oracle, heads, ranks, resume."""

from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import LazyCall as L
from detectron2.modeling import build_model
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.utils.events import EventStorage

from d2_balance.engine.setup.lazy_model import balance_model
from d2_balance.engine.setup.unused import check_losses_are_used
from d2_balance.engine.setup.validate import check_losses
from d2_balance.losses import Samples, SigmoidCELoss, SmoothL1Loss, SoftmaxCELoss
from d2_balance.modeling.criterion import ImagePositives, detection_losses
from d2_balance.sampling import HardNegatives, hard_negatives

from ..conftest import make_inputs, small_cfg
from ..losses.test_contract import Deltas
from ..two_ranks import results_of_two_ranks

REFERENCE = Path(__file__).parents[1] / "reference" / "ssd_mining.npz"
KEY = "MODEL.BALANCE.ANCHOR_SAMPLER"
MINED = ("MODEL.BALANCE.CLS_LOSS", "SigmoidCE", KEY, "HardNegatives")
RPN = ("MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN")
RPN_MINED = (*RPN, "MODEL.BALANCE.RPN.ANCHOR_SAMPLER", "HardNegatives")


def samples_of(logits, labels, num_classes, **fields):
    pos = (labels < num_classes).nonzero().squeeze(1)
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]], dtype=logits.dtype).expand(len(pos), -1)
    return Samples(
        logits=logits,
        labels=labels,
        num_classes=num_classes,
        pred_deltas=logits.new_zeros(len(pos), 4),
        boxes=boxes,
        gt_boxes=boxes + 1,
        box_transform=Deltas(),
        **fields,
    )


@pytest.mark.parametrize("case", ["mixed", "few_negatives", "no_positive"])
def test_loss_and_gradient_equal_mmdet(case):
    with np.load(REFERENCE) as file:
        f = {k: torch.from_numpy(np.asarray(v)) for k, v in file.items()}
    labels = f[f"{case}_labels"].long()
    kept = labels >= 0
    logits = f[f"{case}_logits"].requires_grad_()
    losses = detection_losses(
        samples_of(logits[kept], labels[kept], int(f["num_classes"])),
        SoftmaxCELoss(),
        SmoothL1Loss(),
        [],
        ImagePositives(),
        anchor_sampler=HardNegatives(ratio=float(f["neg_pos_ratio"])),
    )
    torch.testing.assert_close(losses["loss_cls"], f[f"{case}_loss"], rtol=1e-6, atol=1e-12)
    (grad,) = torch.autograd.grad(losses["loss_cls"], logits)
    torch.testing.assert_close(grad, f[f"{case}_grad"], rtol=1e-6, atol=1e-12)


def chosen_by_hand(labels, image, loss, num_classes, ratio, least):
    """Indices that train, image by image."""
    kept = set()
    for n in set(image):
        own = [i for i in range(len(labels)) if image[i] == n]
        positive = [i for i in own if labels[i] < num_classes]
        negative = sorted((i for i in own if labels[i] == num_classes), key=lambda i: -loss[i])
        kept |= {*positive, *negative[: max(int(ratio * len(positive)), least)]}
    return kept


@pytest.mark.parametrize(("ratio", "least"), [(3.0, 0), (0.5, 0), (2.5, 7)])
def test_choice_equals_the_loop_over_images(ratio, least):
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 5, (300,), generator=generator)
    labels = torch.where(torch.rand(300, generator=generator) < 0.1, 1, 2)
    labels[image == 3] = 2  # no positive
    labels[image == 4] = 1  # no negative
    loss = torch.rand(300, generator=generator)
    samples = Samples(
        logits=torch.zeros(300, 2), labels=labels, num_classes=2, image_index=image, num_images=6
    )
    kept = hard_negatives(samples, loss, ratio, least)
    expected = chosen_by_hand(*(x.tolist() for x in (labels, image, loss)), 2, ratio, least)
    assert set(kept.nonzero().squeeze(1).tolist()) == expected


def test_an_empty_batch_and_images_without_objects_give_zero_with_a_gradient():
    for count in (0, 9):
        logits = torch.randn(count, 2, requires_grad=True)
        samples = samples_of(logits, torch.full((count,), 2), 2, num_images=1)
        parts = SigmoidCELoss(), SmoothL1Loss(), [], ImagePositives()
        losses = detection_losses(samples, *parts, anchor_sampler=HardNegatives())
        sum(losses.values()).backward()
        assert losses["loss_cls"] == 0 and (logits.grad == 0).all()


def test_half_precision_is_ranked_in_float32():
    # 1000 negatives whose losses differ by less than bfloat16 can tell
    logits = torch.linspace(1, 1.001, 1000).unsqueeze(1).bfloat16().requires_grad_()
    samples = samples_of(logits, torch.tensor([0] + [1] * 999), 1)
    parts = SigmoidCELoss(), SmoothL1Loss(), [], ImagePositives()
    losses = detection_losses(samples, *parts, anchor_sampler=HardNegatives())
    assert losses["loss_cls"].dtype == torch.float32
    assert (torch.autograd.grad(losses["loss_cls"], logits)[0] != 0).sum() == 4


@pytest.mark.parametrize("kind", ["retinanet", "fcos"])
@pytest.mark.parametrize("empty", [(), (0,), (0, 1)], ids=["objects", "one empty", "all empty"])
def test_dense_heads_train_on_three_negatives_for_each_positive(kind, empty):
    model = build_model(small_cfg(kind, *MINED))
    seen = []
    original = model.anchor_sampler.forward
    model.anchor_sampler.forward = lambda s, loss: (
        seen.append((s, original(s, loss))) or seen[-1][1]
    )
    with EventStorage(0):
        losses = model(make_inputs(empty=empty))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    ((samples, kept),) = seen
    for n in range(2):
        own = samples.image_index == n
        positives = int((own & samples.foreground).sum())
        negatives = int((own & kept & ~samples.foreground).sum())
        assert negatives == min(3 * positives, int((own & ~samples.foreground).sum()))
    counts = [int((samples.foreground & (samples.image_index == n)).sum()) for n in range(2)]
    assert model.normalizer.value() == sum(max(n, 1) for n in counts)
    with torch.no_grad():
        model.eval()(make_inputs(images=1))


@pytest.mark.parametrize("empty", [(), (0, 1)], ids=["objects", "all empty"])
def test_the_rpn_mines_all_anchors_that_are_not_ignored(empty):
    model = build_model(small_cfg("faster", *RPN_MINED))
    rpn, seen = model.proposal_generator, []
    rpn.anchor_sampler.register_forward_hook(lambda m, i, out: seen.append((i[0], out)))
    with EventStorage(0):
        losses = model(make_inputs(empty=empty))
    sum(losses.values()).backward()
    ((samples, kept),) = seen
    assert len(samples.labels) > 2 * 256  # in place of random ones
    positives = samples.foreground.sum()
    assert kept.sum() == 4 * positives and (positives > 0) == (empty == ())
    assert losses["loss_rpn_cls"].isfinite() and (losses["loss_rpn_cls"] > 0) == (empty == ())


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("retinanet", (KEY, "HardNegatives"), "CLS_LOSS Focal weighs samples by their difficulty"),
        (
            "fcos",
            (*MINED, "MODEL.BALANCE.CLS_LOSS", "EFL", "MODEL.BALANCE.CLASS_COUNTS_FILE", "x"),
            "EFL weighs samples|x does not exist",
        ),
        (
            "retinanet",
            (*MINED, "MODEL.BALANCE.CLS_LOSS", "AP"),
            "CLS_LOSS AP has no loss per sample; CLS_LOSS that work: .*SigmoidCE",
        ),
        ("faster", (KEY, "HardNegatives"), "samples anchors and RoI heads have none"),
        ("cascade", (KEY, "HardNegatives"), "PROPOSAL_SAMPLER OHEM mines proposals"),
        (
            "faster",
            (*RPN_MINED, "MODEL.BALANCE.RPN.SAMPLING_FREE", True),
            r"RPN.ANCHOR_SAMPLER HardNegatives .* SAMPLING_FREE True keeps all",
        ),
        (
            "faster",
            (*RPN_MINED, "MODEL.BALANCE.RPN.CLS_LOSS", "Focal"),
            r"BALANCE.RPN.ANCHOR_SAMPLER .* CLS_LOSS Focal weighs",
        ),
        ("retinanet", (*MINED, KEY, "Hard"), "ANCHOR_SAMPLER: 'Hard' is unknown; must be one of"),
        (
            "retinanet",
            (*MINED, "MODEL.BALANCE.HARDNEGATIVES.RATIO", 0.0),
            "BALANCE.HARDNEGATIVES: HardNegatives: ratio is 0.0; must be a number above 0",
        ),
        (
            "retinanet",
            (*MINED, "MODEL.BALANCE.HARDNEGATIVES.MIN_NEGATIVES", -1),
            "min_negatives is -1; must be an integer of at least 0",
        ),
    ],
)
def test_what_cannot_work_is_refused(kind, keys, message):
    with pytest.raises(ValueError, match=message):
        build_model(small_cfg(kind, *keys))


def test_bad_values_are_refused_before_the_model_is_built():
    keys = (*RPN_MINED, "MODEL.BALANCE.RPN.HARDNEGATIVES.RATIO", -1.0)
    with pytest.raises(ValueError, match=r"BALANCE\.RPN\.HARDNEGATIVES: .*ratio is -1.0"):
        check_losses(small_cfg("faster", *keys))
    with pytest.raises(ValueError, match="ANCHOR_SAMPLER is set, but the model would not use it"):
        check_losses_are_used(small_cfg("retinanet", KEY, "HardNegatives", balanced=False))


def test_lazy_models_take_it():
    from detectron2 import model_zoo

    model = model_zoo.get_config("common/models/retinanet.py").model
    balance_model(model, "coco_2017_val", cls_loss="SigmoidCE", anchor_sampler="HardNegatives")
    assert model.anchor_sampler._target_ is HardNegatives
    model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
    assert model._target_ is GeneralizedRCNN
    sampler = L(HardNegatives)(ratio=2.0)
    with pytest.raises(ValueError, match="must be rpn_anchor_sampler"):
        balance_model(model, "coco_2017_val", anchor_sampler=sampler)
    balance_model(model, "coco_2017_val", rpn_anchor_sampler=sampler)
    assert model.proposal_generator.anchor_sampler.ratio == 2.0


def two_steps(ranks):
    """Gradients of two steps; in the second, rank 1 has no positive."""
    grads, normalizer = [], ImagePositives()
    for step in range(2):
        logits, labels = [], []
        for rank in ranks:
            generator = torch.Generator().manual_seed(10 * step + rank)
            logits.append(torch.randn(60, 3, generator=generator, dtype=torch.float64))
            own = torch.randint(0, 12, (60,), generator=generator).clamp(max=3)
            labels.append(own if not (step and rank) else torch.full_like(own, 3))
        logits = torch.cat(logits).requires_grad_()
        image = torch.arange(len(ranks)).repeat_interleave(60)
        samples = samples_of(logits, torch.cat(labels), 3, image_index=image, num_images=len(ranks))
        parts = SigmoidCELoss(), SmoothL1Loss(), [], normalizer
        losses = detection_losses(samples, *parts, anchor_sampler=HardNegatives())
        grads.append(torch.autograd.grad(losses["loss_cls"], logits)[0])
    return grads


def of_rank(rank):
    return two_steps([rank])


def test_two_ranks_give_the_gradient_of_one_process(tmp_path):
    first, second = results_of_two_ranks(of_rank, tmp_path)
    for one, two, joined in zip(first, second, two_steps([0, 1]), strict=True):
        torch.testing.assert_close(torch.cat([one, two]) / 2, joined)  # DDP averages


def test_a_resumed_run_needs_no_state():
    names = build_model(small_cfg("retinanet", *MINED)).state_dict()
    assert not [name for name in names if "anchor_sampler" in name or "normalizer" in name]
