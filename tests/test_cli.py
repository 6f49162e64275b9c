"""The command line: how sub-commands are found and run."""

import importlib
import sys
from types import ModuleType

import pytest

from d2_balance import cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_that_parses_and_runs(name):
    module = importlib.import_module(cli.COMMANDS[name][0])
    assert callable(module.add_arguments)
    assert callable(module.run)
    assert name in cli.build_parser().format_help()


def test_only_the_called_command_is_imported_and_its_status_returned(monkeypatch):
    count = ModuleType("count")
    count.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    count.run = lambda args: args.number
    monkeypatch.setitem(sys.modules, "count", count)
    commands = {"count": ("count", "a test"), "other": ("module_that_is_not_there", "a test")}
    monkeypatch.setattr(cli, "COMMANDS", commands)
    assert cli.main(["count", "--number", "3"]) == 3


@pytest.mark.parametrize("argv", [[], ["nothing"], ["doctor", "--unknown"]])
def test_wrong_usage_ends_with_status_2_and_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: d2-balance" in capsys.readouterr().err
