"""The page docs/config.md: every key of this package with its default and its meaning.

    python scripts/config_reference.py docs/config.md

Comments above the keys in `config.py` and the docstrings of the losses are the only source.
"""

from __future__ import annotations

import argparse
import inspect
import re
from typing import Any

from detectron2.config import CfgNode, get_cfg

from d2_balance.config import add_balance_config, add_training_config, argument_help
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.build import DATA_ARGUMENTS, argument_key
from d2_balance.reweight import REWEIGHTERS
from d2_balance.sampling import ANCHOR_SAMPLERS, PROPOSAL_SAMPLERS
from d2_balance.utils.config_tree import leaves
from d2_balance.utils.files import write_text

HEAD = """# Configuration

Keys that this package adds to Detectron2's configuration. Set them in a YAML file or on the
command line: `train_net.py --config-file FILE MODEL.BALANCE.CLS_LOSS DR MODEL.BALANCE.DR.TAU 2.0`.
The losses are used by `MODEL.META_ARCHITECTURE: BalancedRetinaNet` and `BalancedFCOS`, and by
`BalancedRCNN` with `MODEL.ROI_HEADS.NAME: BalancedStandardROIHeads` or `BalancedCascadeROIHeads`.

This page is made by `python scripts/config_reference.py docs/config.md`; do not edit it.
"""
_OF_MODELS = ("MODEL.FCOS", "MODEL.BALANCE")  # have sections of their own
SECTIONS = {
    "Classification losses (`CLS_LOSS`)": CLS_LOSSES,
    "Box losses (`BOX_LOSS`)": BOX_LOSSES,
    "Reweighters (`REWEIGHTERS`)": REWEIGHTERS,
    "Proposal samplers (`PROPOSAL_SAMPLER`)": PROPOSAL_SAMPLERS,
    "Anchor samplers (`ANCHOR_SAMPLER`)": ANCHOR_SAMPLERS,
}


def key_comments() -> dict[str, str]:
    """The comments above the assignments in `config.py`, by full name of the key."""
    comments: dict[str, str] = {}
    block: list[str] = []
    sources = (add_balance_config, add_training_config)
    for line in "\n".join(map(inspect.getsource, sources)).splitlines():
        comment = re.match(r"\s*# (.*)", line)
        key = re.match(r"\s*(_C|cfg)\.([A-Z_.0-9]+) = ", line)
        if comment:
            block.append(comment.group(1).strip())
            continue
        if key:
            place = "MODEL.BALANCE." if key.group(1) == "_C" else ""
            comments[place + key.group(2)] = " ".join(block)
        block = []
    return comments


def reference_page() -> str:
    """The text of docs/config.md.

    Raises:
        ValueError: a key has no comment, or a constructor argument no line in its docstring.
    """
    cfg = get_cfg()
    add_balance_config(cfg)
    comments = key_comments()
    balance = cfg.MODEL.BALANCE
    nodes = {key for key, value in balance.items() if isinstance(value, CfgNode)}
    own = {key: value for key, value in balance.items() if key not in nodes}
    named = {name.upper() for registry in SECTIONS.values() for name, _ in registry}
    parts = [HEAD]
    for place, keys in added_keys(cfg, get_cfg()).items():
        about = [f"{comments[place]}\n"] if place in comments else []
        parts += [f"## {place}\n", *about, _table(place, keys, comments)]
    parts += ["## MODEL.FCOS\n", f"{comments['MODEL.FCOS']}\n"]
    parts += [_table("MODEL.FCOS", cfg.MODEL.FCOS, comments)]
    parts += ["## MODEL.BALANCE\n", _table("MODEL.BALANCE", own, comments)]
    for key in balance:
        if key in nodes - named:
            place = f"MODEL.BALANCE.{key}"
            sentence = _text(comments, place).rstrip(":.")
            texts = comments | _argument_texts(place)  # nodes of losses below the node of a part
            table = _table(place, dict(leaves(balance[key])), texts)
            parts += [f"### {place}\n", f"{sentence}.\n", table]
    for title, registry in SECTIONS.items():
        entries = [_entry(name, cls, balance.get(name.upper())) for name, cls in registry]
        parts += [f"## {title}\n", *entries] if entries else []
    return "\n".join(parts)


def added_keys(cfg: CfgNode, stock: CfgNode, place: str = "") -> dict[str, dict[str, Any]]:
    """Keys that Detectron2 lacks, by the full name of their node; without those of the models."""
    found: dict[str, dict[str, Any]] = {}
    for key, value in cfg.items():
        name = f"{place}.{key}".lstrip(".")
        if isinstance(value, CfgNode) and name not in _OF_MODELS:
            found |= added_keys(value, stock.get(key, {}), name)
        elif key not in stock and name not in _OF_MODELS:
            found.setdefault(place, {})[key] = value
    return found


def _argument_texts(place: str) -> dict[str, str]:
    """The meaning of every constructor argument, by the name of its key below `place`."""
    return {
        f"{place}.{name.upper()}.{argument_key(argument)}": text
        for registry in SECTIONS.values()
        for name, cls in registry
        for argument, text in argument_help(cls).items()
    }


def _entry(name: str, cls: type, node: CfgNode | None) -> str:
    """Heading, first line of the docstring, quantities from the data, and keys of one class."""
    parts = [f"### {name}\n", f"{(inspect.getdoc(cls) or name).splitlines()[0]}\n"]
    data = [f"`{name}`" for name in inspect.signature(cls).parameters if name in DATA_ARGUMENTS]
    if data:
        parts.append(
            f"Counted on the training set: {', '.join(data)}; see "
            "`MODEL.BALANCE.CLASS_COUNTS_FILE`.\n"
        )
    if node is None:
        parts.append("No keys.\n")
    else:
        place = f"MODEL.BALANCE.{name.upper()}"
        parts.append(_table(place, node, _argument_texts("MODEL.BALANCE")))
    return "\n".join(parts)


def _table(place: str, values: dict[str, Any], texts: dict[str, str]) -> str:
    """Markdown table of the keys below `place`, their defaults and meanings."""
    rows = ["| key | default | meaning |", "| --- | --- | --- |"]
    for key, value in values.items():
        name = f"{place}.{key}"
        text = _text(texts, name).replace("|", "\\|")
        rows.append(f"| `{name}` | `{_shown(value)}` | {_capitalised(text)} |")
    return "\n".join(rows) + "\n"


def _text(texts: dict[str, str], name: str) -> str:
    if not texts.get(name):
        raise ValueError(f"{name} has no comment in config.py and no line under Args.")
    return texts[name]


def _capitalised(text: str) -> str:
    """The first letter in upper case, unless it is a symbol of a formula ("s, how much ...")."""
    return text if re.match(r"[a-z](,|$)", text) else text[0].upper() + text[1:]


def _shown(value: Any) -> str:
    """A default as one types it; long floats are shortened, nothing else reads them from here."""
    if isinstance(value, str):
        return f'"{value}"'
    return f"{value:.6g}" if isinstance(value, float) and len(repr(value)) > 8 else repr(value)


def main() -> None:
    """Writes the page to the file named on the command line."""
    parser = argparse.ArgumentParser(description="Writes the reference of all configuration keys.")
    parser.add_argument("file", help="the page to write, replaced if it is there")
    path = parser.parse_args().file
    write_text(path, reference_page())


if __name__ == "__main__":
    main()
