"""Run the batch again that has ended a run with a loss that is not finite.

A run whose loss becomes infinite or NaN writes OUTPUT_DIR/replay_<iteration>_rank<rank>.pt: the
batch, the weights before the step, the config and the random numbers. This command runs that batch
in training mode, without a step, and says which losses, images and classes are not finite.

Exit status: 0 where the loss is not finite again, 1 where it is finite, 2 for a bad file.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detectron2.config import CfgNode


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance replay`."""
    parser.add_argument("file", help="replay_*.pt of a run's OUTPUT_DIR")
    parser.add_argument("--device", help="cpu or cuda; default: as in the run, where it is there")
    parser.add_argument(
        "--precision",
        choices=["fp32", "fp16", "bf16"],
        help="default: as in the run; fp32 says whether half precision is to blame",
    )


def run(args: argparse.Namespace) -> int:
    """Run the batch, and print what is not finite."""
    from d2_balance.data.unreadable import image_name
    from d2_balance.engine.replay.saved_batch import load_saved_batch
    from d2_balance.engine.replay.search import Replay, first_non_finite
    from d2_balance.engine.step import PRECISIONS
    from d2_balance.engine.trainer import BalancedTrainer

    saved = load_saved_batch(args.file)
    cfg = saved_config(saved["config"], args.device)
    model = BalancedTrainer.build_model(cfg)
    model.load_state_dict(saved["model"])
    model.train()
    precision = args.precision or saved["precision"]
    replay = Replay(
        model,
        saved["batch"],
        key=None if saved["key"] is None else tuple(saved["key"]),
        iteration=saved["iteration"],
        precision=PRECISIONS.get(precision),
    )
    found = replay.run()
    finite = not found.bad_input and replay.is_finite()
    print(f"iteration {saved['iteration']}, {len(saved['batch'])} images, {precision or 'fp32'}")
    for name, value in replay.losses.items():
        print(f"  {name} = {value:g}")
    if parameter := first_non_finite(model.named_parameters()):
        print(f"weights: {parameter} is not finite")
    if finite:
        print("The loss is finite.")
        return 1
    names = saved["class_names"] or []
    print("The loss is not finite:")
    for index, what in sorted(found.images.items()):
        classes = sorted(found.classes[index])
        called = [names[c] if c < len(names) else f"class {c}" for c in classes]
        print(f"  {image_name(saved['batch'][index])}: {what}", *called, sep=", ")
    return 0


def saved_config(text: str, device: str | None) -> CfgNode:
    """The run's config, for a model whose class counts come with its weights.

    Args:
        text: YAML.
        device: of torch; None: that of the run, cpu where it has gone.

    Raises:
        ValueError: the config is of another version of the package.
    """
    import torch
    from detectron2.config import CfgNode, get_cfg

    from d2_balance.config import add_balance_config
    from d2_balance.data.class_counts import FROM_CHECKPOINT

    cfg = get_cfg()
    add_balance_config(cfg)
    try:
        cfg.merge_from_other_cfg(CfgNode.load_cfg(text))
    except KeyError as error:
        raise ValueError(f"the saved config has a key that is unknown here: {error}") from error
    cfg.MODEL.BALANCE.CLASS_COUNTS_FILE = FROM_CHECKPOINT
    if device is None and cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        device = "cpu"
    cfg.MODEL.DEVICE = device or cfg.MODEL.DEVICE
    return cfg
