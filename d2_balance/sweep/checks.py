"""Checks of every remedy before the first trial, all of them reported together."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from d2_balance.data import register_from_config
from d2_balance.engine import read_config, use_cpu_without_cuda, validate

from .intervals import Intervals
from .run import Plan
from .spec import SUGGESTED, Remedy, SweepSpec, with_suggestions


def check_remedies(spec: SweepSpec) -> Plan:
    """Check the config of each remedy as its training will, model included.

    Args:
        spec: the sweep, without "suggested".

    Returns:
        Length of the trials, first rung and dataset.

    Raises:
        ValueError: the base cannot be read, or remedies do not fit; each is named with its reason.
    """
    base = _config(spec, spec.reference)
    if len(base.DATASETS.TEST) != 1:
        raise ValueError(
            f"{spec.path}: DATASETS.TEST has {len(base.DATASETS.TEST)} datasets; a sweep compares "
            "on one"
        )
    problems: dict[str, list[str]] = {}  # message to remedies
    plans = {}
    with _each_message_once():
        for remedy in spec.remedies:
            try:
                cfg = _config(spec, remedy.name)
                _check(cfg)
                plans[remedy.name] = (cfg.SOLVER.MAX_ITER, cfg.DATASETS.TEST[0])
            except (ValueError, KeyError) as error:
                message = str(error.args[0] if error.args else error)
                problems.setdefault(message, []).append(remedy.name)
    if problems:
        bad = sum(map(len, problems.values()))
        lines = [f"- {', '.join(names)}: {message}" for message, names in problems.items()]
        raise ValueError(
            f"{spec.path}: {bad} of {len(spec.remedies)} remedies do not fit:\n" + "\n".join(lines)
        )
    if len(set(plans.values())) > 1:
        shown = ", ".join(f"{name} {n} on {test}" for name, (n, test) in plans.items())
        raise ValueError(
            f"{spec.path}: remedies differ in SOLVER.MAX_ITER or DATASETS.TEST ({shown}); they "
            "must be equal, or the comparison is not fair"
        )
    iterations, dataset = plans[spec.reference]
    first = 0 if spec.first is None else max(1, round(iterations * spec.first))
    if first and iterations % first:
        first = next(n for n in range(first, iterations + 1) if iterations % n == 0)
    return Plan(iterations, 0 if first >= iterations else first, dataset)


def with_suggested(spec: SweepSpec) -> SweepSpec:
    """Return the sweep with "suggested" replaced by what `analyze` proposes for the training set.

    Raises:
        ValueError: the base cannot be read, or has several training sets.
    """
    if all(r.name != SUGGESTED for r in spec.remedies):
        return spec
    from d2_balance.analysis.remedies import suggestions
    from d2_balance.analysis.report import analyze
    from d2_balance.analysis.source import load

    cfg = _config(spec, spec.reference)
    if len(cfg.DATASETS.TRAIN) != 1:
        raise ValueError(
            f"{spec.path}: {SUGGESTED} needs one dataset in DATASETS.TRAIN, and there are "
            f"{len(cfg.DATASETS.TRAIN)}; name the remedies instead"
        )
    register_from_config(cfg)
    found = suggestions(analyze(load(cfg.DATASETS.TRAIN[0]), cfg, cuts=spec.cuts))
    return with_suggestions(
        spec, [Remedy(re.sub(r"[^\w.+-]+", "-", s.name), s.fragment, s.reason) for s in found]
    )


def make_intervals(spec: SweepSpec, plan: Plan) -> Intervals:
    """Return the bootstrap of the trials, under the rules that their evaluations have."""
    cfg = _config(spec, spec.reference)
    register_from_config(cfg)
    return Intervals(
        plan.dataset,
        spec.metric,
        cuts=spec.cuts,
        train=cfg.DATASETS.TRAIN[0] if spec.cuts and len(cfg.DATASETS.TRAIN) == 1 else None,
        max_dets=cfg.TEST.EVAL_MAX_DETS or None,
    )


def _config(spec: SweepSpec, name: str) -> Any:
    config = spec.config(name, spec.seeds[0], "output")
    cfg = read_config(config.pop("_BASE_"))
    try:
        cfg.merge_from_other_cfg(CfgNode(config))
    except (KeyError, ValueError, AssertionError) as error:
        raise ValueError(f"{error.args[0] if error.args else error}") from error
    return cfg


@contextmanager
def _each_message_once() -> Iterator[None]:
    """Drop log records that say what was said before: the remedies share their data."""
    said: set[str] = set()

    def is_new(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        new = message not in said
        said.add(message)
        return new

    handlers = [*logging.getLogger().handlers, *logging.getLogger("d2_balance").handlers]
    handlers += [logging.lastResort] if logging.lastResort else []
    for handler in handlers:
        handler.addFilter(is_new)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(is_new)


def _check(cfg: Any) -> None:
    use_cpu_without_cuda(cfg)
    register_from_config(cfg)
    validate(cfg)
    cfg.MODEL.DEVICE = "cpu"
    build_model(cfg)
