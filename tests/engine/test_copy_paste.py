"""Copy-paste in a run: the same data after a resume and with workers, and what is refused."""

import pytest
import torch
from detectron2.config import LazyConfig
from detectron2.data import DatasetCatalog

from d2_balance.data.class_counts import ClassCounts
from d2_balance.data.copy_paste import check_copy_paste
from d2_balance.engine import BalancedTrainer
from d2_balance.engine.resume.data_stream import build_train_stream
from d2_balance.engine.setup import lazy
from d2_balance.utils.config_files import get_config_file

from ..conftest import make_inputs
from .conftest import TRAIN, run_cfg
from .test_data_stream import take

KEY = "DATALOADER.COPY_PASTE."
ON = (KEY + "ENABLED", "True", KEY + "THRESHOLD", "0.5", KEY + "MAX_OBJECTS", "4")
MASKS = ("INPUT.MASK_FORMAT", "bitmask")


def equal(one, other):
    assert one["file_name"] == other["file_name"] and torch.equal(one["image"], other["image"])
    for field, value in one["instances"].get_fields().items():
        value, again = (getattr(v, "tensor", v) for v in (value, other["instances"].get(field)))
        assert torch.equal(value, again), field
    for key in ("neg_category_ids", "not_exhaustive_category_ids"):
        assert one[key] == other[key]


@pytest.mark.parametrize("kind", ["retinanet", "mask"])
def test_batches_are_the_same_after_a_resume_and_with_workers(dataset, tmp_path, kind):
    batches = take(build_train_stream(run_cfg(tmp_path, *ON, *MASKS, kind=kind)), 8)
    plain = take(build_train_stream(run_cfg(tmp_path, *MASKS, kind=kind)), 8)
    more = sum(
        len(a["instances"]) > len(b["instances"])
        for one, other in zip(batches, plain, strict=True)
        for a, b in zip(one, other, strict=True)
    )
    assert more > 3  # the images themselves are the same
    for workers in ("0", "2"):
        cfg = run_cfg(tmp_path, *ON, *MASKS, "DATALOADER.NUM_WORKERS", workers, kind=kind)
        for one, other in zip(batches[3:], take(build_train_stream(cfg), 5, 3), strict=True):
            for a, b in zip(one, other, strict=True):
                equal(a, b)


def test_another_rank_pastes_other_objects(dataset, tmp_path):
    streams = [build_train_stream(run_cfg(tmp_path, *ON)) for _ in range(2)]
    streams[1]._images._rank = 1
    runs = [[record for batch in take(stream, 6) for record in batch] for stream in streams]
    assert [r["file_name"] for r in runs[0]] == [r["file_name"] for r in runs[1]]
    assert [len(r["instances"]) for r in runs[0]] != [len(r["instances"]) for r in runs[1]]


@pytest.mark.parametrize("kind", ["retinanet", "mask", "fcos"])
def test_a_run_trains_with_it(dataset, tmp_path, kind):
    trainer = BalancedTrainer(run_cfg(tmp_path, *ON, *MASKS, "SOLVER.MAX_ITER", "2", kind=kind))
    trainer.train()
    assert trainer.iter == 2


def test_counts_of_classes_stay_those_of_the_files(dataset, tmp_path):
    plain = ClassCounts.from_config(run_cfg(tmp_path))
    cfg = run_cfg(tmp_path, *ON)
    take(build_train_stream(cfg), 2)
    assert torch.equal(ClassCounts.from_config(cfg).image_count, plain.image_count)


@pytest.mark.parametrize(
    ("keys", "kind", "message"),
    [
        ((KEY + "THRESHOLD", "0.0"), "retinanet", "THRESHOLD is 0.0; must be a fraction"),
        ((KEY + "MAX_OBJECTS", "0"), "retinanet", "MAX_OBJECTS is 0; must be an integer"),
        ((KEY + "SCALE", "[2.0, 1.0]"), "retinanet", r"SCALE is \[2.0, 1.0\]; must be two"),
        ((KEY + "MAX_SHIFT", "-1.0"), "retinanet", "MAX_SHIFT is -1.0; must be a number"),
        ((KEY + "MIN_PIXELS", "-1"), "retinanet", "MIN_PIXELS is -1; must be an integer"),
        ((KEY + "CACHE_MB", "-1.0"), "retinanet", "CACHE_MB is -1.0; must be a number"),
        (("INPUT.FORMAT", "L"), "retinanet", "works with INPUT.FORMAT BGR or RGB, not 'L'"),
        (("MODEL.KEYPOINT_ON", "True"), "retinanet", "MODEL.KEYPOINT_ON is True"),
        (("MODEL.LOAD_PROPOSALS", "True"), "faster", "MODEL.LOAD_PROPOSALS is True"),
        ((), "mask", "MASK_FORMAT 'polygon' cannot hold; must be 'bitmask'"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, keys, kind, message):
    with pytest.raises(ValueError, match=f"DATALOADER.COPY_PASTE.*{message}"):
        check_copy_paste(run_cfg(tmp_path, *ON, *keys, kind=kind))


def test_datasets_that_are_no_lists_are_refused(tmp_path):
    class Images(torch.utils.data.Dataset):
        def __len__(self):
            return 2

        def __getitem__(self, index):
            return make_inputs()[index]

    DatasetCatalog.register(TRAIN, Images)
    try:
        with pytest.raises(ValueError, match="ENABLED True needs datasets that are lists"):
            build_train_stream(run_cfg(tmp_path, *ON))
    finally:
        DatasetCatalog.remove(TRAIN)


def test_lazy_configs_paste_too(dataset, tmp_path):
    config = LazyConfig.load(get_config_file("lazy/retinanet_R_18_focal_mini_lvis.py"))
    node = config.dataloader.train
    node.dataset.names = TRAIN
    stream = lazy._train_stream(node, run_cfg(tmp_path, *ON))
    plain = lazy._train_stream(node, run_cfg(tmp_path))
    counts = [[len(r["instances"]) for b in take(s, 6) for r in b] for s in (stream, plain)]
    assert sum(counts[0]) > sum(counts[1])
    node.mapper.use_instance_mask = True
    with pytest.raises(ValueError, match="instance_mask_format of the mapper is 'polygon'"):
        lazy._train_stream(node, run_cfg(tmp_path, *ON))
