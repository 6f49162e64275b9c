"""Batches are a function of the seed and of the iteration."""

import random

import numpy as np
import pytest
import torch
from detectron2.data.samplers import TrainingSampler

from d2_balance.data.samplers import repeat_factors
from d2_balance.data.training_set import training_records
from d2_balance.engine import BalancedTrainer, read_config
from d2_balance.engine.resume import data_stream as train_stream
from d2_balance.engine.resume.data_stream import TrainStream, build_train_stream
from d2_balance.engine.resume.random_state import seed_everything, seeded
from d2_balance.utils.config_files import get_config_file

from ..conftest import CLASSES
from .conftest import TRAIN, run_cfg

SIZES = [(64, 48), (48, 64), (50, 50), (80, 20), (20, 80), (30, 40), (40, 30)]


def draw(record):
    """Stands for a mapper with augmentation: draws from all three generators."""
    return record | {"drawn": (random.random(), np.random.rand(), torch.rand(()).item())}


def stream(workers=0, seed=3, group=True):
    dicts = [{"index": i, "width": w, "height": h} for i, (w, h) in enumerate(SIZES)]
    sampler = TrainingSampler(len(dicts), seed=seed)
    return TrainStream(
        dicts, draw, sampler, 2, group_by_aspect=group, num_workers=workers, seed=seed
    )


def take(source, count, start=0):
    source.start = start
    batches = iter(source)
    return [next(batches) for _ in range(count)]


def test_entering_in_the_middle_gives_the_same_batches():
    assert take(stream(), 4, start=9) == take(stream(), 13)[9:]


def test_the_number_of_workers_does_not_change_the_data():
    assert take(stream(workers=2), 6, start=3) == take(stream(), 9)[3:]


def test_another_seed_gives_other_images_and_draws():
    assert take(stream(seed=3), 5) != take(stream(seed=4), 5)


def test_a_image_is_augmented_anew_each_time():
    drawn = [record["drawn"] for batch in take(stream(), 20) for record in batch]
    assert len(set(drawn)) == len(drawn)


def test_batches_hold_one_aspect_and_no_image_is_lost():
    batches = take(stream(), 60)
    for batch in batches:
        assert len({record["width"] > record["height"] for record in batch}) == 1
    counts = np.bincount([r["index"] for b in batches for r in b], minlength=len(SIZES))
    assert counts.max() - counts.min() <= 2  # 120 images of 7; two batches may be waiting


def test_without_grouping_the_order_is_the_samplers():
    indices = [r["index"] for b in take(stream(group=False), 7) for r in b]
    sampler = iter(TrainingSampler(len(SIZES), seed=3))
    assert indices == [next(sampler) for _ in range(14)]


def test_loading_leaves_the_global_generators_alone():
    seed_everything(5)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    seed_everything(5)
    take(stream(), 3)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_seeded_restores_after_an_error():
    seed_everything(1)
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError), seeded(2):
        torch.rand(3)
        raise RuntimeError
    assert torch.equal(torch.random.get_rng_state(), state)


def names(batch):
    return [record["file_name"] for record in batch]


@pytest.mark.parametrize(
    "sampler", ["TrainingSampler", "RepeatFactorTrainingSampler", "ClassAwareTrainingSampler"]
)
def test_a_config_gives_the_same_stream_whatever_was_drawn_before(dataset, tmp_path, sampler):
    threshold = ["DATALOADER.REPEAT_THRESHOLD", "2.0"]  # repeats every image, some more often
    cfg = run_cfg(tmp_path, "DATALOADER.SAMPLER_TRAIN", sampler, *threshold)
    seed_everything(1)
    first = take(build_train_stream(cfg), 4)
    seed_everything(2)
    second = take(build_train_stream(cfg), 2, start=2)
    assert [names(b) for b in first[2:]] == [names(b) for b in second]
    for one, other in zip(first[2:], second, strict=True):
        assert all(torch.equal(a["image"], b["image"]) for a, b in zip(one, other, strict=True))


def test_the_order_of_images_is_the_same_whether_samplers_draw_or_take_a_seed(
    dataset, tmp_path, monkeypatch
):
    """Detectron2's head gives its samplers cfg.SEED, earlier versions let them draw."""
    cfg, seeds = run_cfg(tmp_path, "SEED", "5"), []
    parts = train_stream._loader_parts

    def later_version(given):
        seeds.append(given.SEED)
        found = parts(given)
        return found | {"sampler": TrainingSampler(len(found["dataset"]), seed=given.SEED)}

    names = [r["file_name"] for b in take(build_train_stream(cfg), 6) for r in b]
    monkeypatch.setattr(train_stream, "_loader_parts", later_version)
    assert names == [r["file_name"] for b in take(build_train_stream(cfg), 6) for r in b]
    build_train_stream(run_cfg(tmp_path, "SEED", "-1"))
    assert seeds[1] >= 0 and seeds[1] != seeds[0]


@pytest.mark.parametrize("form", ["irfs", "eirfs"])
def test_quick_schedules_of_repeat_forms_train_a_step(dataset, form, tmp_path):
    cfg = read_config(get_config_file(f"quick_schedules/faster_rcnn_R_18_{form}_mini_lvis.yaml"))
    cfg.OUTPUT_DIR, cfg.MODEL.DEVICE, cfg.LOG.IMAGES = str(tmp_path), "cpu", 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 1, ()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = (TRAIN,), ()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = CLASSES
    factors = repeat_factors(
        training_records(cfg), cfg.DATALOADER.REPEAT_THRESHOLD, form, cfg.DATALOADER.REPEAT_ALPHA
    )
    assert factors.max() > 1
    trainer = BalancedTrainer(cfg)
    trainer.train()
    assert trainer.iter == 1
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())


def test_a_batch_size_of_zero_is_refused(dataset, tmp_path):
    with pytest.raises(ValueError, match="SOLVER.IMS_PER_BATCH is 0; must be a multiple"):
        build_train_stream(run_cfg(tmp_path, "SOLVER.IMS_PER_BATCH", "0"))
