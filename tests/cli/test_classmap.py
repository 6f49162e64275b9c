"""d2-balance classmap: what it prints, writes and refuses."""

import json
from pathlib import Path

import pytest
import yaml

from d2_balance.cli.main import main

SOURCE = [
    {"id": 1, "name": "Traffic light"},
    {"id": 2, "name": "Human face"},
    {"id": 9, "name": "Kitten", "synset": "cat.n.01"},
]
TARGET = [
    {"id": 4, "name": "traffic_light"},
    {"id": 5, "name": "cat", "synset": "cat.n.01"},
    {"id": 6, "name": "zebra"},
]


@pytest.fixture
def files(tmp_path):
    paths = [tmp_path / name for name in ("a.json", "b.json")]
    for path, categories in zip(paths, (SOURCE, TARGET), strict=True):
        path.write_text(json.dumps({"categories": categories}))
    return [str(path) for path in paths]


def test_matches_and_the_rest_of_both_sides_are_printed(files, capsys):
    assert main(["classmap", *files]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "2 matched:",
        "  Traffic light -> traffic_light",
        "  Kitten -> cat",
        f"1 only in {files[0]}:",
        "  Human face",
        f"1 only in {files[1]}:",
        "  zebra",
    ]


def test_a_draft_is_written_once_and_can_be_checked(files, tmp_path, capsys):
    path = str(tmp_path / "map.yaml")
    assert main(["classmap", *files, "--output", path]) == 0
    written = yaml.safe_load(Path(path).read_text())
    assert written == {"Traffic light": "traffic_light", "Human face": None, "Kitten": "cat"}
    capsys.readouterr()
    assert main(["classmap", *files, "--map", path]) == 0
    assert "1 left out by null:\n  Human face\n" in capsys.readouterr().out
    assert main(["classmap", *files, "--output", path]) == 2
    assert "map.yaml exists" in capsys.readouterr().err


def test_registered_sets_are_known_by_name(files, capsys):
    assert main(["classmap", files[0], "mini_lvis_val"]) == 0
    assert f"3 only in {files[0]}:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (["no.json", "{b}"], "'no.json' is neither a file nor a registered dataset"),
        (["{a}", "{b}", "--map", "{a}"], "must be two class names"),
        (["{a}", "{b}", "--map", "no.yaml"], "no.yaml: the class map cannot be read"),
        (["{a}", "{b}", "--map", "x", "--output", "y"], "give one of them"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name(files, capsys, change, text):
    parts = {"{a}": files[0], "{b}": files[1]}
    assert main(["classmap", *(parts.get(part, part) for part in change)]) == 2
    assert text in capsys.readouterr().err


def test_two_categories_of_one_name_are_refused(files, capsys):
    with open(files[0], "w") as file:
        json.dump({"categories": [SOURCE[0], SOURCE[0] | {"id": 8}]}, file)
    assert main(["classmap", *files]) == 2
    assert "a.json: the categories 1 and 8 have the same name" in capsys.readouterr().err
