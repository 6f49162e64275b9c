"""`d2-balance doctor` with packages hidden and broken, and datasets in part."""

import importlib
import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from d2_balance.cli import doctor
from d2_balance.cli import main as cli

ROOT = Path(__file__).parents[2]
LIBGL = ImportError("libGL.so.1: cannot open shared object file", name="cv2")


@pytest.fixture
def replace(monkeypatch):
    """replace(name, outcome): importing `name` gives the module or raises the exception.

    With None, the package is neither importable nor installed.
    """
    outcomes = {}
    load, version = importlib.import_module, importlib.metadata.version

    def import_module(name, package=None):
        for hidden, outcome in outcomes.items():
            if name == hidden or (outcome is None and name.startswith(hidden + ".")):
                if outcome is None:
                    raise ModuleNotFoundError(f"No module named '{hidden}'", name=hidden)
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome
        return load(name, package)

    def find_version(name):
        hidden = {doctor.PIP_NAMES.get(k, k) for k, outcome in outcomes.items() if outcome is None}
        if name in hidden:
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib, "import_module", import_module)
    monkeypatch.setattr(importlib.metadata, "version", find_version)
    return outcomes.__setitem__


@pytest.fixture(autouse=True)
def no_datasets(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    return tmp_path / "sets"


def by_name(findings):
    return {finding.name: finding for finding in findings}


def make(root: Path, *paths: str) -> None:
    for path in paths:
        file = root / path if path.endswith(".json") else root / path / "000000000001.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("{}")


def test_doctor_prints_versions_and_that_a_training_can_start(capsys):
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    for name in ("torch", "numpy", "lvis", "pycocotools", "hotcoco"):
        assert f"\n{name} " in out and f" {importlib.metadata.version(name)}" in out
    assert ", works with this torch\n" in out
    assert out.endswith("\nA training can start.\n")


def test_doctor_runs_without_any_package(tmp_path):
    """-S leaves site-packages out: the standard library and this package are all there is."""
    code = "import sys; sys.path.insert(0, sys.argv[1]); from d2_balance.cli.main import main; "
    code += "sys.exit(main(['doctor']))"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    for name in ("torch", "Detectron2", "numpy", "lvis", "opencv-python"):
        assert f"\n{name} " in done.stdout and f"\n- {name}: " in done.stdout
    assert "A training cannot start yet: torch, Detectron2, numpy, " in done.stdout


def test_doctor_runs_where_detectron2_is_there_but_broken(tmp_path):
    """Then importing this package must not import Detectron2, or nobody is told what to do."""
    (tmp_path / "detectron2").mkdir()
    (tmp_path / "detectron2" / "__init__.py").write_text("import torch\n")
    code = "import sys; sys.path[:0] = sys.argv[1:]; from d2_balance.cli.main import main; "
    code += "sys.exit(main(['doctor']))"
    command = [sys.executable, "-I", "-S", "-c", code, str(ROOT), str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "broken: ModuleNotFoundError: No module named 'torch'" in done.stdout


def test_report_has_one_line_per_remedy_and_names_what_blocks():
    findings = [
        doctor.Finding("a", "1"),
        doctor.Finding("long", "not installed", "install long", blocking=True),
        doctor.Finding("b", "absent", "only if you need it"),
    ]
    assert doctor.report(findings) == (
        "a     1\nlong  not installed\nb     absent\n\n"
        "What to do:\n- long: install long\n- b: only if you need it\n\n"
        "A training cannot start yet: long."
    )


# doctor: packages


@pytest.mark.parametrize(
    ("module", "row"),
    [
        ("numpy", "numpy"),
        ("lvis", "lvis"),
        ("pycocotools", "pycocotools"),
        ("hotcoco", "hotcoco"),
        ("cv2", "opencv-python"),
    ],
)
def test_a_package_that_is_not_there_blocks_and_pip_installs_it(module, row, replace):
    replace(module, None)
    found = doctor.check_package(module)
    assert (found.name, found.value, found.blocking) == (row, "not installed", True)
    assert f"-m pip install {row}" in found.remedy.replace("'", "")


def test_the_remedy_keeps_the_limits_of_this_package(replace):
    """pkg_resources, which Detectron2's model zoo imports, left setuptools with version 81."""
    error = ModuleNotFoundError("No module named 'pkg_resources'", name="pkg_resources")
    replace("detectron2.model_zoo", error)
    (found,) = doctor.check_detectron2(usable=True)
    assert "broken: ModuleNotFoundError: No module named 'pkg_resources'" in found.value
    assert found.blocking
    assert found.remedy.endswith("-m pip install 'setuptools<81'")


def test_a_package_whose_binary_does_not_load_is_reinstalled(replace):
    replace("hotcoco", OSError("undefined symbol: x"))
    found = doctor.check_package("hotcoco")
    assert "broken: OSError: undefined symbol: x" in found.value
    assert re.search(r"pip install --force-reinstall --no-deps 'hotcoco<2,>=1\.3'", found.remedy)


def test_opencv_without_libgl_is_replaced_and_what_needs_it_not_blamed(replace):
    replace("cv2", LIBGL)
    replace("lvis", LIBGL)
    rows = by_name(doctor.examine())
    assert rows["opencv-python"].remedy.endswith("--no-deps opencv-python-headless")
    assert rows["opencv-python"].blocking
    assert "not tried" in rows["lvis"].value
    assert rows["lvis"].remedy is None


def test_without_torch_a_pair_is_installed_and_detectron2_not_blamed(replace):
    replace("torch", None)
    rows = by_name(doctor.examine())
    assert rows["torch"].value == "not installed"
    assert rows["torch"].remedy.endswith("-m pip install torch torchvision")
    assert rows["torch"].blocking
    assert rows["CUDA"].value == "unknown without torch"
    assert not rows["Detectron2"].blocking or rows["Detectron2"].value == "not installed"


def test_a_torchvision_of_another_torch_is_found_by_calling_its_operator(replace):
    def nms(boxes, scores, threshold):
        raise RuntimeError("operator torchvision::nms does not exist")

    replace("torchvision", SimpleNamespace(ops=SimpleNamespace(nms=nms), __version__="0.1"))
    torch, torchvision = doctor.check_torch()
    assert not torch.blocking
    assert "broken: RuntimeError: operator torchvision::nms does not exist" in torchvision.value
    assert torchvision.blocking
    assert "pip uninstall torch torchvision, then " in torchvision.remedy


def test_without_detectron2_the_remedy_is_the_script(replace):
    replace("detectron2", None)
    (found,) = doctor.check_detectron2(usable=True)
    assert (found.value, found.blocking) == ("not installed", True)
    assert "d2_balance install-detectron2" in found.remedy


def test_a_missing_requirement_of_detectron2_is_not_a_missing_detectron2(replace):
    replace("detectron2", ModuleNotFoundError("No module named 'yacs'", name="yacs"))
    (found,) = doctor.check_detectron2(usable=True)
    assert "broken: ModuleNotFoundError: No module named 'yacs'" in found.value
    assert found.remedy.endswith("-m pip install 'yacs>=0.1.8'")


@pytest.mark.parametrize(
    ("outcome", "value"),
    [
        (ModuleNotFoundError("No module", name="detectron2._C"), "absent; rotated boxes"),
        (ImportError("undefined symbol: y"), "ImportError: undefined symbol: y; rotated boxes"),
        (ModuleType("_C"), "there"),
    ],
    ids=["absent", "of another torch", "there"],
)
def test_the_compiled_operators_never_block(outcome, value, replace):
    replace("detectron2._C", outcome)
    detectron2, compiled = doctor.check_detectron2(usable=True)
    assert not detectron2.blocking and not compiled.blocking
    assert compiled.value.startswith(value)
    assert (compiled.remedy is None) == (value == "there")


@pytest.mark.parametrize(
    ("smi", "remedy"), [(None, "MODEL.DEVICE cpu"), ("/bin/nvidia-smi", "for this driver")]
)
def test_without_a_device_the_remedy_depends_on_the_driver(smi, remedy, replace, monkeypatch):
    cuda = SimpleNamespace(is_available=lambda: False)
    replace("torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda=None)))
    monkeypatch.setattr(doctor.shutil, "which", lambda name: smi)
    found = doctor.check_cuda()
    assert found.value == "no device (CPU build)"
    assert remedy in found.remedy
    assert not found.blocking


def test_devices_are_listed(replace):
    cuda = SimpleNamespace(
        is_available=lambda: True, device_count=lambda: 2, get_device_name=lambda i: f"GPU {i}"
    )
    replace("torch", SimpleNamespace(cuda=cuda, version=SimpleNamespace(cuda="13.2")))
    assert doctor.check_cuda().value == "13.2, 2 device(s): ['GPU 0', 'GPU 1']"


# doctor: datasets


def test_without_data_sets_the_built_in_one_is_enough(no_datasets):
    rows = by_name(doctor.check_datasets(no_datasets))
    assert rows["datasets"].value.startswith(f"in {no_datasets} (not there);")
    assert rows["mini_lvis"].value == "made on first use"
    assert not any(row.blocking for row in rows.values())
    for name, files in doctor.DATASETS.items():
        assert rows[name].value == "4 of 4 parts missing"
        assert all(file in rows[name].remedy for file in files)
        assert f"into {no_datasets} " in rows[name].remedy


def test_only_what_is_missing_is_asked_for(no_datasets):
    make(no_datasets, "coco/train2017", "lvis/lvis_v1_train.json", "lvis/lvis_v1_val.json")
    (no_datasets / "coco" / "val2017").mkdir()  # a directory without images is no dataset
    rows = by_name(doctor.check_datasets(no_datasets))
    assert rows["lvis v1"].remedy.startswith(f"put coco/val2017 into {no_datasets} ")
    assert rows["lvis v0.5"].value == "3 of 4 parts missing"
    make(no_datasets, "coco/val2017")
    assert by_name(doctor.check_datasets(no_datasets))["lvis v1"].value == "complete"


@pytest.mark.parametrize("other", [(), doctor.DATASETS["coco"]], ids=["none", "coco"])
def test_a_directory_that_cannot_be_written_blocks_where_no_data_set_is_there(
    other, no_datasets, monkeypatch
):
    make(no_datasets, *other)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    found = by_name(doctor.check_datasets(no_datasets))["mini_lvis"]
    assert found.value == f"cannot be made in {no_datasets}"
    assert f"make {no_datasets} writable" in found.remedy
    assert found.blocking == (not other)


def test_a_rendered_mini_lvis_is_found(no_datasets, monkeypatch):
    make(no_datasets, "mini_lvis/v1/instances_train.json")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert by_name(doctor.check_datasets(no_datasets))["mini_lvis"].value == "there"
