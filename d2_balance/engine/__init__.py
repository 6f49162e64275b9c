"""Trainer, hooks, the checks before a run and the summary after it."""

from d2_balance.utils.lock import output_lock

from .errors import RunStopped
from .hooks.nonfinite import FiniteLosses, FiniteWeights, NonFiniteLossError
from .hooks.training import BetaDecay, LossStats, SeedSteps, decayed_beta
from .resume.data_stream import TrainStream, build_train_stream
from .setup.launch import check_launch, start
from .setup.lazy import read_run, save_lazy
from .setup.run import prepare_run, read_config, short_messages, use_cpu_without_cuda
from .setup.scaling import batch_warning, scale_to_batch
from .setup.validate import validate
from .summary import write_summary
from .trainer import BalancedTrainer

__all__ = [
    "BalancedTrainer",
    "BetaDecay",
    "FiniteLosses",
    "FiniteWeights",
    "LossStats",
    "NonFiniteLossError",
    "RunStopped",
    "SeedSteps",
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
