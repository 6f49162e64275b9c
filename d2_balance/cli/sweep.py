"""Try remedies on your data, and say with intervals which of them helps.

Each remedy is trained with several seeds, the hopeless are stopped early, and the report ends with
what to set.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import TYPE_CHECKING

from .arguments import add_executor_arguments, executor_of

if TYPE_CHECKING:
    from d2_balance.sweep.run import Sweep


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance sweep`."""
    parser.add_argument("sweep", metavar="SWEEP.yaml", help="base config, remedies and seeds")
    parser.add_argument("--output", metavar="DIRECTORY", help="default: output/sweep-NAME")
    parser.add_argument("--resume", action="store_true", help="go on with the sweep in --output")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of a trial (default 0)")
    add_executor_arguments(parser, "trials")
    parser.add_argument(
        "--storage",
        metavar="URL",
        help="database of a study that several machines work on, such as "
        "postgresql://user@host/name; default: a journal file in --output",
    )
    parser.add_argument("--study", default="sweep", help="name of the study in --storage")
    parser.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    parser.add_argument("--report", action="store_true", help="write the report only")
    parser.add_argument("--check", action="store_true", help="check the remedies and stop")


def run(args: argparse.Namespace) -> int:
    """Run the sweep and write its report; return the exit status."""
    from contextlib import ExitStack

    from d2_balance.sweep.checks import check_remedies, make_intervals, with_suggested
    from d2_balance.sweep.progress import Progress
    from d2_balance.sweep.report import write_report
    from d2_balance.sweep.run import run_sweep
    from d2_balance.sweep.spec import read_sweep
    from d2_balance.utils.lock import directory_lock

    spec = with_suggested(read_sweep(args.sweep))
    name = os.path.splitext(os.path.basename(args.sweep))[0]
    output = os.path.abspath(args.output or os.path.join("output", f"sweep-{name}"))
    used = os.path.isdir(output) and any(not f.startswith(".") for f in os.listdir(output))
    if used and not (args.resume or args.report or args.storage):
        raise FileExistsError(
            f"{output} is not empty, and nothing is overwritten: pass --resume to go on with the "
            "sweep there, or another --output"
        )
    plan = check_remedies(spec)
    if args.check:
        print(f"{len(spec.remedies)} remedies fit, {plan.iterations} iterations each")
        return 0
    with ExitStack() as stack:
        if args.storage is None:
            stack.enter_context(directory_lock(output))
        executor = executor_of(args, args.gpus, os.path.join(output, "jobs"))
        stack.callback(executor.close)
        progress = stack.enter_context(Progress(sys.stdout))
        sweep: Sweep = run_sweep(
            spec,
            plan,
            output,
            executor,
            storage=args.storage,
            name=args.study,
            gpus=args.gpus,
            retry_failed=args.retry_failed,
            report_only=args.report,
            intervals=make_intervals(spec, plan),
            event=progress.event,
            tick=progress.tick,
        )
    files, text = write_report(sweep)
    print(text)
    print("\n".join(files))
    return 0
