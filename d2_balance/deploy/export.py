"""Export a trained model to TorchScript or ONNX, and check the result against the eager model.

The exported model takes one image, (3, H, W) float32 from 0 to 255 in the order of INPUT.FORMAT,
resized already, and returns boxes (R, 4) in pixels of that image, scores (R,), classes (R,) int64
and, if the model has masks, masks (R, 1, M, M) in [0, 1] inside their boxes. Beside it lies a JSON
file of labels, thresholds, input and outputs.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from detectron2.data.detection_utils import read_image
from detectron2.export import TracingAdapter, scripting_with_instances
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import Boxes
from torch import Tensor, nn

from d2_balance.data.model_classes import class_thresholds
from d2_balance.utils.files import atomic_path, write_json

from .predictor import Predictor

TRACE, SCRIPT, ONNX = FORMATS = ("torchscript-trace", "torchscript-script", "onnx")
ENDINGS = {TRACE: ".pt", SCRIPT: ".pt", ONNX: ".onnx"}
OPSET = 17
OUTPUTS = ("boxes", "scores", "classes", "masks")
BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE = 1e-3, 1e-5, 1e-4

Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Difference:
    """The largest differences between the exported and the eager model.

    Attributes:
        images: number of images that both have seen.
        detections: number of detections on them.
        boxes: in pixels.
        scores: in [0, 1].
        masks: in [0, 1]; None if the model has no masks.
    """

    images: int
    detections: int
    boxes: float
    scores: float
    masks: float | None = None

    def __str__(self) -> str:
        masks = "" if self.masks is None else f", masks {self.masks:.2g}"
        return (
            f"largest difference to the eager model on {self.images} images with "
            f"{self.detections} detections: boxes {self.boxes:.2g} pixels, scores "
            f"{self.scores:.2g}{masks}"
        )


def export(
    predictor: Predictor,
    model_format: str,
    path: str,
    images: Sequence[str],
) -> Difference:
    """Export a model, check it on images, and write it with its labels.

    Args:
        predictor: the trained model.
        model_format: one of `FORMATS`.
        path: file of the exported model; the labels go to the same name with the ending `.json`.
        images: paths of images on which the exported model must give what the eager one gives; at
            least one. Different sizes show that the model takes any size.

    Returns:
        The largest differences.

    Raises:
        FileExistsError: one of the two files exists.
        ValueError: the format is unknown, the model cannot be exported in it, or the exported
            model gives other detections; nothing is written then.
    """
    if model_format not in FORMATS:
        raise ValueError(
            f"export format is {model_format!r}; it must be one of {', '.join(FORMATS)}"
        )
    labels = os.path.splitext(path)[0] + ".json"
    for file in (path, labels):
        if os.path.exists(file):
            raise FileExistsError(f"{file} exists, and nothing is overwritten; give another output")
    if not images:
        raise ValueError("an exported model is checked on images; give at least one")
    model = predictor.model
    if not isinstance(model, GeneralizedRCNN | DenseDetector):
        raise ValueError(
            f"{type(model).__name__} cannot be exported; it must be a GeneralizedRCNN or a dense "
            "detector (RetinaNet, FCOS)"
        )
    if getattr(getattr(model, "roi_heads", None), "keypoint_on", False):
        raise ValueError("a model with keypoints cannot be exported; set MODEL.KEYPOINT_ON False")
    inputs = [_input(predictor, image) for image in images]
    with atomic_path(path) as temporary:
        _WRITERS[model_format](predictor, inputs[0], temporary)
        difference = compare(_eager(predictor), run_exported(temporary, model_format), inputs)
        _check(difference, model_format)
        write_json(labels, _labels(predictor, model_format, difference), indent=1)
    return difference


def compare(
    eager: Callable[[Tensor], Outputs],
    exported: Callable[[Tensor], Outputs],
    inputs: Sequence[Tensor],
) -> Difference:
    """Compare the outputs of two models.

    Args:
        eager: function from an image (3, H, W) to outputs in the order of `OUTPUTS`.
        exported: the same for the exported model.
        inputs: the images.

    Raises:
        ValueError: the models detect another number of objects, or other classes.
    """
    largest = [0.0, 0.0, 0.0]
    detections, has_masks = 0, False
    for number, image in enumerate(inputs):
        ours, theirs = eager(image), exported(image)
        order = _match(ours, theirs)
        if order is None:
            raise ValueError(
                f"the exported model detects {len(theirs[0])} objects in image {number} where the "
                f"eager model detects {len(ours[0])}, or objects of other classes"
            )
        theirs = tuple(column[order] for column in theirs)
        detections += len(ours[0])
        has_masks = len(ours) > 3
        for k, name in enumerate(("boxes", "scores", "masks")):
            place = OUTPUTS.index(name)
            if place < len(ours) and len(ours[0]):
                gap = (ours[place].double() - theirs[place].double()).abs().max().item()
                largest[k] = max(largest[k], gap)
    masks = largest[2] if has_masks else None
    return Difference(len(inputs), detections, largest[0], largest[1], masks)


def _match(ours: Outputs, theirs: Outputs) -> Tensor | None:
    """Places in `theirs` of the detections of `ours`, None if the classes are others.

    Detections whose scores are equal but for rounding may have changed places.
    """
    if torch.equal(ours[2], theirs[2]):
        return torch.arange(len(ours[2]))
    if not torch.equal(ours[2].sort().values, theirs[2].sort().values):
        return None
    far = (ours[0].double().unsqueeze(1) - theirs[0].double()).abs().amax(dim=2)  # (R, R)
    far[ours[2].unsqueeze(1) != theirs[2]] = torch.inf
    order = []
    for row in far:
        order.append(int(row.argmin()))
        far[:, order[-1]] = torch.inf
    return torch.tensor(order)


def run_exported(path: str, model_format: str) -> Callable[[Tensor], Outputs]:
    """Load an exported model as a function from an image (3, H, W) to its outputs, on the CPU."""
    if model_format != ONNX:
        import torchvision  # noqa: F401  TorchScript files call its operators

        model = torch.jit.load(path, map_location="cpu")
        return lambda image: tuple(model(image))
    onnxruntime = _onnxruntime()
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> Outputs:
        outputs = session.run(None, {"image": image.numpy()})
        return tuple(map(torch.from_numpy, outputs))

    return run


def _onnxruntime() -> Any:
    try:
        import onnx  # noqa: F401  the exporter needs it
        import onnxruntime
    except ImportError as error:
        raise ValueError(
            f"ONNX needs the package {error.name}; install d2-balance[onnx]"
        ) from error
    return onnxruntime


def _input(predictor: Predictor, path: str) -> Tensor:
    try:
        image = read_image(path, format=predictor.input_format)
    except Exception as error:  # decoders raise what they like
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error
    return predictor.preprocess(image)["image"].float()


def _outputs(model: nn.Module, image: Tensor) -> Outputs:
    """What the exported model computes, on the eager model."""
    if isinstance(model, GeneralizedRCNN):
        instances = model.inference([{"image": image}], do_postprocess=False)[0]
    else:
        instances = model([{"image": image}])[0]["instances"]
    outputs = (instances.pred_boxes.tensor, instances.scores, instances.pred_classes)
    return (*outputs, instances.pred_masks) if instances.has("pred_masks") else outputs


def _eager(predictor: Predictor) -> Callable[[Tensor], Outputs]:
    @torch.no_grad()
    def run(image: Tensor) -> Outputs:
        return tuple(output.cpu() for output in _outputs(predictor.model, image))

    return run


def _check(difference: Difference, model_format: str) -> None:
    allowed = (0.0, 0.0, 0.0) if model_format == TRACE else _TOLERANCES
    seen = (difference.boxes, difference.scores, difference.masks or 0.0)
    if any(a > b for a, b in zip(seen, allowed, strict=True)):
        raise ValueError(f"the exported model is not the eager one: {difference}")


_TOLERANCES = (BOX_TOLERANCE, SCORE_TOLERANCE, MASK_TOLERANCE)


def _write_trace(predictor: Predictor, image: Tensor, path: str) -> None:
    adapter = TracingAdapter(predictor.model, (image,), _outputs).eval()
    with _quiet():
        # tracing twice to compare would fail where two operators differ in the last bit
        traced = torch.jit.trace(adapter, (image,), check_trace=False)
    torch.jit.save(traced, path)


def _write_onnx(predictor: Predictor, image: Tensor, path: str) -> None:
    _onnxruntime()
    adapter = TracingAdapter(predictor.model, (image,), _outputs).eval()
    names = OUTPUTS[: len(_eager(predictor)(image))]
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            adapter,
            (image,),
            path,
            dynamo=False,  # the other exporter needs torch.export, which these models do not pass
            opset_version=OPSET,
            input_names=["image"],
            output_names=list(names),
            dynamic_axes={
                "image": {1: "height", 2: "width"},
                **{name: {0: "detections"} for name in names},
            },
        )


def _write_script(predictor: Predictor, image: Tensor, path: str) -> None:
    model = predictor.model
    fields: dict[str, type] = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
    with _one_threshold(predictor) as thresholds:
        if isinstance(model, GeneralizedRCNN):
            fields |= {"proposal_boxes": Boxes, "objectness_logits": Tensor, "pred_masks": Tensor}
            masks = len(_eager(predictor)(image)) > 3
            adapter: nn.Module = (_ScriptedMasks if masks else _ScriptedBoxes)(model, thresholds)
        else:
            adapter = _ScriptedDense(model, thresholds)
        try:
            with _quiet():
                scripted = scripting_with_instances(adapter.eval(), fields)
        except Exception as error:  # TorchScript raises errors of many types
            raise ValueError(
                f"{type(model).__name__} cannot be scripted; export it with {TRACE} or {ONNX}. "
                f"TorchScript says: {' '.join(str(error).split())[:300]}"
            ) from error
        torch.jit.save(scripted, path)


_WRITERS = {TRACE: _write_trace, SCRIPT: _write_script, ONNX: _write_onnx}


@contextmanager
def _one_threshold(predictor: Predictor) -> Iterator[Tensor]:
    """Give the model the least of its score thresholds, and yield all (K,).

    TorchScript knows Detectron2's threshold as a number; the adapter applies those of the classes.
    """
    before = predictor.score_thresholds
    per_class = class_thresholds(predictor.model) is not None
    if per_class:
        predictor.set_score_threshold(min(before))
    try:
        yield torch.tensor(before, device=predictor.device)
    finally:
        if per_class:
            predictor.set_score_threshold(dict(zip(predictor.names, before, strict=True)))


class _Scripted(nn.Module):
    """Base of what is scripted: the model, and thresholds that it may not apply itself."""

    if TYPE_CHECKING:  # TorchScript reads annotations of attributes
        model: Any
        thresholds: Tensor

    def __init__(self, model: nn.Module, thresholds: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("thresholds", thresholds)


class _ScriptedBoxes(_Scripted):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model.inference([{"image": image}], do_postprocess=False)[0]
        kept = found.scores > self.thresholds[found.pred_classes]
        return found.pred_boxes.tensor[kept], found.scores[kept], found.pred_classes[kept]


class _ScriptedMasks(_Scripted):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        found = self.model.inference([{"image": image}], do_postprocess=False)[0]
        kept = found.scores > self.thresholds[found.pred_classes]
        return (
            found.pred_boxes.tensor[kept],
            found.scores[kept],
            found.pred_classes[kept],
            found.pred_masks[kept],
        )


class _ScriptedDense(_Scripted):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.model([{"image": image}])[0]
        # the eager model does so in its postprocessing, which TorchScript leaves out
        boxes = found.pred_boxes
        boxes.clip((image.shape[1], image.shape[2]))
        kept = (found.scores > self.thresholds[found.pred_classes]) & boxes.nonempty()
        return boxes.tensor[kept], found.scores[kept], found.pred_classes[kept]


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide warnings that tracing gives for every detector of Detectron2."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _labels(predictor: Predictor, model_format: str, difference: Difference) -> dict[str, Any]:
    cfg = predictor.cfg
    has_masks = difference.masks is not None
    return {
        "format": model_format,
        "names": predictor.names,
        "category_ids": predictor.category_ids,
        "score_thresholds": predictor.score_thresholds,
        "activation": predictor.activation,
        "input": {
            "name": "image",
            "shape": [3, "height", "width"],
            "type": "float32",
            "range": [0, 255],
            "channels": predictor.input_format,
            "min_size": cfg.INPUT.MIN_SIZE_TEST,
            "max_size": cfg.INPUT.MAX_SIZE_TEST,
        },
        "outputs": list(OUTPUTS[: 4 if has_masks else 3]),
        "difference": asdict(difference),
        "checkpoint": os.path.basename(predictor.checkpoint),
        "versions": {"torch": torch.__version__, "numpy": np.__version__},
    }
