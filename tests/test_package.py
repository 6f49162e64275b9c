"""What `import d2_balance` loads, registers and offers."""

import subprocess
import sys
from pathlib import Path

import pytest

import d2_balance
from d2_balance.utils import config_files

ROOT = Path(__file__).resolve().parents[1]


def python(code):
    """Output of a process that imports this checkout."""
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("statement", ["import d2_balance", "from d2_balance.losses import *"])
def test_losses_load_neither_detectron2_nor_torchvision(statement):
    code = f"{statement}\nprint(*(m for m in ('detectron2', 'torchvision') if m in sys.modules))"
    assert python(code) == []


def test_add_balance_config_registers_models_and_datasets():
    code = """
from detectron2.config import get_cfg
from d2_balance import add_balance_config
add_balance_config(get_cfg())
from detectron2.data import DatasetCatalog
from detectron2.modeling import META_ARCH_REGISTRY, ROI_HEADS_REGISTRY
print("BalancedRetinaNet" in META_ARCH_REGISTRY, "BalancedStandardROIHeads" in ROI_HEADS_REGISTRY,
      "mini_lvis_train" in DatasetCatalog)
"""
    assert python(code) == ["True"] * 3


def test_importing_the_package_changes_nothing_of_detectron2():
    code = """
import detectron2.data, detectron2.engine, detectron2.evaluation, detectron2.modeling
import detectron2.export, detectron2.checkpoint, detectron2.model_zoo
import types

def members():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != "detectron2":
            continue
        for key, value in vars(module).items():
            found[name, key] = id(value)
            if isinstance(value, type) and value.__module__.startswith("detectron2"):
                found |= {(name, key, k): id(v) for k, v in vars(value).items()}
    return found

before = members()
import d2_balance.config, d2_balance.engine, d2_balance.modeling
import d2_balance.engine.trainer, d2_balance.engine.setup.lazy, d2_balance.evaluation.evaluators
after = members()
ignored = {"__annotations__", "__doc__", "__abstractmethods__", "_abc_impl"}
for key, value in before.items():
    if after[key] != value and not ignored & set(key):
        print(*key, sep=":")
"""
    assert python(code) == []


def test_unknown_names_of_the_package_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'add_config'"):
        d2_balance.add_config  # noqa: B018


def test_config_files_are_found_in_a_checkout_and_in_a_wheel(tmp_path, monkeypatch):
    name = "quick_schedules/retinanet_R_18_ghm_mini_lvis.yaml"
    assert Path(d2_balance.get_config_file(name)) == ROOT / "configs" / name
    package = tmp_path / "site-packages" / "d2_balance"
    (package / "configs" / "quick_schedules").mkdir(parents=True)
    (package / "configs" / name).write_text("VERSION: 2\n")
    (package.parent / "configs").mkdir()  # of another package
    monkeypatch.setattr(config_files, "_PACKAGE", package)
    assert Path(d2_balance.get_config_file(name)) == package / "configs" / name
    with pytest.raises(ValueError, match=f"no config 'ghm.yaml'; must be one of {name}"):
        d2_balance.get_config_file("ghm.yaml")
