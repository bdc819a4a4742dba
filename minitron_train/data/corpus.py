"""The embedded corpus: text of Python's standard library, so that the program runs without a network.

`prose` is the standard library's docstrings, module by module, and the language reference topics of `pydoc_data`;
`code` is the same modules without their docstrings, so that no sentence occurs in both. The texts differ between
Python versions: `corpus_sha256` goes into the provenance.
"""

import ast
import contextlib
import hashlib
import sysconfig
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PARTS = ("prose", "code")
SKIPPED_FOLDERS = frozenset(
    # tests; packages of pip and the distribution; tables of code points, which are not language
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "sitecustomize", "usercustomize")  # differ from machine to machine
TOPICS = "pydoc_data/topics.py"
Named = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.Module | Named
BLOCKS = ("body", "orelse", "finalbody", "handlers", "cases")  # fields of a statement that hold statements
MIN_CHARACTERS = 200  # shorter documents are left out


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
    """sha256 over the names and bytes of all modules, and the code of this one without docstrings and comments."""
    own = ast.unparse(parse(code(Path(__file__).read_text(encoding="utf-8"))))
    digest = hashlib.sha256(own.encode())
    for path in modules():
        digest.update(path.relative_to(stdlib_root()).as_posix().encode() + b"\0")
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()


def module_name(module: Path) -> str:
    """lib/json/__init__.py -> json, lib/json/decoder.py -> json.decoder."""
    parts = module.relative_to(stdlib_root()).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def read_module(module: Path) -> str:
    """A module's source. In the few files that are not UTF-8, invalid bytes are replaced."""
    return module.read_bytes().decode("utf-8", errors="replace").replace("\r\n", "\n")


def topics() -> list[str]:
    """The language reference by topic, as `help("TOPIC")` shows it."""
    from pydoc_data.topics import topics as texts

    return [texts[name].strip() + "\n" for name in sorted(texts)]


def docstrings(name: str, source: str) -> str:
    """All docstrings of a module, each under its qualified name, in the order of the source."""
    found = [(qualified, ast.get_docstring(node)) for qualified, node in definitions(parse(source), name)]
    return "\n\n".join(f"{qualified}\n\n{text.strip()}" for qualified, text in found if text) + "\n"


def code(source: str) -> str:
    """A module's source without docstrings; a body that was only a docstring becomes `...`."""
    lines: list[str | None] = [*source.split("\n")]
    for _, node in definitions(parse(source), ""):
        if ast.get_docstring(node, clean=False) is None:
            continue
        text = node.body[0]
        assert text.end_lineno
        first = text.lineno - 1
        only = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first : text.end_lineno] = [None] * (text.end_lineno - first)
        lines[first] = " " * text.col_offset + "..." if only else None
    return "\n".join(line for line in lines if line is not None)


def definitions(node: ast.AST, name: str) -> Iterator[tuple[str, Definition]]:
    """Every module, class and function with its qualified name; expressions are skipped to save time."""
    if isinstance(node, Definition):
        yield name, node
    for block in BLOCKS:
        for child in getattr(node, block, ()):
            inner = f"{name}.{child.name}" if isinstance(child, Named) else name
            yield from definitions(child, inner)


def parse(source: str) -> ast.Module:
    """The syntax tree; empty for the few templates in the library that are not Python."""
    with warnings.catch_warnings(action="ignore"):  # the user cannot fix old escapes like "\d"
        try:
            with contextlib.suppress(SystemError):  # python/cpython#106905: raised if a finalizer runs
                return ast.parse(source)
            return ast.parse(source)
        except (SyntaxError, ValueError):
            return ast.Module(body=[], type_ignores=[])
