"""The trainer: Detectron2's, with the state of the losses treated as part of the run."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, MetadataCatalog, build_detection_test_loader
from detectron2.engine import DefaultTrainer, HookBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter, TensorboardXWriter
from omegaconf import DictConfig
from torch import Tensor, nn

from d2_balance.data.model_classes import ModelClasses
from d2_balance.data.unreadable import SkipUnreadable
from d2_balance.evaluation.evaluators import build_evaluator
from d2_balance.losses import BoxLoss, ClassificationLoss
from d2_balance.modeling.criterion import Normalizer
from d2_balance.modeling.inert import inert_remedies
from d2_balance.modeling.postprocess.statistics import fill_from_weights
from d2_balance.modeling.roi_heads.feature_memory import FeatureMemory
from d2_balance.modeling.tta import AugmentedRCNN, augmentation_config
from d2_balance.reweight import Reweighter
from d2_balance.utils.config_tree import changed
from d2_balance.utils.workers import shielded

from .best_per_class import best_per_class
from .errors import Interrupted, StopTraining
from .hooks.best import BestModel, StopEarly
from .hooks.beta_decay import BetaDecay
from .hooks.ema import WeightAverage
from .hooks.example_detections import ExampleDetections, ImageWriter
from .hooks.interrupt import SaveOnSignal
from .hooks.logit_statistics import CollectLogits
from .hooks.loss_stats import LossStats
from .hooks.nonfinite import (
    FiniteLosses,
    FiniteWeights,
    NonFiniteLossError,
    errors_without_traceback,
)
from .hooks.validation_loss import ValidationLoss
from .hooks.writers import ClassAP, ClassAPWriter, log_writers
from .replay.saved_batch import BatchSaver
from .resume.checkpoint import BalancedCheckpointer, resumable_files
from .resume.data_stream import TrainStream, build_train_stream
from .resume.random_state import SeedSteps
from .resume.run_state import FinishIteration, RunState
from .setup.compiled import compile_losses
from .setup.pretrained import load_pretrained
from .setup.scaling import scale_to_batch
from .setup.trainable import train_only
from .step import CLIP_TYPES, FULL_MODEL, clipped, our_steps

_STATEFUL = (ClassificationLoss, BoxLoss, Normalizer, Reweighter, FeatureMemory)

logger = logging.getLogger(__name__)


class BalancedTrainer(DefaultTrainer):
    """DefaultTrainer for the models of this package.

    - The evaluator is chosen by dataset, see `build_evaluator`.
    - A resumed run sees the same images, augmentations, random numbers and beta as an
      uninterrupted one, and continues with the buffers of the losses.
    - A run that starts from the weights of another one takes over what was learned, and no
      densities, counters or class counts: those belong to the other run and its data.
    - Several ranks work without a GPU, over gloo.
    - A loss that is not finite ends the run before it reaches the weights, with a
      `NonFiniteLossError` that names the loss, the images and the classes.

    Args:
        cfg: config with MODEL.BALANCE. With SEED below 0 a resumed run is not exact; `train_net.py`
            draws a seed and writes it into the run's config.yaml.

    Raises:
        ValueError: the config asks for what cannot work; the message names the key.
    """

    _hooks: list[HookBase]
    lazy: DictConfig | None = None
    """The lazy config that the model, the data and the optimizer are made of."""

    def __init__(self, cfg: CfgNode) -> None:
        if cfg.SOLVER.REFERENCE_IMS_PER_BATCH:  # the commands have scaled it, other callers may not
            cfg = changed(cfg, {})
            scale_to_batch(cfg)
        self._tensorboard: ClassAPWriter | None = None  # in the first process
        self._image_writers: list[ImageWriter] = []  # in the first process
        self._evaluated = -1  # iterations done when it was last evaluated
        with _ddp(self.ddp_options(), cfg.MODEL.DEVICE), our_steps(cfg):
            super().__init__(cfg)
        # this one calls backward and the optimizer
        self._trainer.register_hooks([self._finite_losses])

    @classmethod
    def ddp_options(cls) -> dict[str, Any]:
        """Return the arguments of Detectron2's `create_ddp_model`, besides the model."""
        return {"broadcast_buffers": False}

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, and ours behind the learning rate scheduler.

        The main process has hooks that the others lack (checkpoints, writers), so places are
        counted from the front, where all ranks agree.
        """
        saved = {"cfg": self.cfg, "classes": self._known_classes()}
        self.checkpointer = BalancedCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, **saved, trainer=weakref.proxy(self)
        )
        found = super().build_hooks()
        names = [MetadataCatalog.get(n).get("thing_classes") for n in self.cfg.DATASETS.TRAIN[:1]]
        model: Any = getattr(self.model, "module", self.model)
        saver = BatchSaver(model, self.cfg.dump(), self.cfg.OUTPUT_DIR, *names)
        self._finite_losses = FiniteLosses(self.model, names[0] if names else None, saver)
        place = 1 + next(i for i, h in enumerate(found) if isinstance(h, hooks.LRScheduler))
        found[place:place] = [
            SeedSteps(self.cfg.SEED) if self.cfg.SEED >= 0 else None,
            BetaDecay.from_config(self.cfg, self.model),
            LossStats(self.model, self.cfg.OUTPUT_DIR),
            FiniteWeights(self.model, self.cfg.SOLVER.CHECKPOINT_PERIOD, self._finite_losses),
        ]
        state = RunState(self.model, self.cfg.OUTPUT_DIR, self.cfg.SOLVER.CHECKPOINT_PERIOD)
        behind = (hooks.PeriodicCheckpointer, hooks.EvalHook)
        weights = BalancedCheckpointer(self.model, self.cfg.OUTPUT_DIR, **saved)
        self._average = WeightAverage.from_config(self.cfg, self.model, weights)
        place = next(i for i, h in enumerate(found) if isinstance(h, behind))
        parts = (self.cfg, self.build_train_loader, self.model, self._measuring)
        self._logits = CollectLogits(*parts, (self.checkpointer, weights))
        found[place:place] = [self._average, state, self._logits]
        place = next(i for i, h in enumerate(found) if isinstance(h, hooks.EvalHook))
        found[place] = hooks.EvalHook(self.cfg.TEST.EVAL_PERIOD, self._evaluate)
        best = BestModel.from_config(self.cfg, weights, self._measured_weights)
        found[place + 1 : place + 1] = [
            self._class_ap(),
            self._example_detections(),
            ValidationLoss.from_config(self.cfg, self.model, self._measuring),
            best,
        ]
        stop = None if best is None else StopEarly(best, state, self.checkpointer)
        self._stop = SaveOnSignal(
            state, self.checkpointer, self._finite_losses, self.cfg.SOLVER.INTERRUPT_TIMEOUT
        )
        # must stay the last one
        return [*found, stop, self._stop, FinishIteration(state, self.cfg.TEST.EVAL_PERIOD)]

    def _known_classes(self) -> ModelClasses | None:
        """Return what is saved of the classes with the model, on the first rank."""
        if not comm.is_main_process():
            return None
        try:
            return ModelClasses.from_run(self.cfg, self.model)
        except ValueError as error:  # must not cost a training
            logger.warning(f"Names and counts of the classes are not saved with the model: {error}")
            return None

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, and those that LOG names."""
        found = super().build_writers()
        self._tensorboard = ClassAPWriter(self.cfg.OUTPUT_DIR)
        place = next(i for i, w in enumerate(found) if isinstance(w, TensorboardXWriter))
        found[place] = self._tensorboard
        found += log_writers(self.cfg)
        self._image_writers = [writer for writer in found if hasattr(writer, "add_image")]
        return found

    def _example_detections(self) -> ExampleDetections | None:
        count, datasets = self.cfg.LOG.IMAGES, self.cfg.DATASETS.TEST
        if not (count and datasets and self._image_writers):
            return None
        records = getattr(self.build_test_loader(self.cfg, datasets[0]), "dataset", ())
        return ExampleDetections(
            self.model,
            [records[index] for index in range(min(count, len(records)))],
            datasets[0],
            self.cfg.INPUT.FORMAT,
            self._image_writers,
            period=self.cfg.TEST.EVAL_PERIOD,
            min_score=self.cfg.LOG.IMAGES_MIN_SCORE,
            weights=self._measured_weights,
        )

    def _class_ap(self) -> ClassAP | None:
        if not self.cfg.TEST.CLASS_AP:
            return None
        directory = os.path.join(self.cfg.OUTPUT_DIR, "inference")
        return ClassAP(
            self._tensorboard, directory, self.cfg.DATASETS.TEST, self.cfg.TEST.EVAL_PERIOD
        )

    def _measured_weights(self) -> AbstractContextManager[None]:
        """Return a block in which the model has the weights that are evaluated."""
        return nullcontext() if self._average is None else self._average.applied()

    @contextmanager
    def _measuring(self) -> Iterator[None]:
        """A block in which the model is measured, which SIGINT and SIGTERM leave at once."""
        with self._stop.evaluating(), self._measured_weights():
            yield

    @functools.cached_property
    def inert_remedies(self) -> list[str]:
        """What the config asks for and what changes nothing on this data, on the first rank."""
        return inert_remedies(self.cfg, self.model) if comm.is_main_process() else []

    def _evaluate(self) -> dict:
        """Results of `test` for the present weights, which are not evaluated twice."""
        done = self.iter if self.iter >= self.max_iter else self.iter + 1
        if done != self._evaluated:
            with self._measuring():
                self._last_eval_results = self.test(self.cfg, self.model)
            self._evaluated = done
        return self._last_eval_results

    def run_step(self) -> None:
        """One iteration.

        Raises:
            NonFiniteLossError: a loss is not finite, or the model stopped because of values that
                are not.
        """
        with self._no_evaluation_after_failure():
            try:
                super().run_step()
            except NonFiniteLossError:
                raise
            except Exception as error:
                explained = self._finite_losses.error_of_forward(error)
                if explained is None:
                    raise
                raise explained from error

    def after_step(self) -> None:
        with self._no_evaluation_after_failure():
            super().after_step()

    @contextmanager
    def _no_evaluation_after_failure(self) -> Iterator[None]:
        """Detectron2 would evaluate the model of a run that failed in its last iteration."""
        try:
            yield
        except Exception:
            self._hooks = [h for h in self._hooks if not isinstance(h, hooks.EvalHook)]
            raise

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Return the model, with all but MODEL.BALANCE.TRAINABLE frozen; see `train_only`."""
        return finished_model(super().build_model(cfg), cfg)

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Detectron2's optimizer, with SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model" as well.

        Detectron2 clips each parameter by itself ("value", "norm"); "full_model" clips the norm of
        all parameters together, as the releases of GHM and EFL do.

        Raises:
            ValueError: another CLIP_TYPE.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if clip.ENABLED and clip.CLIP_TYPE not in CLIP_TYPES:
            raise ValueError(
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; must be one of "
                f"{', '.join(CLIP_TYPES)}."
            )
        if not (clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL):
            return super().build_optimizer(cfg, model)
        bare = changed(cfg, {"SOLVER.CLIP_GRADIENTS.ENABLED": False})
        return clipped(super().build_optimizer(bare, model), cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """See `build_train_stream`."""
        return build_train_stream(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Iterable[list[dict]]:
        """Detectron2's loader, which leaves out images that cannot be read."""
        mapper = SkipUnreadable(DatasetMapper(cfg, is_train=False))
        return shielded(build_detection_test_loader(cfg, dataset_name, mapper=mapper))

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `d2_balance.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: Sequence[DatasetEvaluator] | None = None,
    ) -> dict:
        """Evaluate a model on DATASETS.TEST, as Detectron2's; see TEST.DETECTIONS_PER_CLASS."""
        if not cfg.TEST.DETECTIONS_PER_CLASS or evaluators is not None:
            return super().test(cfg, model, evaluators)
        results = {}
        for name in cfg.DATASETS.TEST:
            one = cfg.clone()
            one.defrost()
            one.DATASETS.TEST = (name,)
            evaluator = cls.build_evaluator(cfg, name)
            loader = functools.partial(cls.build_test_loader, one, name)
            with best_per_class(model, evaluator, loader):
                results[name] = super().test(one, model, [evaluator])
        return results if len(results) > 1 else next(iter(results.values()), {})

    @classmethod
    def test_finished(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """As `test`, with test-time augmentation if TEST.AUG.ENABLED."""
        if not cfg.TEST.AUG.ENABLED:
            return cls.test(cfg, model)
        return cls.test(augmentation_config(cfg), AugmentedRCNN(cfg, model))

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the last checkpoint of OUTPUT_DIR, or MODEL.WEIGHTS where there is none.

        Args:
            resume: False starts from MODEL.WEIGHTS in any case; `weights` has then a row for each
                tensor, see `load_pretrained`.
        """
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(True)
            fill_from_weights(self.model, resumable_files(self.cfg.OUTPUT_DIR)[0])
        else:
            self.weights = load_pretrained(self.cfg, self.model, _loss_state(self.model))

    def train(self) -> dict:
        """Train from the present iteration on; a finished run is evaluated once more.

        Returns:
            Results of the evaluation after the last iteration, as `test` returns them; on other
            ranks than the first, {}.

        Raises:
            NonFiniteLossError: see `run_step`; or a step has made the weights infinite or NaN.
            Interrupted: SIGINT or SIGTERM has come; a checkpoint is saved.
        """
        if self.start_iter >= self.max_iter:
            logger.info(
                f"The run in {self.cfg.OUTPUT_DIR} has all of its {self.max_iter} iterations; "
                "it is evaluated again. A larger SOLVER.MAX_ITER would continue it."
            )
            if (
                self._logits.wanted and self._logits.missing
            ):  # a signal came while they were counted
                self._logits.collect()
                self.checkpointer.save("model_final", iteration=self.max_iter - 1)
            with self._measured_weights():
                self._last_eval_results = self.test(self.cfg, self.model)
        else:
            self.checkpointer.save_classes()
            for text in self.inert_remedies:
                logger.warning(f"A remedy changes nothing here. {text}")
            if isinstance(self.data_loader, TrainStream):
                self.data_loader.start = self.start_iter
            with errors_without_traceback():
                try:
                    super().train()
                except Interrupted:
                    raise
                except StopTraining:
                    pass  # the run has ended early
        return self._last_eval_results if comm.is_main_process() else {}


def finished_model(model: nn.Module, cfg: CfgNode) -> nn.Module:
    """Return a new model with all but MODEL.BALANCE.TRAINABLE frozen, and losses compiled."""
    train_only(model, cfg.MODEL.BALANCE.TRAINABLE)
    if cfg.MODEL.BALANCE.COMPILE:
        compile_losses(model)
    return model


def _loss_state(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of losses, normalisers and reweighters, by name without DDP."""
    return {
        f"{prefix}.{name}": buffer
        for prefix, module in getattr(model, "module", model).named_modules()
        if isinstance(module, _STATEFUL)
        for name, buffer in module.named_buffers()
    }


@contextmanager
def _ddp(options: dict[str, Any], device: str) -> Iterator[None]:
    """Let DefaultTrainer wrap its model with these options; on the CPU it would name a GPU."""
    wrap = defaults.create_ddp_model
    if device == "cpu":
        options = options | {"device_ids": None}

    def create(model: nn.Module, **_: Any) -> nn.Module:
        return wrap(model, **options)

    defaults.create_ddp_model = create
    try:
        yield
    finally:
        defaults.create_ddp_model = wrap
