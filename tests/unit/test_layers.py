"""The layer rule of docs/architecture.md: a package imports only packages below its own, so none import each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron_train

PACKAGE = Path(minitron_train.__file__).parent
LAYERS = (  # from the bottom; packages of one layer do not import each other
    {"runtime"},
    {"arch"},
    {"config"},
    {"hf", "parallel", "stages"},
    {"data", "fetch", "model"},
    {"planning"},
    {"pruning", "distillation"},
    {"train"},
    {"evaluation"},
    {"reporting"},
    {"commands"},
    {"api"},
    {"__init__", "__main__"},
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def imports(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """Dotted modules of this package that a file imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("minitron_train."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minitron_train":
            for alias in node.names:
                dotted = f"{node.module}.{alias.name}"
                yield dotted if dotted in modules else str(node.module)


def dotted(file: Path) -> str:
    """The module that a file is."""
    parts = file.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {dotted(file): file for file in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(file.read_text()) for name, file in FILES.items()}
GRAPH = {name: set(imports(tree, set(FILES))) for name, tree in TREES.items()}


def for_types(tree: ast.AST) -> Iterator[ast.If]:
    """The blocks under `if TYPE_CHECKING`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield node


def package(module: str) -> str:
    """The part of a dotted module below minitron_train."""
    return module.split(".")[1] if "." in module else "__init__"


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_from_lower_layers(module: str) -> None:
    own = package(module)
    higher = {
        name for name in GRAPH[module] if package(name) not in (own, "__init__") and LEVEL[package(name)] >= LEVEL[own]
    }
    assert not higher, f"{module} is in layer {LEVEL[own]} ({own})"


def test_every_package_has_its_layer() -> None:
    assert {package(module) for module in FILES} == set(LEVEL)


def test_no_module_imports_itself_in_a_circle() -> None:
    """Within a package too. Left out: a package's __init__, which only collects names, and imports for types alone."""
    modules = {name for name, file in FILES.items() if file.name != "__init__.py"}
    graph = {}
    for name in modules:
        for_annotations = {to for block in for_types(TREES[name]) for to in imports(block, set(FILES))}
        graph[name] = (GRAPH[name] - for_annotations) & modules - {name}
    while free := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in free:
            del graph[name]
    circles = {name: found & graph.keys() for name, found in graph.items()}
    assert not circles
