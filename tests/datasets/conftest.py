"""Runs the scripts of `datasets/` in this process."""

import runpy
import sys
from pathlib import Path

import pytest

DIRECTORY = Path(__file__).parents[2] / "datasets"


@pytest.fixture
def script(monkeypatch, capsys):
    """script(name, *arguments) -> (exit status, stdout, stderr) of datasets/<name>.py."""

    def call(name, *arguments):
        path = str(DIRECTORY / f"{name}.py")
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(path, run_name="__main__")
        return (end.value.code, *capsys.readouterr())

    return call
