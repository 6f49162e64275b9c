"""YAML configs by path or by name, with what they are based on."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import detectron2.model_zoo
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from d2_balance.config import add_balance_config
from d2_balance.utils.config_files import config_directory
from d2_balance.utils.config_tree import names
from d2_balance.utils.names import closest

ZOO = os.path.join(os.path.dirname(detectron2.model_zoo.__file__), "configs")
"""Directory of Detectron2's model zoo."""

_WORDS = {"True": "always", "False": "never"}

logger = logging.getLogger(__name__)


def find_config(name: str, beside: str = "") -> str:
    """Return the path of a config file.

    Args:
        name: a path, relative to `beside` or the working directory; or the name of a config of
            Detectron2's model zoo, such as "COCO-Detection/retinanet_R_50_FPN_1x.yaml", or of this
            package (`get_config_file` finds those that bear a name of the zoo).
        beside: directory of the file that names it as its _BASE_.

    Raises:
        ValueError: there is no such file; with the names that look alike.
    """
    path = os.path.expanduser(name)
    place = path if "://" in path else os.path.join(beside, path)
    if PathManager.isfile(place):
        return place
    directories = [ZOO]  # first: a name that both have is known as the zoo's
    with suppress(ValueError):  # installed without configs
        directories.append(str(config_directory()))
    for directory in directories:
        if os.path.isfile(place := os.path.join(directory, name)):
            return place
    known = [
        file.relative_to(directory).as_posix()
        for directory in directories
        for file in Path(directory).rglob(f"*{Path(name).suffix}")
    ]
    raise ValueError(
        f"the config {name!r} does not exist; it must be a file, or a name of this package or of "
        f"Detectron2's model zoo. {closest(name, known)}".rstrip()
    )


def read_config(config_file: str = "", overrides: Sequence[str] = ()) -> CfgNode:
    """Read Detectron2's defaults, then MODEL.BALANCE, then a YAML file, then the command line.

    Args:
        config_file: YAML file or name of the model zoo, see `find_config`; "" for none.
        overrides: keys and values in turn.

    Raises:
        ValueError: a file that cannot be read, an unknown key (with keys that look like it), or a
            value of the wrong type.
    """
    cfg = get_cfg()
    add_balance_config(cfg)
    for path, layer in config_layers(config_file) if config_file else ():
        with _explained(cfg, path):
            version = layer.pop("VERSION", cfg.VERSION)
            if version != cfg.VERSION:
                raise ValueError(
                    f"VERSION is {version}; it must be {cfg.VERSION} "
                    "(detectron2.config.upgrade_config translates old keys)"
                )
            cfg.merge_from_other_cfg(CfgNode(_in_words(layer, cfg)))
    merge_overrides(cfg, overrides, "command line")
    return cfg


def _in_words(layer: dict[str, Any], cfg: CfgNode) -> dict[str, Any]:
    """Return a layer with True and False as "always" and "never" for keys that have these."""
    return {
        key: _in_words(value, cfg[key])
        if isinstance(value, dict) and isinstance(cfg.get(key), CfgNode)
        else _in_a_word(value, cfg.get(key))
        for key, value in layer.items()
    }


def _in_a_word(value: Any, known: Any) -> Any:
    return _WORDS.get(str(value), value) if known in ("auto", *_WORDS.values()) else value


def config_layers(name: str) -> list[tuple[str, dict[str, Any]]]:
    """Read a YAML file and those that it is based on.

    Tags that run Python are read, as in Detectron2, whose own zoo has them.

    Args:
        name: see `find_config`.

    Returns:
        Pairs of path and content without _BASE_, the first base first.

    Raises:
        ValueError: naming the file that cannot be read.
    """
    return _layers(find_config(name), ())


def _layers(path: str, above: tuple[str, ...]) -> list[tuple[str, dict[str, Any]]]:
    if path in above:
        raise ValueError(f"{path}: its _BASE_ leads back to itself")
    try:
        with PathManager.open(path) as file:
            text = file.read()
        content = _load(text, path)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: it must hold keys and values, not {type(content).__name__}")
    bases = content.pop("_BASE_", [])
    found = []
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            below = find_config(base, os.path.dirname(path))
        except ValueError as error:
            raise ValueError(f"{path}: _BASE_: {error}") from error
        found += _layers(below, (*above, path))
    return [*found, (path, content)]


def _load(text: str, path: str) -> Any:
    try:
        return yaml.safe_load(text) or {}
    except yaml.constructor.ConstructorError:
        if not path.startswith(ZOO):
            logger.warning(
                f"{path} has tags that run Python code; trust the file before you use it"
            )
        return yaml.unsafe_load(text)


def merge_overrides(cfg: CfgNode, overrides: Sequence[Any], source: str) -> None:
    """Set keys of a config to values, given in turn.

    Raises:
        ValueError: an unknown key, or a value of the wrong type; the message names `source`.
    """
    values = list(overrides)
    for number, key in enumerate(values[:-1:2]):
        node: Any = cfg
        for part in str(key).split("."):
            node = node.get(part) if isinstance(node, CfgNode) else None
        if isinstance(node, str):
            values[2 * number + 1] = _in_a_word(values[2 * number + 1], node)
    with _explained(cfg, source):
        cfg.merge_from_list(values)


@contextmanager
def _explained(cfg: CfgNode, source: str) -> Iterator[None]:
    """Turn what yacs and PyYAML raise into ValueErrors that say where and what."""
    try:
        yield
    except (KeyError, AssertionError, ValueError, OSError, yaml.YAMLError) as error:
        text = str(error.args[0]) if error.args and isinstance(error, KeyError) else str(error)
        for start in ("Non-existent config key: ", "Non-existent key: "):
            if text.startswith(start):
                key = text.removeprefix(start)
                text = f"unknown key {key}; {closest(key, names(cfg))}"
        raise ValueError(f"{source}: {text}") from error
