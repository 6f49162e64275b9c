"""Export a trained model to TorchScript or ONNX, and check it against the eager model on images.

The labels, the score thresholds, and what input the model takes go to a JSON file beside it.
"""

from __future__ import annotations

import argparse
import os
import random

from .predict import add_model_arguments, model_options

FORMATS = ("torchscript-trace", "torchscript-script", "onnx")
_IMAGES = 4  # on which the exported model is checked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance export`."""
    add_model_arguments(parser)
    parser.add_argument("--format", required=True, choices=FORMATS, help="of the exported model")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="default: the name of the weights with the ending .pt or .onnx, in their directory",
    )
    parser.add_argument(
        "--images",
        nargs="+",
        metavar="FILE",
        help="images, or directories of images, to check the exported model on; if not given, "
        f"{_IMAGES} of the first dataset of DATASETS.TEST",
    )
    parser.add_argument(
        "--score-threshold", type=float, metavar="SCORE", help="least score of a detection"
    )


def run(args: argparse.Namespace) -> int:
    """Export the model and print the largest difference to the eager one."""
    from d2_balance.deploy import load
    from d2_balance.deploy.export import ENDINGS, export
    from d2_balance.deploy.predict import find_sources

    predictor = load(args.model, **model_options(args), score_threshold=args.score_threshold)
    path = args.output or os.path.splitext(predictor.checkpoint)[0] + ENDINGS[args.format]
    if args.images:
        images = [source.path for source in find_sources(args.images) if not source.is_video]
    else:
        images = _test_images(predictor.cfg)
    if len(images) > _IMAGES:
        images = random.Random(0).sample(images, _IMAGES)
    difference = export(predictor, args.format, path, images)
    print(f"{path}: {difference}")
    print(os.path.splitext(path)[0] + ".json")
    return 0


def _test_images(cfg) -> list[str]:
    """Images of the first test set that is here.

    Raises:
        ValueError: none is here.
    """
    from detectron2.data import DatasetCatalog

    from d2_balance.data.catalog.from_config import register_from_config

    try:
        register_from_config(cfg)
        name = next(name for name in cfg.DATASETS.TEST if name in DatasetCatalog)
        return [record["file_name"] for record in DatasetCatalog.get(name)]
    except (ValueError, OSError, StopIteration) as error:
        raise ValueError(
            "the exported model is checked on images, and the test set of the config is not here; "
            "give some (--images FILE ...)"
        ) from error
