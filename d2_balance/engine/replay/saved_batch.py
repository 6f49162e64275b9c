"""A batch in a file, with the weights and the config that it takes to run it again.

The file holds tensors, numbers and strings only, so that it loads with `weights_only=True`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints, PolygonMasks, RotatedBoxes
from detectron2.utils import comm
from torch import Tensor, nn

from d2_balance.utils.files import atomic_path

FORMAT = 1
_BY_TENSOR = {cls.__name__: cls for cls in (BitMasks, Boxes, Keypoints, RotatedBoxes)}
_PRECISIONS = {None: "", torch.float16: "fp16", torch.bfloat16: "bf16"}

logger = logging.getLogger(__name__)


class BatchSaver:
    """Writes batches to files `replay_<iteration>_rank<rank>.pt` of a directory.

    Args:
        model: whose weights go with them; not wrapped in DDP.
        config: the run's config as YAML.
        directory: OUTPUT_DIR.
        class_names: K names; None: unknown.
    """

    def __init__(
        self,
        model: nn.Module,
        config: str,
        directory: str,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self._model, self._config, self._directory = model, config, directory
        self._names = class_names

    def save(
        self,
        batch: list[dict[str, Any]],
        *,
        key: tuple[int, ...] | None,
        iteration: int,
        precision: torch.dtype | None,
    ) -> str:
        """Write a batch of this rank.

        Args:
            batch: Detectron2's inputs.
            key: what the random generators were seeded with; None: unknown.
            iteration: from 0.
            precision: of mixed precision; None if it is off.

        Returns:
            Path of the file; "" where it cannot be written, which is logged.
        """
        name = f"replay_{iteration:07d}_rank{comm.get_rank()}.pt"
        path = os.path.join(self._directory, name)
        content = {
            "format": FORMAT,
            "config": self._config,
            "model": self._model.state_dict(),
            "batch": [_plain(record) for record in batch],
            "key": None if key is None else list(key),
            "iteration": iteration,
            "precision": _PRECISIONS[precision],
            "class_names": None if self._names is None else list(self._names),
        }
        try:
            with atomic_path(path) as temporary:
                torch.save(content, temporary)
        except (OSError, RuntimeError) as error:  # torch raises the second on a full disk
            logger.warning(f"The batch could not be saved to {path}: {error}")
            return ""
        return path


def load_saved_batch(path: str) -> dict[str, Any]:
    """Return what `BatchSaver` has written, with the batch as Detectron2's inputs again.

    Raises:
        ValueError: the file is not there or is none of a saved batch.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{path} does not exist; must be a file replay_*.pt of a run.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch, zipfile and pickle raise their own
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or "batch" not in content:
        raise ValueError(f"{path} is no saved batch; must be a file replay_*.pt of a run.")
    content["batch"] = [_record(plain) for plain in content["batch"]]
    return content


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors, numbers, strings, lists and dicts of a record, and leave out the rest."""
    plain = {}
    for name, value in record.items():
        if isinstance(value, Instances):
            plain[name] = {"image_size": list(value.image_size), "fields": _fields(value)}
        elif _is_plain(value):
            plain[name] = value
        elif isinstance(value, np.generic):
            plain[name] = value.item()
    return plain


def _fields(instances: Instances) -> dict[str, list[Any]]:
    fields = {}
    for name, value in instances.get_fields().items():
        if isinstance(value, PolygonMasks):
            polygons = [[torch.as_tensor(p) for p in each] for each in value.polygons]
            fields[name] = ["PolygonMasks", polygons]
        elif type(value).__name__ in _BY_TENSOR:
            fields[name] = [type(value).__name__, value.tensor]
        elif _is_plain(value):
            fields[name] = ["", value]
    return fields


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    if isinstance(value, dict):
        return all(isinstance(k, (str, int)) and _is_plain(v) for k, v in value.items())
    return value is None or type(value) in (bool, int, float, str, Tensor)


def _record(plain: dict[str, Any]) -> dict[str, Any]:
    record = dict(plain)
    for name, value in plain.items():
        if isinstance(value, dict) and value.keys() == {"image_size", "fields"}:
            instances = Instances(tuple(value["image_size"]))
            for field, (kind, content) in value["fields"].items():
                instances.set(field, _field(kind, content))
            record[name] = instances
    return record


def _field(kind: str, content: Any) -> Any:
    if kind == "PolygonMasks":
        return PolygonMasks([[p.numpy() for p in each] for each in content])
    return _BY_TENSOR[kind](content) if kind else content
