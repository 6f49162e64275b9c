"""The pages: links lead somewhere, YAML blocks are configs, keys and commands exist."""

import argparse
import re
from pathlib import Path

import pytest
import yaml
from detectron2.config import CfgNode, get_cfg

from d2_balance import add_balance_config
from d2_balance.cli import main as cli

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    ROOT / "datasets/README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text(encoding="utf-8") for page in PAGES}
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def default_cfg():
    cfg = get_cfg()
    add_balance_config(cfg)
    return cfg


def anchors(text):
    """Anchors of a page's headings, as GitHub and MkDocs make them."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.*)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", TEXTS)
def test_links_to_files_and_headings_lead_somewhere(page):
    broken = []
    for target in LINK.findall(TEXTS[page]):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        if not file.exists() or (
            anchor and anchor not in anchors(file.read_text(encoding="utf-8"))
        ):
            broken.append(target)
    assert not broken


def test_every_page_is_in_the_navigation_once():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_multi_constructor("", lambda *_: None)  # tags of plugins do not matter here
    content = yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)

    def leaves(node):
        if isinstance(node, str):
            yield node
        elif node is not None:
            for child in node.values() if isinstance(node, dict) else node:
                yield from leaves(child)

    listed = sorted(leaves(content["nav"]))
    pages = sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))
    assert listed == pages


def config_blocks():
    for page, text in TEXTS.items():
        for number, block in enumerate(re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)):
            if re.match(r"(#.*\n)*(_BASE_|MODEL|DATASETS|SOLVER|TEST|DATALOADER|INPUT)", block):
                yield pytest.param(block, id=f"{page}-{number}")


@pytest.mark.parametrize("block", config_blocks())
def test_yaml_blocks_are_configs(block):
    content = yaml.safe_load(block)
    content.pop("_BASE_", None)
    default_cfg().merge_from_other_cfg(CfgNode(content))


def exists(cfg, key):
    for part in key.split("."):
        if not isinstance(cfg, CfgNode) or part not in cfg:
            return False
        cfg = cfg[part]
    return True


@pytest.mark.parametrize("page", [page for page in TEXTS if page != "docs/config.md"])
def test_config_keys_exist(page):
    cfg = default_cfg()
    found = re.findall(r"`((?:[A-Z][A-Z0-9_]*\.)+[A-Z][A-Z0-9_]*)\b", TEXTS[page])
    places = (cfg, cfg.MODEL, cfg.MODEL.BALANCE)
    assert not [key for key in found if not any(exists(place, key) for place in places)]


@pytest.mark.parametrize("page", TEXTS)
def test_commands_exist_and_take_their_options(page):
    text = TEXTS[page].replace("\\\n", " ")
    known = set(cli.COMMANDS)
    for line in re.findall(
        r"^(?:\.venv/bin/)?d2-balance ([a-z0-9-]+.*)$", text, flags=re.MULTILINE
    ):
        name, *rest = line.split()
        assert name in known, line
        options = options_of(name)
        used = [word for word in rest if re.fullmatch(r"--[a-z-]+", word)]
        assert set(used) <= options, f"{line}: {set(used) - options}"
    assert set(re.findall(r"`d2-balance ([a-z][a-z0-9-]*)", text)) <= known


def options_of(command):
    """Every option of a command and of its sub-commands."""
    parser = cli.build_parser(command)

    def walk(parser):
        for action in parser._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                for child in action.choices.values():
                    yield from walk(child)

    return set(walk(parser))


@pytest.mark.parametrize("page", TEXTS)
def test_make_targets_exist(page):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z-]+)`", TEXTS[page])) <= targets
    code = "".join(re.findall(r"```\n(.*?)```", TEXTS[page], flags=re.DOTALL))
    assert set(re.findall(r"^make ([a-z-]+)", code, flags=re.MULTILINE)) <= targets
