"""List every method with its paper and file, and which go together."""

from __future__ import annotations

import argparse
import inspect
from pathlib import Path

from tabulate import tabulate

from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.methods import METHODS, Method
from d2_balance.modeling import compatibility as rules
from d2_balance.reweight import REWEIGHTERS
from d2_balance.sampling import PROPOSAL_SAMPLERS
from d2_balance.utils.blocks import with_blocks

ARXIV = "https://arxiv.org/abs/"

HEAD_COLUMNS = {
    "RetinaNet": "RetinaNet",
    "FCOS": "FCOS",
    "RPN": "the RPN",
    "RoI heads": "RoI heads",
}


def method_table(links: bool, root: str = "") -> str:
    """The list of methods as a Markdown table.

    Args:
        links: whether files and papers are links.
        root: path from the page to the project's directory, "" or one that ends with a slash.
    """
    rows = []
    for m in METHODS:
        papers = [f"[{p}]({ARXIV}{p})" if links else p for p in m.papers]
        file, config = source_file(m), m.config
        if links:
            file = f"[{Path(file).name}]({root}{file})" if file else "Detectron2"
            config = f"[{Path(config).stem}]({root}{config})"
        names = ", ".join(f"`{n}`" if links else n for n in m.names)
        rows.append([names, m.purpose, ", ".join(papers), file, config, m.published])
    headers = ["name in YAML", "against", "paper", "file", "config", "published"]
    if not links:  # a terminal is narrower
        headers, rows = headers[:3] + headers[5:], [row[:3] + row[5:] for row in rows]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def source_file(method: Method) -> str:
    """File of a method, relative to the project's directory; "" if it is Detectron2's."""
    root = Path(__file__).parents[2]
    for registry in (CLS_LOSSES, BOX_LOSSES, REWEIGHTERS, PROPOSAL_SAMPLERS):
        if method.names[0] in registry:
            path = inspect.getsourcefile(registry.get(method.names[0]))
            return Path(path).relative_to(root).as_posix()
    return method.file


def goes_together(cls_name: str) -> dict[str, bool]:
    """Whether a classification loss works in each head and with each other part, by column.

    The heads are asked with SmoothL1; the other columns in RoI heads, whose losses are the most.
    """
    loss = CLS_LOSSES.get(cls_name)
    roi = {"head": "RoI heads", "box_loss": BOX_LOSSES.get("SmoothL1")}
    asked = {column: {**roi, "head": head} for column, head in HEAD_COLUMNS.items()}
    asked["GHMR"] = {**roi, "box_loss": BOX_LOSSES.get("GHMR")}
    for name, cls in sorted(REWEIGHTERS):
        asked[name] = {**roi, "reweighters": [cls]}
    for name, cls in sorted(PROPOSAL_SAMPLERS):
        asked[name] = {**roi, "proposal_sampler": cls}
    asked["GUIDED_SCALE"] = {**roi, "guided": True}
    asked["NORCAL"] = {**roi, "norcal": True}
    return {column: _works(loss, **parts) for column, parts in asked.items()}


def _works(loss: type, head: str, **parts: object) -> bool:
    try:
        rules.check_parts(rules.Parts(rules.HEADS[head], loss, **parts))
    except ValueError:
        return False
    return True


def pair_table() -> str:
    """Which classification losses work in which heads and with which other parts, as Markdown."""
    names = sorted(name for name, _ in CLS_LOSSES)
    found = {name: goes_together(name) for name in names}
    headers = ["CLS_LOSS", *found[names[0]]]
    rows = [[name, *("x" if works else "" for works in found[name].values())] for name in names]
    return tabulate(
        rows, headers, tablefmt="github", colalign=["left"] + ["center"] * len(rows[0][1:])
    )


def blocks(root: str = "") -> dict[str, str]:
    """The generated parts of a page by the name of their markers; `root` as in `method_table`."""
    return {"methods": method_table(links=True, root=root), "pairs": pair_table()}


def _root_from(page: Path) -> str:
    """Path from a page of the project to the project's directory; "" for a page elsewhere."""
    try:
        depth = len(page.resolve().relative_to(Path(__file__).parents[2]).parts) - 1
    except ValueError:
        return ""
    return "../" * depth


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `d2-balance methods`."""
    parser.add_argument(
        "--write",
        metavar="FILE",
        help="bring the tables in a Markdown file, docs/methods.md, up to date",
    )


def run(args: argparse.Namespace) -> int:
    """Prints both tables, or writes them; returns the exit status."""
    if not args.write:
        print(method_table(links=False))
        print("\nx: a classification loss works in that head, or together with that part.\n")
        print(pair_table())
        return 0
    path = Path(args.write)
    text = with_blocks(path.read_text(encoding="utf-8"), blocks(_root_from(path)))
    path.write_text(text, encoding="utf-8")
    return 0
