"""What goes wrong overnight: each fault loses nothing but what its message names.

Full disk, corrupt image, killed worker, changed world size, two runs in one directory.
Broken checkpoints and those of another model: test_checkpoint.py; kills of the run: test_kill.py.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import torch.multiprocessing as mp
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase

from d2_balance.data import register_json
from d2_balance.engine import BalancedTrainer, RunStopped, TrainStream, output_lock
from d2_balance.engine.resume.checkpoint import BalancedCheckpointer
from d2_balance.engine.resume.random_state import seed_everything

from ..two_ranks import joined, start_ranks
from .conftest import TEST, TRAIN, run_cfg, write_dataset
from .test_checkpoint import STATE, different
from .test_trainer import trained

pytestmark = pytest.mark.faults


@pytest.fixture
def own_data(tmp_path):
    """As `dataset`, with files of this test alone; the directory of the images."""
    files = write_dataset(tmp_path / "data")
    for name in (TRAIN, TEST):
        register_json(name, *files)
    yield tmp_path / "data" / "images"
    for name in (TRAIN, TEST):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


# --- full disk ---


@contextlib.contextmanager
def small_disk(directory, size):
    """A file system of `size` bytes at `directory`."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(directory)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here; the limit of file sizes stands for it")
    try:
        yield
    finally:
        subprocess.run(["umount", str(directory)], check=True)


@contextlib.contextmanager
def file_limit(size):
    """No file grows beyond `size` bytes; Python ignores the signal, and write raises an error."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_the_checkpoints_before_it(tmp_path, log):
    directory = tmp_path / "disk"
    with small_disk(directory, 1 << 20):
        model = torch.nn.Linear(100, 1000)  # 404 kB: two fit, three do not
        checkpointer = BalancedCheckpointer(model, str(directory))
        for step in (1, 2, 3):
            torch.nn.init.constant_(model.bias, step)
            checkpointer.save(f"model_{step:07d}", iteration=step)
        assert sorted(os.listdir(directory)) == [
            "last_checkpoint",
            "model_0000001.pth",
            "model_0000002.pth",
        ]
        message = next(text for text in log if "could not be written" in text)
        assert "model_0000003.pth could not be written: No space left on device. Free" in message
        assert "model_0000002.pth is whole and --resume continues from it." in message
        assert checkpointer.resume_or_load("")["iteration"] == 2
        assert model.bias[0] == 2
        with pytest.raises(RunStopped, match="model_final.pth could not be written: No space"):
            checkpointer.save("model_final", iteration=3)
        (directory / "model_0000001.pth").unlink()  # what the message asks for
        checkpointer.save("model_final", iteration=3)
        assert (directory / "last_checkpoint").read_text() == "model_final.pth"


def test_a_run_on_a_full_disk_goes_on_and_stops_only_at_its_end(dataset, tmp_path, log):
    cfg = run_cfg(tmp_path / "out", *STATE)
    with file_limit(100_000), pytest.raises(RunStopped, match="There is no checkpoint of this run"):
        trained(cfg)
    failed = [text for text in log if "could not be written" in text]
    assert [re.search(r"model_\w+", text).group() for text in failed] == [
        "model_0000001",
        "model_0000003",
        "model_0000005",
    ]
    assert not list((tmp_path / "out").glob("*.pth*"))


# --- images and workers ---


def corrupt(images, name="5.png"):
    path = images / name
    path.write_bytes(path.read_bytes()[:300])
    return str(path)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_is_skipped_named_and_counted(own_data, tmp_path, log, workers):
    path = corrupt(own_data)
    longer = ["SOLVER.MAX_ITER", "12", "DATALOADER.NUM_WORKERS", str(workers)]
    trainer = trained(run_cfg(tmp_path / "out", *STATE, *longer))
    assert trainer.iter == 12 and list(trainer.data_loader.unreadable) == [path]
    named = [text for text in log if path in text]
    assert len(named) == 1 and "1 so far, DATALOADER.MAX_UNREADABLE_IMAGES is 10" in named[0]


def test_a_run_with_a_corrupt_image_resumes_exactly(own_data, tmp_path):
    path = corrupt(own_data)
    longer = ["SOLVER.MAX_ITER", "12"]
    whole = trained(run_cfg(tmp_path / "whole", *STATE, *longer))
    cfg = run_cfg(tmp_path / "parts", *STATE, *longer)
    trained(cfg, kill_at=11)
    resumed = trained(cfg, resume=True)
    assert different(whole, resumed) == []
    assert list(resumed.data_loader.unreadable) == [path]  # the count goes on


def test_more_corrupt_images_than_the_limit_end_the_run(own_data, tmp_path):
    path = corrupt(own_data)
    limit = ["SOLVER.MAX_ITER", "12", "DATALOADER.MAX_UNREADABLE_IMAGES", "0"]
    with pytest.raises(RunStopped, match="1 training images cannot be read") as error:
        trained(run_cfg(tmp_path / "out", *STATE, *limit))
    assert path in str(error.value) and "DATALOADER.MAX_UNREADABLE_IMAGES is 0" in str(error.value)


def test_a_disk_that_has_gone_ends_the_run(own_data, tmp_path):
    trainer = BalancedTrainer(run_cfg(tmp_path / "out", "DATALOADER.MAX_UNREADABLE_IMAGES", "1000"))
    for image in own_data.iterdir():
        image.unlink()
    with pytest.raises(RunStopped, match="images in a row cannot be read.*Is the disk"):
        trainer.train()


class KillLoader(HookBase):
    """Kills a worker, as the system does when memory runs out."""

    def __init__(self, iterations):
        self.iterations = iterations

    def before_train(self):
        # a run before this one may not have let go of its process yet
        self.others = {child.pid for child in mp.active_children()}

    def before_step(self):
        if self.trainer.iter in self.iterations:
            own = [c.pid for c in mp.active_children() if c.pid not in self.others]
            assert own
            os.kill(own[0], signal.SIGKILL)


def test_a_killed_loading_process_is_started_again(dataset, tmp_path, log):
    overrides = [*STATE, "DATALOADER.NUM_WORKERS", "1", "SOLVER.MAX_ITER", "8"]
    whole = trained(run_cfg(tmp_path / "whole", *overrides))
    trainer = BalancedTrainer(run_cfg(tmp_path / "parts", *overrides))
    trainer.model.load_state_dict(first_weights(run_cfg(tmp_path / "first", *overrides)))
    trainer.test = lambda cfg, model: {}
    trainer.register_hooks([KillLoader((3,))])
    trainer.train()
    assert different(whole, trainer) == []
    assert any("workers start again at batch" in text for text in log)


def first_weights(cfg):
    seed_everything(7)  # as `trained` does
    return BalancedTrainer(cfg).model.state_dict()


class Dies(torch.utils.data.Dataset):
    def __getitem__(self, key):
        os.kill(os.getpid(), signal.SIGKILL)


def test_loading_processes_that_die_again_and_again_end_the_run(monkeypatch, log):
    # PyTorch looks every 5 seconds whether a worker lives
    wait = torch.utils.data.dataloader._MultiProcessingDataLoaderIter._try_get_data
    monkeypatch.setattr(wait, "__defaults__", (0.3,))
    stream = TrainStream(
        [{"width": 1, "height": 1}], dict, [0] * 9, 1, group_by_aspect=False, num_workers=1, seed=0
    )
    stream._images = Dies()
    with pytest.raises(RunStopped, match="lower DATALOADER.NUM_WORKERS. --resume continues"):
        next(iter(stream))
    assert len([text for text in log if "start again at batch 0" in text]) == 3


# --- processes ---


def _rank(rank, directory, files):
    with joined(rank, directory):
        for name in (TRAIN, TEST):
            register_json(name, *files)
        trained(run_cfg(f"{directory}/out", *STATE), kill_at=5)


def test_another_number_of_processes_continues_with_a_warning(
    dataset_files, dataset, tmp_path, log
):
    start_ranks(_rank, (str(tmp_path), dataset_files))
    cfg = run_cfg(tmp_path / "out", *STATE)
    saved = torch.load(tmp_path / "out" / "model_0000003.pth", weights_only=True)["model"]
    trainer = BalancedTrainer(cfg)
    trainer.resume_or_load()
    assert trainer.start_iter == 4
    state = trainer.model.state_dict()
    assert [name for name, value in saved.items() if not torch.equal(state[name], value)] == []
    assert any("saved by 2 processes and goes on with 1" in text for text in log)
    trainer.test = lambda cfg, model: {}
    trainer.train()
    assert trainer.iter == 6


HOLD = """
import sys
from d2_balance.utils.lock import directory_lock
with directory_lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_two_runs_do_not_write_into_one_directory(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdin=-1, stdout=-1, text=True
    )
    try:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ValueError) as error, output_lock(str(tmp_path)):
            pass
        text = str(error.value)
        assert f"OUTPUT_DIR {tmp_path} is being written by another run (process {other.pid}" in text
        assert "set another OUTPUT_DIR" in text
    finally:
        other.kill()  # as kill -9 does: the lock goes with the process
        other.communicate()
    with output_lock(str(tmp_path)):
        assert str(os.getpid()) in (tmp_path / ".lock").read_text()


def test_metrics_of_a_resumed_run_have_every_iteration_once(dataset, tmp_path):
    overrides = [*STATE, "TEST.EVAL_PERIOD", "3", "SOLVER.CHECKPOINT_PERIOD", "4"]
    cfg = run_cfg(tmp_path, *overrides)
    trained(cfg, kill_at=5)
    trained(cfg, resume=True)
    found = [json.loads(x)["iteration"] for x in (tmp_path / "metrics.json").open()]
    assert found == sorted(set(found)) and found[-1] == 5
