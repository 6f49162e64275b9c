"""The command `d2-balance`: one sub-command per module, listed in `COMMANDS`."""

import argparse
import importlib
import os
import sys
import warnings
from collections.abc import Sequence

# name -> (module, one line of help). A module offers `add_arguments(parser) -> None` and
# `run(args) -> int`, the exit status; its docstring is the sub-command's description. Only the
# module that is called is imported, so that `doctor` runs where torch or Detectron2 is missing.
COMMANDS = {
    "analyze": ("analyze", "show which imbalance a dataset has, and what to set"),
    "challenge": ("challenge", "run a recipe of stages, with resume"),
    "classmap": ("classmap", "say which classes of two datasets are the same"),
    "compare": (
        "compare",
        "put evaluations side by side: groups and classes that gain",
    ),
    "ensemble": ("ensemble", "merge predictions of models, experts included"),
    "eval": ("eval", "evaluate a file of predictions, by frequency group and class"),
    "methods": ("methods", "list every method, and which go together"),
    "doctor": (
        "doctor",
        "print versions, datasets, and what to do about the missing",
    ),
    "rescore": ("rescore", "raise scores of rare classes before the cap of 300"),
    "show": ("show", "draw objects and detections, rare classes first"),
    "replay": ("replay", "run the batch again whose loss was not finite"),
    "prior": (
        "prior",
        "count the initial bias that foreground needs in a training set",
    ),
}


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Return the parser; only `command`, where it is one of COMMANDS, has its arguments."""
    parser = argparse.ArgumentParser(
        prog="d2-balance", description="Remedies for class imbalance in Detectron2."
    )
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, (module_name, line) in COMMANDS.items():
        if name != command:
            commands.add_parser(name, help=line)
            continue
        module = importlib.import_module(f"d2_balance.cli.{module_name}")
        chosen = commands.add_parser(name, help=line, description=module.__doc__)
        module.add_arguments(chosen)
        chosen.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit status; argparse exits by itself on bad usage.

    A file that cannot be read or written (a full disk, a directory without permission) ends in one
    line and status 2.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    warnings.filterwarnings("ignore", "torch.meshgrid", UserWarning)  # as in train_net.py
    args = build_parser(argv[0] if argv else None).parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `d2-balance methods | head`: who reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"d2-balance {args.command}: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
