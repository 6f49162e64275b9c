"""Which losses, reweighters, proposal samplers and heads go together: one table of rules.

The rules are checked when a model is built. `d2-balance methods` prints them as a table, which is
computed by asking them about every pair. Every message names both sides and says what works.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES, ClassificationLoss
from d2_balance.sampling import PROPOSAL_SAMPLERS

# Constructor arguments that are quantities of the training set, one entry per class.
CLASS_QUANTITIES = ("class_frequency", "class_count", "instance_count")


@dataclass(frozen=True)
class Head:
    """What a head offers to the losses.

    Args:
        name: as it stands in messages.
        extra_outputs: whether it has outputs besides those of the classes, such as background.
        levels: whether its samples come from feature levels.
        proposals: whether its samples are proposals.
        classes: whether it tells classes apart, not only objects from background.
    """

    name: str
    extra_outputs: bool = False
    levels: bool = True
    proposals: bool = False
    classes: bool = True

    @property
    def node(self) -> str:
        """Config node of its losses."""
        return "MODEL.BALANCE" if self.classes else "MODEL.BALANCE.RPN"

    @property
    def cls_losses(self) -> list[Any]:
        """Losses that fit its columns and classes."""
        return [
            cls
            for _, cls in CLS_LOSSES
            if (self.extra_outputs or has_class_columns_only(cls))
            and (self.classes or not needs_class_quantities(cls))
        ]


HEADS = {
    head.name: head
    for head in (
        Head("RetinaNet"),
        Head("FCOS"),
        Head("the RPN", classes=False),
        Head("RoI heads", extra_outputs=True, levels=False, proposals=True),
    )
}


@dataclass(frozen=True)
class Parts:
    """What one head would be made of; losses, reweighters and samplers as objects or as classes.

    Args:
        head: entry of `HEADS`.
        cls_loss: classification loss.
        box_loss: box loss.
        reweighters: what weights samples.
        proposal_sampler: what chooses proposals, or None.
        anchor_sampler: what chooses anchors, or None.
        sampling_free: whether all proposals train.
        guided: whether the classification loss is scaled to the box loss.
        calibration: what calibrates scores at test time: "norcal", or a name of
            MODEL.BALANCE.CALIBRATION.NAME.
    """

    head: Head
    cls_loss: Any
    box_loss: Any
    reweighters: Sequence[Any] = ()
    proposal_sampler: Any = None
    anchor_sampler: Any = None
    sampling_free: bool = False
    guided: bool = False
    calibration: str = ""


def check_parts(parts: Parts) -> None:
    """Refuse combinations that cannot work.

    Raises:
        ValueError: names both sides and says what works.
    """
    for rule in RULES:
        message = rule(parts)
        if message is not None:
            raise ValueError(message)


def _outputs(parts: Parts) -> str | None:
    loss, head = parts.cls_loss, parts.head
    if head.extra_outputs or has_class_columns_only(loss):
        return None
    why = f"is a {loss.activation} loss and {head.name} has a sigmoid head"
    if loss.activation == "sigmoid":
        why = f"needs outputs besides those of the classes and {head.name} has none"
    return (
        f"{head.node}.CLS_LOSS {_name(loss)} {why}; losses that work there: "
        f"{_names(head.cls_losses)}"
    )


def _class_quantities(parts: Parts) -> str | None:
    if parts.head.classes or not needs_class_quantities(parts.cls_loss):
        return None
    return (
        f"{parts.head.node}.CLS_LOSS {_name(parts.cls_loss)} weights classes by their frequency "
        f"and {parts.head.name} has no classes; losses that work there: "
        f"{_names(parts.head.cls_losses)}"
    )


def _levels(parts: Parts) -> str | None:
    for loss in (parts.cls_loss, parts.box_loss):
        if getattr(loss, "per_level", False) and not parts.head.levels:
            return (
                f"{parts.head.node}.{_name(loss).upper()}.PER_LEVEL True needs feature levels and "
                f"{parts.head.name} have none; set it to False."
            )
    return None


def _coupled_boxes(parts: Parts) -> str | None:
    if not parts.cls_loss.couples_boxes or parts.box_loss.elementwise:
        return None
    return (
        f"{parts.head.node}.CLS_LOSS {_name(parts.cls_loss)} ranks boxes as well and BOX_LOSS "
        f"{_name(parts.box_loss)} has no loss per box; BOX_LOSS that work: "
        + _names(cls for _, cls in BOX_LOSSES if cls.elementwise)
    )


def _per_sample(parts: Parts) -> str | None:
    users = [*parts.reweighters]
    if parts.proposal_sampler is not None and parts.proposal_sampler.needs_predictions:
        users.append(parts.proposal_sampler)
    for user in users:
        for loss, key, registry in (
            (parts.cls_loss, "CLS_LOSS", CLS_LOSSES),
            (parts.box_loss, "BOX_LOSS", BOX_LOSSES),
        ):
            if not loss.elementwise:
                return (
                    f"MODEL.BALANCE.{_key(user)} {_name(user)} weights single samples and {key} "
                    f"{_name(loss)} has no loss per sample; {key} that work: "
                    + _names(cls for _, cls in registry if cls.elementwise)
                )
    return None


def _scores(parts: Parts) -> str | None:
    for reweighter in parts.reweighters:
        if reweighter.needs_scores and not has_plain_scores(parts.cls_loss):
            return (
                f"MODEL.BALANCE.REWEIGHTERS {_name(reweighter)} reads class scores off the logits "
                f"and CLS_LOSS {_name(parts.cls_loss)} has outputs of its own; CLS_LOSS that work: "
                + _names(cls for _, cls in CLS_LOSSES if cls.elementwise and has_plain_scores(cls))
            )
    return None


def _entries(parts: Parts) -> str | None:
    for reweighter in parts.reweighters:
        if getattr(reweighter, "needs_entries", False) and not _has_entries(parts.cls_loss):
            return (
                f"MODEL.BALANCE.{_name(reweighter).upper()}.TARGET {reweighter.target} weights "
                f"single classes of a sample and CLS_LOSS {_name(parts.cls_loss)} has no loss for "
                "each class and for nothing else; set it to samples. CLS_LOSS that work: "
                + _names(cls for _, cls in CLS_LOSSES if cls.elementwise and _has_entries(cls))
            )
    return None


def _proposals(parts: Parts) -> str | None:
    if parts.proposal_sampler is None:
        return None
    name = _name(parts.proposal_sampler)
    if not parts.head.proposals:
        return (
            f"MODEL.BALANCE.PROPOSAL_SAMPLER {name} samples proposals and {parts.head.name} has "
            'none; set it to "".'
        )
    if parts.sampling_free:
        return (
            f"MODEL.BALANCE.PROPOSAL_SAMPLER {name} samples proposals and SAMPLING_FREE True "
            'keeps all of them; set SAMPLING_FREE False or PROPOSAL_SAMPLER "".'
        )
    return None


def _anchors(parts: Parts) -> str | None:
    if parts.anchor_sampler is None:
        return None
    key, loss = f"{parts.head.node}.ANCHOR_SAMPLER {_name(parts.anchor_sampler)}", parts.cls_loss
    if parts.head.proposals:
        return (
            f'{key} samples anchors and {parts.head.name} have none; set it to "". '
            "MODEL.BALANCE.PROPOSAL_SAMPLER OHEM mines proposals, and "
            "MODEL.BALANCE.RPN.ANCHOR_SAMPLER anchors of the RPN."
        )
    if parts.sampling_free:
        return (
            f"{key} samples anchors and SAMPLING_FREE True keeps all of them; set SAMPLING_FREE "
            'False or ANCHOR_SAMPLER "".'
        )
    if loss.elementwise and not loss.weighs_difficulty:
        return None
    why = (
        "weighs samples by their difficulty itself"
        if loss.elementwise
        else "has no loss per sample"
    )
    works = (c for c in parts.head.cls_losses if c.elementwise and not c.weighs_difficulty)
    return (
        f"{key} keeps the hardest anchors and CLS_LOSS {_name(loss)} {why}; CLS_LOSS that work: "
        + _names(works)
    )


def _guided(parts: Parts) -> str | None:
    if not parts.guided or parts.cls_loss.elementwise:
        return None
    return (
        f"{parts.head.node}.GUIDED_SCALE gives a sum over samples its scale and CLS_LOSS "
        f"{_name(parts.cls_loss)} has a scale of its own; set it to 0. CLS_LOSS that work: "
        + _names(cls for _, cls in CLS_LOSSES if cls.elementwise)
    )


def _calibration(parts: Parts) -> str | None:
    if not parts.calibration:
        return None
    works, why = _has_class_logits, "has logits of groups, not of classes"
    what, off = f"CALIBRATION.NAME {parts.calibration}", '""'
    if parts.calibration == "logn":
        works, why = _is_plain_softmax, "has no plain softmax"
    elif parts.calibration == "norcal":
        works, what, off = _has_odds, "NORCAL.GAMMA (norcal)", "0"
    if not _has_odds(parts.cls_loss):
        why = "has Gumbel scores, whose logits are no log-odds"
    if works(parts.cls_loss):
        return None
    return (
        f"MODEL.BALANCE.{what} calibrates class logits and CLS_LOSS "
        f"{_name(parts.cls_loss)} {why}; set it to {off}. CLS_LOSS that work: "
        + _names(cls for _, cls in CLS_LOSSES if works(cls))
    )


def _has_odds(loss: Any) -> bool:
    return bool(loss.activation != "gumbel")


def _has_class_logits(loss: Any) -> bool:
    return bool(loss.class_logits) and _has_odds(loss)


def _is_plain_softmax(loss: Any) -> bool:
    return bool(loss.activation == "softmax" and has_plain_scores(loss))


RULES: tuple[Callable[[Parts], str | None], ...] = (
    _outputs,
    _class_quantities,
    _levels,
    _coupled_boxes,
    _per_sample,
    _scores,
    _entries,
    _proposals,
    _anchors,
    _guided,
    _calibration,
)


def has_plain_scores(loss: Any) -> bool:
    """Whether scores are a plain sigmoid or softmax of the logits."""
    plain = _class(loss).num_outputs is ClassificationLoss.num_outputs
    return bool(_has_odds(loss) and plain)


def _has_entries(loss: Any) -> bool:
    """Whether a loss is a sum over K columns of logits."""
    plain = _class(loss).num_outputs is ClassificationLoss.num_outputs
    return bool(loss.activation != "softmax" and plain)


def has_class_columns_only(loss: Any) -> bool:
    """Whether a loss takes K columns of logits, as a dense head gives them."""
    return bool(loss.activation == "sigmoid" and has_plain_scores(loss))


def needs_class_quantities(loss: Any) -> bool:
    """Whether a loss is made from the counts of classes in the training set."""
    return any(name in inspect.signature(_class(loss)).parameters for name in CLASS_QUANTITIES)


def _class(part: Any) -> Any:
    return part if isinstance(part, type) else type(part)


def _key(part: Any) -> str:
    samples = any(cls is _class(part) for _, cls in PROPOSAL_SAMPLERS)
    return "PROPOSAL_SAMPLER" if samples else "REWEIGHTERS"


def _name(part: Any) -> str:
    return str(_class(part).name)


def _names(classes: Iterable[Any]) -> str:
    return ", ".join(sorted(cls.name for cls in classes)) + "."


def check_pairing(
    head: str, cls_loss: Any, box_loss: Any, reweighters: Sequence[Any] = (), **others: Any
) -> None:
    """`check_parts` for the head of a name in `HEADS`; `others` as in `Parts`.

    Raises:
        ValueError: names both sides and says what works.
    """
    check_parts(Parts(HEADS[head], cls_loss, box_loss, tuple(reweighters), **others))


def check_proposal_sampler(head: str, proposal_sampler: Any) -> None:
    """Refuse a proposal sampler if there are no proposals to choose from.

    Raises:
        ValueError: names both and says what works.
    """
    message = _proposals(Parts(HEADS[head], None, None, proposal_sampler=proposal_sampler))
    if message is not None:
        raise ValueError(message)


def check_anchor_sampler(head: str, anchor_sampler: Any) -> None:
    """Refuse an anchor sampler in a head without anchors.

    Raises:
        ValueError: names both and says what works.
    """
    message = _anchors(Parts(HEADS[head], None, None, anchor_sampler=anchor_sampler))
    if message is not None:
        raise ValueError(message)
