"""kill -9 at five random iterations, then --resume: the end is bit-equal to an uninterrupted run.

Compared are model_final.pth (weights, buffers, optimizer, scheduler, hooks) and metrics.json,
without what measures time: `time`, `data_time`, `rank_data_time`, `eta_seconds`. Processes are
forked from a server that has loaded the package, so that each start is quick.
"""

import json
import multiprocessing
import os
import random
import signal

import pytest
import torch

from d2_balance.engine.resume.run_state import CLOCK

from ..conftest import RETINANET
from ..two_ranks import PRELOADED
from .conftest import write_dataset

LENGTH, PERIOD = 24, 3
CONFIG = """
  DEVICE: cpu
  WEIGHTS: ""
  BALANCE: {{CLS_LOSS: GHMC, BOX_LOSS: SmoothL1, BETA_DECAY: {{ENABLED: True, PERIOD: 9}}}}
DATASETS:
  TRAIN: [kill_train]
  TEST: [kill_test]
  REGISTER: [[kill_train, {json}, {images}], [kill_test, {json}, {images}]]
DATALOADER: {{NUM_WORKERS: 1}}
INPUT: {{MIN_SIZE_TRAIN: [48, 64], MIN_SIZE_TEST: 48}}
SOLVER:
  {{IMS_PER_BATCH: 2, MAX_ITER: {length}, STEPS: [15], WARMUP_ITERS: 2,
    CHECKPOINT_PERIOD: {period}}}
TEST: {{EVAL_PERIOD: 10}}
SEED: 7
VERSION: 2
"""
PLACES = ("before the step", "before the optimizer", "after the step", "half of a checkpoint")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def plant(iteration, place):  # noqa: C901  one case per place
    """Makes the process kill itself, as late in the iteration as `place` says."""
    from detectron2.engine import HookBase

    from d2_balance.engine import BalancedTrainer
    from d2_balance.engine.resume import checkpoint

    class Kill(HookBase):
        def before_step(self):
            if place == PLACES[0] and self.trainer.iter == iteration:
                die()

        def after_backward(self):
            if place == PLACES[1] and self.trainer.iter == iteration:
                die()

        def after_step(self):
            if place == PLACES[2] and self.trainer.iter == iteration:
                die()

    class Files:
        """Stands for torch in the module that saves checkpoints."""

        def __getattr__(self, name):
            return getattr(torch, name)

        def save(self, content, file):
            torch.save(content, file)
            if content["iteration"] >= iteration:
                file.truncate(file.tell() // 2)
                file.flush()
                die()

    if place == PLACES[3]:
        checkpoint.torch = Files()
        return
    build, make = BalancedTrainer.build_hooks, BalancedTrainer.__init__

    def started(self, cfg):
        make(self, cfg)
        self._trainer.register_hooks([Kill()])

    BalancedTrainer.__init__ = started
    # the hooks of the inner trainer do not see the other calls
    BalancedTrainer.build_hooks = lambda self: [*build(self), Kill()]


def process(rank, ranks, meeting, arguments, kill, plant_in=None):
    torch.set_num_threads(1)
    # workers as a run of its own has them; this process was started in another way
    multiprocessing.set_start_method("fork", force=True)
    import torch.distributed as dist
    from detectron2.utils import comm

    from d2_balance.engine.setup.launch import leave_groups
    from d2_balance.engine.train import train

    from ..test_train_net import parsed

    if ranks > 1:
        dist.init_process_group("gloo", init_method=meeting, world_size=ranks, rank=rank)
        comm.create_local_process_group(ranks)
    if kill is not None:
        (plant_in or plant)(*kill)
    train(parsed(arguments))
    comm.synchronize()
    leave_groups()


def run(ranks, directory, config, *more, kill=None, plant_in=None, everywhere=False):
    """Exit codes of the ranks; where one is killed, so are the others.

    `plant_in` plants something else, after which all ranks end by themselves; `everywhere` does
    so in all of them.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(PRELOADED)
    arguments = ["--config-file", str(config), *more, "OUTPUT_DIR", str(directory)]
    meeting = f"file://{directory}.meeting{random.random()}"
    started = []
    for rank in range(ranks):
        # with several ranks the last one is killed, or the first one while it saves
        hit = everywhere or (kill and kill[1] == PLACES[3]) or rank == ranks - 1
        mine = kill if hit else None
        started.append(
            server.Process(target=process, args=(rank, ranks, meeting, arguments, mine, plant_in))
        )
        started[-1].start()
    watched = started[0] if kill and kill[1] == PLACES[3] else started[-1]
    watched.join(timeout=300)
    if kill and plant_in is None:
        for each in started:
            each.kill()
    for each in started:
        each.join(timeout=60)
    return [each.exitcode for each in started]


def lines(directory):
    records = [json.loads(line) for line in (directory / "metrics.json").read_text().splitlines()]
    return [{key: x for key, x in record.items() if key not in CLOCK} for record in records]


def differences(one, other, path=""):
    """Paths in two nested states at which they are not bit-equal."""
    if isinstance(one, dict):
        if one.keys() != other.keys():
            return [path]
        return [d for key in one for d in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return [path]
        pairs = enumerate(zip(one, other, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{path}/{i}")]
    if isinstance(one, torch.Tensor):
        equal = torch.equal(one, other)
    else:
        equal = one == other or (one != one and other != other)  # AP of no object is NaN
    return [] if equal else [path]


def final(directory):
    state = torch.load(directory / "model_final.pth", weights_only=True)
    state.pop("config")  # names OUTPUT_DIR
    state["trainer"]["hooks"]["RunState"].pop("logs")  # bytes of the log, digits of times included
    return state


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    directory = tmp_path_factory.mktemp("kill")
    files = dict(zip(("json", "images"), write_dataset(directory / "data"), strict=True))
    model = RETINANET.replace("{NUM_CONVS: 1}", "{NUM_CONVS: 1, NUM_CLASSES: 6}")
    model = model.replace("META_ARCHITECTURE: RetinaNet", "META_ARCHITECTURE: BalancedRetinaNet")
    text = CONFIG.format(**files, length=LENGTH, period=PERIOD)
    (directory / "small.yaml").write_text(model.rstrip() + text)
    return directory / "small.yaml"


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.parametrize("ranks", [1, 2])
def test_five_kills_leave_no_trace(config, tmp_path, ranks):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(ranks, whole, config) == [0] * ranks
    drawn = random.Random(ranks)
    iterations = sorted(drawn.sample(range(1, LENGTH - 3), 5))
    places = [*PLACES, PLACES[0]]
    drawn.shuffle(places)
    for count, kill in enumerate(zip(iterations, places, strict=True)):
        codes = run(ranks, parts, config, *["--resume"] * bool(count), kill=kill)
        assert -signal.SIGKILL in codes and not (parts / "model_final.pth").exists(), kill
    assert run(ranks, parts, config, "--resume") == [0] * ranks

    expected, found = final(whole), final(parts)
    assert expected["model"]["cls_loss.density.acc"].sum() > 0
    last_step = expected["trainer"]["iteration"]
    assert last_step == LENGTH - 1
    assert differences(expected, found) == []
    assert [x["iteration"] for x in lines(whole)] == [19, 23, 24]
    assert lines(parts) == lines(whole)
    assert not list(parts.glob("*.tmp"))
