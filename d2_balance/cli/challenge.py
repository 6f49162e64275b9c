"""Run a recipe of stages: pre-training, training, experts, multi-scale predictions, ensemble and
re-scoring, with a report of AP by frequency group for each.

A stopped run goes on with --resume, between stages and inside a training."""

from __future__ import annotations

import argparse
import signal
import sys


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance challenge`."""
    parser.add_argument("recipe", help="YAML file, see configs/recipes")
    parser.add_argument("--output", metavar="DIRECTORY", help="in place of the recipe's `output`")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of each training")
    parser.add_argument("--check", action="store_true", help="check the recipe, run nothing")


def run(args: argparse.Namespace) -> int:
    """Runs the recipe; 2 where the user has to change something, 1 where a stage has failed."""
    from detectron2.data import DatasetCatalog

    import d2_balance.data  # noqa: F401  registers the built-in sets
    from d2_balance.recipes.recipe import Recipe
    from d2_balance.recipes.runner import Runner, check_names
    from d2_balance.recipes.stages import StageError
    from d2_balance.recipes.training import check_configs

    try:
        recipe = Recipe.read(args.recipe)
        output = args.output or recipe.output
        if args.check:
            check_configs(recipe)
            check_names(recipe, {*DatasetCatalog, *(entry[0] for entry in recipe.datasets)})
            print(
                f"{args.recipe}: {len(recipe.stages)} stages; every field, config key and dataset "
                "exists (files were not looked for)"
            )
            return 0
        runner = Runner(recipe, output, resume=args.resume, gpus=args.num_gpus)
    except (ValueError, FileExistsError) as error:
        print(f"d2-balance challenge: error: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _stop)  # so that the training of a stage is ended as well
    try:
        print(runner.run())
    except StageError as error:
        stage = next(s.name for s in recipe.stages if s.name not in runner.done)
        print(f"d2-balance challenge: error: stage {stage}: {error}", file=sys.stderr)
        return 1
    except ValueError as error:  # another run works in the directory
        print(f"d2-balance challenge: error: {error}", file=sys.stderr)
        return 2
    return 0


def _stop(number: int, _frame: object) -> None:
    sys.exit(128 + number)
