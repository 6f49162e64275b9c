"""Max-size loss: the authors' figures, a slow loop, and images without proposals or labels."""

from pathlib import Path

import numpy as np
import pytest
import torch

from d2_balance.losses import max_size_loss
from d2_balance.losses.max_size import largest_proposals

REFERENCE = Path(__file__).parent.parent / "reference" / "detic_max_size.npz"


def images_of(counts):
    return torch.repeat_interleave(torch.arange(len(counts)), torch.as_tensor(counts))


@pytest.mark.parametrize("form", ["sigmoid", "softmax"])
def test_value_and_gradient_equal_the_authors(form):
    f = np.load(REFERENCE)
    counts = torch.tensor(f["proposals_per_image"])
    labels = torch.zeros(len(counts), int(f["num_classes"]), dtype=torch.bool)
    labels[f["label_image"], f["label_class"]] = True
    logits = torch.tensor(f[f"{form}_logits"]).requires_grad_()
    boxes = torch.tensor(f[f"{form}_boxes"])
    loss = max_size_loss(logits, boxes, images_of(counts), labels, softmax=form == "softmax")
    loss = float(f["loss_weight"]) * loss.mean()
    loss.backward()
    assert abs(loss.item() - f[f"{form}_loss"]) <= 1e-9
    assert np.abs(logits.grad.numpy() - f[f"{form}_grad"]).max() <= 1e-9


def slow(logits, boxes, counts, labels, softmax, skip_last):
    losses, start = [], 0
    for count, own in zip(counts, labels, strict=True):
        classes = own.nonzero().flatten().tolist()
        z, corners = logits[start : start + count], boxes[start : start + count]
        start += count
        if not count or not classes:
            losses.append(logits.new_zeros(()))
            continue
        areas = [(x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in corners.tolist()]
        if skip_last and count > 1:
            areas = areas[:-1]
        row = z[areas.index(max(areas))]
        total = 0
        for c in classes:
            if softmax:
                total = total - row.log_softmax(0)[c]
            else:
                for j, score in enumerate(row.sigmoid()):
                    total = total - (score if j == c else 1 - score).log()
        losses.append(total / len(classes))
    return torch.stack(losses)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("skip_last", [False, True])
def test_value_and_gradient_equal_the_formula(softmax, skip_last):
    generator = torch.Generator().manual_seed(int(softmax) + 2 * int(skip_last))
    for columns in (5, 6):
        counts = torch.randint(0, 5, (12,), generator=generator)
        total = int(counts.sum())
        # corners on a coarse grid: areas tie often
        low = torch.randint(0, 3, (total, 2), generator=generator)
        size = torch.randint(1, 3, (total, 2), generator=generator)
        boxes = torch.cat([low, low + size], dim=1).double()
        logits = torch.randn(total, columns, generator=generator, dtype=torch.float64)
        logits.requires_grad_()
        labels = torch.rand(12, 5, generator=generator) < 0.3
        loss = max_size_loss(
            logits, boxes, images_of(counts), labels, softmax=softmax, skip_last=skip_last
        )
        expected = slow(logits, boxes, counts.tolist(), labels, softmax, skip_last)
        assert (loss - expected).abs().max() <= 1e-12
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        (wanted,) = torch.autograd.grad(expected.sum(), logits)
        assert (grad - wanted).abs().max() <= 1e-12


def test_the_last_proposal_counts_only_if_it_is_the_only_one_or_asked_for():
    boxes = torch.tensor([[0, 0, 2, 2], [0, 0, 3, 3], [0, 0, 9, 9], [0, 0, 1, 1]]).float()
    index = torch.tensor([0, 0, 0, 1])
    assert largest_proposals(boxes, index, 3).tolist() == [1, 3, 4]
    assert largest_proposals(boxes, index, 3, skip_last=False).tolist() == [2, 3, 4]


def test_the_first_of_equal_areas_is_chosen_also_if_all_are_empty():
    boxes = torch.zeros(4, 4)
    assert largest_proposals(boxes, torch.tensor([0, 0, 0, 0]), 1).tolist() == [0]


def test_images_without_proposals_or_labels_keep_a_graph_with_a_zero_gradient():
    logits = torch.randn(0, 4, requires_grad=True)
    labels = torch.ones(2, 3, dtype=torch.bool)
    loss = max_size_loss(logits, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), labels)
    assert loss.tolist() == [0, 0]
    loss.sum().backward()
    assert logits.grad.shape == (0, 4)
    logits = torch.full((2, 4), 1e4, requires_grad=True)
    boxes = torch.tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    loss = max_size_loss(logits, boxes, torch.tensor([0, 0]), nothing)
    loss.sum().backward()
    assert loss.tolist() == [0]
    assert not logits.grad.any()


def test_more_classes_than_columns_are_refused():
    boxes, labels = torch.zeros(1, 4), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="image_labels has 3 classes; must be at most the 2"):
        max_size_loss(torch.zeros(1, 2), boxes, torch.tensor([0]), labels)


def test_areas_of_boxes_in_half_precision_do_not_overflow():
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 500, 500]], dtype=torch.float16)
    assert largest_proposals(boxes, torch.tensor([0, 0]), 1, skip_last=False).tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised(dtype):
    logits = torch.tensor([[20.0, -3.0, 1.0]], dtype=dtype)
    boxes, index = torch.tensor([[0.0, 0, 4, 4]]), torch.tensor([0])
    labels = torch.tensor([[False, True]])
    loss = max_size_loss(logits, boxes, index, labels)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, max_size_loss(logits.float(), boxes, index, labels))
