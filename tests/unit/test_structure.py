"""Imports between the files of this repository: no file and no package imports itself by way of others."""

import ast
from collections.abc import Set
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {name: ROOT / name for name in ("vpmoe", "jobs", "devcluster", "demo", "tests", "benchmarks")} | {
    "distill_operator": ROOT / "operator/distill_operator"
}

COPIED = ("configuration_vpmoe.py", "grouped.py", "modeling_vpmoe.py", "tensor_product.py")
"""Files of vpmoe.model that are copied into exported model folders."""


def modules() -> dict[str, Path]:
    """Every module of the repository: dotted name → file."""
    found = {}
    for package, folder in PACKAGES.items():
        for file in folder.rglob("*.py"):
            parts = [package, *file.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imported(module: str, file: Path, known: Set[str]) -> set[str]:
    """The modules of `known` that a file imports anywhere: in functions and under TYPE_CHECKING too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # In a model folder, the student's code is not part of this package.
            assert not node.level or file.name in COPIED, f"{file}: relative import"
            source = f"vpmoe.model.{node.module}" if node.level else str(node.module)
            names |= {of if (of := f"{source}.{alias.name}") in known else source for alias in node.names}
    return names & known - {module}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes that lead back to the first of them; none where the graph has no circle."""
    left = {node: set(after) for node, after in graph.items()}
    while ends := [node for node, after in left.items() if not after & left.keys()]:
        for node in ends:
            del left[node]
    path = list(left)[:1]
    while path:
        following = min(left[path[-1]] & left.keys())
        if following in path:
            return path[path.index(following) :]
        path.append(following)
    return []


MODULES = modules()
IMPORTS = {name: imported(name, file, MODULES.keys()) for name, file in MODULES.items()}


def test_no_file_imports_itself_through_others() -> None:
    assert not circle(IMPORTS)


def test_no_package_imports_itself_through_others() -> None:
    def package(module: str) -> str:
        """vpmoe.<package>, demo.sample and tests.fakes; the top-level package elsewhere."""
        parts = ("vpmoe.", "demo.sample", "tests.fakes")
        return ".".join(module.split(".")[: 2 if module.startswith(parts) else 1])

    graph: dict[str, set[str]] = {}
    for module, others in IMPORTS.items():
        graph.setdefault(package(module), set()).update(map(package, others))
    for name, others in graph.items():
        others.discard(name)
    assert not circle(graph)


def test_no_test_module_and_no_conftest_is_imported() -> None:
    """What several test modules use is in tests/fakes."""
    found = {
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if other.startswith("tests.") and other.rpartition(".")[2].startswith(("test_", "conftest"))
    }
    assert not found
