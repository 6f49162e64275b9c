"""`d2-balance install-detectron2` on small wheels made here; no network."""

import ast
import base64
import hashlib
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from d2_balance.cli import install_detectron2 as script
from d2_balance.cli.main import main

ROOT = Path(__file__).parent.parent

UPSTREAM = {
    "detectron2/__init__.py": b"from detectron2.part import NAME\n__version__ = '0.6'\n",
    "detectron2/part.py": b"NAME = 'detectron2.part'\n",
    "detectron2/model_zoo/configs/a.yaml": b"_BASE_: b.yaml\n",
}
METADATA = b"Metadata-Version: 2.1\nName: LabGym\nVersion: 3.1.2\n"


def make_source(directory: Path, changes: dict[str, bytes | None] | None = None) -> Path:
    """A wheel as LabGym packs it; `changes` replaces, adds or (None) drops upstream files."""
    files = {**UPSTREAM, **(changes or {})}
    path = directory / "labgym-3.1.2-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LabGym/__init__.py", "raise RuntimeError('not part of Detectron2')\n")
        for name, content in files.items():
            if content is not None:
                renamed = content.replace(b"detectron2", b"LabGym.detectron2")
                archive.writestr(f"LabGym/{name}", renamed)
        info = "labgym-3.1.2.dist-info"
        archive.writestr(f"{info}/METADATA", METADATA + b"Requires-Python: <3\nRequires-Dist: no\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hash_list(tmp_path) -> Path:
    path = tmp_path / "list.sha1"
    lines = (f"{script.git_blob_hash(data)}  {name}\n" for name, data in UPSTREAM.items())
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> str:
    """The interpreter of an environment with pip and without Detectron2."""
    directory = tmp_path_factory.mktemp("environment")
    venv.create(directory, with_pip=True)
    return str(directory / "bin" / "python")


@pytest.fixture
def site(environment):
    """Its site-packages; what a test puts there under Detectron2's name is removed afterwards."""
    (directory,) = Path(environment).parent.parent.glob("lib/python*/site-packages")
    yield directory
    for path in directory.glob("detectron2*"):
        shutil.rmtree(path)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """pip without a registry and without the user's settings; finds what lies in `tmp_path`."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def call(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_blob_hash_is_that_of_git():
    # `git hash-object` of an empty file and of a file that holds "hello\n"
    assert script.git_blob_hash(b"") == "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"
    assert script.git_blob_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"


def test_hash_list_names_the_306_files_of_upstream():
    hashes = script.read_hash_list(script.HASH_LIST)
    assert len(hashes) == 306
    assert all(name.startswith("detectron2/") for name in hashes)
    assert all(re.fullmatch("[0-9a-f]{40}", sha1) for sha1 in hashes.values())


def test_extraction_gives_files_and_imports_the_names_of_upstream(tmp_path):
    assert script.extract_package(make_source(tmp_path)) == UPSTREAM


def test_installed_package_has_metadata_and_is_removed_by_pip(
    tmp_path, environment, site, hash_list
):
    source = make_source(tmp_path)
    message = script.install(environment, source, sha256(source), hash_list)
    assert message.startswith("Installed: Detectron2 0.6+864913f at ")
    assert str(site) in message
    imported = call(environment, "-c", "import detectron2; print(detectron2.NAME)")
    assert imported.stdout == "detectron2.part\n"

    shown = call(environment, "-m", "pip", "show", "detectron2").stdout
    assert "Name: detectron2\nVersion: 0.6+864913f\n" in shown
    assert "License: Apache 2.0\n" in shown
    assert "fvcore, hydra-core, iopath" in shown

    assert call(environment, "-m", "pip", "uninstall", "--yes", "detectron2").returncode == 0
    assert not list(site.glob("detectron2*"))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"detectron2/part.py": b"NAME = 1\n"}, "different from upstream: detectron2/part.py"),
        ({"detectron2/part.py": None}, "missing: detectron2/part.py"),
        ({"detectron2/more.py": b""}, "not in the list: detectron2/more.py"),
    ],
    ids=["tampered", "missing", "extra"],
)
def test_a_file_unlike_upstream_is_named_and_nothing_installed(
    changes, named, tmp_path, environment, site, hash_list
):
    source = make_source(tmp_path, changes)
    with pytest.raises(script.InstallError, match="nothing was installed") as caught:
        script.install(environment, source, sha256(source), hash_list)
    assert named in str(caught.value)
    assert not list(site.glob("detectron2*"))


def test_a_wheel_of_another_hash_is_refused(tmp_path, environment, site, hash_list):
    source = make_source(tmp_path)
    with pytest.raises(script.InstallError, match=f"has sha256 {sha256(source)}, expected 00"):
        script.install(environment, source, "00", hash_list)
    assert not list(site.glob("detectron2*"))


def test_a_file_that_is_no_wheel_is_refused(tmp_path):
    path = tmp_path / "labgym.whl"
    path.write_bytes(b"<html>")
    with pytest.raises(script.InstallError, match="labgym.whl is not a readable wheel"):
        script.extract_package(path)


def test_a_detectron2_that_imports_is_kept(tmp_path, environment, site, hash_list):
    (site / "detectron2").mkdir()
    own = site / "detectron2" / "__init__.py"
    own.write_text("__version__ = '9.9'\n")
    message = script.install(environment, tmp_path / "not needed", "", hash_list)
    assert message == f"Kept: Detectron2 9.9 at {own}"
    assert own.read_text() == "__version__ = '9.9'\n"


def test_a_detectron2_that_fails_to_import_is_reported_not_replaced(
    tmp_path, environment, site, hash_list
):
    (site / "detectron2").mkdir()
    own = site / "detectron2" / "__init__.py"
    own.write_text("import of_another_time\n")
    source = make_source(tmp_path)
    with pytest.raises(script.InstallError, match="No module named 'of_another_time'"):
        script.install(environment, source, sha256(source), hash_list)
    assert own.read_text() == "import of_another_time\n"


def test_an_empty_directory_of_that_name_is_no_detectron2(environment, site):
    (site / "detectron2" / "__pycache__").mkdir(parents=True)
    assert script.find_detectron2(environment) is None


def test_an_environment_without_pip_is_named(tmp_path, hash_list):
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(script.InstallError, match=f"{python} has no pip"):
        script.install(python, None, "", hash_list)


def test_download_ignores_the_limits_of_the_source_package(
    tmp_path, environment, monkeypatch, offline
):
    source = make_source(tmp_path)  # asks for Python 2 and a package that does not exist
    monkeypatch.setattr(script, "SOURCE_SHA256", sha256(source))
    (tmp_path / "into").mkdir()
    wheel = script.download(environment, tmp_path / "into")
    assert wheel.parent == tmp_path / "into"
    assert wheel.read_bytes() == source.read_bytes()


def test_download_of_another_hash_is_refused(tmp_path, environment, offline):
    make_source(tmp_path)
    (tmp_path / "into").mkdir()
    with pytest.raises(script.InstallError, match="DO NOT MATCH THE HASHES") as caught:
        script.download(environment, tmp_path / "into")
    assert script.SOURCE_SHA256 in str(caught.value)
    assert not list((tmp_path / "into").glob("*.whl"))


def test_without_a_registry_the_message_says_what_else_works(
    tmp_path, environment, site, hash_list, offline
):
    with pytest.raises(script.InstallError, match="could not download") as caught:
        script.install(environment, None, "", hash_list)
    assert "labgym 3.1.2" in str(caught.value)
    assert "--wheel FILE" in str(caught.value)
    assert not list(site.glob("detectron2*"))


def test_a_failure_ends_with_status_1_and_one_message(monkeypatch, capsys):
    def fail(*args):
        raise script.InstallError("no network")

    monkeypatch.setattr(script, "install", fail)
    assert main(["install-detectron2"]) == 1
    assert capsys.readouterr() == ("", "d2-balance install-detectron2: error: no network\n")


def test_wheel_records_every_file_with_its_hash(tmp_path):
    wheel = script.build_wheel(UPSTREAM, tmp_path, b"the licence")
    assert wheel.name == "detectron2-0.6+864913f-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        record = archive.read("detectron2-0.6+864913f.dist-info/RECORD").decode()
        rows = dict(line.split(",", 1) for line in record.splitlines())
        assert sorted(rows) == sorted(archive.namelist())
        for name, row in rows.items():
            if not name.endswith("/RECORD"):
                digest = hashlib.sha256(archive.read(name)).digest()
                code = base64.urlsafe_b64encode(digest).decode().rstrip("=")
                assert row == f"sha256={code},{len(archive.read(name))}"


def test_this_package_installs_what_detectron2_requires():
    def names(lines):
        return {re.split(r"[^\w.-]", line)[0].lower() for line in lines}

    own = names(importlib.metadata.requires("d2-balance"))
    assert names(script.REQUIREMENTS) <= own


def test_files_installed_here_are_those_of_upstream():
    try:
        distribution = importlib.metadata.distribution("detectron2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("Detectron2 was not installed by the script")
    if distribution.version != script.VERSION:
        pytest.skip(f"Detectron2 {distribution.version} is not the script's")
    for name, sha1 in script.read_hash_list(script.HASH_LIST).items():
        assert script.git_blob_hash(distribution.locate_file(name).read_bytes()) == sha1, name


# import name -> distribution; cv2 comes with lvis, and as the headless one where libGL lacks.
DISTRIBUTIONS = {
    "PIL": "pillow",
    "cv2": "lvis",
    "yaml": "pyyaml",
}
OPTIONAL = {"detectron2", "mlflow", "wandb"}  # from the script; trackers that a key asks for


def test_every_import_of_the_package_is_declared():
    with open(ROOT / "pyproject.toml", "rb") as file:
        project = tomllib.load(file)["project"]
    extras = (p for name, packages in project["optional-dependencies"].items() for p in packages)
    declared = {re.split(r"[<>=\[ ]", p)[0].lower() for p in (*project["dependencies"], *extras)}
    imported = set()
    for path in (ROOT / "d2_balance").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    imported -= sys.stdlib_module_names | OPTIONAL | {"d2_balance"}
    assert {DISTRIBUTIONS.get(name, name) for name in imported} <= declared
