"""SIGINT and SIGTERM save the iteration reached; the resumed run ends bit-equal to a whole one."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from .test_kill import LENGTH, config, differences, final, lines, run  # noqa: F401  the fixture

PLACES = ("before the step", "before the optimizer", "in an evaluation")


def plant(iteration, place, number):
    """Makes the process signal itself in an iteration, at a place of `PLACES`."""
    from detectron2.engine import HookBase

    from d2_balance.engine import BalancedTrainer

    class Signal(HookBase):
        def before_step(self):
            if place == PLACES[0] and self.trainer.iter == iteration:
                os.kill(os.getpid(), number)

        def after_backward(self):
            if place == PLACES[1] and self.trainer.iter == iteration:
                os.kill(os.getpid(), number)

    build, make, test = BalancedTrainer.build_hooks, BalancedTrainer.__init__, BalancedTrainer.test

    def started(self, cfg):
        make(self, cfg)
        self._trainer.register_hooks([Signal()])

    def tested(cfg, model, *others):
        if place == PLACES[2]:
            os.kill(os.getpid(), number)
            time.sleep(20)  # the signal leaves this at once
        return test(cfg, model, *others)

    BalancedTrainer.__init__ = started
    BalancedTrainer.build_hooks = lambda self: [*build(self), Signal()]
    BalancedTrainer.test = tested


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_signals_leave_no_trace(config, tmp_path, ranks):  # noqa: F811
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(ranks, whole, config) == [0] * ranks
    chosen = random.Random(ranks)
    first, last = sorted(chosen.sample([i for i in range(1, LENGTH - 4) if i not in (8, 9)], 2))
    stops = [(first, PLACES[0], signal.SIGINT), (9, PLACES[2], signal.SIGTERM)]
    stops += [(last, PLACES[1], signal.SIGTERM)]
    # an evaluation comes after iteration 9; a run that has not got there yet stops before it
    for count, (iteration, place, number) in enumerate(sorted(stops, key=lambda stop: stop[0])):
        codes = run(
            ranks, parts, config, *["--resume"] * bool(count), kill=(iteration, place, number),
            plant_in=plant, everywhere=place == PLACES[2],
        )  # fmt: skip
        assert codes[-1] == 128 + number, (iteration, place, codes)
        named = (parts / "last_checkpoint").read_text()
        # other ranks learn of it with the next backward pass
        done = iteration + (ranks > 1 and place == PLACES[1])
        assert named == f"model_{done:07d}.pth" and (parts / named).exists(), place
        assert not (parts / "model_final.pth").exists()
    assert run(ranks, parts, config, "--resume") == [0] * ranks
    assert differences(final(whole), final(parts)) == []
    assert lines(parts) == lines(whole)


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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_command_reaches_the_processes_that_it_has_started(
    config,  # noqa: F811
    tmp_path,
    number,
):
    out = tmp_path / "out"
    started = subprocess.Popen(
        [sys.executable, "-m", "d2_balance", "train", "--num-gpus", "2", "--config-file",
         str(config), "OUTPUT_DIR", str(out), "SOLVER.MAX_ITER", "100000", "TEST.EVAL_PERIOD", "0",
         "SOLVER.CHECKPOINT_PERIOD", "100000"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        for line in started.stdout:
            if " iter: " in line:  # the first steps are done
                break
        started.send_signal(number)
        rest, _ = started.communicate(timeout=100)
    finally:
        started.kill()
    assert started.returncode == 128 + number, rest[-2000:]
    assert "the same command with --resume goes on from there" in rest
    assert "Traceback" not in rest, rest[-2000:]
    named = (out / "last_checkpoint").read_text()
    assert (out / named).exists() and not (out / "model_final.pth").exists()
