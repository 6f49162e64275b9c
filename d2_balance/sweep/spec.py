"""A sweep file: a base config, remedies, seeds and a budget, checked before the first trial."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from d2_balance.utils.config_tree import merge
from d2_balance.utils.files import read_yaml
from d2_balance.utils.names import closest

BASELINE = "baseline"
SUGGESTED = "suggested"
FIELDS = {
    "base": "config file of the baseline",
    "overrides": "keys that every trial shares",
    "remedies": "a list of names and fragments",
    "seeds": "a list of integers",
    "early_stopping": "false, or a mapping of first and reduction_factor",
    "metric": "what the table is sorted by, such as bbox/AP",
    "reference": "the remedy that others are compared with",
    "cuts": "two integers, the training images that divide rare, common and frequent classes",
}
DEFAULT_FIRST, DEFAULT_FACTOR = 1 / 3, 3
_METRIC = re.compile(r"(bbox|segm)/(AP|AP50|AP75|APs|APm|APl|APr|APc|APf)")


@dataclasses.dataclass(frozen=True)
class Remedy:
    """A name and the keys that it changes.

    Args:
        name: as it stands in tables and directory names.
        fragment: nested keys and values that are merged into the base config.
        reason: why `analyze` suggests it, "" for one that the user names.
    """

    name: str
    fragment: Mapping[str, Any]
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class SweepSpec:
    """What a sweep file says.

    Args:
        path: the file.
        base: absolute path, or name in the model zoo, of the base config.
        overrides: nested keys that every trial shares.
        remedies: the baseline first.
        seeds: different integers.
        first: fraction of the iterations after which a trial may be stopped first, in (0, 1);
            None switches early stopping off.
        reduction_factor: one in so many trials goes on at a rung, at least 2.
        metric: task and figure, such as "bbox/AP".
        reference: name of the remedy that others are compared with.
        cuts: largest image counts of a rare and of a common class; None takes the data's groups.
    """

    path: str
    base: str
    overrides: Mapping[str, Any]
    remedies: tuple[Remedy, ...]
    seeds: tuple[int, ...]
    first: float | None = DEFAULT_FIRST
    reduction_factor: int = DEFAULT_FACTOR
    metric: str = "bbox/AP"
    reference: str = BASELINE
    cuts: tuple[int, int] | None = None

    def remedy(self, name: str) -> Remedy:
        """Return the remedy of a name."""
        return next(r for r in self.remedies if r.name == name)

    @property
    def fingerprint(self) -> str:
        """Key of all that decides what the trials are."""
        content = [
            self.base,
            self.overrides,
            [(r.name, r.fragment) for r in self.remedies],
            self.metric,
            self.first,
            self.reduction_factor,
        ]
        text = json.dumps(content, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def config(self, name: str, seed: int, output_dir: str) -> dict[str, Any]:
        """Return the config of a trial, as one writes it to a YAML file."""
        config: dict[str, Any] = {"_BASE_": self.base}
        merge(config, self.overrides)
        merge(config, self.remedy(name).fragment)
        return merge(config, {"SEED": seed, "OUTPUT_DIR": output_dir})


def read_sweep(path: str) -> SweepSpec:
    """Read a sweep file and check its form; the configs are checked by `check_remedies`.

    Args:
        path: YAML file with the fields of `FIELDS`; `base` and `remedies` are needed.

    Returns:
        The sweep. "suggested" stays a remedy without a fragment until `with_suggestions`.

    Raises:
        ValueError: a file that cannot be read, an unknown field, or a value of another form,
            naming the field and what it must be.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path}: a sweep must be a mapping with the fields {', '.join(FIELDS)}")
    for name in data:
        if name not in FIELDS:
            raise ValueError(f"{path}: unknown field {name!r}; {closest(str(name), FIELDS)}")
    for name in ("base", "remedies"):
        if not data.get(name):
            raise ValueError(f"{path}: {name} is missing; it must be {FIELDS[name]}")
    first, factor = _early_stopping(path, data.get("early_stopping", True))
    remedies = _remedies(path, data["remedies"])
    reference = data.get("reference", BASELINE)
    if reference not in [r.name for r in remedies]:
        raise ValueError(
            f"{path}: reference is {reference!r}; it must be one of "
            f"{', '.join(r.name for r in remedies)}"
        )
    overrides = data.get("overrides") or {}
    if not isinstance(overrides, dict):
        raise ValueError(f"{path}: overrides must be a mapping of config keys")
    metric = data.get("metric", "bbox/AP")
    if not _METRIC.fullmatch(str(metric)):
        raise ValueError(
            f"{path}: metric is {metric!r}; it must be a task and a figure, such as bbox/AP, "
            "bbox/APr or segm/AP"
        )
    return SweepSpec(
        path=os.path.abspath(path),
        base=_base(path, data["base"]),
        overrides=overrides,
        remedies=remedies,
        seeds=_seeds(path, data.get("seeds", [1, 2, 3])),
        first=first,
        reduction_factor=factor,
        metric=metric,
        reference=reference,
        cuts=_cuts(path, data.get("cuts")),
    )


def with_suggestions(spec: SweepSpec, suggestions: Sequence[Remedy]) -> SweepSpec:
    """Return the sweep with "suggested" replaced by what `analyze` proposes.

    Remedies that the file names itself are not taken twice.
    """
    named = {r.name for r in spec.remedies}
    remedies: list[Remedy] = []
    for remedy in spec.remedies:
        if remedy.name == SUGGESTED and not remedy.fragment:
            remedies += [s for s in suggestions if s.name not in named]
        else:
            remedies.append(remedy)
    return dataclasses.replace(spec, remedies=tuple(remedies))


def _base(path: str, base: object) -> str:
    if not isinstance(base, str):
        raise ValueError(f"{path}: base must be {FIELDS['base']}")
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), base)
    return beside if os.path.exists(beside) else base


def _remedies(path: str, entries: object) -> tuple[Remedy, ...]:
    """Return the remedies: names, or mappings of one name to a fragment; the baseline first."""
    if isinstance(entries, dict):
        entries = [{name: fragment} for name, fragment in entries.items()]
    if not isinstance(entries, list):
        raise ValueError(f"{path}: remedies must be {FIELDS['remedies']}")
    remedies = []
    for entry in entries:
        if isinstance(entry, str):
            fragment = {} if entry in (SUGGESTED, BASELINE) else named_fragment(path, entry)
            remedies.append(Remedy(entry, fragment))
        elif isinstance(entry, dict) and all(isinstance(v, dict | None) for v in entry.values()):
            remedies += [Remedy(str(name), fragment or {}) for name, fragment in entry.items()]
        else:
            raise ValueError(
                f"{path}: remedies: {entry!r} must be a name, or a name with the config keys that "
                "it changes"
            )
    for remedy in remedies:
        if not re.fullmatch(r"[\w.+-]+", remedy.name):
            raise ValueError(
                f"{path}: remedies: {remedy.name!r} must have letters, digits, '.', '+', '-' and "
                "'_' only, for it names a directory"
            )
    names = [r.name for r in remedies]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise ValueError(f"{path}: remedies: {', '.join(sorted(twice))} stands there twice")
    if BASELINE not in names:
        remedies.insert(0, Remedy(BASELINE, {}))
    return tuple(remedies)


def named_fragment(path: str, name: str) -> dict[str, Any]:
    """Return the config keys behind the name of a loss, a reweighter or a sampler.

    Raises:
        ValueError: no part of the package has that name.
    """
    from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
    from d2_balance.reweight import REWEIGHTERS
    from d2_balance.sampling import ANCHOR_SAMPLERS, PROPOSAL_SAMPLERS

    if name in CLS_LOSSES:
        return {"MODEL": {"BALANCE": {"CLS_LOSS": name}}}
    if name in BOX_LOSSES:
        return {"MODEL": {"BALANCE": {"BOX_LOSS": name}}}
    if name in REWEIGHTERS:
        return {"MODEL": {"BALANCE": {"REWEIGHTERS": [name]}}}
    if name in PROPOSAL_SAMPLERS:
        return {"MODEL": {"BALANCE": {"PROPOSAL_SAMPLER": name}}}
    if name in ANCHOR_SAMPLERS:
        return {"MODEL": {"BALANCE": {"ANCHOR_SAMPLER": name}}}
    if name.endswith("TrainingSampler"):
        return {"DATALOADER": {"SAMPLER_TRAIN": name}}
    registries = (CLS_LOSSES, BOX_LOSSES, REWEIGHTERS, PROPOSAL_SAMPLERS, ANCHOR_SAMPLERS)
    known = [key for registry in registries for key, _ in registry]
    raise ValueError(
        f"{path}: remedies: {name!r} is unknown; {closest(name, known)}, or give the config keys "
        f"that it changes, as in '{name}: {{MODEL: {{BALANCE: {{CLS_LOSS: ...}}}}}}'"
    )


def _seeds(path: str, seeds: object) -> tuple[int, ...]:
    fits = isinstance(seeds, list) and all(type(s) is int and s >= 0 for s in seeds)
    if not isinstance(seeds, list) or not fits or not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"{path}: seeds is {seeds!r}; it must be a list of different integers")
    return tuple(seeds)


def _cuts(path: str, cuts: object) -> tuple[int, int] | None:
    if cuts is None:
        return None
    fits = isinstance(cuts, list) and all(type(c) is int and c >= 0 for c in cuts)
    if not isinstance(cuts, list) or not fits or len(cuts) != 2 or cuts[0] > cuts[1]:
        raise ValueError(f"{path}: cuts is {cuts!r}; it must be {FIELDS['cuts']}")
    return cuts[0], cuts[1]


def _early_stopping(path: str, value: object) -> tuple[float | None, int]:
    if value is False:
        return None, DEFAULT_FACTOR
    if value is True or value is None:
        return DEFAULT_FIRST, DEFAULT_FACTOR
    if not isinstance(value, dict) or set(value) - {"first", "reduction_factor"}:
        raise ValueError(f"{path}: early_stopping must be {FIELDS['early_stopping']}")
    first = value.get("first", DEFAULT_FIRST)
    factor = value.get("reduction_factor", DEFAULT_FACTOR)
    if not isinstance(first, int | float) or not 0 < first < 1:
        raise ValueError(
            f"{path}: early_stopping.first is {first!r}; it must be a number in (0, 1)"
        )
    if not isinstance(factor, int) or factor < 2:
        raise ValueError(
            f"{path}: early_stopping.reduction_factor is {factor!r}; it must be an integer of at "
            "least 2"
        )
    return float(first), factor
