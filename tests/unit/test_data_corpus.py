"""The embedded corpus: whole, the same each time, nothing twice."""

import ast
from pathlib import Path

import pytest

from minitron_train.data import corpus

SOURCE = '''"""Module text."""
import os

class A(Exception):
    """Only a docstring."""

class B:
    """Class text.

    More of it.
    """

    x = "a\\x0cb"

    def f(self):
        r"""Regular \\d text."""
        return """not a docstring"""

try:
    import fast
except ImportError:
    def slow(ß=1):
        "One line."
        return ß
'''


def test_prose_and_code_share_the_source_between_them():
    prose = corpus.docstrings("m", SOURCE)
    assert prose == (
        "m\n\nModule text.\n\nm.A\n\nOnly a docstring.\n\nm.B\n\nClass text.\n\nMore of it.\n\n"
        "m.B.f\n\nRegular \\d text.\n\nm.slow\n\nOne line.\n"
    )
    code = corpus.code(SOURCE)
    assert (
        "docstring" in code and "text" not in code and "One line" not in code and "class A(Exception):\n    ..." in code
    )
    kept = [node for node in ast.walk(ast.parse(SOURCE)) if isinstance(node, ast.stmt)]
    left = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.stmt)]
    assert len(left) == len(kept) - 4, "four docstrings went, the fifth became `...`"


def test_corpus_is_large_clean_and_repeatable():
    names = {path.relative_to(corpus.stdlib_root()).as_posix() for path in corpus.modules()}
    assert {"json/decoder.py", "argparse.py", corpus.TOPICS} <= names
    assert not any("/test/" in f"/{name}" or "site-packages" in name for name in names)
    assert len(corpus.corpus_sha256()) == 64
    topics = list(corpus.documents(corpus.stdlib_root() / corpus.TOPICS, "prose"))
    assert len(topics) > 50 and sum(map(len, topics)) > 200_000
    assert list(corpus.documents(corpus.stdlib_root() / corpus.TOPICS, "code")) == []
    module = corpus.stdlib_root() / "argparse.py"
    (prose,), (code,) = corpus.documents(module, "prose"), corpus.documents(module, "code")
    assert prose.startswith("argparse\n\nCommand-line parsing library") and "argparse.ArgumentParser\n\n" in prose
    ast.parse(code)


def test_comments_and_docstrings_do_not_decide_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rewritten sentence must not make runs on the embedded corpus stale; changed code must."""
    monkeypatch.setattr(corpus, "modules", lambda: [])
    text = Path(corpus.__file__).read_text()
    found = []
    for name, changed in (
        ("same", text),
        ("words", text.replace("shorter documents are left out", "x").replace('"""A module\'s source.', '"""Y')),
        ("code", text.replace("MIN_CHARACTERS = 200", "MIN_CHARACTERS = 201")),
    ):
        assert name == "same" or changed != text
        (tmp_path / name).write_text(changed)
        monkeypatch.setattr(corpus, "__file__", str(tmp_path / name))
        found.append(corpus.corpus_sha256.__wrapped__())
    assert found[0] == found[1] != found[2]
