"""Checks of a configuration and its data before anything is built.

Every message names the key or the file and says what it must be. What is quick comes first.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)
from detectron2.modeling.meta_arch.rcnn import GeneralizedRCNN
from detectron2.modeling.meta_arch.retinanet import RetinaNet
from detectron2.utils import comm

from d2_balance.data import (
    check_categories_match,
    check_masks,
    check_num_classes,
    require_image_labels,
)
from d2_balance.data.catalog.external import is_external
from d2_balance.data.catalog.register import load_dataset, registered_file
from d2_balance.data.checks.classes import configured_num_classes
from d2_balance.data.checks.coverage import (
    classes_with_objects,
    log_left_out_negatives,
    log_unseen_classes,
)
from d2_balance.data.checks.images import check_image_sizes
from d2_balance.data.class_counts import FROM_CHECKPOINT
from d2_balance.data.columns import IMAGE_LABEL_KEYS
from d2_balance.data.ignore_regions import region_files
from d2_balance.data.priors.foreground import ForegroundPrior
from d2_balance.data.records import objects_of
from d2_balance.modeling.build import (
    build_anchor_sampler,
    build_box_loss,
    build_cls_loss,
    build_proposal_sampler,
    build_reweighters,
)
from d2_balance.modeling.meta_arch.fcos import BalancedFCOS
from d2_balance.modeling.roi_heads.feature_memory import check_memory
from d2_balance.modeling.tta import check_test_augmentation
from d2_balance.utils.config_tree import changed
from d2_balance.utils.names import closest
from d2_balance.utils.rules import check_values

from ..best_per_class import check_best_per_class
from ..hooks.best import check_best
from ..hooks.ema import check_ema
from ..hooks.validation_loss import check_validation_loss
from ..hooks.writers import check_logs
from ..resume.checkpoint import resumable_files
from ..resume.data_stream import check_sampler
from .norms import check_norms
from .pretrained import check_weights_file
from .rules import RULES
from .scaling import check_reference_batch
from .unused import check_losses_are_used

# Images of a set whose sizes are compared with the annotations before a run: enough to notice
# another copy of the dataset, and a second or two on a slow disk.
_SIZES_LOOKED_AT = 200


logger = logging.getLogger(__name__)


def validate(
    cfg: CfgNode, *, eval_only: bool = False, resume: bool = False, registered: bool = True
) -> None:
    """Check everything that can be checked before the model and the loaders are built.

    Loads the datasets, as the run will.

    Args:
        cfg: the full config; DATASETS.REGISTER is registered already.
        eval_only: True leaves the training sets alone, which may not be on this machine.
        resume: True does not ask for MODEL.WEIGHTS where OUTPUT_DIR holds a checkpoint.
        registered: False leaves the names of the model's parts alone; a lazy config has classes.

    Raises:
        ValueError: naming the key or file.
    """
    if registered:
        check_registered_names(cfg)
        check_losses_are_used(cfg)
    check_values(cfg, RULES)
    check_losses(cfg, eval_only)
    check_test_augmentation(cfg)
    check_best_per_class(cfg)
    check_dataset_names(cfg, eval_only)
    for check in () if eval_only else _OF_TRAINING:
        check(cfg)
    check_weights(cfg, eval_only, resume)
    check_data(cfg, eval_only)


def check_step(cfg: CfgNode) -> None:
    """Check that the device has the precision, and that the micro-batches divide the batch.

    Raises:
        ValueError: naming the key.
    """
    amp, ranks = cfg.SOLVER.AMP, comm.get_world_size()
    cuda = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
    if amp.ENABLED and amp.PRECISION == "bf16" and cuda and not torch.cuda.is_bf16_supported():
        raise ValueError("SOLVER.AMP.PRECISION bf16 is beyond this GPU; set fp16.")
    count, batch = cfg.SOLVER.GRAD_ACCUM_STEPS, cfg.SOLVER.IMS_PER_BATCH
    if count < 1 or batch % (ranks * count):
        raise ValueError(
            f"SOLVER.GRAD_ACCUM_STEPS is {count}; must be an integer of at least 1 that divides "
            f"the images of a rank, SOLVER.IMS_PER_BATCH {batch} over {ranks} processes."
        )


def check_prior(cfg: CfgNode) -> None:
    """Check that MODEL.BALANCE.PRIOR_FILE, which a training starts from, can be read.

    Raises:
        ValueError: naming the key and the file.
    """
    path = cfg.MODEL.BALANCE.PRIOR_FILE
    if path:
        try:
            ForegroundPrior.load(path)
        except ValueError as error:
            raise ValueError(f"MODEL.BALANCE.PRIOR_FILE: {error}") from error


_OF_TRAINING: tuple[Callable[[CfgNode], Any], ...] = (
    check_step,
    check_sampler,
    check_norms,
    region_files,
    check_prior,
    check_reference_batch,
    check_ema,
    check_validation_loss,
    check_best,
    check_logs,
)


def check_registered_names(cfg: CfgNode) -> None:
    """Check the names of the parts that the model is made of.

    Raises:
        ValueError: a name is not registered with Detectron2.
    """
    names = [
        ("MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE, META_ARCH_REGISTRY),
        ("MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME, BACKBONE_REGISTRY),
        ("MODEL.ROI_HEADS.NAME", cfg.MODEL.ROI_HEADS.NAME, ROI_HEADS_REGISTRY),
    ]
    generator = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    if generator != "PrecomputedProposals":  # Detectron2's word for none
        names.append(("MODEL.PROPOSAL_GENERATOR.NAME", generator, PROPOSAL_GENERATOR_REGISTRY))
    for key, name, registry in names:
        if name not in registry:
            hint = closest(name, (known for known, _ in registry))
            raise ValueError(f"{key}: {name!r} is unknown; {hint}")


def check_losses(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check names and arguments of the losses, without the quantities that come from the data.

    Raises:
        ValueError: naming the key.
    """
    if not eval_only and cfg.MODEL.BALANCE.CLASS_COUNTS_FILE == FROM_CHECKPOINT:
        # a new run would train with counts of zero, which make every class one of the tail
        raise ValueError(
            f'MODEL.BALANCE.CLASS_COUNTS_FILE "{FROM_CHECKPOINT}" is for --eval-only; in training '
            'it must be "", which counts on DATASETS.TRAIN, or a file.'
        )
    check_memory(cfg)
    bare = changed(cfg, {"MODEL.BALANCE.CLASS_COUNTS_FILE": FROM_CHECKPOINT})
    num_classes = configured_num_classes(cfg)
    for build in (
        build_cls_loss,
        build_box_loss,
        build_reweighters,
        build_proposal_sampler,
        build_anchor_sampler,
    ):
        build(bare, num_classes)
    for build in (build_cls_loss, build_box_loss, build_anchor_sampler):
        build(bare, 1, "RPN")


def check_dataset_names(cfg: CfgNode, eval_only: bool = False) -> None:
    """Check that there are datasets and that their names are registered.

    Raises:
        ValueError: with the names that look alike.
    """
    needed = "TEST" if eval_only else "TRAIN"
    if not cfg.DATASETS[needed]:
        raise ValueError(
            f"DATASETS.{needed} is empty; it must name at least one dataset "
            "(--config-file, or DATASETS.REGISTER for your own files)."
        )
    for key in ("TEST",) if eval_only else ("TRAIN", "TEST"):
        for name in cfg.DATASETS[key]:
            if name not in DatasetCatalog:
                raise ValueError(
                    f"DATASETS.{key}: the dataset {name!r} is not registered; "
                    f"{closest(name, DatasetCatalog.list())} DATASETS.REGISTER takes your own "
                    "files."
                )


def check_weights(cfg: CfgNode, eval_only: bool = False, resume: bool = False) -> None:
    """Check that MODEL.WEIGHTS can be read; a file of the model zoo is downloaded.

    Raises:
        ValueError: saying what to set.
    """
    weights = cfg.MODEL.WEIGHTS
    if resume and resumable_files(cfg.OUTPUT_DIR):
        return
    if not weights:
        if eval_only:
            raise ValueError(
                "--eval-only needs MODEL.WEIGHTS, or --resume for the last checkpoint in "
                "OUTPUT_DIR; both are missing."
            )
        return
    check_weights_file(weights)


def check_data(cfg: CfgNode, eval_only: bool = False) -> None:
    """Load the datasets and check them against the model and against each other.

    Raises:
        ValueError: naming the dataset or file, and the key to set.
    """
    train = () if eval_only else tuple(cfg.DATASETS.TRAIN)
    test = tuple(cfg.DATASETS.TEST)
    seen: dict[str, set[int]] = {}
    for name in dict.fromkeys((*train, *test)):
        dataset_dicts = load_dataset(name)
        if name in train:
            check_train_set(cfg, dataset_dicts, name)
        if isinstance(dataset_dicts, Sequence):
            check_image_sizes(dataset_dicts, name, limit=_SIZES_LOOKED_AT)
            seen[name] = classes_with_objects(dataset_dicts)
    if _is_a(cfg, GeneralizedRCNN, RetinaNet, BalancedFCOS):  # other models have keys of their own
        check_num_classes(cfg, (*train, *test))
    described = [name for name in (*train, *test) if _has_classes(name)]
    if len(described) == len(train) + len(test):
        check_categories_match(train, test)
        if train and all(name in seen for name in train):
            trained = set().union(*(seen[name] for name in train))
            for name in set(test) & set(seen):
                classes = MetadataCatalog.get(name).thing_classes
                log_unseen_classes(trained, seen[name], classes, (", ".join(train), name))


def check_train_set(cfg: CfgNode, dataset_dicts: Sequence[dict[str, Any]], name: str) -> None:
    """Check one training set against what the model and the loss need.

    Raises:
        ValueError: naming the dataset and the key to set.
    """
    if not isinstance(dataset_dicts, Sequence):
        return  # a torch dataset of the user's own, which is not looked through here
    crowd = objects_of(dataset_dicts).crowd
    if not len(crowd):
        raise ValueError(
            f"the dataset {name!r} has {len(dataset_dicts)} images and no annotation; a "
            "training set needs at least one (DATASETS.TRAIN)."
        )
    if crowd.all():
        raise ValueError(
            f"the dataset {name!r} has nothing to train on: {len(crowd)} of {len(crowd)} objects "
            "have iscrowd 1 (or ignore 1), as CVAT and datumaro write masks; set iscrowd to 0."
        )
    if cfg.MODEL.KEYPOINT_ON and registered_file(name):
        raise ValueError(
            f"MODEL.KEYPOINT_ON: the keypoints of {name!r} are not read from files of "
            "DATASETS.REGISTER; register it with Detectron2's register_coco_instances, or set "
            "MODEL.KEYPOINT_ON False"
        )
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        log_left_out_negatives(dataset_dicts, name)
    external = is_external(name)  # whose labels are lists that may be empty, and have a meaning
    if not external:
        check_image_labels(cfg, dataset_dicts, name)
    if cfg.MODEL.MASK_ON and _is_a(cfg, GeneralizedRCNN):
        check_masks(dataset_dicts, name, cfg.INPUT.MASK_FORMAT, boxes_too=external)


def check_image_labels(cfg: CfgNode, records: Sequence[dict[str, Any]], name: str) -> None:
    """Check that a training set has the image-level labels it needs; log what "auto" means.

    Raises:
        ValueError: USE_IMAGE_LEVEL_LABELS is "always" and there are none.
    """
    loss = cfg.MODEL.BALANCE.CLS_LOSS.upper()
    wanted = cfg.MODEL.BALANCE.get(loss, {}).get("USE_IMAGE_LEVEL_LABELS", "never")
    key = f"MODEL.BALANCE.{loss}.USE_IMAGE_LEVEL_LABELS"
    if wanted == "auto":
        found = any(record.get(field) for record in records for field in IMAGE_LABEL_KEYS)
        use = "has image-level labels, and the loss uses them" if found else "has none"
        logger.info(f"{key} is auto: {name} {use}.")
    elif wanted == "always":
        require_image_labels(records, name, key)


def _has_classes(name: str) -> bool:
    return MetadataCatalog.get(name).get("thing_classes") is not None


def _is_a(cfg: CfgNode, *models: type) -> bool:
    name = cfg.MODEL.META_ARCHITECTURE
    # a lazy config may have a class that is not registered
    return name in META_ARCH_REGISTRY and issubclass(META_ARCH_REGISTRY.get(name), models)
