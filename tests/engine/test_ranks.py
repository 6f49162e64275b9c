"""k ranks train as one process on the joined batch does: 20 iterations on mini_lvis.

For the claim to have a meaning, nothing may depend on how images are shared out, save what is
all-reduced. So layer norm stands for batch norm, no anchor or proposal is sampled, nothing is
flipped, and all images have one size (a batch is padded to its largest image, and padding has
anchors). The feed deals the images of one fixed batch to the ranks. Numbers are float64: in float32
another order of summation moves scores by 1e-7, and that is enough to swap two proposals.
"""

from contextlib import nullcontext

import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.modeling.proposal_generator import proposal_utils
from detectron2.utils import comm

from d2_balance.data import register_json
from d2_balance.data.mini_lvis import dataset as mini_lvis
from d2_balance.engine import BalancedTrainer
from d2_balance.engine.resume.random_state import seed_everything

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg

BATCH, STEPS = 4, 20
EMPTY = range(8, 13)  # iterations in which the second half of the ranks has empty images only
WHOLE = ["MODEL.BALANCE.SAMPLING_FREE", "True", "MODEL.PROPOSAL_GENERATOR.NAME", "BalancedRPN"]
WHOLE += ["MODEL.BALANCE.RPN.SAMPLING_FREE", "True"]
LOSSES = {
    "Focal": "retinanet",
    "GHMC": "retinanet",
    "DR": "retinanet",
    "EQL": "retinanet",
    "EQLv2": "faster",
    "Seesaw": "faster",
}


class Trainer(BalancedTrainer):
    """In float64, without evaluation."""

    @classmethod
    def build_model(cls, cfg):
        return super().build_model(cfg).double()

    @classmethod
    def test(cls, cfg, model, evaluators=None):
        return {}


def nms_of_floats(boxes, scores, *more, nms=proposal_utils.batched_nms):
    """The RPN's boxes are float32 in any case, and NMS wants one type of boxes and scores."""
    return nms(boxes, scores.float(), *more)


def feed(root):
    """STEPS batches of BATCH images, the same in every process."""
    mapper = DatasetMapper(
        is_train=True,
        augmentations=[T.Resize((64, 64))],
        image_format="BGR",
        use_instance_mask=False,
    )
    images = [mapper(record) for record in mini_lvis.load_mini_lvis(root, "mini_lvis_train")]
    order = torch.Generator().manual_seed(5)
    for step in range(STEPS):
        chosen = torch.randint(len(images), (BATCH,), generator=order).tolist()
        batch = [dict(images[index]) for index in chosen]
        for record in batch[BATCH // 2 :] if step in EMPTY else ():
            record["instances"] = record["instances"][:0]
        yield batch


def train(root, directory, name):
    """State of the model after training on this rank's fraction of the feed."""
    kind = LOSSES[name]
    overrides = ["MODEL.BALANCE.CLS_LOSS", name, "MODEL.RESNETS.NORM", "LN"]
    overrides += ["MODEL.RETINANET.NUM_CLASSES", "30", "MODEL.ROI_HEADS.NUM_CLASSES", "30"]
    overrides += ["SOLVER.IMS_PER_BATCH", str(BATCH), "SOLVER.MAX_ITER", str(STEPS)]
    overrides += ["SOLVER.BASE_LR", "0.001"]
    overrides += WHOLE if kind == "faster" else []
    seed_everything(7)
    trainer = Trainer(run_cfg(f"{directory}/{name}", *overrides, kind=kind))
    ranks, rank = comm.get_world_size(), comm.get_rank()
    share = BATCH // ranks
    trainer.data_loader = [batch[rank * share :][:share] for batch in feed(root)]
    trainer.train()
    model = getattr(trainer.model, "module", trainer.model)
    return {"state": model.state_dict(), "buffers": dict(model.named_buffers())}


def train_all(rank, ranks, root, directory):
    torch.set_num_threads(1)
    proposal_utils.batched_nms = nms_of_floats
    for name in (TRAIN, TEST):
        register_json(name, f"{root}/v1/mini_lvis_train.json", f"{root}/v1")
    with joined(rank, directory, ranks) if ranks > 1 else nullcontext():
        results = {name: train(root, f"{directory}/{ranks}", name) for name in LOSSES}
        torch.save(results, f"{directory}/{ranks}_{rank}.pth")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """States by number of ranks and rank."""
    directory = tmp_path_factory.mktemp("ranks")
    root = str(directory / "mini_lvis")
    mini_lvis._build(root, {"train": 16, "val": 4})
    for ranks in (1, 2, 4):
        start_ranks(train_all, (ranks, root, str(directory)), ranks=ranks)
    return {(k, r): torch.load(directory / f"{k}_{r}.pth") for k in (1, 2, 4) for r in range(k)}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_ranks_end_with_the_weights_of_one_process_on_the_joined_batch(results, name, ranks):
    expected, found = results[1, 0][name]["state"], results[ranks, 0][name]["state"]
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-5, msg=key)
    if LOSSES[name] == "retinanet":  # another loss leads elsewhere
        other = results[1, 0]["GHMC" if name == "Focal" else "Focal"]["state"]
        key = "head.cls_score.weight"
        assert not torch.allclose(other[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_all_buffers_are_identical_over_ranks(results, name, ranks):
    first = results[ranks, 0][name]["buffers"]
    assert any("loss" in key or "normalizer" in key for key in first)
    for rank in range(1, ranks):
        for key, value in results[ranks, rank][name]["buffers"].items():
            assert torch.equal(value, first[key]), key
