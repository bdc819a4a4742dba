"""Records that are damaged or are no files: one line with the remedy, never a traceback, never a wait."""

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.records import decode, read_bytes, read_record


@dataclass
class Example:
    step: int
    name: str = "x"


def test_reads_a_record(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"step": 3, "later": [1]}')
    assert read_record(tmp_path / "a.json", Example, "delete it") == Example(3)


@pytest.mark.parametrize(
    "text",
    ["", "3", "null", "[]", '"x"', "{", '{"step": "3"}', '{"step": null}', "{}", "[" * 100_000, '{"step": 1e999}'],
)
def test_refuses_other_types_in_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.json: damaged \(.+\); delete it") as caught:
        read_record(tmp_path / "a.json", Example, "delete it")
    assert "\n" not in str(caught.value)


def test_refuses_bytes_that_are_not_utf8() -> None:
    with pytest.raises(UserError, match="damaged"):
        decode(b'{"step": 1, "name": "\xff"}', Example, "here", "delete it")


def test_refuses_what_is_no_file_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "loop", "folder"):
        with pytest.raises(UserError, match=f"{name}: "):
            read_bytes(tmp_path / name)
    for name in ("absent", "absent/below"):
        with pytest.raises(FileNotFoundError):
            read_bytes(tmp_path / name)


def test_refuses_a_file_of_absurd_size(tmp_path: Path) -> None:
    with (tmp_path / "big").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(UserError, match="1,099,511,627,776 bytes"):
        read_bytes(tmp_path / "big")
