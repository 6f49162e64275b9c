"""SIGINT and SIGTERM save the iteration reached; the resumed run ends bit-equal to a whole one.

The iterations are other ones in every run of the tests. A failure names the seed that they come
from; `SEED_VARIABLE=<seed> pytest ...` chooses them again.
"""

import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest

from .test_kill import LENGTH, config, differences, final, lines, run  # noqa: F401  the fixture

PLACES = ("before the step", "before the optimizer", "in an evaluation", "at any moment")
EVALUATED = 9  # iteration after which the first evaluation comes; then every 10
SEED_VARIABLE = "D2_BALANCE_TEST_SEED"


def plant(iteration, place, number):
    """Makes the process signal itself in an iteration, at a place of `PLACES`."""
    from detectron2.engine import HookBase

    from d2_balance.engine import BalancedTrainer

    def send():
        os.kill(os.getpid(), number)

    later = threading.Timer(random.uniform(0, 0.05), send)
    senders = {PLACES[0]: send, PLACES[3]: later.start}

    class Signal(HookBase):
        def before_step(self):
            if place in senders and self.trainer.iter == iteration:
                senders[place]()

        def after_backward(self):
            if place == PLACES[1] and self.trainer.iter == iteration:
                send()

    build, make, test = BalancedTrainer.build_hooks, BalancedTrainer.__init__, BalancedTrainer.test

    def started(self, cfg):
        make(self, cfg)
        self._trainer.register_hooks([Signal()])

    def tested(cfg, model, *others):
        if place == PLACES[2]:
            send()
            time.sleep(20)  # the signal leaves this at once
        return test(cfg, model, *others)

    BalancedTrainer.__init__ = started
    BalancedTrainer.build_hooks = lambda self: [*build(self), Signal()]
    BalancedTrainer.test = staticmethod(tested)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_leave_no_trace(config, tmp_path, ranks):  # noqa: F811
    seed = int(os.environ.get(SEED_VARIABLE, 0)) or random.SystemRandom().randrange(1, 10**6)
    chosen = random.Random(seed)
    # not those whose signal would reach the evaluation, or the end, by way of the other rank
    free = [i for i in range(1, LENGTH - 4) if i % 10 not in (7, 8, 9)]
    iterations = sorted(chosen.sample(free, 3))
    places = [PLACES[0], PLACES[1], PLACES[3]]
    chosen.shuffle(places)
    signals = [chosen.choice((signal.SIGINT, signal.SIGTERM)) for _ in places]
    stops = [*zip(iterations, places, signals, strict=True)]
    stops.append((EVALUATED, PLACES[2], chosen.choice((signal.SIGINT, signal.SIGTERM))))

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(ranks, whole, config) == [0] * ranks
    reached = -1
    for iteration, place, number in sorted(stops):
        stop = f"{number.name} {place} of iteration {iteration}; {SEED_VARIABLE}={seed}"
        if iteration <= reached:
            continue  # "at any moment" may come as late as the next stop
        codes = run(
            ranks, parts, config, *["--resume"] * (reached >= 0), kill=(iteration, place, number),
            plant_in=plant, everywhere=place == PLACES[2],
        )  # fmt: skip
        assert codes[-1] == 128 + number, f"{codes}: {stop}"
        named = (parts / "last_checkpoint").read_text()
        reached = int(named.removeprefix("model_").removesuffix(".pth"))
        # other ranks learn of it with the next backward pass
        late = ranks > 1 and place == PLACES[1]
        allowed = range(iteration, iteration + 3) if place == PLACES[3] else [iteration + late]
        assert reached in allowed and (parts / named).exists(), f"{named}: {stop}"
        assert not (parts / "model_final.pth").exists(), stop
    assert run(ranks, parts, config, "--resume") == [0] * ranks, stops
    of = f"stops {stops}; {SEED_VARIABLE}={seed}"
    assert differences(final(whole), final(parts)) == [], of
    assert lines(parts) == lines(whole), of


SCRIPT = """
import os, signal, sys, time
from d2_balance.engine import BalancedTrainer
from detectron2.engine import HookBase
from d2_balance.cli.main import main

class Stuck(HookBase):
    def before_step(self):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)

build = BalancedTrainer.build_hooks
BalancedTrainer.build_hooks = lambda self: [*build(self), Stuck()]
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
def test_a_step_that_does_not_end_is_left_when_the_time_is_up(config, tmp_path):  # noqa: F811
    start = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "--config-file", str(config), "OUTPUT_DIR",
         str(tmp_path / "out"), "SOLVER.INTERRUPT_TIMEOUT", "1.0"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 130, done.stderr
    assert "SOLVER.INTERRUPT_TIMEOUT" in done.stderr.splitlines()[-1]
    assert "There is no checkpoint of this run yet." in done.stderr
    assert "Traceback" not in done.stderr and time.monotonic() - start < 55


def interrupted(command, send, number, wait_for, out):
    """Start a training, send a signal after a line, and check how it ends; what it printed then."""
    started = subprocess.Popen(
        [sys.executable, *command],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for line in started.stdout:
            if wait_for in line:
                break
        send(started.pid, number)
        rest, _ = started.communicate(timeout=100)
    finally:
        started.kill()
    assert started.returncode == 128 + number, rest[-2000:]
    assert "the same command with --resume goes on from there" in rest
    assert "Traceback" not in rest, rest[-2000:]
    named = (out / "last_checkpoint").read_text()
    assert (out / named).exists() and not (out / "model_final.pth").exists()
    return named


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_reaches_the_processes_that_it_has_started(
    config,  # noqa: F811
    tmp_path,
    number,
):
    out = tmp_path / "out"
    command = [
        "-m", "d2_balance", "train", "--num-gpus", "2", "--config-file", str(config),
        "OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "100000", "TEST.EVAL_PERIOD", "0",
        "SOLVER.CHECKPOINT_PERIOD", "100000",
    ]  # fmt: skip
    interrupted(command, os.kill, number, " iter: ", out)  # the first steps are done


SLOW = """
import sys, time
from d2_balance.cli.main import main
from d2_balance.data.unreadable import SkipUnreadable

call = SkipUnreadable.__call__

def slowly(self, record):
    time.sleep(0.5)
    return call(self, record)

SkipUnreadable.__call__ = slowly
sys.exit(main(["train", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_workers_too_leaves_an_evaluation_without_traceback(
    config,  # noqa: F811
    tmp_path,
    number,
):
    out = tmp_path / "out"
    command = [
        "-c", SLOW, "--config-file", str(config), "OUTPUT_DIR", str(out),
        "TEST.EVAL_PERIOD", "2", "DATALOADER.NUM_WORKERS", "2",
    ]  # fmt: skip

    def send(group, number):
        time.sleep(0.5)  # the workers have begun to read
        os.killpg(group, number)  # as terminals and schedulers do it

    named = interrupted(command, send, number, "Start inference on", out)
    assert named == "model_0000001.pth"
    assert "\x1b" not in (out / "log.txt").read_text()
