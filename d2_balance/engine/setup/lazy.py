"""Python configs (Detectron2's LazyConfig) for the same trainer.

A lazy config has `model`, `dataloader`, `optimizer`, `lr_multiplier` and `train`, as Detectron2's
own have, and `run` with keys under their names in YAML, for example
`run = dict(TEST=dict(BEST=dict(METRIC="bbox/APr")))`. Losses are objects: `cls_loss=L(GHMCLoss)()`.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import os
from collections.abc import Iterable, Sequence
from typing import Any

import yaml
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import DatasetMapper
from detectron2.data.samplers import TrainingSampler
from detectron2.evaluation import DatasetEvaluator
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from omegaconf import DictConfig, OmegaConf, SCMode
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.optim import Optimizer

from d2_balance.config import add_balance_config
from d2_balance.data.copy_paste import add_copy_paste
from d2_balance.data.mapper import BalancedMapper
from d2_balance.data.unreadable import SkipUnreadable
from d2_balance.modeling.build import argument_key
from d2_balance.utils.config_tree import leaves
from d2_balance.utils.workers import shielded

from ..resume.data_stream import TrainStream
from ..resume.random_state import seeded
from ..step import clipped
from ..trainer import BalancedTrainer, finished_model
from .config_file import find_config, merge_overrides, read_config
from .lazy_model import output_layers, target

NEEDED = ("model", "dataloader", "optimizer", "lr_multiplier", "train")
SAVED = "lazy.yaml"
"""File of OUTPUT_DIR that holds the lazy config of a run; train_net.py takes it."""

_NEED_TIMM = ("ViT", "MViT", "SwinTransformer")

# name in `train` to key
_TRAIN_KEYS = {
    "cudnn_benchmark": "CUDNN_BENCHMARK",
    "output_dir": "OUTPUT_DIR",
    "init_checkpoint": "MODEL.WEIGHTS",
    "max_iter": "SOLVER.MAX_ITER",
    "amp.enabled": "SOLVER.AMP.ENABLED",
    "checkpointer.period": "SOLVER.CHECKPOINT_PERIOD",
    "eval_period": "TEST.EVAL_PERIOD",
    "device": "MODEL.DEVICE",
    "seed": "SEED",
}


def is_lazy(path: str) -> bool:
    """Return whether a file is a Python config, or a YAML file that `LazyConfig.save` wrote."""
    if not path.endswith((".yaml", ".yml")):
        return path.endswith(".py")
    with PathManager.open(find_config(path)) as file:
        return any(line.startswith("model:") for line in file)  # Detectron2's YAML has MODEL


def read_run(path: str, overrides: Sequence[str] = ()) -> tuple[CfgNode, type[BalancedTrainer]]:
    """Return the config of a run and its trainer, from a YAML or a lazy config.

    Args:
        path: a file, or "" for Detectron2's defaults.
        overrides: KEY VALUE pairs; for lazy configs name=value.

    Raises:
        ValueError: the file or an override cannot be used.
    """
    if not (path and is_lazy(path)):
        return read_config(path, overrides), BalancedTrainer
    lazy = read_lazy(path, overrides)
    _check_packages(lazy, path)
    return run_config(lazy), lazy_trainer(lazy)


def read_lazy(path: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return a lazy config with overrides, such as optimizer.lr=0.01.

    Raises:
        ValueError: it cannot be loaded, lacks a part, or an override does not fit.
    """
    try:
        lazy = LazyConfig.load(find_config(path))
    except (OSError, SyntaxError, ImportError, NameError, KeyError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    missing = [name for name in NEEDED if name not in lazy]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}; needed are {', '.join(NEEDED)}.")
    for entry in overrides:
        name = entry.partition("=")[0]
        if "=" not in entry or (
            not name.startswith("run.") and OmegaConf.select(lazy, name, default=lazy) is lazy
        ):
            raise ValueError(
                f"{entry!r}: {path} is a lazy config; overrides are name=value of what it has, for "
                "example optimizer.lr=0.01, or run.KEY=value."
            )
    try:
        return LazyConfig.apply_overrides(lazy, list(overrides))
    except (OmegaConfBaseException, KeyError, ValueError) as error:
        raise ValueError(f"command line: {error}") from error


def _check_packages(lazy: DictConfig, path: str) -> None:
    """Refuse a transformer of Detectron2 where the package that it is made of is missing."""
    backbone = _backbone(lazy.model)
    needs_timm = any(name in backbone for name in _NEED_TIMM)
    if needs_timm and importlib.util.find_spec("timm") is None:
        raise ValueError(
            f"{path}: the backbone {backbone} needs the package timm: pip install "
            "'d2-balance[vitdet]' or pip install timm."
        )


def run_config(lazy: DictConfig) -> CfgNode:
    """Return the keys of a run that hooks, checks and the summary read, from a lazy config.

    The model, the optimizer and the data are made from the lazy config itself; what is said here of
    them names them.

    Raises:
        ValueError: `run` has a key that does not exist.
    """
    cfg = get_cfg()
    add_balance_config(cfg)
    values: dict[str, Any] = {}
    for name, key in _TRAIN_KEYS.items():
        value = OmegaConf.select(lazy.train, name)
        if value is not None:
            values[key] = value
    loaders = lazy.dataloader
    values["DATASETS.TRAIN"], values["DATASETS.TEST"] = _names(loaders.train), _names(loaders.test)
    values["SOLVER.IMS_PER_BATCH"] = loaders.train.total_batch_size
    values["DATALOADER.NUM_WORKERS"] = loaders.train.get("num_workers", 0)
    if "lr" in lazy.optimizer:
        values["SOLVER.BASE_LR"] = float(lazy.optimizer.lr)
    if "input_format" in lazy.model:
        values["INPUT.FORMAT"] = lazy.model.input_format
    values |= _model_keys(lazy.model)
    merge_overrides(cfg, [part for pair in values.items() for part in pair], "lazy config")
    run: Any = OmegaConf.to_container(lazy.get("run", OmegaConf.create()), resolve=True)
    merge_overrides(cfg, [part for pair in leaves(run) for part in pair], "run")
    return cfg


def _model_keys(model: DictConfig) -> dict[str, Any]:
    """Return the names of the parts of a model under their keys in YAML."""
    keys: dict[str, Any] = {"MODEL.META_ARCHITECTURE": _name(model)}
    keys["MODEL.BACKBONE.NAME"] = _backbone(model)
    if "roi_heads" in model:
        heads = model.roi_heads
        keys["MODEL.ROI_HEADS.NAME"] = _name(heads)
        keys["MODEL.ROI_HEADS.NUM_CLASSES"] = heads.num_classes
        keys["MODEL.PROPOSAL_GENERATOR.NAME"] = _name(model.proposal_generator)
        keys["MODEL.MASK_ON"] = heads.get("mask_head") is not None
        keys["MODEL.KEYPOINT_ON"] = heads.get("keypoint_head") is not None
    elif "num_classes" in model:
        node = "FCOS" if "FCOS" in keys["MODEL.META_ARCHITECTURE"] else "RETINANET"
        keys[f"MODEL.{node}.NUM_CLASSES"] = model.num_classes
    head = output_layers(model)[0]  # the stages of a cascade have the same losses
    for part, key in (("cls_loss", "CLS_LOSS"), ("box_loss", "BOX_LOSS")):
        loss = head.get(part)
        if loss is None:
            continue
        name = target(loss).name
        keys[f"MODEL.BALANCE.{key}"] = name
        for argument in inspect.signature(target(loss)).parameters.values():
            if argument.default is not argument.empty and argument.name in loss:
                place = f"MODEL.BALANCE.{name.upper()}.{argument_key(argument.name)}"
                keys[place] = _plain(loss[argument.name])
    for part in ("cls_weight", "box_weight"):
        if part in head:
            keys[f"MODEL.BALANCE.{part.replace('_', '_LOSS_').upper()}"] = float(head[part])
    return keys


def _backbone(model: DictConfig) -> str:
    """Return the name of a backbone for people, such as "FPN of ResNet-50"."""
    node = model.backbone
    text = _name(node)
    for inner in ("bottom_up", "net"):
        if inner in node:
            node = node[inner]
            text += f" of {_name(node)}"
    depth = OmegaConf.select(node, "stages.depth") or node.get("depth")
    width = node.get("embed_dim")
    if depth is not None:
        text += f"-{depth}" if width is None else f" ({depth} blocks, {width} channels)"
    return text


def _plain(value: Any) -> Any:
    if not OmegaConf.is_config(value):
        return value
    return OmegaConf.to_container(value, resolve=True, structured_config_mode=SCMode.INSTANTIATE)


def _in_order(value: Any) -> Any:
    """Return a model's parts by name: the order in which they draw random weights.

    YAML sorts names; a config that was saved starts so from the weights of the Python file.
    """
    if isinstance(value, dict):
        return {key: _in_order(value[key]) for key in sorted(value)}
    return [_in_order(part) for part in value] if isinstance(value, list) else value


def _name(node: DictConfig) -> str:
    called = target(node)
    # a bound method such as ResNet.make_stage goes by the name of its class
    return getattr(called, "__self__", called).__name__


def _names(loader: DictConfig) -> tuple[str, ...]:
    names = loader.dataset.names
    return (names,) if isinstance(names, str) else tuple(names)


def lazy_trainer(config: DictConfig) -> type[BalancedTrainer]:
    """Return the trainer whose model, data, optimizer and schedule are those of a lazy config."""

    class LazyTrainer(BalancedTrainer):
        lazy = config

        @classmethod
        def ddp_options(cls) -> dict[str, Any]:
            return super().ddp_options() | _plain(cls.lazy.train.get("ddp") or {})

        @classmethod
        def build_model(cls, cfg: CfgNode) -> nn.Module:
            model = instantiate(_in_order(_plain(cls.lazy.model)))
            return finished_model(model.to(cfg.MODEL.DEVICE), cfg)

        @classmethod
        def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> Optimizer:
            node = copy.deepcopy(cls.lazy.optimizer)
            node.params.model = model
            if "lr" in node:
                node.lr = cfg.SOLVER.BASE_LR  # REFERENCE_IMS_PER_BATCH may have scaled it
            return clipped(instantiate(node), cfg)

        @classmethod
        def build_lr_scheduler(cls, cfg: CfgNode, optimizer: Optimizer) -> LRMultiplier:
            return LRMultiplier(optimizer, instantiate(cls.lazy.lr_multiplier), cfg.SOLVER.MAX_ITER)

        @classmethod
        def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
            return _train_stream(cls.lazy.dataloader.train, cfg)

        @classmethod
        def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
            node = copy.deepcopy(cls.lazy.dataloader.test)
            node.dataset.names = dataset_name
            loader = _plain(node)
            loader["mapper"] = {"_target_": SkipUnreadable, "mapper": loader["mapper"]}
            return shielded(instantiate(loader))

        @classmethod
        def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
            node = cls.lazy.dataloader.get("evaluator")
            if node is None:
                return super().build_evaluator(cfg, dataset_name)
            node = copy.deepcopy(node)
            node.dataset_name = dataset_name
            return instantiate(node)

    return LazyTrainer


def _train_stream(node: DictConfig, cfg: CfgNode) -> TrainStream:
    """Our stream from the arguments of Detectron2's build_detection_train_loader."""
    ranks = comm.get_world_size()
    if cfg.SOLVER.IMS_PER_BATCH % ranks:
        raise ValueError(
            f"dataloader.train.total_batch_size is {cfg.SOLVER.IMS_PER_BATCH}; must be a "
            f"multiple of the number of processes, {ranks}."
        )
    seed = cfg.SEED if cfg.SEED >= 0 else comm.shared_random_seed()
    with seeded(seed):  # the sampler draws the seed of its order from numpy
        dataset = instantiate(node.dataset)
        mapper = instantiate(_balanced_mapper(node.mapper))
        add_copy_paste(mapper, cfg, dataset)
        sampler = node.get("sampler")
        sampler = TrainingSampler(len(dataset)) if sampler is None else instantiate(sampler)
    return TrainStream(
        dataset,
        mapper,
        sampler,
        cfg.SOLVER.IMS_PER_BATCH // ranks,
        group_by_aspect=node.get("aspect_ratio_grouping", True),
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
        max_unreadable=cfg.DATALOADER.MAX_UNREADABLE_IMAGES,
    )


def _balanced_mapper(node: DictConfig) -> DictConfig:
    """Return the mapper with ours in place of Detectron2's, which stops at images without objects.

    That is one with `recompute_boxes`; ours also knows ignore regions and objects without masks.
    """
    if target(node) is not DatasetMapper:
        return node
    node = copy.deepcopy(node)
    node._target_ = BalancedMapper
    return node


def save_lazy(trainer: type[BalancedTrainer], directory: str) -> None:
    """Write the lazy config of a run to its directory, in the first process; for YAML none."""
    if trainer.lazy is not None and comm.is_main_process():
        LazyConfig.save(trainer.lazy, os.path.join(directory, SAVED))
