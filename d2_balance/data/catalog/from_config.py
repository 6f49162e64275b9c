"""Registers what DATASETS.REGISTER and DATASETS.EXTERNAL name."""

from typing import Any

from detectron2.config import CfgNode

from .external import register_external_from_config
from .register import register_json

_KEYS = ("NAME", "JSON", "IMAGES")
_FORM = "{NAME: name, JSON: file, IMAGES: directory} or [name, file, directory], each a text"


def register_from_config(cfg: CfgNode) -> list[str]:
    """Register every entry of DATASETS.REGISTER.

    An entry is ``{NAME: ..., JSON: ..., IMAGES: ...}`` or ``[name, json, directory]``. Calling this
    again with equal entries changes nothing.

    The entries of DATASETS.EXTERNAL are registered after them, see `external.py`.

    Returns:
        The names, in the order of the lists.

    Raises:
        ValueError: naming the entry, if it has another form, if its file or directory is missing,
            or if its name belongs to another dataset.
    """
    entries = cfg.DATASETS.REGISTER
    if not isinstance(entries, list | tuple):
        raise ValueError(f"DATASETS.REGISTER must be a list of {_FORM}, not {entries!r}")
    names = []
    for number, entry in enumerate(entries):
        key = f"DATASETS.REGISTER[{number}]"
        name, json_file, image_root = _parse_entry(entry, key)
        register_json(name, json_file, image_root, key)
        names.append(name)
    return names + register_external_from_config(cfg)


def _parse_entry(entry: Any, key: str) -> tuple[str, str, str]:
    if isinstance(entry, dict):
        if set(entry) != set(_KEYS):
            raise ValueError(f"{key} has the keys {sorted(entry)}; must be {_FORM}")
        entry = [entry[field] for field in _KEYS]
    if not isinstance(entry, list | tuple) or len(entry) != 3:
        raise ValueError(f"{key} is {entry!r}; must be {_FORM}")
    if not all(isinstance(value, str) and value for value in entry):
        raise ValueError(f"{key} is {list(entry)!r}; must be {_FORM}")
    return tuple(entry)
