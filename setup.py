"""Packages, which pyproject.toml cannot name: `configs/` is `d2_balance.configs`."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["d2_balance*"]), "d2_balance.configs"],
    package_dir={"d2_balance.configs": "configs"},
)
