"""Run a recipe of stages, with a report of AP by frequency group for each.

Stages are pre-training, training, experts, predictions with test-time augmentation, ensemble and
re-scoring. A stopped run goes on with --resume, between stages and inside a training.
"""

from __future__ import annotations

import argparse

from .arguments import add_executor_arguments, at_least, executor_of
from .main import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance challenge`."""
    parser.add_argument("recipe", help="YAML file, or its name, such as recipes/mini_lvis.yaml")
    parser.add_argument("--output", metavar="DIRECTORY", help="in place of the recipe's `output`")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_argument(
        "--num-gpus",
        type=at_least(0),
        default=1,
        help="processes of each training; 0 is one that asks a cluster for no GPU",
    )
    add_executor_arguments(parser, "stages")
    parser.add_argument("--check", action="store_true", help="check the recipe, run nothing")


def run(args: argparse.Namespace) -> int:
    """Run the recipe."""
    from contextlib import ExitStack

    from detectron2.data import DatasetCatalog

    import d2_balance.data  # noqa: F401  registers the built-in sets
    from d2_balance.engine.setup.config_file import find_config
    from d2_balance.recipes.recipe import Recipe
    from d2_balance.recipes.runner import Runner, check_names
    from d2_balance.recipes.stages import StageError
    from d2_balance.recipes.training import check_configs
    from d2_balance.utils.executors import visible_gpus

    recipe = Recipe.read(find_config(args.recipe))
    if args.check:
        check_configs(recipe)
        check_names(recipe, {*DatasetCatalog, *(entry[0] for entry in recipe.datasets)})
        print(
            f"{args.recipe}: {len(recipe.stages)} stages; every field, config key and dataset "
            "exists (files were not checked)"
        )
        return 0
    output = args.output or recipe.output
    runner = Runner(recipe, output, resume=args.resume, gpus=args.num_gpus)
    with ExitStack() as stack:
        executor = None
        cluster = args.ray is not None or args.slurm is not None
        if cluster or args.jobs != 1:
            gpus = args.num_gpus if cluster or visible_gpus() else 0
            executor = executor_of(args, gpus, runner.jobs)
            stack.callback(executor.close)
        try:
            print(runner.run(executor))
        except StageError as error:
            raise CommandError(str(error)) from error
    return 0
