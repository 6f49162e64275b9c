"""Checkpoints that are whole or not there, and a resumption that says what does not fit.

A checkpoint is written to a temporary file, synced and renamed. When the last one cannot be read,
a run continues from the one before. Files are loaded as tensors and plain values only: a file that
would run code is refused.
"""

from __future__ import annotations

import dataclasses
import errno
import glob
import logging
import os
import pickle
import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.utils import comm
from torch import Tensor, nn

from d2_balance.data.model_classes import CHECKPOINT_KEY, FILE, ModelClasses, class_activation
from d2_balance.utils.files import atomic_path, write_text
from d2_balance.utils.names import listed

from ..errors import RunStopped
from .same_run import changed_settings, check_same_model

_NUMBERED = re.compile(r"model_(\d{7})\.pth")
_FINAL = "model_final.pth"
_LAST = "last_checkpoint"
_UNREADABLE = (OSError, RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError)
_SHOWN = 3  # tensors that a message lists

logger = logging.getLogger(__name__)


class BalancedCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer, safe against kills, full disks and broken files.

    Only the files of the run itself, model_0000000.pth and so on, become its last checkpoint; a
    best model that is saved besides does not.

    Args:
        model: wrapped in DDP or not.
        save_dir: directory of the run.
        cfg: saved with the model, and compared when a run is resumed; None: neither.
        classes: names, counts and thresholds, saved with the model under "classes" and in the
            run's directory; None: unknown.
        save_to_disk: None: on the first rank only.
        checkpointables: see Detectron2.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        cfg: CfgNode | None = None,
        classes: ModelClasses | None = None,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self._cfg, self._classes = cfg, classes

    def save(self, name: str, **kwargs: Any) -> None:
        """Save model and checkpointables to `save_dir`/`name`.pth.

        Where the disk is full nothing is left behind, what was there stays, and the run goes on
        with an error in its log; at the end of a run it stops.

        Args:
            name: file name without ending.
            kwargs: more to save, plain values or tensors.

        Raises:
            RunStopped: the final model could not be written.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        file_name = f"{name}.pth"
        path = os.path.join(self.save_dir, file_name)
        data = {"model": self.model.state_dict()}
        data |= {key: part.state_dict() for key, part in self.checkpointables.items()}
        data |= {} if self._cfg is None else {"config": self._cfg.dump()}
        data |= {} if self._classes is None else {CHECKPOINT_KEY: self._classes.as_dict()}
        logger.info(f"Saving checkpoint to {path}")
        try:
            # a file of Python's, whose error says what was wrong; PyTorch's own hides it
            with atomic_path(path, sync=True) as temporary, open(temporary, "wb") as file:
                torch.save(data | kwargs, file)
            self.save_classes()
            if _NUMBERED.fullmatch(file_name) or file_name == _FINAL:
                self.tag_last_checkpoint(file_name)
        except Exception as error:
            cause = _os_error(error)
            if cause is None:
                raise
            message = self._not_written(path, cause)
            if file_name == _FINAL:
                raise RunStopped(message) from error
            logger.error(message)

    def add_calibration(self, measured: Mapping[str, Any]) -> None:
        """Save from now on what the calibration of the model was made from."""
        if self._classes is not None:
            self._classes = dataclasses.replace(self._classes, calibration=measured)

    def save_classes(self) -> None:
        """Write classes.json into the run's directory, on the first rank."""
        if self._classes is not None and self.save_dir and self.save_to_disk:
            self._classes.save(os.path.join(self.save_dir, FILE))

    def _not_written(self, path: str, cause: OSError) -> str:
        kept = [name for name in resumable_files(self.save_dir) if os.path.exists(name)]
        text = f"The checkpoint {path} could not be written: {cause.strerror or cause}."
        if cause.errno == errno.ENOSPC:
            text += f" Free space on the disk of {self.save_dir}."
        if kept:
            return f"{text} {os.path.basename(kept[0])} is whole and --resume continues from it."
        return f"{text} There is no checkpoint of this run yet."

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Note the file name of the last checkpoint; the note is whole or the old one."""
        write_text(os.path.join(self.save_dir, _LAST), last_filename_basename, sync=True)

    def has_checkpoint(self) -> bool:
        """Return whether the first rank sees a checkpoint to resume; every rank must call this."""
        return _of_main(comm.is_main_process() and bool(resumable_files(self.save_dir)))

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continues from the last checkpoint that can be read, or loads weights only.

        Ranks that do not see the file, or another one of its name, get it from the first rank.

        Args:
            path: weights where there is nothing to resume.
            resume: False loads `path` in any case.

        Returns:
            What the checkpoint holds besides.

        Raises:
            ValueError: no checkpoint can be read, or it is of another model.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        path, checkpoint = self._last_readable()
        if self._cfg is not None and "config" in checkpoint:
            check_same_model(checkpoint["config"], self._cfg, path)
            if changes := changed_settings(checkpoint["config"], self._cfg):
                logger.warning(f"The resumed run goes on with other settings: {changes}.")
        self._check_tensors(path, checkpoint["model"])
        logger.info(f"Resuming from {path}")
        self._log_incompatible_keys(self._load_model(checkpoint))
        for key, part in self.checkpointables.items():
            part.load_state_dict(checkpoint.pop(key))
        return checkpoint

    def _last_readable(self) -> tuple[str, dict[str, Any]]:
        """Path and content of the checkpoint to resume from, for every rank."""
        chosen, checkpoint, broken = "", {}, []
        if comm.is_main_process():
            for path in resumable_files(self.save_dir):
                try:
                    checkpoint = self._read(path)
                    chosen = path
                    break
                except _UNREADABLE as error:
                    broken.append(f"{path} ({_first_line(error)})")
            _remove_unfinished(self.save_dir)
        chosen, broken = _of_main((chosen, broken))
        if not chosen:
            raise ValueError(
                f"--resume: no checkpoint in {self.save_dir} can be read: {', '.join(broken)}. "
                "Put a whole one there, or start again in another OUTPUT_DIR."
            )
        if broken:
            logger.warning(
                f"Broken checkpoints are skipped: {', '.join(broken)}. The run continues from "
                f"{chosen}; what came after it is done again."
            )
        return chosen, self._on_all_ranks(chosen, checkpoint)

    def _on_all_ranks(self, path: str, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """Return the content of the first rank's file, which other machines may not see."""
        if comm.get_world_size() == 1:
            return checkpoint
        mine = os.path.isfile(path)
        size = os.path.getsize(path) if mine else -1
        mine = size == _of_main(size)
        if mine and not comm.is_main_process():
            try:
                checkpoint = self._read(path)
            except _UNREADABLE:
                mine = False
        if all(comm.all_gather(mine)):
            return checkpoint
        content: list[Any] = [checkpoint if comm.is_main_process() else None]
        dist.broadcast_object_list(content, src=0, group=comm._get_global_gloo_group())
        return checkpoint if mine else content[0]

    def _read(self, path: str) -> dict[str, Any]:
        checkpoint = _load_plain(path)
        needed = ("model", *self.checkpointables)
        if missing := [key for key in needed if key not in checkpoint]:
            raise ValueError(f"it has no {' and no '.join(missing)}")
        return checkpoint

    def _check_tensors(self, path: str, saved: Mapping[str, Tensor]) -> None:
        """Refuse a checkpoint that would leave parameters of the model as they are.

        Buffers that are missing belong to losses of another release, and are named in the log.
        """
        own = self.model.state_dict()
        parameters = dict(self.model.named_parameters())
        wrong = [f"{name} is missing" for name in parameters if name not in saved]
        wrong += [
            f"{name} is {tuple(saved[name].shape)} and the model's is {tuple(value.shape)}"
            for name, value in own.items()
            if name in saved and saved[name].shape != value.shape
        ]
        if wrong:
            raise ValueError(
                f"--resume continues the same model, and {path} is of another one: "
                f"{listed(wrong, _SHOWN)}. Start a run in another OUTPUT_DIR with MODEL.WEIGHTS "
                "set to the checkpoint."
            )

    def _torch_load(self, filename: str) -> dict[str, Any]:
        """Load a .pth file that MODEL.WEIGHTS names.

        Raises:
            ValueError: it cannot be read, or holds more than tensors and plain values.
        """
        try:
            content = _load_plain(filename)
        except _UNREADABLE as error:
            raise ValueError(f"{filename} cannot be loaded: {_first_line(error)}") from error
        if isinstance(content, dict) and "model" not in content:
            # where Lightning, mmdetection and others keep the tensors
            content = content.get("state_dict", content)
            other = [name for name, value in content.items() if not isinstance(value, Tensor)]
            if other:
                raise ValueError(
                    f"{filename} has no 'model' or 'state_dict', and more than tensors "
                    f"({listed(other, _SHOWN)}); save the weights alone: "
                    "torch.save({'model': model.state_dict()}, FILE)"
                )
            content = {"model": content}
        return content


def check_classifier(model: nn.Module, weights: str) -> None:
    """Refuse weights of a classifier that makes scores in another way than the model.

    Args:
        model: as the config builds it.
        weights: MODEL.WEIGHTS.

    Raises:
        ValueError: naming both ways and the key.
    """
    saved = ModelClasses.of_weights(weights)
    trained = None if saved is None else saved.activation
    own = class_activation(model)
    if trained and own and trained != own:
        raise ValueError(
            f"{weights} was trained with {trained} scores, and the config makes {own} scores; set "
            "MODEL.BALANCE.CLS_LOSS to the loss that it was trained with."
        )


def load_trained(model: nn.Module, weights: str) -> None:
    """Load the weights of a trained model, to be evaluated.

    Args:
        model: as the config builds it.
        weights: MODEL.WEIGHTS.

    Raises:
        ValueError: the file cannot be read, or its classifier makes scores in another way.
    """
    check_classifier(model, weights)
    BalancedCheckpointer(model, save_to_disk=False).load(weights)


def resumable_files(directory: str) -> list[str]:
    """Checkpoints of the run in a directory, the one to resume from first.

    That is the one that `last_checkpoint` names, whether it is there or not, then the numbered ones
    from the last to the first, then the final one.
    """
    tag = os.path.join(directory, _LAST)
    named = ""
    if os.path.isfile(tag):
        with open(tag) as file:
            named = file.read().strip()
    if not os.path.isdir(directory):
        return []
    names = os.listdir(directory)
    numbered = sorted((name for name in names if _NUMBERED.fullmatch(name)), reverse=True)
    if _NUMBERED.fullmatch(named):
        # later ones are left from a run before, or were not whole when they were named
        numbered = [name for name in numbered if name < named]
    found = [named] if named else []
    found += [name for name in (*numbered, _FINAL) if name in names and name != named]
    return [os.path.join(directory, name) for name in found]


def _load_plain(path: str) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            "it is damaged, or holds more than tensors and plain values, which could run code "
            "and is not loaded; where you trust it, save its weights alone: "
            "torch.save({'model': model.state_dict()}, FILE)"
        ) from error


def _remove_unfinished(directory: str) -> None:
    """Remove temporary files of checkpoints that a kill has left."""
    for path in glob.glob(os.path.join(glob.escape(directory), "*.pth.*.tmp")):
        os.remove(path)


def _os_error(error: BaseException | None) -> OSError | None:
    """Return the OSError that an exception was raised for."""
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def _of_main(value: Any) -> Any:
    """Return the first rank's value; every rank must call this."""
    return comm.all_gather(value)[0]
