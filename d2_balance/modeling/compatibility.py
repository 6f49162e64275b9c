"""Which losses, reweighters and heads go together; checked when a model is built.

Every message names both sides and says what works.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..losses import BOX_LOSSES, CLS_LOSSES, BoxLoss, ClassificationLoss
from ..reweight import Reweighter, Selector


def check_pairing(
    head: str,
    cls_loss: ClassificationLoss,
    box_loss: BoxLoss,
    reweighters: Sequence[Reweighter],
    *,
    softmax: bool,
    levels: bool,
) -> None:
    """Refuses combinations that cannot work.

    Args:
        head: name of the head, for the message.
        cls_loss, box_loss, reweighters: what the head would use.
        softmax: whether the head has a background column, as softmax losses need.
        levels: whether rows come from feature levels (dense heads).

    Raises:
        ValueError: names both sides and says what works.
    """
    _check_columns(head, cls_loss, softmax)
    for loss in (cls_loss, box_loss):
        if getattr(loss, "per_level", False) and not levels:
            raise ValueError(
                f"MODEL.BALANCE.{type(loss).__name__.upper()}.PER_LEVEL True needs feature levels "
                f"and {head} has none; set it to False."
            )
    if cls_loss.couples_boxes and not box_loss.elementwise:
        raise ValueError(
            f"MODEL.BALANCE.CLS_LOSS {type(cls_loss).__name__} ranks boxes as well and BOX_LOSS "
            f"{type(box_loss).__name__} has no loss per box; BOX_LOSS that work: "
            f"{_names(cls for _, cls in BOX_LOSSES if cls.elementwise)}."
        )
    for reweighter in reweighters:
        _check_reweighter(reweighter, cls_loss, box_loss)


def _check_columns(head: str, loss: ClassificationLoss, softmax: bool) -> None:
    if softmax or _has_class_columns_only(type(loss)):
        return
    why = f"is a softmax loss and {head} has a sigmoid head"
    if loss.activation == "sigmoid":
        why = f"needs outputs besides those of the classes and {head} has none"
    raise ValueError(
        f"MODEL.BALANCE.CLS_LOSS {type(loss).__name__} {why}; losses that work there: "
        f"{_names(cls for _, cls in CLS_LOSSES if _has_class_columns_only(cls))}."
    )


def _check_reweighter(
    reweighter: Reweighter | Selector, cls_loss: ClassificationLoss, box_loss: BoxLoss
) -> None:
    name = type(reweighter).__name__
    for loss, key, registry in (
        (cls_loss, "CLS_LOSS", CLS_LOSSES),
        (box_loss, "BOX_LOSS", BOX_LOSSES),
    ):
        if not loss.elementwise:
            raise ValueError(
                f"MODEL.BALANCE.REWEIGHT {name} weights single rows and {key} "
                f"{type(loss).__name__} has no loss per row; {key} that work: "
                f"{_names(cls for _, cls in registry if cls.elementwise)}."
            )
    if getattr(reweighter, "needs_scores", False) and not _has_plain_scores(type(cls_loss)):
        raise ValueError(
            f"MODEL.BALANCE.REWEIGHT {name} reads class scores off the logits and CLS_LOSS "
            f"{type(cls_loss).__name__} has outputs of its own; CLS_LOSS that work: "
            f"{_names(cls for _, cls in CLS_LOSSES if cls.elementwise and _has_plain_scores(cls))}."
        )


def check_selection(
    selector: Selector | None,
    sample_proposals: bool,
    cls_loss: ClassificationLoss,
    box_loss: BoxLoss,
) -> None:
    """Refuses a choice of proposals that the losses of a RoI head cannot serve.

    Raises:
        ValueError: names both sides and says what works.
    """
    if selector is None:
        return
    name = type(selector).__name__
    if not sample_proposals:
        raise ValueError(
            f"MODEL.BALANCE.REWEIGHT {name} chooses proposals and SAMPLE_PROPOSALS False keeps "
            "all of them; set SAMPLE_PROPOSALS True or take it off the list."
        )
    if selector.needs_predictions:
        _check_reweighter(selector, cls_loss, box_loss)


def _has_plain_scores(cls: type[ClassificationLoss]) -> bool:
    """Whether scores are a plain sigmoid or softmax of the logits."""
    return cls.num_outputs is ClassificationLoss.num_outputs


def _has_class_columns_only(cls: type[ClassificationLoss]) -> bool:
    """Whether a loss takes K columns of logits, as RetinaNet's head gives them."""
    return cls.activation == "sigmoid" and _has_plain_scores(cls)


def _names(classes) -> str:
    return ", ".join(sorted(cls.__name__ for cls in classes))
