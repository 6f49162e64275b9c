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
from d2_balance.utils.rules import Rule

BASELINE = "baseline"
SUGGESTED = "suggested"
DEFAULT_FIRST, DEFAULT_FACTOR = 1 / 3, 3
_METRIC = re.compile(r"(bbox|segm)/(AP|AP50|AP75|APs|APm|APl|APr|APc|APf)")


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _stops_early(value: Any) -> bool:
    if isinstance(value, bool):
        return True
    if not isinstance(value, dict) or set(value) - {"first", "reduction_factor"}:
        return False
    first, factor = value.get("first", DEFAULT_FIRST), value.get("reduction_factor", DEFAULT_FACTOR)
    return type(first) in (int, float) and 0 < first < 1 and type(factor) is int and factor >= 2


FIELDS: Mapping[str, Rule] = {
    "base": (
        "the config file of the baseline",
        lambda value: isinstance(value, str) and value != "",
    ),
    "overrides": (
        "a mapping of config keys that every trial shares",
        lambda value: isinstance(value, dict),
    ),
    "remedies": (
        "a list of names, or names with the config keys that they change",
        lambda value: isinstance(value, list | dict) and len(value) > 0,
    ),
    "seeds": (
        "a list of different integers",
        lambda value: _counts(value) and len(set(value)) == len(value) > 0,
    ),
    "early_stopping": (
        "false, or a mapping of first, a number in (0, 1), and reduction_factor, an integer of at "
        "least 2",
        _stops_early,
    ),
    "metric": (
        "a task and a figure, such as bbox/AP, bbox/APr or segm/AP",
        lambda value: _METRIC.fullmatch(str(value)) is not None,
    ),
    "reference": (
        "the remedy that others are compared with",
        lambda value: isinstance(value, str),
    ),
    "cuts": (
        "two integers, the training images that divide rare, common and frequent classes",
        lambda value: _counts(value) and len(value) == 2 and value[0] <= value[1],
    ),
}
"""The fields of a sweep file; `base` and `remedies` are needed."""

_DEFAULTS: dict[str, Any] = {
    "overrides": {},
    "seeds": [1, 2, 3],
    "early_stopping": True,
    "metric": "bbox/AP",
    "reference": BASELINE,
    "cuts": None,
}


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
    data = {name: value for name, value in data.items() if value is not None}
    for name, (must, fits) in FIELDS.items():
        if name in data and not fits(data[name]):
            raise ValueError(f"{path}: {name} is {data[name]!r}; must be {must}")
        if name not in data and name not in _DEFAULTS:
            raise ValueError(f"{path}: {name} is missing; must be {must}")
    data = _DEFAULTS | data
    remedies = _remedies(path, data["remedies"])
    if data["reference"] not in [r.name for r in remedies]:
        raise ValueError(
            f"{path}: reference is {data['reference']!r}; must be one of "
            f"{', '.join(r.name for r in remedies)}"
        )
    beside = os.path.join(os.path.dirname(os.path.abspath(path)), data["base"])
    stopping = data["early_stopping"] if isinstance(data["early_stopping"], dict) else {}
    first = float(stopping.get("first", DEFAULT_FIRST))
    return SweepSpec(
        path=os.path.abspath(path),
        base=beside if os.path.exists(beside) else data["base"],
        overrides=data["overrides"],
        remedies=remedies,
        seeds=tuple(data["seeds"]),
        first=None if data["early_stopping"] is False else first,
        reduction_factor=stopping.get("reduction_factor", DEFAULT_FACTOR),
        metric=data["metric"],
        reference=data["reference"],
        cuts=tuple(data["cuts"]) if data["cuts"] else None,
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


def _remedies(path: str, entries: list[Any] | dict[str, Any]) -> tuple[Remedy, ...]:
    """Return the remedies: names, or mappings of one name to a fragment; the baseline first."""
    if isinstance(entries, dict):
        entries = [{name: fragment} for name, fragment in entries.items()]
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
    from d2_balance.config import REGISTRIES

    for key, registry in REGISTRIES.items():
        if name in registry:
            return {"MODEL": {"BALANCE": {key: [name] if key == "REWEIGHTERS" else name}}}
    if name.endswith("TrainingSampler"):
        return {"DATALOADER": {"SAMPLER_TRAIN": name}}
    known = [key for registry in REGISTRIES.values() for key, _ in registry]
    raise ValueError(
        f"{path}: remedies: {name!r} is unknown; {closest(name, known)}, or give the config keys "
        f"that it changes, as in '{name}: {{MODEL: {{BALANCE: {{CLS_LOSS: ...}}}}}}'"
    )
