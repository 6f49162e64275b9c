"""The configs that come with the package."""

from __future__ import annotations

from pathlib import Path

from .names import closest

_PACKAGE = Path(__file__).resolve().parents[1]


def config_directory() -> Path:
    """Return the directory of the configs: `configs/` of a checkout, or that of the wheel.

    Raises:
        ValueError: the package was installed without its configs.
    """
    directories = _PACKAGE.parent / "configs", _PACKAGE / "configs"
    for directory in directories:
        if (directory / "quick_schedules").is_dir():  # any package may install a `configs`
            return directory
    raise ValueError(
        f"d2_balance has no configs: {directories[0]} or {directories[1]} must exist; install the "
        "package again."
    )


def get_config_file(name: str) -> str:
    """Return the path of a config that comes with the package.

    Args:
        name: path below `configs/`, such as
            "LVISv1-InstanceSegmentation/mask_rcnn_R_50_FPN_1x_eqlv2.yaml".

    Raises:
        ValueError: there is no such file; the message names those that look alike.
    """
    directory = config_directory()
    path = directory / name
    if not path.is_file():
        files = (p for p in directory.rglob("*") if p.suffix in (".py", ".yaml"))
        names = [p.relative_to(directory).as_posix() for p in files]
        raise ValueError(f"there is no config {name!r}; {closest(name, names)}".rstrip("; "))
    return str(path)
