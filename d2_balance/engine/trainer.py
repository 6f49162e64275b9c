"""The trainer: Detectron2's, with the state of the losses treated as part of the run."""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultTrainer, HookBase, defaults, hooks
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import Tensor, nn

from ..evaluation import build_evaluator
from ..losses import BoxLoss, ClassificationLoss
from ..modeling.criterion import Normalizer
from ..modeling.feature_memory import FeatureMemory
from ..modeling.multi_scale import AugmentedRCNN, augmentation_config
from ..reweight import Reweighter
from .checkpoint import BalancedCheckpointer
from .decoupled import train_only
from .hooks import BetaDecay, LossStats, SeedSteps
from .nonfinite import FiniteLosses, FiniteWeights, NonFiniteLossError, errors_without_traceback
from .run_state import FinishIteration, RunState
from .saved_batch import BatchSaver
from .step import our_steps
from .train_stream import TrainStream, build_train_stream

_STATEFUL = (ClassificationLoss, BoxLoss, Normalizer, Reweighter, FeatureMemory)

FULL_MODEL = "full_model"
CLIP_TYPES = ("value", "norm", FULL_MODEL)

logger = logging.getLogger(__name__)


class BalancedTrainer(DefaultTrainer):
    """DefaultTrainer for the models of this package.

    - The evaluator is chosen by data set, see `build_evaluator`.
    - A resumed run sees the same pictures, augmentations, random numbers and beta as an
      uninterrupted one, and continues with the buffers of the losses.
    - A run that starts from the weights of another one takes over what was learned, and no
      densities, counters or class counts: those belong to the other run and its data.
    - Several ranks work without a GPU, over gloo.
    - A loss that is not finite ends the run before it reaches the weights, with a
      `NonFiniteLossError` that names the loss, the pictures and the classes.

    Args:
        cfg: config with MODEL.BALANCE. With SEED below 0 a resumed run is not exact; `train_net.py`
            draws a seed and writes it into the run's config.yaml.

    Raises:
        ValueError: the config asks for what cannot work; the message names the key.
    """

    def __init__(self, cfg: CfgNode) -> None:
        with _ddp_on_cpu(cfg.MODEL.DEVICE), our_steps(cfg):
            super().__init__(cfg)
        # this one calls backward and the optimizer
        self._trainer.register_hooks([self._finite_losses])

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, and ours behind the learning rate scheduler.

        The main process has hooks that the others lack (checkpoints, writers), so places are
        counted from the front, where all ranks agree.
        """
        self.checkpointer = BalancedCheckpointer(
            self.model, self.cfg.OUTPUT_DIR, cfg=self.cfg, trainer=weakref.proxy(self)
        )
        found = super().build_hooks()
        names = [MetadataCatalog.get(n).get("thing_classes") for n in self.cfg.DATASETS.TRAIN[:1]]
        model = getattr(self.model, "module", self.model)
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
        found.insert(next(i for i, h in enumerate(found) if isinstance(h, behind)), state)
        # must stay the last one
        return [*found, FinishIteration(state, self.cfg.TEST.EVAL_PERIOD)]

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
        """The model, with all but MODEL.BALANCE.TRAIN_ONLY frozen; see `train_only`."""
        model = super().build_model(cfg)
        train_only(model, cfg.MODEL.BALANCE.TRAIN_ONLY)
        return model

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
                f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; allowed is one of "
                f"{', '.join(CLIP_TYPES)}."
            )
        if not (clip.ENABLED and clip.CLIP_TYPE == FULL_MODEL):
            return super().build_optimizer(cfg, model)
        bare = cfg.clone()
        bare.defrost()
        bare.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(bare, model)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]

        def clip_all(*_) -> None:
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        optimizer.register_step_pre_hook(clip_all)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[list[dict]]:
        """See `build_train_stream`."""
        return build_train_stream(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        """See `d2_balance.evaluation.build_evaluator`."""
        return build_evaluator(cfg, dataset_name)

    @classmethod
    def test_finished(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """As `test`, at several sizes and mirrored where TEST.AUG.ENABLED asks for it."""
        if not cfg.TEST.AUG.ENABLED:
            return cls.test(cfg, model)
        return cls.test(augmentation_config(cfg), AugmentedRCNN(cfg, model))

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint of OUTPUT_DIR, or MODEL.WEIGHTS where there is none.

        Args:
            resume: False starts from MODEL.WEIGHTS in any case.
        """
        resumes = resume and self.checkpointer.has_checkpoint()
        state = None if resumes else _loss_state(self.model)
        super().resume_or_load(resume)
        if state is not None:
            _restore(self.model, state)

    def train(self) -> dict:
        """Trains from the present iteration on; a finished run is evaluated once more.

        Returns:
            Results of the evaluation after the last iteration, as `test` returns them; on other
            ranks than the first, {}.

        Raises:
            NonFiniteLossError: see `run_step`; or a step has made the weights infinite or NaN.
        """
        if self.start_iter >= self.max_iter:
            logger.info(
                f"The run in {self.cfg.OUTPUT_DIR} has all of its {self.max_iter} iterations; "
                "it is evaluated again. A larger SOLVER.MAX_ITER would continue it."
            )
            self._last_eval_results = self.test(self.cfg, self.model)
        else:
            if isinstance(self.data_loader, TrainStream):
                self.data_loader.start = self.start_iter
            with errors_without_traceback():
                super().train()
        return self._last_eval_results if comm.is_main_process() else {}


def _loss_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers of losses, normalisers and reweighters, by name in the model."""
    return {
        f"{prefix}.{name}": buffer.clone()
        for prefix, module in model.named_modules()
        if isinstance(module, _STATEFUL)
        for name, buffer in module.named_buffers()
    }


@torch.no_grad()
def _restore(model: nn.Module, state: dict[str, Tensor]) -> None:
    buffers = dict(model.named_buffers())
    for name, value in state.items():
        buffers[name].copy_(value)


@contextmanager
def _ddp_on_cpu(device: str) -> Iterator[None]:
    """Lets DefaultTrainer wrap a model on the CPU; it names a GPU to DDP otherwise."""
    if device != "cpu":
        yield
        return
    wrap = defaults.create_ddp_model
    defaults.create_ddp_model = functools.partial(wrap, device_ids=None)
    try:
        yield
    finally:
        defaults.create_ddp_model = wrap
