"""Class maps: which class of one dataset is which class of another.

A map is a YAML or JSON file of lines `source class: target class`. Either side is a class name or a
synset; `null` on the right leaves the class out on purpose:

    person: person
    traffic light: traffic_light
    "Human face": null
    "/m/01yrx": cat.n.01      # a class may be named by any of its texts
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml

from d2_balance.utils.files import read_bytes, write_text
from d2_balance.utils.names import listed

from .columns import category_name

_KEYS = ("synset", "freebase_id", "mid")
_SHOWN = 10


@dataclass(frozen=True)
class ClassMap:
    """Classes of a source and the classes of a target that they are.

    Attributes:
        ids: category id of the source to category id of the target.
        matched: (source name, target name) of each entry of `ids`.
        left_out: source names that the file sets to null.
        unmatched: source names that the file does not have.
        uncovered: target names that no source class maps to.
        source, target: what the two sides are called, for messages.
    """

    ids: dict[int, int]
    matched: list[tuple[str, str]]
    left_out: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)
    uncovered: list[str] = field(default_factory=list)
    source: str = "source"
    target: str = "target"

    def report(self) -> str:
        """What matched and what did not, as text."""
        lines = [
            f"{len(self.matched)} classes of {self.source} are classes of {self.target}: "
            + listed([a if a == b else f"{a} -> {b}" for a, b in self.matched], _SHOWN)
        ]
        for names, text in (
            (self.left_out, f"left out of {self.source} by null"),
            (self.unmatched, f"of {self.source} without a match"),
            (self.uncovered, f"of {self.target} that {self.source} does not have"),
        ):
            if names:
                lines.append(f"{len(names)} {text}: {listed(names, _SHOWN)}")
        return "\n".join(lines)


def read_class_map(path: str) -> dict[str, str | None]:
    """The entries of a class map file.

    Raises:
        ValueError: a file that cannot be read, is no mapping of texts, or names a class twice.
    """
    try:
        content = read_bytes(path) if "://" in path else Path(path).read_bytes()
        entries = yaml.load(content, Loader=_UniqueLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        text = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: the class map cannot be read: {text}") from error
    if not isinstance(entries, dict) or not entries:
        raise ValueError(f"{path}: a class map has lines 'source class: target class'")
    for key, value in entries.items():
        if not isinstance(key, str) or not isinstance(value, str | None):
            raise ValueError(
                f"{path}: {key!r}: {value!r} must be two class names; put quotes around names that "
                "YAML takes for something else, and null for a class to leave out"
            )
    return entries


def resolve_class_map(
    entries: Mapping[str, str | None] | None,
    source: Sequence[Mapping[str, Any]],
    target: Sequence[Mapping[str, Any]],
    names: tuple[str, str] = ("source", "target"),
    path: str = "",
) -> ClassMap:
    """Turn a map into category ids; without one classes of equal name or synset are the same.

    Args:
        entries: as `read_class_map` returns them; None: by name (case, `_`, `-` and spaces do not
            count), then by synset.
        source: `categories` of the source's annotation file.
        target: `categories` of the target's.
        names: what the two are called in messages.
        path: file of the entries, for messages.

    Raises:
        ValueError: names that a side does not have (with the closest that it has), names that
            several classes of a side share, or one source class in two lines. Maps of many source
            classes to one target class are fine.
    """
    source_ids, target_ids = _by_text(source), _by_text(target)
    ids: dict[int, int] = {}
    left_out: set[int] = set()
    if entries is None:
        for category in source:
            found = _same(category, target_ids)
            if found is not None:
                ids[category["id"]] = found
    else:
        for text, other in entries.items():
            own = _look_up(text, source_ids, f"{path}: {text!r}", names[0])
            if own in ids or own in left_out:
                raise ValueError(f"{path}: {text!r} names a class of {names[0]} a second time")
            if other is None:
                left_out.add(own)
            else:
                ids[own] = _look_up(other, target_ids, f"{path}: {text!r}", names[1])
    name = {c["id"]: category_name(c) for c in source}
    target_name = {c["id"]: category_name(c) for c in target}
    covered = set(ids.values())
    return ClassMap(
        ids=ids,
        matched=[(name[a], target_name[b]) for a, b in sorted(ids.items())],
        left_out=[n for i, n in name.items() if i in left_out],
        unmatched=[n for i, n in name.items() if i not in ids and i not in left_out],
        uncovered=[n for i, n in target_name.items() if i not in covered],
        source=names[0],
        target=names[1],
    )


def load_class_map(
    path: str | None,
    source: Sequence[Mapping[str, Any]],
    target: Sequence[Mapping[str, Any]],
    names: tuple[str, str] = ("source", "target"),
) -> ClassMap:
    """`read_class_map` and `resolve_class_map`; without a path by name and synset."""
    entries = read_class_map(path) if path else None
    return resolve_class_map(entries, source, target, names, path or "")


def write_class_map(
    path: str, source: Sequence[Mapping[str, Any]], target: Sequence[Mapping[str, Any]]
) -> ClassMap:
    """Write the map that names and synsets give, for editing; classes without match are null.

    Raises:
        FileExistsError: the file is there; edited maps are not replaced.
    """
    if os.path.exists(path):
        raise FileExistsError(f"{path} exists; it may have been edited, and is not replaced")
    found = resolve_class_map(None, source, target)
    names = {c["id"]: category_name(c) for c in target}
    lines = {category_name(c): names.get(found.ids.get(c["id"])) for c in source}
    write_text(path, yaml.safe_dump(lines, allow_unicode=True, sort_keys=False))
    return found


def _texts(category: Mapping[str, Any]) -> list[str]:
    """The texts that name a class: its name and its ids in other vocabularies."""
    texts = [category_name(category), *(category.get(key) for key in _KEYS)]
    return list(dict.fromkeys(text for text in texts if isinstance(text, str) and text))


def _plain(text: str) -> str:
    return " ".join(text.lower().replace("_", " ").replace("-", " ").split())


def _by_text(categories: Sequence[Mapping[str, Any]]) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}
    for category in categories:
        for text in _texts(category):
            for form in {text, _plain(text)}:
                found.setdefault(form, set()).add(category["id"])
    return found


def _same(category: Mapping[str, Any], target: Mapping[str, set[int]]) -> int | None:
    for text in _texts(category):
        for form in (text, _plain(text)):
            if len(target.get(form, ())) == 1:
                return next(iter(target[form]))
    return None


def _look_up(text: str, known: Mapping[str, set[int]], where: str, side: str) -> int:
    found = known.get(text) or known.get(_plain(text), set())
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(
            f"{where}: {len(found)} classes of {side} are called {text!r}; use synsets"
        )
    similar = get_close_matches(text, known, n=3, cutoff=0.6)
    hint = f"did you mean {' or '.join(map(repr, similar))}?" if similar else ""
    raise ValueError(f"{where}: {side} has no class {text!r}; {hint or 'names and synsets count'}")


class _UniqueLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice, of which YAML would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((k for i, k in enumerate(keys) if k in keys[:i]), None)
        if twice is not None:
            raise yaml.YAMLError(f"{twice!r} stands in two lines")
        return super().construct_mapping(node, deep)
