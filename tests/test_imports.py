"""Imports of the package go one way, and in no circle; those inside functions are left out."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room imports from itself and from rooms with a lower number.
LEVEL = {
    "utils": 0,
    "losses": 1,
    "sampling": 2,
    "reweight": 2,
    "data": 2,
    "modeling": 3,
    "evaluation": 3,
    "analysis": 4,
    "config": 4,
    "methods": 4,
    "engine": 5,
    "deploy": 6,
    "recipes": 6,
    "sweep": 6,
    "cli": 7,
    "__main__": 8,
}


def statements(nodes) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports that run when a module is imported."""
    for node in nodes:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from statements(node.orelse)
        elif isinstance(node, ast.If | ast.Try | ast.With):
            yield from statements(ast.iter_child_nodes(node))
        elif isinstance(node, ast.ExceptHandler):
            yield from statements(node.body)


def imported(path: Path, root: Path) -> set[str]:
    """Names of the modules of the package that a file imports at once."""
    package = path.relative_to(root).parts[:-1]
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
            continue
        base = package[: len(package) - node.level + 1] if node.level else ()
        module = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = root.joinpath(*module.split("."), alias.name)
            is_module = inner.with_suffix(".py").is_file() or inner.is_dir()
            found.add(f"{module}.{alias.name}" if is_module else module)
    return {name for name in found if name.partition(".")[0] == "d2_balance"}


def graph(root: Path) -> dict[str, set[str]]:
    modules = {}
    for path in sorted((root / "d2_balance").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        modules[name.removesuffix(".__init__")] = imported(path, root)
    return modules


def wrong_ways(modules: dict[str, set[str]]) -> list[str]:
    def room(module):
        return ([*module.split("."), ""])[1]

    return [
        f"{module} imports {other}"
        for module, others in modules.items()
        for other in sorted(others)
        if room(module) and room(other) and room(module) != room(other)
        if LEVEL[room(module)] <= LEVEL[room(other)]
    ]


def test_imports_go_one_way():
    assert not wrong_ways(graph(ROOT))


def test_no_circles():
    modules = graph(ROOT)
    assert len(modules) > 150
    TopologicalSorter(modules).prepare()  # CycleError names the circle


def test_a_circle_and_a_wrong_way_are_found(tmp_path):
    for name, text in {
        "losses/a.py": "from d2_balance.utils import b\nfrom ..engine.c import x\n",
        "utils/b.py": "def later():\n    import d2_balance.cli\n",
        "engine/c.py": "try:\n    import d2_balance.losses.a\nexcept ImportError:\n    pass\n",
    }.items():
        path = tmp_path / "d2_balance" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    modules = graph(tmp_path)
    assert wrong_ways(modules) == ["d2_balance.losses.a imports d2_balance.engine.c"]
    with pytest.raises(CycleError):
        TopologicalSorter(modules).prepare()
