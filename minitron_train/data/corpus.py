"""The embedded corpus: text that every machine with Python has, so that the program runs where nothing can be fetched.

`prose` is the standard library's docstrings, module by module, and the language reference topics of `pydoc_data`;
`code` is the same modules without their docstrings, so that no sentence stands in both. The texts differ between
Python versions: `corpus_sha256` goes into the provenance.
"""

import ast
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PARTS = ("prose", "code")
SKIPPED_FOLDERS = frozenset(
    # tests; what pip and the distribution put there; tables of code points, which are not language
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ from machine to machine
TOPICS = "pydoc_data/topics.py"
MIN_CHARACTERS = 200  # a module with less to say is left out


@cache
def modules() -> list[Path]:
    """The standard library's modules, sorted by their path below it."""
    root = stdlib_root()
    paths = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = (p for p in paths if SKIPPED_FOLDERS.isdisjoint(p.parts[:-1]) and not p.name.startswith(SKIPPED_PREFIXES))
    return [root / path for path in sorted(kept, key=Path.as_posix)]


def stdlib_root() -> Path:
    """The folder of the standard library (of the base Python in a virtual environment)."""
    return Path(sysconfig.get_path("stdlib"))


def documents(module: Path, part: str) -> Iterator[str]:
    """The documents of one module: its docstrings (`prose`) or its code without them (`code`)."""
    if module.relative_to(stdlib_root()).as_posix() == TOPICS:
        texts = topics() if part == "prose" else []
    else:
        name = module_name(module)
        texts = [docstrings(name, read_module(module)) if part == "prose" else code(read_module(module))]
    yield from (text for text in texts if len(text) >= MIN_CHARACTERS)


@cache
def corpus_sha256() -> str:
    """sha256 over the names and bytes of all modules: which text this machine's Python carries."""
    digest = hashlib.sha256()
    for path in modules():
        digest.update(path.relative_to(stdlib_root()).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def module_name(module: Path) -> str:
    """lib/json/__init__.py -> json, lib/json/decoder.py -> json.decoder."""
    parts = module.relative_to(stdlib_root()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_module(module: Path) -> str:
    """A module's source; the few files that are not UTF-8 lose the bytes that are not."""
    return module.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def topics() -> list[str]:
    """The language reference by topic, as `help("TOPIC")` shows it."""
    from pydoc_data.topics import topics as texts

    return [texts[name].strip() + "\n" for name in sorted(texts)]


def docstrings(name: str, source: str) -> str:
    """All docstrings of a module, each under its qualified name, in the order of the source."""
    tree = parse(source)
    return "\n\n".join(sections(tree, name)) + "\n" if tree else ""


def sections(node: ast.AST, name: str) -> Iterator[str]:
    """Name and docstring of one definition and, depth first, of those inside it."""
    text = ast.get_docstring(node) if isinstance(node, DEFINITIONS) else None
    if text:
        yield f"{name}\n\n{text.strip()}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, DEFINITIONS[1:]):
            yield from sections(child, f"{name}.{child.name}")


def code(source: str) -> str:
    """A module's source without docstrings; a body that was only a docstring becomes `...`."""
    tree = parse(source)
    if not tree:
        return ""
    lines: list[str | None] = [*source.split("\n")]
    for node in ast.walk(tree):
        if not isinstance(node, DEFINITIONS) or ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0]
        assert text.end_lineno
        first = text.lineno - 1
        only = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : text.end_lineno] = [None] * (text.end_lineno - first)
        lines[first] = " " * text.col_offset + "..." if only else None
    return "\n".join(line for line in lines if line is not None)


def parse(source: str) -> ast.Module | None:
    """The syntax tree; None for the few templates in the library that are not Python."""
    with warnings.catch_warnings(action="ignore"):  # old escapes like "\d" are none of the user's business
        try:
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return None


DEFINITIONS = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
