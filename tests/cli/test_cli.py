"""The command line: how sub-commands are found and run."""

import errno
import importlib
import subprocess
import sys
from subprocess import PIPE
from types import ModuleType

import pytest

from d2_balance.cli import main as cli


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_that_parses_and_runs(name):
    module = importlib.import_module(f"d2_balance.cli.{name.replace('-', '_')}")
    assert callable(module.add_arguments)
    assert callable(module.run)
    assert name in cli.build_parser().format_help()


def test_only_the_called_command_is_imported_and_its_status_returned(monkeypatch):
    count = ModuleType("count")
    count.add_arguments = lambda parser: parser.add_argument("--number", type=int)
    count.run = lambda args: args.number
    monkeypatch.setitem(sys.modules, "d2_balance.cli.count", count)
    commands = {"count": "a test", "module_that_is_not_there": "a test"}
    monkeypatch.setattr(cli, "COMMANDS", commands)
    assert cli.main(["count", "--number", "3"]) == 3


@pytest.fixture
def failing(monkeypatch):
    """A command `fail` that raises what it is given."""
    module = ModuleType("fail")
    module.add_arguments = lambda parser: None
    monkeypatch.setitem(sys.modules, "d2_balance.cli.fail", module)
    monkeypatch.setattr(cli, "COMMANDS", {"fail": "a test"})

    def use(error):
        def run(args):
            raise error

        module.run = run

    return use


def test_a_file_that_cannot_be_written_ends_in_one_line_and_status_2(failing, capsys):
    failing(OSError(errno.ENOSPC, "No space left on device", "merged.json"))
    assert cli.main(["fail"]) == 2
    assert capsys.readouterr().err == (
        "d2-balance fail: error: [Errno 28] No space left on device: 'merged.json'\n"
    )


def test_a_reader_that_has_seen_enough_and_deprecations_of_others_print_nothing():
    command = "from d2_balance.cli.main import main; raise SystemExit(main(['methods']))"
    process = subprocess.Popen([sys.executable, "-c", command], stdout=PIPE, stderr=PIPE)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


@pytest.mark.parametrize("argv", [[], ["nothing"], ["doctor", "--unknown"]])
def test_wrong_usage_ends_with_status_2_and_the_usage(argv, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(argv)
    assert caught.value.code == 2
    assert "usage: d2-balance" in capsys.readouterr().err
