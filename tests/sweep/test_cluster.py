"""Executors beyond one machine: Ray's test cluster of two nodes, and submitit's local executor."""

import contextlib
import os
import signal
import sys
import time

import pytest

from d2_balance.utils.executors import Job, JobLostError, make_executor

SLEEPY = "import os, sys, time; open(sys.argv[1], 'a').write('x'); time.sleep(float(sys.argv[2]))"


def job(tmp_path, name, seconds=0.1, code=SLEEPY):
    command = [sys.executable, "-c", code, str(tmp_path / name), str(seconds)]
    return Job(command, str(tmp_path / f"{name}.log"))


def wait(running, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        status = running.poll()
        if status is not None:
            return status
        time.sleep(0.1)
    raise AssertionError("the job has not ended")


def test_ray_runs_jobs_and_returns_their_status(cluster, tmp_path):
    handler = signal.getsignal(signal.SIGTERM)
    executor = make_executor(2, ray=cluster[0].address)
    try:
        assert signal.getsignal(signal.SIGTERM) is handler  # Ray has one of its own
        good = executor.start(job(tmp_path, "good"), 0)
        bad = executor.start(job(tmp_path, "bad", code="import sys; sys.exit(5)"), 1)
        assert wait(good) == 0 and wait(bad) == 5
        assert (tmp_path / "good").read_text() == "x"
    finally:
        executor.close()


def test_a_job_whose_node_dies_is_lost_and_runs_elsewhere(cluster, tmp_path):
    executor = make_executor(2, ray=cluster[0].address)
    try:
        first = [executor.start(job(tmp_path, f"job{k}", 8), k) for k in range(2)]
        end = time.monotonic() + 60
        while len(list(tmp_path.glob("job?"))) < 2 and time.monotonic() < end:
            time.sleep(0.2)
        cluster[0].remove_node(cluster[1][0], allow_graceful=False)
        lost = 0
        for running in first:
            try:
                assert wait(running) == 0
            except JobLostError:
                lost += 1
        assert lost == 1
        assert wait(executor.start(job(tmp_path, "again"), 0)) == 0
    finally:
        executor.close()


def test_submitits_local_executor_runs_and_stops_jobs(tmp_path):
    pytest.importorskip("submitit", reason="pip install 'd2-balance[cluster]'")
    executor = make_executor(2, slurm="local", directory=str(tmp_path / "jobs"))
    good = executor.start(job(tmp_path, "good"), 0)
    bad = executor.start(job(tmp_path, "bad", code="import sys; sys.exit(5)"), 1)
    assert wait(good) == 0 and wait(bad) == 5
    long = executor.start(job(tmp_path, "long", 300), 0)
    while not (tmp_path / "long").exists():
        time.sleep(0.1)
    long.stop()
    with contextlib.suppress(JobLostError):  # submitit may end before it has written the status
        assert wait(long) != 0


def test_submitits_local_jobs_get_the_gpus_of_their_slot(tmp_path, monkeypatch):
    pytest.importorskip("submitit", reason="pip install 'd2-balance[cluster]'")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,2,7")
    with pytest.raises(ValueError, match="needs 4 GPUs, and 3 are visible"):
        make_executor(2, slurm="local", gpus=2, directory=str(tmp_path / "jobs"))
    executor = make_executor(3, slurm="local", gpus=1, directory=str(tmp_path / "jobs"))
    code = "import os, sys; sys.exit(int(os.environ['CUDA_VISIBLE_DEVICES']))"
    jobs = [executor.start(job(tmp_path, f"slot{n}", code=code), n) for n in range(3)]
    assert [wait(running) for running in jobs] == [4, 2, 7]


def test_an_address_without_a_cluster_is_told():
    pytest.importorskip("ray", reason="pip install 'd2-balance[cluster]'")
    with pytest.raises(ValueError, match="no cluster can be reached"):
        make_executor(1, ray="127.0.0.1:1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "--jobs is 0"),
        ({"ray": "auto", "slurm": "gpu"}, "cannot go together"),
        ({"gpus": 99}, "99 GPUs"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_executor(**options)


def test_missing_packages_are_named(monkeypatch):
    for name, option in (("ray", "ray"), ("submitit", "slurm")):
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(ValueError, match=r"d2-balance\[cluster\]"):
            make_executor(1, **{option: "local"})


def test_a_job_ends_with_the_process_that_started_it(tmp_path):
    code = (
        "import sys, time; sys.path[:0] = {path!r}\n"
        "from d2_balance.utils.executors import Job, LocalExecutor\n"
        "job = Job([sys.executable, '-c', {sleepy!r}, {file!r}, '300'], {log!r})\n"
        "LocalExecutor(1).start(job, 0); time.sleep(300)"
    ).format(path=sys.path, sleepy=SLEEPY, file=str(tmp_path / "x"), log=str(tmp_path / "log"))
    if sys.platform != "linux":
        pytest.skip("other systems do not tell a child that its parent died")
    import signal
    import subprocess

    parent = subprocess.Popen([sys.executable, "-c", code + "  # " + str(os.getpid())])
    while not (tmp_path / "x").exists():
        time.sleep(0.05)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    pattern = str(tmp_path / "x")
    while time.monotonic() < end:
        found = subprocess.run(["pgrep", "-f", pattern], capture_output=True, text=True).stdout
        if not found.split():
            return
        time.sleep(0.1)
    raise AssertionError("the child lives on")
