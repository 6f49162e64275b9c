"""Install Detectron2, which PyPI does not carry under its own name, from the registry alone.

The PyPI wheel LabGym 3.1.2 holds Detectron2's Python files at upstream commit 864913f, with the
words `LabGym.detectron2` where upstream says `detectron2`. This command downloads that wheel,
turns the words back, compares every file with the hashes of upstream's files
(`detectron2-864913f.sha1`, git blob hashes) and installs the result as a package of its own, so
that `pip show detectron2` and `pip uninstall detectron2` work. The compiled operators
(`detectron2._C`) are not part of it. A Detectron2 that can be imported already is kept. What
Detectron2 itself requires comes with `pip install "d2-balance[detectron2]"`.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

SOURCE_PROJECT = "labgym"
SOURCE_VERSION = "3.1.2"
SOURCE_SHA256 = "a2900cff8a3fb508e1975f19b5f9abd9f261966db87b0c332697fb4138c1cb2b"
SOURCE_PREFIX = "LabGym/"

COMMIT = "864913f0e57e87a75c8cc0c7d79ecbd774fc669b"
VERSION = f"0.6+{COMMIT[:7]}"
HASH_LIST = Path(__file__).with_name("detectron2-864913f.sha1")

# What upstream's setup.py lists at that commit, less its entry for Python 3.6.
REQUIREMENTS = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "omegaconf>=2.1,<2.4",
    "hydra-core>=1.1",
    "black",
    "packaging",
)

# Run in a process of its own, so that the import neither sees the directory this is called
# from nor leaves a half-imported package behind here.
PROBE = """
import importlib.metadata, json
report = {"file": None, "version": None, "error": None}
try:
    import detectron2
    # A directory of that name without Python files imports too; it has no file.
    report["file"] = getattr(detectron2, "__file__", None)
    report["version"] = getattr(detectron2, "__version__", None)
except ModuleNotFoundError as error:
    if error.name != "detectron2":
        report["error"] = f"{type(error).__name__}: {error}"
except Exception as error:
    report["error"] = f"{type(error).__name__}: {error}"
try:
    report["version"] = importlib.metadata.version("detectron2")
except importlib.metadata.PackageNotFoundError:
    pass
print("\\n" + json.dumps(report))
"""


class InstallError(Exception):
    """A reason to stop that the user can act on; its text is the whole message."""


def find_detectron2(python: str) -> tuple[str, str] | None:
    """Return version and file of the Detectron2 that `python` imports, None where there is none.

    Raises:
        InstallError: there is one, but it cannot be imported. It is left alone, since it may be
            a build of the user's own.
    """
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(
            [python, "-c", PROBE], cwd=directory, capture_output=True, text=True, check=False
        )
    if done.returncode != 0:  # a crash that Python cannot catch
        raise InstallError(f"`import detectron2` ends {python}:\n{_tail(done.stderr)}")
    report = json.loads(done.stdout.strip().splitlines()[-1])
    if report["error"] is not None:
        raise InstallError(
            f"Detectron2 {report['version'] or ''} is there but cannot be imported "
            f"({report['error']}). Install what it misses, or remove it with "
            f"`{python} -m pip uninstall detectron2` and call this command again."
        )
    return (report["version"], report["file"]) if report["file"] else None


def download(python: str, directory: Path) -> Path:
    """Let pip fetch the source wheel into `directory` and return its path.

    Raises:
        InstallError: pip is missing, the registry cannot be reached, or the hash is another one.
    """
    requirement = directory / "requirements.txt"
    requirement.write_text(f"{SOURCE_PROJECT}=={SOURCE_VERSION} --hash=sha256:{SOURCE_SHA256}\n")
    _pip(
        python,
        f"download the wheel of {SOURCE_PROJECT} {SOURCE_VERSION} from the package registry "
        "(with one fetched elsewhere, call this command with --wheel FILE)",
        "download",
        "--no-deps",  # LabGym's own requirements are not needed
        "--ignore-requires-python",  # LabGym's limit on Python, not Detectron2's
        "--only-binary=:all:",
        "--require-hashes",
        f"--requirement={requirement}",
        f"--dest={directory}",
    )
    return next(directory.glob("*.whl"))


def check_sha256(wheel: Path, expected: str) -> None:
    """Raise InstallError unless the file's sha256 is `expected`."""
    if not wheel.is_file():
        raise InstallError(f"{wheel} does not exist.")
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != expected:
        raise InstallError(f"{wheel.name} has sha256 {found}, expected {expected}.")


def read_hash_list(path: Path) -> dict[str, str]:
    """Return path -> git blob hash from lines of `<sha1>  <path>`."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return {name: sha1 for sha1, name in (line.split(maxsplit=1) for line in lines if line)}


def extract_package(wheel: Path) -> dict[str, bytes]:
    """Read `LabGym/detectron2/**` from the wheel and give files and imports their own names."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            return {
                name.removeprefix(SOURCE_PREFIX): archive.read(name).replace(
                    b"LabGym.detectron2", b"detectron2"
                )
                for name in archive.namelist()
                if name.startswith(SOURCE_PREFIX + "detectron2/") and not name.endswith("/")
            }
    except zipfile.BadZipFile as error:
        raise InstallError(f"{wheel.name} is not a readable wheel: {error}.") from None


def git_blob_hash(content: bytes) -> str:
    """Return the SHA-1 that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_files(files: Mapping[str, bytes], expected: Mapping[str, str]) -> None:
    """Raise InstallError, naming the files, unless exactly the listed contents are there."""
    problems = {
        "missing": [name for name in expected if name not in files],
        "not in the list": [name for name in files if name not in expected],
        "different from upstream": [
            name
            for name, sha1 in expected.items()
            if name in files and git_blob_hash(files[name]) != sha1
        ],
    }
    found = [f"{kind}: {_some(names)}" for kind, names in problems.items() if names]
    if found:
        raise InstallError(
            "The files are not those of Detectron2 at commit "
            f"{COMMIT[:7]}; nothing was installed. " + "; ".join(found) + "."
        )


def build_wheel(files: Mapping[str, bytes], directory: Path, license_text: bytes) -> Path:
    """Write `files` with metadata as a wheel into `directory` and return its path."""
    info = f"detectron2-{VERSION}.dist-info"
    metadata = [
        "Metadata-Version: 2.1",
        "Name: detectron2",
        f"Version: {VERSION}",
        "Summary: Detectron2 is FAIR's next-generation research platform for object detection "
        "and segmentation.",
        "Home-page: https://github.com/facebookresearch/detectron2",
        "Author: FAIR",
        "License: Apache 2.0",
        "Requires-Python: >=3.7",
        *(f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS),
        "",
        f"Unchanged Python files of upstream commit {COMMIT},",
        "without the compiled operators; put here by `d2-balance install-detectron2`.",
        "",
    ]
    tags = ["Wheel-Version: 1.0", "Generator: d2-balance", "Root-Is-Purelib: true"]
    contents = {
        **files,
        f"{info}/METADATA": "\n".join(metadata).encode(),
        f"{info}/WHEEL": "\n".join([*tags, "Tag: py3-none-any", ""]).encode(),
        f"{info}/LICENSE": license_text,
    }
    record = "".join(
        f"{name},sha256={_record_hash(data)},{len(data)}\n" for name, data in contents.items()
    )
    contents[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    wheel = directory / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = 0o644 << 16  # otherwise unpacked files are the owner's alone
            archive.writestr(entry, data)
    return wheel


def install(python: str, source: Path | None, sha256: str, hash_list: Path) -> str:
    """Install Detectron2 for the interpreter `python` and return one line that says what is there.

    Args:
        python: path of the interpreter.
        source: the LabGym wheel, or None to download it.
        sha256: what the wheel's bytes must hash to.
        hash_list: the file of git blob hashes.

    Raises:
        InstallError: a step failed; before the last one nothing has been installed.
    """
    present = find_detectron2(python)
    if present is not None:
        return "Kept: Detectron2 {} at {}".format(*present)
    _pip(python, "be called", "--version")
    with tempfile.TemporaryDirectory(prefix="detectron2-") as name:
        directory = Path(name)
        wheel = source or download(python, directory)
        check_sha256(wheel, sha256)
        files = extract_package(wheel)
        check_files(files, read_hash_list(hash_list))
        built = build_wheel(files, directory, license_text())
        _pip(python, f"install {built.name}", "install", "--no-deps", "--no-index", str(built))
    present = find_detectron2(python)
    if present is None:
        raise InstallError(f"pip installed Detectron2, but {python} does not find it.")
    return "Installed: Detectron2 {} at {}".format(*present)


def _pip(python: str, purpose: str, *arguments: str) -> None:
    """Run pip and turn its failure into one message that carries pip's own errors."""
    done = subprocess.run(
        [python, "-m", "pip", *arguments], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return
    if "No module named pip" in done.stderr:
        raise InstallError(f"{python} has no pip. Add it with `{python} -m ensurepip --upgrade`.")
    errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
    if not errors or "DO NOT MATCH" in done.stderr:  # the hashes stand in the lines below
        errors = [_tail(done.stderr)]
    raise InstallError(f"pip could not {purpose}:\n" + "\n".join(errors))


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-12:])


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(sorted(names)[:5]) + more


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def license_text() -> bytes:
    """Return Apache 2.0, the licence of Detectron2 and of this package."""
    in_checkout = Path(__file__).parents[2] / "LICENSE"
    if in_checkout.is_file():
        return in_checkout.read_bytes()
    text = importlib.metadata.distribution("d2-balance").read_text("licenses/LICENSE")
    if text is None:
        raise InstallError("d2-balance was installed without its LICENSE; install it again.")
    return text.encode()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `d2-balance install-detectron2`."""
    parser.add_argument(
        "--wheel", type=Path, help="a LabGym 3.1.2 wheel that lies here already; no download"
    )


def run(args: argparse.Namespace) -> int:
    """Install it and say where; 1 if that is not possible."""
    try:
        print(install(sys.executable, args.wheel, SOURCE_SHA256, HASH_LIST))
    except InstallError as error:
        print(f"d2-balance install-detectron2: error: {error}", file=sys.stderr)
        return 1
    return 0
