"""Weights that a run starts from: the model zoo, torchvision, or a file; and a table of what came.

A layer whose tensors do not fit keeps all of its initial values. A weight of another shape beside a
bias that happens to fit would lose the initial probability that the bias stands for.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlparse

import torch
from detectron2.checkpoint.catalog import ModelCatalog, ModelCatalogHandler
from detectron2.config import CfgNode
from detectron2.utils.file_io import Detectron2Handler, PathManager
from iopath.common.file_io import get_cache_dir
from torch import Tensor, nn

from d2_balance.data.model_classes import ModelClasses, class_activation
from d2_balance.utils.names import closest, listed
from d2_balance.utils.text import table

from ..resume.checkpoint import BalancedCheckpointer
from .torchvision_weights import (
    PREFIX,
    as_detectron2,
    is_torchvision_resnet,
    settings_warning,
    torchvision_url,
)

KEY = "MODEL.BALANCE.REINITIALIZE"

LOADED = "loaded"
SHAPE = "skipped (shape)"
NEW = "skipped (missing)"
REINITIALIZED = "re-initialised"
RUN_STATE = "skipped (state)"
UNUSED = "unused"

_SHOWN = 40  # tensors of one status

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WeightRow:
    """What happened to one tensor.

    Attributes:
        name: in the model; of an unused one in the file.
        status: LOADED; SHAPE, NEW, RUN_STATE and REINITIALIZED, which keep their initial values; or
            UNUSED.
        reason: why it was not loaded.
        shape: in the model; of an unused one in the file.
    """

    name: str
    status: str
    reason: str
    shape: tuple[int, ...]


def weights_table(rows: Sequence[WeightRow]) -> str:
    """Return a table of what was loaded by part of the model, and of each tensor that was not.

    The sums stand below it.
    """
    parts: dict[str, int] = {}
    for row in rows:
        if row.status == LOADED:
            part = ".".join(row.name.split(".")[:2])
            parts[part] = parts.get(part, 0) + 1
    lines = [(f"{part}.* ({count})", LOADED, "", "") for part, count in parts.items()]
    for status in (SHAPE, REINITIALIZED, NEW, RUN_STATE, UNUSED):
        of_status = [row for row in rows if row.status == status]
        lines += [(r.name, status, str(r.shape), r.reason) for r in of_status[:_SHOWN]]
        if len(of_status) > _SHOWN:
            lines.append((f"and {len(of_status) - _SHOWN} more", status, "", ""))
    text = table(lines, ["tensor", "what became of it", "shape", "why"])
    statuses = [row.status for row in rows]
    sums = [f"{statuses.count(status)} {status}" for status in dict.fromkeys(statuses)]
    return f"{text}\n{', '.join(sums)}."


def load_pretrained(
    cfg: CfgNode, model: nn.Module, state: dict[str, Tensor] | None = None
) -> list[WeightRow]:
    """Load MODEL.WEIGHTS into a new model, and log the table of what was loaded and what not.

    Args:
        cfg: with MODEL.WEIGHTS and MODEL.BALANCE.REINITIALIZE.
        model: wrapped in DDP or not.
        state: buffers by name that belong to a run (densities, counters) and are not taken over.

    Returns:
        A row for every tensor of the model, and of the file.

    Raises:
        ValueError: the file cannot be read, or not one of its tensors fits; REINITIALIZE names
            nothing.
    """
    loader = _Loader(model, cfg, state or {})
    if not cfg.MODEL.WEIGHTS:
        return []
    loader.load(cfg.MODEL.WEIGHTS, checkpointables=[])
    logger.info(f"Weights from {cfg.MODEL.WEIGHTS}:\n{weights_table(loader.rows)}")
    _warn_of_another_activation(loader.model, cfg.MODEL.WEIGHTS, loader.rows)
    return loader.rows


def _warn_of_another_activation(model: nn.Module, weights: str, rows: Sequence[WeightRow]) -> None:
    """Say so if a classifier of softmax scores goes on with sigmoid scores, or the other way."""
    saved = ModelClasses.of_weights(weights)
    trained, own = None if saved is None else saved.activation, class_activation(model)
    taken = any(
        row.status == LOADED and "cls_score" in row.name and "proposal" not in row.name
        for row in rows
    )
    if trained and own and trained != own and taken:
        logger.warning(
            f"{weights} was trained with {trained} scores, and the config makes {own} scores; "
            f"{KEY} \"['cls_score']\" starts the classifier anew."
        )


def check_reinitialize(names: Sequence[str], parameters: Sequence[str]) -> None:
    """Check that every entry of REINITIALIZE is part of the name of a parameter.

    Raises:
        ValueError: naming the entry.
    """
    for entry in names:
        if not isinstance(entry, str) or not entry or not any(entry in n for n in parameters):
            parts = {part for name in parameters for part in name.split(".") if not part.isdigit()}
            raise ValueError(
                f"{KEY}: {entry!r} is no part of the name of a parameter; "
                f"{closest(str(entry), parts) or 'it must be a part such as cls_score.'}"
            )


class _Loader(BalancedCheckpointer):
    """Loads weights into a model that keeps what does not fit, and notes what happened.

    Attributes:
        rows: one for each tensor of the model and of the file, after `load`.
    """

    def __init__(self, model: nn.Module, cfg: CfgNode, state: dict[str, Tensor]) -> None:
        super().__init__(model)
        self._run_state = state
        self._settings, self._path = cfg, cfg.MODEL.WEIGHTS
        self._reinitialize = list(cfg.MODEL.BALANCE.REINITIALIZE)
        self.rows: list[WeightRow] = []
        check_reinitialize(self._reinitialize, [n for n, _ in self.model.named_parameters()])

    def _load_file(self, filename: str) -> dict[str, Any]:
        loaded = super()._load_file(filename)
        if is_torchvision_resnet(loaded["model"]):
            loaded = {"model": as_detectron2(loaded["model"]), "matching_heuristics": True}
            if warning := settings_warning(self._settings):
                logger.warning(warning)
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        own = {name: value.clone() for name, value in self.model.state_dict().items()}
        self._convert_ndarray_to_tensor(checkpoint["model"])
        heuristics = checkpoint.get("matching_heuristics", False)
        found = {n.removeprefix("module."): tuple(v.shape) for n, v in checkpoint["model"].items()}
        result = super()._load_model(checkpoint)
        shapes = {name: saved for name, saved, _ in result.incorrect_shapes}
        missing, unused = {*result.missing_keys, *shapes}, []
        if not heuristics:  # names in converted files are others
            missing |= own.keys() - found.keys()  # batch norms fill in what an old file lacks
            unused = [name for name in found if name not in own]
        if not own.keys() - missing - self._run_state.keys():
            raise ValueError(
                f"MODEL.WEIGHTS {self._path} is of another architecture: none of its "
                f"{len(found)} tensors fits the model. It holds {listed(list(found), 3)}; the "
                f"model has {listed(list(own), 3)}."
            )
        self.rows = self._rows(own, missing, shapes)
        why = "the model has none of this name"
        self.rows += [WeightRow(name, UNUSED, why, found[name]) for name in unused]
        self._put_back(own)

    def _rows(
        self, own: dict[str, Tensor], missing: set[str], shapes: dict[str, tuple[int, ...]]
    ) -> list[WeightRow]:
        parameters = dict(self.model.named_parameters())
        broken = {_layer(name) for name in missing & parameters.keys()}
        rows = []
        for name, value in own.items():
            shape = tuple(value.shape)
            if name in self._run_state:
                rows.append(WeightRow(name, RUN_STATE, "belongs to a run and its data", shape))
            elif any(entry in name for entry in self._reinitialize):
                rows.append(WeightRow(name, REINITIALIZED, f"named in {KEY}", shape))
            elif name in shapes:
                reason = f"the file has {shapes[name]}"
                rows.append(WeightRow(name, SHAPE, reason, shape))
            elif name in missing:
                rows.append(WeightRow(name, NEW, "the file has none that fits", shape))
            elif _layer(name) in broken and name in parameters:
                reason = "another tensor of its layer does not fit"
                rows.append(WeightRow(name, REINITIALIZED, reason, shape))
            else:
                rows.append(WeightRow(name, LOADED, "", shape))
        return rows

    @torch.no_grad()
    def _put_back(self, own: dict[str, Tensor]) -> None:
        """Give initial values back to what was loaded and is not wanted."""
        now = self.model.state_dict()
        for row in self.rows:
            if row.status in (REINITIALIZED, RUN_STATE):
                now[row.name].copy_(own[row.name])


def _layer(name: str) -> str:
    return name.rpartition(".")[0]


def web_address(path: str) -> str:
    """Return the https address that a name of the model zoo or of torchvision stands for."""
    if path.startswith(PREFIX):
        return torchvision_url(path)
    if path.startswith(Detectron2Handler.PREFIX):
        name = path.removeprefix(Detectron2Handler.PREFIX)
        return Detectron2Handler.S3_DETECTRON2_PREFIX + name
    if path.startswith(ModelCatalogHandler.PREFIX):
        return ModelCatalog.get(path.removeprefix(ModelCatalogHandler.PREFIX))
    return path


def cached_file(url: str) -> str:
    """Return the path at which Detectron2 caches the file of a web address."""
    return os.path.join(get_cache_dir(), urlparse(url).path.lstrip("/"))


def check_weights_file(weights: str) -> None:
    """Check that MODEL.WEIGHTS can be read; a file of the network is downloaded.

    Raises:
        ValueError: saying what to set, or which file to put where.
    """
    path = weights.split("?")[0]
    if "://" not in path:
        if not PathManager.isfile(path):
            raise ValueError(
                f"MODEL.WEIGHTS: the file {path!r} does not exist; must be a file, an address "
                "of the model zoo (detectron2://...) or of torchvision (torchvision://resnet50), "
                'or "" for random weights.'
            )
        return
    try:
        PathManager.get_local_path(path)
    except ValueError:
        raise  # of torchvision_weights: an unknown name
    except Exception as error:  # of any network library
        url = path
        with suppress(Exception):
            url = web_address(path)
        raise ValueError(
            f"MODEL.WEIGHTS: {path} cannot be downloaded ({type(error).__name__}: {error}). "
            f"Without network, put {url} from elsewhere to {cached_file(url)}, or set "
            'MODEL.WEIGHTS to where the file lies, or to "" for random weights.'
        ) from error
