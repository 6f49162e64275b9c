"""The wheel, installed beside what is there, works in an empty directory."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# what the wheel is made of
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "d2_balance", "configs")

pytestmark = pytest.mark.slow


def call(*arguments, cwd, site=None, **variables):
    """Standard output of a process; it sees the installed wheel and no checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | variables
    if site is not None:
        environment |= {"PYTHONPATH": str(site), "DETECTRON2_DATASETS": str(site.parent / "data")}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{arguments}:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Directory that the wheel is installed in; what it needs is that of this environment."""
    directory = tmp_path_factory.mktemp("wheel")
    tree = directory / "tree"
    tree.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, tree)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet")
    call("-m", "pip", "wheel", tree, *options, "--wheel-dir", directory / "dist", cwd=directory)
    (wheel,) = (directory / "dist").glob("d2_balance-*.whl")
    target = directory / "site"
    call("-m", "pip", "install", wheel, *options, "--target", target, cwd=directory)
    shutil.rmtree(tree)
    return target


def test_configs_license_and_version_are_in_the_wheel(site, tmp_path):
    code = """
import d2_balance, json, importlib.metadata
print(json.dumps([d2_balance.__file__, d2_balance.__version__,
    d2_balance.get_config_file("quick_schedules/mask_rcnn_R_18_eql_mini_lvis.yaml"),
    d2_balance.get_config_file("lazy/mask_rcnn_R_18_eql_mini_lvis.py")]))
"""
    file, version, *configs = json.loads(call("-c", code, cwd=tmp_path, site=site))
    assert Path(file).parent == site / "d2_balance"
    for config in configs:
        assert Path(config).is_relative_to(site / "d2_balance" / "configs")
    (info,) = site.glob("d2_balance-*.dist-info")
    assert info.name == f"d2_balance-{version}.dist-info"
    assert (info / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    own = {
        p.relative_to(ROOT / "configs") for p in (ROOT / "configs").rglob("*.[yp]*") if p.is_file()
    }
    packed = site / "d2_balance" / "configs"
    there = {p.relative_to(packed) for p in packed.rglob("*.[yp]*") if p.is_file()}
    assert {p for p in there if "__pycache__" not in p.parts} == {
        p for p in own if "__pycache__" not in p.parts
    }


def test_commands_work_in_an_empty_directory(site, tmp_path):
    # exit status 0: a training can start
    assert "A training can start" in call("-m", "d2_balance", "doctor", cwd=tmp_path, site=site)
    listed = call("-m", "d2_balance", "methods", cwd=tmp_path, site=site)
    assert "EQL" in listed
    shown = call("-m", "d2_balance", "install-detectron2", cwd=tmp_path, site=site)
    assert shown.startswith(f"Kept: Detectron2 {importlib.metadata.version('detectron2')}")


def test_recipes_are_found_by_name(site, tmp_path):
    arguments = ("challenge", "recipes/mini_lvis.yaml", "--check")
    assert "13 stages" in call("-m", "d2_balance", *arguments, cwd=tmp_path, site=site)


def test_example_trains_predicts_exports_and_gets_the_same_detections(site, tmp_path):
    pytest.importorskip("onnxruntime")
    shutil.copy(ROOT / "examples" / "deploy.py", tmp_path)
    printed = call("deploy.py", "--output", "out", cwd=tmp_path, site=site)
    assert "ONNX Runtime gives the same" in printed
    assert (tmp_path / "out" / "model.json").is_file()
    assert (tmp_path / "out" / "predictions" / "drawn").is_dir()
