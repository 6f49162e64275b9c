"""The report of a sweep: what it proposes, and what it does not claim."""

from pathlib import Path

import pytest
import yaml

from d2_balance.evaluation.bootstrap import Comparison, Difference
from d2_balance.sweep.report import write_report

from . import test_run
from .test_run import Told, spec_of, sweep_in

stand_in = test_run.stand_in


class Measured(Told):
    """Intervals around the differences of the stand-in's qualities."""

    def __init__(self, low, high):
        super().__init__(False)
        self.low, self.high = low, high

    def compare(self, first, second):
        value = (self.low + self.high) / 2
        gain = Difference(value, self.low, self.high, 1.0, 0.5)
        return Comparison({"AP": gain, "APr": gain}, {}, ({}, {}))


def report(tmp_path, low, high, seeds=(1, 2), **remedies):
    spec = spec_of(seeds, **(remedies or {"good": {"QUALITY": 30.0}}))
    sweep, _ = sweep_in(tmp_path / "out", spec, intervals=Measured(low, high))
    files, text = write_report(sweep)
    return files, text, tmp_path / "out"


def test_a_remedy_is_proposed_if_its_interval_lies_above_the_reference(tmp_path):
    files, text, out = report(tmp_path, 4.0, 16.0)
    assert text.startswith("Use good: bbox/AP +10.0 against baseline, 95 % interval +4.0 to +16.0")
    best = (out / "best.yaml").read_text()
    assert yaml.safe_load(best)["QUALITY"] == 30.0 and "+4.0 to +16.0" in best
    assert all(Path(file).stat().st_size for file in files) and len(files) == 4


def test_nothing_is_proposed_while_the_interval_holds_zero(tmp_path):
    _, text, out = report(tmp_path, -1.0, 21.0)
    assert text.startswith("Use baseline: nothing beats your baseline")
    assert "within noise" in text
    assert set(yaml.safe_load((out / "best.yaml").read_text())) == {"_BASE_", "QUALITY"}


def test_a_loser_is_shown_losing(tmp_path):
    _, text, _ = report(tmp_path, -9.0, -3.0)
    (line,) = [line for line in text.splitlines() if line.startswith("| good")]
    assert "-6.0 [-9.0, -3.0]" in line and "worse" in line


def test_the_table_has_means_and_spreads_of_seeds(tmp_path):
    _, text, _ = report(tmp_path, 1.0, 2.0)
    (line,) = [line for line in text.splitlines() if line.startswith("| good")]
    # 30.1 and 30.2: mean 30.15, standard deviation 0.07
    assert "| 30.1 ± 0.1" in line or "| 30.2 ± 0.1" in line
    assert "| 500" in line  # milliseconds per iteration


def test_one_seed_says_what_it_cannot_say(tmp_path):
    _, text, _ = report(tmp_path, 1.0, 2.0, seeds=(1,))
    assert "A remedy with one seed has no spread over trainings" in text


def test_failures_stand_in_the_report_with_their_message(tmp_path):
    _, text, _ = report(tmp_path, 1.0, 2.0, bad={"FAILS": True}, good={"QUALITY": 30.0})
    assert "bad, seed 1: failed, status 3: no memory left" in text


@pytest.mark.parametrize("seeds", [(1,), (1, 2)])
def test_a_sweep_of_failures_proposes_the_baseline(tmp_path, seeds):
    _, text, _ = report(tmp_path, 1.0, 2.0, seeds, bad={"FAILS": True})
    assert text.startswith("Use baseline: no other remedy has finished")
