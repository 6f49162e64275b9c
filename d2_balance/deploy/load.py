"""From a run's directory or a checkpoint to a predictor, without any file of the training set."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.config import CfgNode, instantiate
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from d2_balance.data.catalog.from_config import register_from_config
from d2_balance.data.catalog.metadata import category_names
from d2_balance.data.class_counts import FROM_CHECKPOINT
from d2_balance.data.model_classes import (
    FILE,
    ModelClasses,
    class_thresholds,
    read_checkpoint,
)
from d2_balance.engine.hooks.ema import FILE as AVERAGED
from d2_balance.engine.resume.checkpoint import BalancedCheckpointer, check_classifier
from d2_balance.engine.setup.config_file import merge_overrides
from d2_balance.engine.setup.lazy import SAVED as LAZY
from d2_balance.engine.setup.lazy import read_run
from d2_balance.engine.setup.run import last_checkpoint, use_cpu_without_cuda
from d2_balance.utils.names import closest

from .predictor import Predictor

CONFIG = "config.yaml"
_SHOWN = 3  # tensors that a message lists

logger = logging.getLogger(__name__)


def load(
    source: str,
    *,
    weights: str = "",
    config_file: str = "",
    device: str = "",
    score_threshold: float | Mapping[str, float] | None = None,
    names: Sequence[str] | None = None,
    overrides: Sequence[Any] = (),
) -> Predictor:
    """Load a trained model for inference.

    Class names, category ids, score thresholds and class counts are those that the training saved.

    Args:
        source: output directory of a training, or a checkpoint.
        weights: checkpoint of the directory to take, a path or its name there. If not given, the
            averaged weights of a run with SOLVER.EMA, else `model_final.pth`, else the last
            checkpoint.
        config_file: config of a checkpoint that holds none and has none beside it, such as one of
            Detectron2's model zoo.
        device: "cpu", "cuda", ...; if not given, what the config says, or the CPU without CUDA.
        score_threshold: see `Predictor.set_score_threshold`.
        names: K class names, for a checkpoint that was saved without them.
        overrides: more keys of the config and their values, in turn.

    Raises:
        ValueError: the source lacks a config, weights or class names, or they do not fit together;
            the message says which and what to do.
    """
    path, config = _files(source, weights, config_file)
    cfg, build, images = _config(config, path, overrides)
    if device:
        cfg.MODEL.DEVICE = device
    use_cpu_without_cuda(cfg)
    classes = _classes(cfg, path, names)
    _forget_training_files(cfg)
    cfg.freeze()
    model = build(cfg)
    _load_weights(model, path)
    if score_threshold is None and classes.score_thresholds and not class_thresholds(model):
        score_threshold = dict(zip(classes.names, classes.score_thresholds, strict=True))
    predictor = Predictor(model, cfg, classes, path, **images)
    if score_threshold is not None:
        predictor.set_score_threshold(score_threshold)
    logger.info(f"Loaded {path}: {len(classes)} classes, {predictor.activation} scores.")
    return predictor


def _files(source: str, weights: str, config_file: str) -> tuple[str, str]:
    """Paths of the weights and of the config; the latter "" where the checkpoint holds it."""
    if os.path.isdir(source):
        path = _weights_of_run(source, weights)
        directory = source
    elif os.path.isfile(source):
        if weights:
            raise ValueError(f"{source} is a checkpoint; weights are given for a directory only")
        path, directory = source, os.path.dirname(os.path.abspath(source))
    else:
        raise ValueError(
            f"{source!r} does not exist; it must be the output directory of a training, or a "
            "checkpoint (.pth)"
        )
    if config_file:
        return path, config_file
    for name in (LAZY, CONFIG):
        if os.path.isfile(found := os.path.join(directory, name)):
            return path, found
    if path.endswith(".pth") and "config" in read_checkpoint(path):
        return path, ""
    raise ValueError(
        f"{source}: {CONFIG} is missing, and the checkpoint {os.path.basename(path)} holds no "
        "config; give the one that it was trained with (config_file, --config-file)"
    )


def _weights_of_run(directory: str, weights: str) -> str:
    if weights:
        for path in (os.path.join(directory, weights), weights):
            if os.path.isfile(path):
                return path
        there = [name for name in os.listdir(directory) if name.endswith((".pth", ".pkl"))]
        raise ValueError(f"{directory} has no weights {weights!r}; {closest(weights, there)}")
    for name in (f"{AVERAGED}.pth", "model_final.pth"):
        if os.path.isfile(path := os.path.join(directory, name)):
            return path
    if (path := last_checkpoint(directory)) and os.path.isfile(path):
        return path
    raise ValueError(
        f"{directory} holds no weights (model_final.pth or model_0000000.pth); it must be the "
        "output directory of a training that has written a checkpoint"
    )


def _config(config: str, path: str, overrides: Sequence[Any]) -> tuple[CfgNode, Any, dict]:
    """The config, not frozen, the function that builds the model, and what is done to images."""
    if not config:
        cfg, _ = read_run("")
        cfg.merge_from_other_cfg(CfgNode(CfgNode.load_cfg(read_checkpoint(path)["config"])))
        merge_overrides(cfg, overrides, "overrides")
        return _with_weights(cfg, path), build_model, {}
    cfg, trainer = read_run(config, overrides)
    cfg = _with_weights(cfg, path)
    lazy = getattr(trainer, "lazy", None)
    if lazy is None:
        return cfg, build_model, {}
    mapper = instantiate(lazy.dataloader.test.mapper)
    images = {"resize": mapper.augmentations, "input_format": mapper.image_format}
    return cfg, trainer.build_model, images


def _with_weights(cfg: CfgNode, path: str) -> CfgNode:
    cfg.defrost()
    cfg.MODEL.WEIGHTS = path
    cfg.MODEL.BALANCE.COMPILE = False  # compiles losses, which do not run
    return cfg


def _forget_training_files(cfg: CfgNode) -> None:
    """Leave out files of the training, whose content came into the checkpoint."""
    balance = cfg.MODEL.BALANCE
    balance.CLASS_COUNTS_FILE = FROM_CHECKPOINT
    if not os.path.isfile(balance.CALIBRATION.STATISTICS):
        balance.CALIBRATION.STATISTICS = ""
    if balance.PRIOR_FILE and not os.path.isfile(balance.PRIOR_FILE):
        balance.PRIOR_FILE, balance.CLASS_THRESHOLDS = "", False


def _classes(cfg: CfgNode, path: str, names: Sequence[str] | None) -> ModelClasses:
    """The classes saved with the weights, else those of the registered datasets."""
    saved = ModelClasses.of_weights(path)
    if saved is not None and names is None:
        return saved
    if names is not None:
        ids = saved.category_ids if saved else tuple(range(1, len(names) + 1))
        if len(ids) != len(names):
            raise ValueError(f"names has {len(names)} entries; {path} has {len(ids)} classes")
        return ModelClasses(tuple(names), ids)
    try:
        register_from_config(cfg)
        sets = [
            name for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if name in DatasetCatalog
        ]
        by_id = category_names(sets[0])
    except (ValueError, OSError, IndexError) as error:
        raise ValueError(
            f"{path} holds no class names, {FILE} is not beside it, and the datasets of its config "
            "are not here; give the names in the order of training (names=[...], --names FILE)"
        ) from error
    return ModelClasses(tuple(by_id.values()), tuple(by_id))


class _StrictCheckpointer(BalancedCheckpointer):
    """Refuses weights that would leave parameters of the model as they are."""

    path = ""

    def _log_incompatible_keys(self, incompatible: Any) -> None:
        parameters = dict(self.model.named_parameters())
        wrong = [f"{n} is missing" for n in incompatible.missing_keys if n in parameters]
        wrong += [
            f"{name} is {tuple(saved)} and the model's is {tuple(own)}"
            for name, saved, own in incompatible.incorrect_shapes
        ]
        lost = [name for name in incompatible.missing_keys if ".cls_loss." in f".{name}"]
        wrong += [f"{name} is missing" for name in lost]
        if wrong:
            more = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
            raise ValueError(
                f"{self.path} is a checkpoint of another model than its config describes: "
                f"{', '.join(wrong[:_SHOWN])}{more}"
            )


def _load_weights(model: nn.Module, path: str) -> None:
    check_classifier(model, path)
    checkpointer = _StrictCheckpointer(model, save_to_disk=False)
    checkpointer.path = path
    checkpointer.load(path)
    model.eval()
