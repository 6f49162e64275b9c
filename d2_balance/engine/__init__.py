"""Trainer, hooks, the checks before a run and the summary after it."""

from .errors import RunStopped
from .hooks import BetaDecay, LossStats, SeedSteps, decayed_beta
from .launching import check_launch, start
from .lazy import read_run, save_lazy
from .lock import output_lock
from .nonfinite import FiniteLosses, FiniteWeights, NonFiniteLossError
from .run_setup import prepare_run, read_config, short_messages, use_cpu_without_cuda
from .scaling import batch_warning, scale_to_batch
from .summary import write_summary
from .train_stream import TrainStream, build_train_stream
from .trainer import BalancedTrainer
from .validate import validate

__all__ = [
    "BalancedTrainer",
    "BetaDecay",
    "FiniteLosses",
    "FiniteWeights",
    "LossStats",
    "NonFiniteLossError",
    "SeedSteps",
    "RunStopped",
    "TrainStream",
    "batch_warning",
    "build_train_stream",
    "check_launch",
    "decayed_beta",
    "output_lock",
    "prepare_run",
    "read_config",
    "read_run",
    "save_lazy",
    "scale_to_batch",
    "short_messages",
    "start",
    "use_cpu_without_cuda",
    "validate",
    "write_summary",
]
