"""Every key that Detectron2 does not have can be set and is described in docs/config.md."""

import inspect
import sys
from pathlib import Path

import pytest
from detectron2.config import CfgNode, get_cfg

from d2_balance import add_balance_config
from d2_balance.config import argument_help
from d2_balance.losses import BOX_LOSSES, CLS_LOSSES
from d2_balance.modeling.build import argument_key
from d2_balance.utils.config_tree import leaves
from scripts import config_reference
from scripts.config_reference import key_comments, main, reference_page

PAGE = Path(__file__).parents[2] / "docs" / "config.md"


def default_cfg():
    cfg = get_cfg()
    add_balance_config(cfg)
    return cfg


STOCK = dict(leaves(get_cfg()))
KEYS = {key: value for key, value in leaves(default_cfg()) if key not in STOCK}


def value_of(cfg, key):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def another(value):
    """A value of the same type that is not the default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, "Name"]
    if isinstance(value, tuple):
        return (*value, 10 * value[-1] if value else 2.0)
    return f"{value}x" if isinstance(value, str) else value + 1


@pytest.mark.parametrize("key", KEYS)
def test_key_is_reachable_from_the_command_line(key):
    default = KEYS[key]
    for value in (default, another(default)):
        cfg = default_cfg()
        cfg.merge_from_list([key, str(value)])  # a shell hands over text
        found = value_of(cfg, key)
        assert found == value
        assert type(found) is type(default)


def test_every_constructor_argument_with_a_default_has_a_key():
    for registry in (CLS_LOSSES, BOX_LOSSES):
        for name, cls in registry:
            for parameter in inspect.signature(cls).parameters.values():
                key = f"MODEL.BALANCE.{name.upper()}.{argument_key(parameter.name)}"
                assert (key in KEYS) == (parameter.default is not parameter.empty), key
                assert KEYS.get(key, parameter.default) == parameter.default


def test_committed_page_is_the_generated_one():
    assert PAGE.read_text() == reference_page(), (
        "run python scripts/config_reference.py docs/config.md"
    )


def test_page_describes_every_key_once():
    rows = [line for line in reference_page().splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in rows]
    described = [name.strip("`") for name, *_ in cells]
    assert sorted(described) == sorted(KEYS)
    assert all(len(meaning) >= 10 for *_, meaning in cells)


@pytest.mark.parametrize(("name", "counted"), [("EQL", True), ("EQLv2", False), ("Focal", False)])
def test_quantities_of_the_training_set_are_named(name, counted):
    section = reference_page().split(f"### {name}\n")[1].split("###")[0]
    assert ("Counted on the training set: `class_frequency`" in section) == counted


def test_symbols_keep_their_case_and_sentences_begin_with_a_capital():
    page = reference_page()
    assert "| s, how much the exponent of" in page and "| b, weight of the last rank" in page
    meanings = [row.split(" | ")[-1] for row in page.splitlines() if row.startswith("| `")]
    assert all(m[0] == m[0].upper() or m[1] == "," for m in meanings)


def test_comments_above_the_keys_are_joined():
    # two lines above PRIOR_PROB in config.py
    text = key_comments()["MODEL.BALANCE.PRIOR_PROB"]
    assert text.startswith("Initial probability") and text.endswith("MODEL.RETINANET.PRIOR_PROB.")


def test_key_without_a_comment_is_refused(monkeypatch):
    def add(cfg):
        add_balance_config(cfg)
        cfg.MODEL.BALANCE.NEW = 1

    comments = key_comments()
    monkeypatch.setattr(config_reference, "key_comments", lambda: comments)
    monkeypatch.setattr(config_reference, "add_balance_config", add)
    with pytest.raises(ValueError, match=r"MODEL\.BALANCE\.NEW has no comment in config\.py"):
        reference_page()


def test_argument_without_a_docstring_line_is_refused(monkeypatch):
    def some(cls):
        left_out = "gamma" if cls.name == "Focal" else None
        return {k: v for k, v in argument_help(cls).items() if k != left_out}

    monkeypatch.setattr(config_reference, "argument_help", some)
    with pytest.raises(ValueError, match=r"BALANCE\.(RPN\.)?FOCAL\.GAMMA has no comment"):
        reference_page()


def test_command_replaces_the_page(monkeypatch, tmp_path):
    path = tmp_path / "config.md"
    path.write_text("old")
    monkeypatch.setattr(sys, "argv", ["config_reference", str(path)])
    main()
    assert path.read_text() == reference_page()
    assert list(tmp_path.iterdir()) == [path]


def test_leaves_walks_the_tree():
    node = CfgNode({"A": 1, "B": {"C": "x", "D": {"E": []}}})
    assert list(leaves(node)) == [("A", 1), ("B.C", "x"), ("B.D.E", [])]
