"""Two gloo ranks keep the state and the gradients of one process on the joined batch."""

import pytest
import torch

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, Samples
from d2_balance.modeling.criterion import PositiveEMA, SampleNormalizer, detection_losses
from d2_balance.modeling.proposal_generator.rpn import ImageNormalizer

from ..losses.test_contract import Deltas, build
from ..two_ranks import results_of_two_ranks

K, SAMPLES, STEPS, LEVELS = 5, 40, 4, 3
PER_LEVEL = "/levels"  # behind the name of a loss: with per_level switched on
PAIRS = sorted(
    {
        (cls, "SmoothL1", norm)
        for cls, _ in CLS_LOSSES
        for norm in ("PositiveEMA", "SampleNormalizer")
    }
    | {("Focal", box, "PositiveEMA") for box, _ in BOX_LOSSES}
    | {("SigmoidCE", "SmoothL1", "ImageNormalizer")}
    | {("GHMC" + PER_LEVEL, "GHMR" + PER_LEVEL, "PositiveEMA")}
)
NORMALIZERS = {
    "PositiveEMA": PositiveEMA,
    "SampleNormalizer": SampleNormalizer,
    "ImageNormalizer": lambda: ImageNormalizer(samples_per_image=256),
}


def batch_of(step, rank, columns):
    """Logits, labels, boxes and levels of one rank's image.

    In step 2 rank 1 has no positives, in step 3 it has no samples at all.
    """
    generator = torch.Generator().manual_seed(10 * step + rank)
    logits = torch.randn(SAMPLES, columns, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(0, K + 4, (SAMPLES,), generator=generator).clamp(max=K)
    if step == 2 and rank == 1:
        labels.fill_(K)
    deltas = torch.randn(SAMPLES, 4, generator=generator, dtype=torch.float64) * 0.2
    boxes = torch.rand(SAMPLES, 4, generator=generator, dtype=torch.float64) * 30
    boxes[:, 2:] += boxes[:, :2] + 5
    level = torch.arange(SAMPLES) % LEVELS
    image = torch.full((SAMPLES,), rank)
    own = slice(0, 0) if step == 3 and rank == 1 else slice(None)
    return [x[own] for x in (logits, labels, deltas, boxes, level, image)]


def samples_of(step, ranks, columns):
    batches = [batch_of(step, rank, columns) for rank in ranks]
    logits, labels, deltas, boxes, level, image = (torch.cat(x) for x in zip(*batches, strict=True))
    pos = labels < K
    logits, deltas = logits.requires_grad_(), deltas.requires_grad_()
    samples = Samples(
        logits=logits,
        labels=labels,
        num_classes=K,
        image_index=image - ranks[0],
        num_images=len(ranks),
        level=level,
        num_levels=LEVELS,
        pred_deltas=deltas[pos],
        boxes=boxes[pos],
        gt_boxes=boxes[pos] + 1,
        gt_index=torch.arange(int(pos.sum())),
        box_transform=Deltas(),
    )
    return samples, logits, deltas


def make(registry, name):
    loss = build(registry, name.removesuffix(PER_LEVEL), K).double()
    if name.endswith(PER_LEVEL):
        loss.per_level = True
    return loss


def train(pair, ranks):
    """Gradients of every step, and the state at the end."""
    cls_name, box_name, norm = pair
    torch.manual_seed(0)
    cls, box = make(CLS_LOSSES, cls_name), make(BOX_LOSSES, box_name)
    normalizer = NORMALIZERS[norm]()
    grads = []
    for step in range(STEPS):
        samples, logits, deltas = samples_of(step, ranks, cls.num_outputs(K))
        losses = detection_losses(samples, cls, box, [], normalizer)
        grads.append(torch.autograd.grad(sum(losses.values()), (logits, deltas)))
    state = {
        f"{part}.{name}": value
        for part, module in (("cls", cls), ("box", box), ("normalizer", normalizer))
        for name, value in module.state_dict().items()
    }
    return grads, state


def of_rank(rank):
    return [train(pair, [rank]) for pair in PAIRS]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    return results_of_two_ranks(of_rank, tmp_path_factory.mktemp("ranks"))


def equal(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("index", range(len(PAIRS)), ids=["-".join(pair) for pair in PAIRS])
def test_state_and_gradients_equal_one_process_on_the_joined_batch(index, two_ranks):
    (first, first_state), (second, second_state) = two_ranks[0][index], two_ranks[1][index]
    for name, value in first_state.items():
        assert torch.equal(value, second_state[name]), name
    if not CLS_LOSSES.get(PAIRS[index][0].removesuffix(PER_LEVEL)).all_reduced:
        return  # it ranks or chooses its own samples; the buffers are equal, and that is all
    joined, state = train(PAIRS[index], [0, 1])
    for name, value in state.items():
        equal(first_state[name], value)
    for ours, (logits, deltas) in zip(zip(first, second, strict=True), joined, strict=True):
        # DDP averages: half of each rank's gradient reaches the weights
        equal(torch.cat([ours[0][0], ours[1][0]]) / 2, logits)
        equal(torch.cat([ours[0][1], ours[1][1]]) / 2, deltas)
