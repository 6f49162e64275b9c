"""Where commands run: processes of this machine, a Ray cluster, or SLURM through submitit.

An executor starts a `Job` and returns a handle that is polled. A machine that goes away is told
from a command that failed: `poll` raises `JobLostError`, and whoever started the job may start it
again. Neither Ray nor submitit is imported before it is asked for.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

# Where data lie: a Ray node has the environment that Ray was started with there.
_TOLD = ("DETECTRON2_DATASETS", "D2_BALANCE_CACHE")
STOP_SECONDS = 40.0  # from SIGTERM to SIGKILL: a training saves a checkpoint first


@dataclass(frozen=True)
class Job:
    """A command and what it needs.

    Args:
        command: program and arguments.
        log: file that standard output and error are appended to.
        env: environment variables on top of those of the process that runs it.
        directory: what relative paths of the command refer to.
    """

    command: Sequence[str]
    log: str
    env: Mapping[str, str] = field(default_factory=dict)
    directory: str = field(default_factory=os.getcwd)


class JobLostError(Exception):
    """The machine of a job has gone away, so that nobody knows how far it came."""


class Running(Protocol):
    """A job that was started."""

    def poll(self) -> int | None:
        """Return the exit status, None while the job runs.

        Raises:
            JobLostError: the machine that ran it has gone away.
        """

    def stop(self) -> None:
        """Send SIGTERM, which a training answers with a checkpoint, and SIGKILL in the end."""


class Executor(Protocol):
    """What starts jobs."""

    slots: int
    """Jobs that run side by side."""

    def start(self, job: Job, slot: int) -> Running:
        """Start a job in a slot in [0, slots), which is free."""

    def close(self) -> None:
        """Release what the executor holds."""


def stop_all(running: Sequence[Running]) -> None:
    """Stop jobs side by side, for each may take its time to save a checkpoint."""
    with ThreadPoolExecutor(max(len(running), 1)) as threads:
        list(threads.map(lambda one: one.stop(), running))


def make_executor(
    jobs: int = 1,
    *,
    ray: str | None = None,
    slurm: str | None = None,
    gpus: int = 0,
    cpus: int = 1,
    directory: str = ".",
) -> Executor:
    """Return the executor that the command line asks for.

    Args:
        jobs: jobs side by side, at least 1.
        ray: address of a Ray cluster, "auto" for the one that runs here, "local" to start one.
        slurm: "local" for submitit's processes of this machine, or a SLURM partition.
        gpus: GPUs of a job.
        cpus: processors of a job.
        directory: where submitit keeps its files.

    Raises:
        ValueError: `jobs` is below 1, both clusters are asked for, a package is missing, or the
            cluster cannot be reached.
    """
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}; it must be an integer of at least 1")
    if ray is not None and slurm is not None:
        raise ValueError("--ray and --slurm cannot go together; give one of them")
    if ray is not None:
        return RayExecutor(jobs, ray, cpus=cpus, gpus=gpus)
    if slurm is not None:
        return SubmititExecutor(jobs, slurm, cpus=cpus, gpus=gpus, directory=directory)
    return LocalExecutor(jobs, gpus=gpus)


class LocalExecutor:
    """Processes of this machine; each slot has its own GPUs and its part of the processors.

    Threads that share a processor wait for each other in every operation: several slots divide the
    processors by OMP_NUM_THREADS, unless it is set.

    Args:
        slots: processes side by side.
        gpus: GPUs of a slot, at least 0.

    Raises:
        ValueError: fewer GPUs are visible than the slots need.
    """

    def __init__(self, slots: int, gpus: int = 0) -> None:
        _check_gpus(slots, gpus)
        self.slots, self.gpus = slots, gpus

    def start(self, job: Job, slot: int) -> Running:
        return _Process(job, {**self._threads(), **job.env, **_gpus_of(slot, self.gpus)})

    def _threads(self) -> dict[str, str]:
        if self.slots == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        available = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        return {"OMP_NUM_THREADS": str(max(1, available // self.slots))}

    def close(self) -> None:
        pass


class _Process:
    """A child of this process, which ends with it."""

    def __init__(self, job: Job, env: Mapping[str, str]) -> None:
        os.makedirs(os.path.dirname(os.path.abspath(job.log)), exist_ok=True)
        with open(job.log, "ab") as log:
            self.process = subprocess.Popen(
                list(job.command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **env},
                cwd=job.directory,
                start_new_session=True,  # Ctrl-C reaches the sweep, which stops its jobs in turn
                preexec_fn=_ends_with_this_process() if sys.platform == "linux" else None,
            )

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        stop_group(self.process)


def stop_group(process: subprocess.Popen, seconds: float = STOP_SECONDS) -> None:
    """Stop a process that leads a session, and all that it started."""
    if process.poll() is not None:
        return
    _signal_group(process.pid, signal.SIGTERM)
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        _signal_group(process.pid, signal.SIGKILL)
        process.wait()


def _signal_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it has ended meanwhile
        os.killpg(pid, number)


def _ends_with_this_process() -> Callable[[], None]:
    """What a new process calls first, so that Linux sends it SIGTERM when its parent dies."""
    library, parent = ctypes.CDLL(None), os.getpid()

    def ask() -> None:
        library.prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
        if os.getppid() != parent:  # it has ended before it was asked
            os._exit(128 + signal.SIGTERM)

    return ask


def _check_gpus(slots: int, gpus: int) -> None:
    """Raise ValueError if fewer GPUs are visible than the slots need."""
    if gpus and (visible := visible_gpus()) < slots * gpus:
        raise ValueError(
            f"--jobs {slots} with {gpus} GPUs each needs {slots * gpus} GPUs, and {visible} "
            "are visible; lower --jobs or --gpus"
        )


def _gpus_of(slot: int, gpus: int) -> dict[str, str]:
    """Return the environment that shows a job the GPUs of its slot, out of the visible ones."""
    if not gpus:
        return {}
    chosen = range(slot * gpus, (slot + 1) * gpus)
    names = _gpu_names()
    return {"CUDA_VISIBLE_DEVICES": ",".join(names[i] if names else str(i) for i in chosen)}


def _gpu_names() -> list[str]:
    names = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [name for name in names.split(",") if name]


def visible_gpus() -> int:
    """Return the number of GPUs that this process may use."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return len(_gpu_names())
    import torch

    return torch.cuda.device_count()


def run_job(job: Job, *, signals: bool = True) -> int:
    """Run a job to its end on this machine, and stop it if this process is told to.

    Args:
        job: the command.
        signals: whether SIGTERM and SIGINT stop the job, and this returns its status; False leaves
            them to the handlers of this process, whose exceptions stop the job.
    """
    child = _Process(job, job.env)

    def forward(number: int, frame: Any) -> None:
        child.stop()

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT) if signals else ():
        with suppress(ValueError):  # not in the main thread
            previous[number] = signal.signal(number, forward)
    try:
        while (status := child.poll()) is None:
            time.sleep(0.2)
        return status
    except BaseException:  # Ray cancels a task with KeyboardInterrupt
        child.stop()
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class RayExecutor:
    """Tasks of a Ray cluster, one a job; logs and outputs lie on a file system that all nodes see.

    Args:
        slots: jobs side by side.
        address: of the cluster; "auto" finds the one that runs here, "local" starts one.
        cpus: processors of a job.
        gpus: GPUs of a job.

    Raises:
        ValueError: Ray is not installed, or there is no cluster at the address.
    """

    def __init__(self, slots: int, address: str, *, cpus: int = 1, gpus: int = 0) -> None:
        try:
            import ray
        except ImportError as error:
            raise ValueError(
                "--ray needs the package ray: pip install 'd2-balance[cluster]'"
            ) from error
        self._ray, self.slots, self.cpus, self.gpus = ray, slots, cpus, gpus
        _check_address(address)  # Ray itself would look for it for minutes
        self._started = not ray.is_initialized()
        if self._started:
            try:
                with _own_sigterm():
                    ray.init(
                        address=None if address == "local" else address,
                        log_to_driver=False,
                        logging_level=logging.ERROR,
                    )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"--ray {address}: no cluster can be reached there ({error})"
                ) from error
        self._task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=0)(run_job)

    def start(self, job: Job, slot: int) -> Running:
        told = {name: os.environ[name] for name in _TOLD if name in os.environ}
        return _RayTask(self._ray, self._task.remote(replace(job, env={**told, **job.env})))

    def close(self) -> None:
        if self._started:
            self._ray.shutdown()


@contextmanager
def _own_sigterm() -> Iterator[None]:
    """Keep the handler of SIGTERM: Ray 2.60 sets its own, which ends a command with status 15."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        with suppress(ValueError):  # not in the main thread, where Ray sets none either
            signal.signal(signal.SIGTERM, handler)


def _check_address(address: str) -> None:
    """Raise ValueError if nothing listens at host:port; other forms of address are left to Ray."""
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ValueError(f"--ray {address}: no cluster can be reached there ({error})") from error


class _RayTask:
    def __init__(self, ray: Any, reference: Any) -> None:
        self._ray, self._reference = ray, reference

    def poll(self) -> int | None:
        ray = self._ray
        ready, _ = ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            return ray.get(self._reference)
        except ray.exceptions.TaskCancelledError:
            return -signal.SIGTERM
        except (
            ray.exceptions.NodeDiedError,
            ray.exceptions.WorkerCrashedError,
            ray.exceptions.LocalRayletDiedError,
            ray.exceptions.OutOfMemoryError,
            ray.exceptions.ObjectLostError,
        ) as error:
            raise JobLostError(str(error).splitlines()[0]) from error

    def stop(self) -> None:
        self._ray.cancel(self._reference)
        end = time.monotonic() + STOP_SECONDS + 5
        while time.monotonic() < end:
            try:
                if self.poll() is not None:
                    return
            except JobLostError:
                return
            time.sleep(0.2)


class SubmititExecutor:
    """Jobs of SLURM through submitit, or processes of this machine with its local executor.

    Args:
        slots: jobs side by side.
        partition: SLURM partition, or "local".
        cpus: processors of a job.
        gpus: GPUs of a job.
        directory: where submitit keeps its files.

    Raises:
        ValueError: submitit is not installed, SLURM is not there, or this machine shows fewer GPUs
            than "local" slots need.
    """

    def __init__(
        self, slots: int, partition: str, *, cpus: int = 1, gpus: int = 0, directory: str = "."
    ) -> None:
        try:
            import submitit
        except ImportError as error:
            raise ValueError(
                "--slurm needs the package submitit: pip install 'd2-balance[cluster]'"
            ) from error
        self.slots = slots
        local = partition == "local"
        self._gpus = gpus if local else 0  # SLURM itself gives each job its GPUs
        _check_gpus(slots, self._gpus)
        try:
            self._executor = submitit.AutoExecutor(directory, cluster="local" if local else "slurm")
        except RuntimeError as error:
            raise ValueError(f"--slurm {partition}: {error}") from error
        self._executor.update_parameters(
            timeout_min=60 * 24 * 7, cpus_per_task=cpus, gpus_per_node=gpus, name="d2_balance"
        )
        if not local:
            self._executor.update_parameters(slurm_partition=partition)

    def start(self, job: Job, slot: int) -> Running:
        # submitit's local executor shows every job the first GPUs of the machine
        job = replace(job, env={**job.env, **_gpus_of(slot, self._gpus)})
        return _SubmititJob(self._executor.submit(run_job, job))

    def close(self) -> None:
        pass


class _SubmititJob:
    def __init__(self, job: Any) -> None:
        self._job = job

    def poll(self) -> int | None:
        if not self._job.done():
            return None
        try:
            return self._job.result()
        except Exception as error:  # submitit raises types of its own for each end of a job
            raise JobLostError(str(error).strip().splitlines()[-1]) from error

    def stop(self) -> None:
        self._job.cancel()
