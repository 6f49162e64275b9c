"""The command `d2-balance`: one module of this room per command, listed in `COMMANDS`."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from d2_balance.utils.errors import is_deliberate
from d2_balance.utils.progress import QUIET

# name -> one line of help; the module is d2_balance/cli/NAME.py, with _ for -. It offers
# `add_arguments(parser)` and `run(args)`, which returns the exit status; its docstring is the
# command's description. Only the module that is called is imported, so that `doctor` runs without
# torch and Detectron2.
COMMANDS = {
    "analyze": "show which imbalance a dataset has, and what to set",
    "calibrate": "measure what calibrations after training need",
    "challenge": "run a recipe of stages, with resume",
    "classmap": "say which classes of two datasets are the same",
    "compare": "put evaluations side by side: groups and classes that gain",
    "convert": "write annotation files from YOLO's data.yaml, or for a list of images",
    "convert-weights": "convert weights of mmdet, EQL's and BAGS's releases",
    "doctor": "print versions, datasets, and what to do about the missing",
    "ensemble": "merge predictions of models, experts included",
    "eval": "evaluate a file of predictions, by frequency group and class",
    "export": "export a trained model to TorchScript or ONNX",
    "install-detectron2": "install Detectron2's Python files from the package registry",
    "methods": "list every method, and which go together",
    "predict": "detect in images, directories and videos with a trained model",
    "prior": "count the initial bias that foreground needs in a training set",
    "replay": "run the batch again whose loss was not finite",
    "rescore": "raise scores of rare classes before the cap of 300",
    "sweep": "try remedies with several seeds, and say with intervals which of them helps",
    "show": "draw objects and detections, rare classes first",
    "train": "train or evaluate a detector, with resume",
}

# Detectron2 is older than these deprecations; a user can do nothing about them. Set at import, so
# that processes which a training starts have them too.
warnings.filterwarnings("ignore", "`torch.jit.script", FutureWarning)
warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)
warnings.filterwarnings("ignore", "pkg_resources is deprecated", UserWarning)


class CommandError(Exception):
    """A command has failed, although its input was right; the exit status is 1."""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Build the parser.

    Args:
        command: one of COMMANDS, which alone gets its arguments.
    """
    parser = argparse.ArgumentParser(
        prog="d2-balance", description="Remedies for class imbalance in Detectron2."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, line in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=line)
            continue
        module = importlib.import_module(f"d2_balance.cli.{name.replace('-', '_')}")
        chosen = commands.add_parser(name, help=line, description=module.__doc__)
        module.add_arguments(chosen)
        chosen.add_argument("--quiet", action="store_true", help="show no progress")
        chosen.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: arguments; None takes those of the process.

    Returns:
        The command's exit status: 2 if the input cannot be used or a file cannot be read or
        written, which is said in one line; 130 after Ctrl-C. argparse exits by itself on bad usage.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = build_parser(argv[0] if argv else None).parse_args(argv)
    if args.quiet:
        os.environ[QUIET] = "1"
    try:
        with _sigterm_unwinds():
            status = args.run(args)
            sys.stdout.flush()
            return status
    except KeyboardInterrupt:
        print(f"d2-balance {args.command}: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `d2-balance methods | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, OSError, CommandError) as error:
        if isinstance(error, ValueError) and not is_deliberate(error):
            raise  # a bug, whose traceback is needed
        print(f"d2-balance {args.command}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, CommandError) else 2


@contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """Turn SIGTERM into SystemExit(143), so that child processes and temporary files are ended."""

    def stop(number: int, _frame: object) -> None:
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
