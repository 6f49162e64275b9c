"""Which room of the package imports which; ARCHITECTURE of the docs shows the direction."""

import ast
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "d2_balance"


@cache
def modules():
    """Dotted names of all modules, with their files."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module):
    """(module of the package, name taken from it or None, whether for types only) of each import.

    Imports inside of functions and under TYPE_CHECKING count as well.
    """
    path = modules()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = []

    def visit(node, types):
        for child in ast.iter_child_nodes(node):
            inner = types or (
                isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            )
            if isinstance(child, ast.Import):
                found.extend((alias.name, None, inner) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = package.split(".")[: len(package.split(".")) - child.level + 1]
                    base = ".".join([*parents, *([base] if base else [])])
                for alias in child.names:
                    if f"{base}.{alias.name}" in modules():
                        found.append((f"{base}.{alias.name}", None, inner))
                    else:
                        found.append((base, alias.name, inner))
            visit(child, inner)

    visit(ast.parse(path.read_text()), False)
    return [entry for entry in found if entry[0].split(".")[0] == "d2_balance"]


# What each room may import beside itself; a module at the top level is a room of its own.
BELOW = {
    "utils": set(),
    "losses": {"utils"},
    "sampling": {"utils", "losses"},
    "reweight": {"utils", "losses"},
    "data": {"utils"},
    "modeling": {"utils", "losses", "sampling", "reweight", "data"},
    "config": {"utils", "losses", "sampling", "reweight", "data", "modeling"},
    "evaluation": {"utils", "data"},
    "analysis": {"utils", "losses", "data", "modeling"},
}
BELOW["engine"] = {*BELOW, ""}  # "" is the package itself: __version__, add_balance_config
BELOW["methods"] = {*BELOW}
BELOW["deploy"] = BELOW["sweep"] = BELOW["recipes"] = {*BELOW["engine"], "engine", "methods"}
BELOW["cli"] = {*BELOW["deploy"], "deploy", "sweep", "recipes"}
BELOW[""] = {"config", "utils"}
BELOW["__main__"] = {"cli"}
# Private modules of the losses that the rooms around them are built with.
SHARED = {"d2_balance.losses._base", "d2_balance.losses._samples", "d2_balance.losses._kernels"}


def room(module):
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("module", sorted(modules()))
def test_a_module_imports_only_rooms_below_its_own(module):
    allowed = {room(module), *BELOW[room(module)]}
    wrong = {target for target, _, _ in imports(module) if room(target) not in allowed}
    assert not wrong, f"{module} must not import them; it may import {sorted(allowed)}"


@pytest.mark.parametrize("module", sorted(modules()))
def test_private_names_stay_in_their_room(module):
    for target, name, _ in imports(module):
        private = [part for part in target.split(".")[1:] if part.startswith("_")]
        if room(target) == room(module) or any(target.startswith(shared) for shared in SHARED):
            continue
        hidden = name and name.startswith("_") and not name.startswith("__")
        assert not private and not hidden, (target, name)


def test_no_module_imports_itself_by_way_of_others():
    """A circle of imports works or fails by the order in which a user imports."""
    graph = {
        m: {t for t, _, typed in imports(m) if t in modules() and not typed} for m in modules()
    }
    done, path = set(), []

    def walk(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in done:
            return
        path.append(module)
        for target in sorted(graph[module]):
            walk(target)
        path.pop()
        done.add(module)

    for module in sorted(graph):
        walk(module)
