"""Print what is installed, which datasets are there, and what to do about what is missing.

The exit status is 0 when a training can start, 1 otherwise.
"""

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

MIN_PYTHON = (3, 11)
UPSTREAM = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"

# Import name -> name for pip, where the two differ.
PIP_NAMES = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "hydra": "hydra-core",
    "pkg_resources": "setuptools",
    "yaml": "pyyaml",
}

IMAGES = ("coco/train2017", "coco/val2017")
# What Detectron2's built-in catalog expects below $DETECTRON2_DATASETS.
DATASETS = {
    "coco": (
        "coco/annotations/instances_train2017.json",
        "coco/annotations/instances_val2017.json",
        *IMAGES,
    ),
    "lvis v0.5": ("lvis/lvis_v0.5_train.json", "lvis/lvis_v0.5_val.json", *IMAGES),
    "lvis v1": ("lvis/lvis_v1_train.json", "lvis/lvis_v1_val.json", *IMAGES),
}


@dataclass(frozen=True)
class Finding:
    """One row of the table.

    Attributes:
        name: what was checked.
        value: what was found.
        remedy: what to do, one line; None where nothing is missing.
        blocking: no training can start as things are.
    """

    name: str
    value: str
    remedy: str | None = None
    blocking: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`doctor` takes no arguments; $DETECTRON2_DATASETS names the directory of the datasets."""


def run(args: argparse.Namespace) -> int:
    """Print the table and the remedies; return 0 when a training can start, 1 otherwise."""
    findings = examine()
    print(report(findings))
    return int(any(finding.blocking for finding in findings))


def examine() -> list[Finding]:
    """Look at the interpreter, the packages, the devices and the datasets; raises nothing."""
    # Importing the packages prints their deprecations, some past every warnings filter.
    with contextlib.redirect_stderr(io.StringIO()):
        torch = check_torch()
        opencv = check_package("cv2")
        return [
            check_python(),
            Finding(
                "d2-balance", _version("d2-balance") or "not installed, run from its directory"
            ),
            *torch,
            *check_detectron2(usable=not any(f.blocking for f in (*torch, opencv))),
            *(check_package(name) for name in ("numpy", "pycocotools.mask", "hotcoco")),
            check_package("lvis", usable=not opencv.blocking),
            opencv,
            check_cuda(),
            *check_datasets(datasets_root()),
        ]


def report(findings: list[Finding]) -> str:
    """Return the table, one line per remedy, and the conclusion."""
    width = max(len(finding.name) for finding in findings)
    lines = [f"{finding.name:<{width}}  {finding.value}" for finding in findings]
    remedies = [f"- {finding.name}: {finding.remedy}" for finding in findings if finding.remedy]
    if remedies:
        lines += ["", "What to do:", *remedies]
    blocking = [finding.name for finding in findings if finding.blocking]
    conclusion = f"cannot start yet: {', '.join(blocking)}." if blocking else "can start."
    return "\n".join([*lines, "", f"A training {conclusion}"])


def check_python() -> Finding:
    """Return the version of Python, and whether it is supported."""
    value = f"{'.'.join(map(str, sys.version_info[:3]))} ({sys.executable})"
    if sys.version_info[:2] >= MIN_PYTHON:
        return Finding("Python", value)
    return Finding("Python", value, "use 3.11 to 3.14 (make setup PYTHON=...)", True)


def check_torch() -> list[Finding]:
    """Torch and torchvision, and whether the compiled part of torchvision loads with this torch."""
    torch, torchvision = _load("torch"), _load("torchvision")
    if isinstance(torch, Exception):
        failed = Finding("torch", _failure("torch", torch), _pip("torch", "torchvision"), True)
        return [failed, Finding("torchvision", _not_tried("torchvision"))]
    try:
        if isinstance(torchvision, Exception):
            raise torchvision
        torchvision.ops.nms(torch.tensor([[0.0, 0.0, 1.0, 1.0]]), torch.ones(1), 0.5)
        vision = Finding("torchvision", f"{torchvision.__version__}, works with this torch")
    except Exception as error:
        remedy = f"{_pip('torch', 'torchvision')}, which finds a pair"
        if _version("torchvision"):
            # Without this, pip keeps two builds whose version numbers fit.
            remedy = f"{_pip('torch', 'torchvision', command='uninstall')}, then {remedy}"
        vision = Finding("torchvision", _failure("torchvision", error), remedy, True)
    return [Finding("torch", torch.__version__), vision]


def check_detectron2(usable: bool) -> list[Finding]:
    """Detectron2, what it imports, and its compiled operators.

    Args:
        usable: whether torch, torchvision and opencv can be imported; Detectron2 needs them.
    """
    if not usable and _version("detectron2"):
        return [Finding("Detectron2", _not_tried("detectron2"))]
    package = _load("detectron2")
    if _missing(package) == "detectron2":
        remedy = f"{sys.executable} -m d2_balance install-detectron2, or compile it: {UPSTREAM}"
        return [Finding("Detectron2", "not installed", remedy, True)]
    # The package itself imports little; the other two reach what a training needs.
    for module in (package, _load("detectron2.engine"), _load("detectron2.model_zoo")):
        if isinstance(module, Exception):
            value = _failure("detectron2", module)
            return [Finding("Detectron2", value, _remedy("detectron2", module), True)]
    version = _version("detectron2") or getattr(package, "__version__", "version unknown")
    place = os.path.dirname(getattr(package, "__file__", ""))
    found = Finding("Detectron2", f"{version} ({place})")
    return [found, _check_compiled()]


def _check_compiled() -> Finding:
    compiled = _load("detectron2._C")
    if not isinstance(compiled, Exception):
        return Finding("detectron2._C", "there")
    state = "absent" if isinstance(compiled, ModuleNotFoundError) else _say(compiled)
    return Finding(
        "detectron2._C",
        f"{state}; rotated boxes fail, all else works (deformable convolution by torchvision)",
        f"only for rotated boxes, compile Detectron2: {UPSTREAM}",
    )


def check_package(module_name: str, usable: bool = True) -> Finding:
    """One package that a training or its evaluation imports.

    Args:
        module_name: what to import.
        usable: False where something it needs is known to fail; it is not imported then.
    """
    top = module_name.partition(".")[0]
    name = PIP_NAMES.get(top, top)
    if not usable and _version(name):
        return Finding(name, _not_tried(name))
    module = _load(module_name)
    if isinstance(module, Exception):
        return Finding(name, _failure(name, module), _remedy(name, module), True)
    return Finding(name, _version(name) or str(getattr(module, "__version__", "version unknown")))


def check_cuda() -> Finding:
    """Return the CUDA devices that torch sees."""
    torch = _load("torch")
    if isinstance(torch, Exception):
        return Finding("CUDA", "unknown without torch")
    if torch.cuda.is_available():
        devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("CUDA", f"{torch.version.cuda}, {len(devices)} device(s): {devices}")
    built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    remedy = "d2-balance train takes the CPU then; other scripts need MODEL.DEVICE cpu"
    if shutil.which("nvidia-smi"):
        remedy = "nvidia-smi is here but torch sees no device; install a torch for this driver"
    return Finding("CUDA", f"no device ({built})", remedy)


def datasets_root() -> Path:
    """The directory where Detectron2 looks for datasets."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def check_datasets(root: Path) -> list[Finding]:
    """COCO, LVIS and mini_lvis below `root`; one of them is enough for a training."""
    missing = {
        name: [path for path in paths if not _has_content(root / path)]
        for name, paths in DATASETS.items()
    }
    directory = f"{root}{'' if root.is_dir() else ' (not there)'}"
    findings = [
        Finding("datasets", f"in {directory}; set DETECTRON2_DATASETS for another directory"),
        _check_mini_lvis(root, needed=all(missing.values())),
    ]
    for name, paths in missing.items():
        if not paths:
            findings.append(Finding(name, "complete"))
            continue
        value = f"{len(paths)} of {len(DATASETS[name])} parts missing"
        remedy = f"put {', '.join(paths)} into {root} (layout: datasets/README.md)"
        findings.append(Finding(name, value, remedy))
    return findings


def _check_mini_lvis(root: Path, needed: bool) -> Finding:
    if any((root / "mini_lvis").rglob("*.json")):
        return Finding("mini_lvis", "there")
    parent = next(path for path in (root, *root.absolute().parents) if path.exists())
    if parent.is_dir() and os.access(parent, os.W_OK):
        return Finding("mini_lvis", "made on first use")
    remedy = f"make {root} writable or set DETECTRON2_DATASETS to another directory"
    return Finding("mini_lvis", f"cannot be made in {root}", remedy, blocking=needed)


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.is_file() and path.stat().st_size > 0


def _load(name: str) -> ModuleType | Exception:
    """Import a module, or return why not; a broken binary raises more than ImportError."""
    try:
        return importlib.import_module(name)
    except Exception as error:
        return error


def _missing(outcome: ModuleType | Exception) -> str | None:
    """Return pip's name of the package whose absence ended an import, None for another outcome."""
    if not isinstance(outcome, ModuleNotFoundError) or not outcome.name:
        return None
    package = outcome.name.partition(".")[0]
    return PIP_NAMES.get(package, package)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _not_tried(distribution: str) -> str:
    version = _version(distribution)
    return f"{version}, not tried before the others work" if version else "not installed"


def _failure(distribution: str, error: Exception) -> str:
    version = _version(distribution)
    if version is None and _missing(error) == distribution:
        return "not installed"
    return f"{version or 'version unknown'}, broken: {_say(error)}"


def _say(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _remedy(distribution: str, error: Exception) -> str:
    """Return the command that helps where importing a package ended with `error`."""
    missing = _missing(error)
    if missing and missing != "detectron2":
        return _pip(_requirement(missing))
    if getattr(error, "name", None) == "cv2":  # libGL is not there; this build does without it
        return _pip("--force-reinstall", "--no-deps", "opencv-python-headless")
    if distribution == "detectron2":  # the registry knows it under another name
        return f"{_pip(distribution, command='uninstall')}, then make setup"
    return _pip("--force-reinstall", "--no-deps", _requirement(distribution))


def _requirement(name: str) -> str:
    """Return `name` with the limits that this package's own metadata puts on it."""
    try:
        lines = importlib.metadata.requires("d2-balance") or []
    except importlib.metadata.PackageNotFoundError:
        lines = []
    requirements = (line.partition(";")[0].strip() for line in lines)
    return next((r for r in requirements if re.split(r"[^\w.-]", r)[0] == name), name)


def _pip(*arguments: str, command: str = "install") -> str:
    return shlex.join([sys.executable, "-m", "pip", command, *arguments])
