"""Run a recipe of stages, with a report of AP by frequency group for each.

Stages are pre-training, training, experts, predictions with test-time augmentation, ensemble and
re-scoring. A stopped run goes on with --resume, between stages and inside a training.
"""

from __future__ import annotations

import argparse

from .main import CommandError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance challenge`."""
    parser.add_argument("recipe", help="YAML file, or its name, such as recipes/mini_lvis.yaml")
    parser.add_argument("--output", metavar="DIRECTORY", help="in place of the recipe's `output`")
    parser.add_argument("--resume", action="store_true", help="go on with a stopped run")
    parser.add_argument("--num-gpus", type=int, default=1, help="processes of each training")
    parser.add_argument(
        "--jobs", type=int, default=1, help="stages that run side by side, if they can (default 1)"
    )
    parser.add_argument("--check", action="store_true", help="check the recipe, run nothing")


def run(args: argparse.Namespace) -> int:
    """Run the recipe."""
    from detectron2.data import DatasetCatalog

    import d2_balance.data  # noqa: F401  registers the built-in sets
    from d2_balance.engine.setup.config_file import find_config
    from d2_balance.recipes.recipe import Recipe
    from d2_balance.recipes.runner import Runner, check_names
    from d2_balance.recipes.stages import StageError
    from d2_balance.recipes.training import check_configs

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
    runner = Runner(recipe, output, resume=args.resume, gpus=args.num_gpus, jobs=args.jobs)
    try:
        print(runner.run())
    except StageError as error:
        raise CommandError(str(error)) from error
    return 0
