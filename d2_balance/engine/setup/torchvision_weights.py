"""ResNets of torchvision as backbones: torchvision://resnet50, or a file saved by torchvision.

Names are translated to Detectron2's, which then finds the backbone of the model by them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode
from detectron2.utils.file_io import PathHandler, PathManager
from torchvision.models import get_model_weights, list_models

from d2_balance.utils.names import closest

PREFIX = "torchvision://"
# torchvision normalises RGB of [0, 1]; these are its figures times 255
PIXEL_MEAN, PIXEL_STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

_RULES = (
    (re.compile(r"^layer(\d)\."), lambda m: f"res{int(m[1]) + 1}."),
    (re.compile(r"^(conv1|bn1)\."), lambda m: f"stem.{m[1]}."),
    (re.compile(r"\bbn(\d)\."), lambda m: f"conv{m[1]}.norm."),
    (re.compile(r"downsample\.0\."), lambda m: "shortcut."),
    (re.compile(r"downsample\.1\."), lambda m: "shortcut.norm."),
)
_NEEDED = ("conv1.weight", "bn1.weight", "layer1.0.conv1.weight", "layer4.0.conv1.weight")


def is_torchvision_resnet(weights: Mapping[str, Any]) -> bool:
    """Return whether names are those of torchvision's ResNet, ResNeXt or Wide ResNet."""
    return all(name in weights for name in _NEEDED)


def as_detectron2(weights: Mapping[str, Any]) -> dict[str, Any]:
    """Return the tensors of a ResNet under Detectron2's names, without its classifier."""
    found = {}
    for name, value in weights.items():
        if name.startswith("fc.") or name.endswith("num_batches_tracked"):
            continue
        for pattern, new in _RULES:
            name = pattern.sub(new, name)
        found[name] = value
    return found


def settings_warning(cfg: CfgNode) -> str:
    """Return what a config has to say for torchvision's weights and does not; "" where it does."""
    wanted = {
        "INPUT.FORMAT": (cfg.INPUT.FORMAT, "RGB"),
        "MODEL.PIXEL_MEAN": (tuple(cfg.MODEL.PIXEL_MEAN), PIXEL_MEAN),
        "MODEL.PIXEL_STD": (tuple(cfg.MODEL.PIXEL_STD), PIXEL_STD),
        "MODEL.RESNETS.STRIDE_IN_1X1": (cfg.MODEL.RESNETS.STRIDE_IN_1X1, False),
    }
    wrong = [f'{key} "{value}"' for key, (own, value) in wanted.items() if own != value]
    if not wrong:
        return ""
    return f"The weights are torchvision's, which were trained with other settings: {wrong}."


class TorchvisionHandler(PathHandler):
    """Resolves torchvision://MODEL and torchvision://MODEL/WEIGHTS, as torchvision calls them."""

    def _get_supported_prefixes(self) -> list[str]:
        return [PREFIX]

    def _get_local_path(self, path: str, **kwargs: Any) -> str:
        return PathManager.get_local_path(torchvision_url(path), **kwargs)

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return PathManager.open(self._get_local_path(path), mode, **kwargs)


def torchvision_url(path: str) -> str:
    """Return the web address of torchvision://MODEL[/WEIGHTS].

    Raises:
        ValueError: an unknown name; the message says which are known.
    """
    model, _, name = path.removeprefix(PREFIX).partition("/")
    models = [m for m in list_models() if re.search(r"^(wide_)?resne", m)]
    if model not in models:
        raise ValueError(
            f"MODEL.WEIGHTS: torchvision has no ResNet {model!r}; {closest(model, models)}"
        )
    known = get_model_weights(model)
    if not name:
        return known.DEFAULT.url
    if name not in known.__members__:
        raise ValueError(
            f"MODEL.WEIGHTS: torchvision has no weights {name!r} of {model}; must be one of "
            f"{', '.join(known.__members__)}."
        )
    return known[name].url


PathManager.register_handler(TorchvisionHandler())
