"""The command line: how sub-commands are found and run."""

import errno
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from subprocess import PIPE
from types import ModuleType

import pytest

from d2_balance.cli import main as cli
from d2_balance.utils import progress as progress_module

ROOT = Path(__file__).parents[2]


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


LOADED = """
import sys
import time
from d2_balance.cli.main import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
heavy = {"torch", "torchvision", "detectron2", "matplotlib", "cv2"} & set(sys.modules)
print("LOADED", *sorted(heavy), file=sys.stderr)
sys.exit(status)
"""


def loaded(directory, *arguments):
    """The heavy packages that a command loads, when it runs without an error."""
    command = [sys.executable, "-c", LOADED, *map(str, arguments)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.rpartition("LOADED")[2].split()


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in cli.COMMANDS)])
def test_help_loads_neither_torch_nor_detectron2(arguments, tmp_path):
    assert loaded(tmp_path, *arguments) == []


def without_a_model(directory):
    """Write what commands that need no model read."""
    data = {
        "images": [{"id": n, "file_name": f"{n}.png", "width": 9, "height": 9} for n in range(4)],
        "annotations": [
            {
                "id": n,
                "image_id": n % 4,
                "category_id": 1 + n // 4,
                "bbox": [1, 1, 5, 5],
                "area": 25,
            }
            for n in range(1, 6)
        ],
        "categories": [{"id": n, "name": f"c{n}"} for n in (1, 2)],
    }
    found = [{k: a[k] for k in ("image_id", "category_id", "bbox")} for a in data["annotations"]]
    other = data | {"images": [i | {"id": 9 + i["id"]} for i in data["images"]], "annotations": []}
    classes = [{"name": f"c{n}", "image_count": n, "instance_count": n} for n in (1, 2)]
    for name, content in (
        ("data", data),
        ("found", [d | {"score": 0.5} for d in found]),
        ("other", other),
        ("counts", {"num_images": 4, "classes": classes}),
    ):
        (directory / f"{name}.json").write_text(json.dumps(content))
    (directory / "ids.txt").write_text("1\n2\n")


def test_commands_without_a_model_load_neither_torch_nor_detectron2(tmp_path):
    without_a_model(tmp_path)
    dataset = ["found.json", "--dataset", "data.json"]
    fit = ["rescore", "fit", *dataset, "--train", "data.json", "--max-dets", 1]
    apply = ["rescore", "apply", *dataset]
    for command in (
        ["analyze", "data.json"],
        ["classmap", "data.json", "data.json"],
        ["ensemble", "found.json", "--dataset", "data.json", "--output", "merged.json"],
        ["eval", "found.json", "--dataset", "data.json", "--json", "a.json"],
        ["eval", "found.json", "--dataset", "data.json", "--json", "b.json", "--csv", "b.csv"],
        ["eval", "found.json", "--dataset", "data.json", "--ap", "fixed", "pool"],
        ["compare", "a.json", "b.json"],
        ["methods"],
        ["analyze", "counts.json"],
        ["convert", "data.json", "--ids", "ids.txt", "--output", "part.json"],
        [*fit, "--test", "other.json", "--output", "factors.json"],
        [*apply, "--factors", "factors.json", "--output", "raised.json"],
    ):
        assert loaded(tmp_path, *command) == [], command


def test_pages_and_plots_load_neither_torch_nor_detectron2(tmp_path):
    without_a_model(tmp_path)
    evaluation = ["eval", "found.json", "--dataset", "data.json", "--json"]
    assert loaded(tmp_path, *evaluation, "b.json") == []
    for command in (
        [*evaluation, "a.json", "--report", "report"],
        ["analyze", "data.json", "--html", "page.html", "--yaml", "page.yaml"],
        ["compare", "a.json", "b.json", "--output", "comparison"],
    ):
        assert loaded(tmp_path, *command) == ["matplotlib"], command


def test_progress_in_a_pipe_is_lines_and_none_when_quiet(monkeypatch, capsys):
    monkeypatch.setattr(progress_module, "PERIOD", 0.0)
    assert list(progress_module.progress("abc", "reading", unit="letters")) == ["a", "b", "c"]
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].startswith("reading: 1 of 3 letters (33%)") and len(lines) == 3
    assert all(line.isprintable() for line in lines)  # neither colours nor bars
    monkeypatch.setenv(progress_module.QUIET, "1")
    assert list(progress_module.progress("abc", "reading")) == ["a", "b", "c"]
    assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback_and_an_interruption_has_none(failing, capsys):
    failing(ValueError("raised by the test, which is no part of the package"))
    with pytest.raises(ValueError, match="raised by the test"):
        cli.main(["fail"])
    failing(KeyboardInterrupt())
    assert cli.main(["fail"]) == 130
    assert capsys.readouterr().err == "d2-balance fail: interrupted\n"


def test_sigterm_ends_a_command_with_status_143_after_its_cleaning(failing, monkeypatch, tmp_path):
    """What a command has begun is undone: SIGTERM becomes SystemExit inside of it."""

    class Terminated:
        def __init__(self):
            self.cleaned = False

        def run(self, args):
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(10)
            finally:
                self.cleaned = True

    command = Terminated()
    failing(None)
    monkeypatch.setattr(sys.modules["d2_balance.cli.fail"], "run", command.run)
    with pytest.raises(SystemExit) as end:
        cli.main(["fail"])
    assert end.value.code == 143 and command.cleaned
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
