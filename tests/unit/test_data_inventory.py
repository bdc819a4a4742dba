"""What a data path stands for: files, formats, splits, links, and what the user is told of what is left out."""

import bz2
import gzip
import json
import lzma
import os
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from minitron_train.config import CalibrationConfig, DataConfig, SourceConfig, SourceKind
from minitron_train.data import sources
from minitron_train.data.calibration import calibration_data
from minitron_train.data.inventory import take
from minitron_train.data.splits import split_of
from minitron_train.data.stream import validation_data
from minitron_train.data.units import Split
from minitron_train.runtime.errors import UserError

ALL = Split(held_out=False, fraction=0)
TEXTS = [f'document {i}\nof several lines, «quoted» and "so"' for i in range(7)]
ROWS = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(TEXTS)).encode()


def write(path: Path, content: bytes = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def read(path: Path | str, cache: Path, **keys: Any) -> list[str]:
    """All documents of a path."""
    source = SourceConfig(path=str(path), **keys)
    opened: Any = sources.parts(DataConfig(sources={"own": source}, cache_dir=str(cache)))[0].open(
        Split(held_out=False, fraction=0)
    )
    return ["".join(passages) for block in range(opened.num_blocks) for passages in opened.read(block)]


def names(path: Path | str, **keys: Any) -> list[str]:
    return [file.name for file in take(str(path), **keys).files]


def reasons(path: Path | str, **keys: Any) -> dict[str, str]:
    return {item.name: item.reason for item in take(str(path), **keys).left_out}


JSONL_NAMES = (
    "a.JSONL",
    "b.jsonlines",
    "c.jl",
    "d.jsonl.1",
    "e",
    "f.ndjson",
    "g.json-00000-of-00002",
    "h.txt",
    "i.dat",
    "j.json",
)


@pytest.mark.parametrize("name", JSONL_NAMES)
def test_json_lines_under_any_name(name, tmp_path):
    path = write(tmp_path / name)
    assert read(path, tmp_path) == TEXTS
    assert take(str(path)).summary() == f"1 file, jsonl, {len(ROWS)} B"


PACK = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda raw: pyarrow.compress(raw, "zstd", asbytes=True),
}


@pytest.mark.parametrize("name", ["a.jsonl{}", "A.JSONL{}", "a.jsonl.1{}", "a{}", "no_suffix"])
@pytest.mark.parametrize("packing", PACK)
def test_compressed_files_of_several_members(name, packing, tmp_path):
    """By name in any case, or by content; every member is read."""
    half = ROWS.index(b"\n", len(ROWS) // 2) + 1
    path = write(tmp_path / name.format(packing), b"".join(PACK[packing](part) for part in (ROWS[:half], ROWS[half:])))
    assert read(path, tmp_path / "cache") == TEXTS


@pytest.mark.parametrize("packing", PACK)
def test_compressed_files_that_are_cut_off(packing, tmp_path):
    raw = os.urandom(3000).hex().encode()
    path = write(tmp_path / f"a.txt{packing}", PACK[packing](raw)[:-20])
    with pytest.raises(UserError, match=r"a\.txt\.\w+: cannot be decompressed \([^\n]*\); the file is corrupt: fetch"):
        read(path, tmp_path / "cache")


@pytest.mark.parametrize(("name", "delimiter"), [("a.csv", ","), ("a.CSV.gz", ";"), ("a.tsv", "\t")])
def test_csv(name, delimiter, tmp_path):
    """Newlines and delimiters inside quotes, a byte order mark as spreadsheets write it, CRLF."""
    rows = [f'{i}{delimiter}"{text.replace(chr(34), chr(34) * 2)}{delimiter}"' for i, text in enumerate(TEXTS)]
    raw = "\r\n".join([f"id{delimiter}text", *rows, ""]).encode("utf-8-sig")
    path = write(tmp_path / name, gzip.compress(raw) if name.endswith("gz") else raw)
    assert read(path, tmp_path / "cache") == [text + delimiter for text in TEXTS]


CSV_MISTAKES = {
    "column": (b"id,body\n1,x\n", "no column text: it has id, body; set text_key"),
    "fields": (b"id,text\n1,one, two\n", r"line 2: 3 fields, but the header has 2; put quotes"),
    "quote": (b'id,text\n1,"a" b\n', r"line 2: not CSV \(.*\); double the quotes"),
    "latin": (b"id,text\n1,caf\xe9\n", r"line 2: not UTF-8 near b'\\xe9'; convert"),
    "utf16": ("id,text\n1,x\n".encode("utf-16"), "is UTF-16, not UTF-8"),
}


@pytest.mark.parametrize("case", CSV_MISTAKES)
def test_mistakes_in_csv(case, tmp_path):
    content, expected = CSV_MISTAKES[case]
    with pytest.raises(UserError, match=expected) as error:
        read(write(tmp_path / "a.csv", content), tmp_path / "cache")
    assert "\n" not in str(error.value) and "a.csv" in str(error.value)


@pytest.mark.parametrize("indent", [None, 2])
def test_json_arrays(indent, tmp_path):
    raw = json.dumps([json.loads(line) for line in ROWS.splitlines()], indent=indent).encode()
    assert read(write(tmp_path / "a.json", raw), tmp_path / "cache") == TEXTS
    assert read(write(tmp_path / "b.json.gz", gzip.compress(raw)), tmp_path / "cache") == TEXTS
    with pytest.raises(UserError, match=r"c\.json: damaged \(.*\); write it as JSON Lines"):
        read(write(tmp_path / "c.json", raw[:-5]), tmp_path / "cache")


def test_saved_data_sets(tmp_path):
    """Folders of `save_to_disk`, of one split and of several; caches beside them are not data."""
    saved = datasets.Dataset.from_dict({"text": TEXTS})
    saved.save_to_disk(str(tmp_path / "one"), num_shards=2)
    write(tmp_path / "one/cache-abc.arrow", (tmp_path / "one/data-00000-of-00002.arrow").read_bytes())
    datasets.DatasetDict({"train": saved, "test": datasets.Dataset.from_dict({"text": ["never"]})}).save_to_disk(
        str(tmp_path / "two")
    )
    cache = tmp_path / "cache"
    assert read(tmp_path / "one", cache) == read(tmp_path / "two", cache) == TEXTS
    assert reasons(tmp_path / "one")["cache-abc.arrow"] == "not in state.json"
    assert reasons(tmp_path / "two")["test/data-00000-of-00001.arrow"] == "split test"
    assert read(tmp_path / "two", cache, split="test") == ["never"]
    pyarrow.feather.write_feather(pyarrow.table({"text": TEXTS}), tmp_path / "a.feather")
    assert read(tmp_path / "a.feather", cache) == TEXTS
    (tmp_path / "one/data-00001-of-00002.arrow").unlink()
    for shard in (1, 0):  # the other one, then none at all
        (tmp_path / f"one/data-0000{shard}-of-00002.arrow").unlink(missing_ok=True)
        with pytest.raises(UserError, match=rf"data-0000{shard}-of-00002\.arrow: missing, state\.json names it"):
            take(str(tmp_path / "one"))


def test_arrow_files_that_are_broken(tmp_path):
    path = tmp_path / "a.arrow"
    datasets.Dataset.from_dict({"text": TEXTS * 500}).save_to_disk(str(tmp_path / "saved"))
    whole = next((tmp_path / "saved").glob("*.arrow")).read_bytes()
    for content, expected in ((whole[:5000], "not a whole Arrow file"), (b"plain", "not an Arrow file")):
        with pytest.raises(UserError, match=rf"a\.arrow: {expected} \([^\n]*fetch or write it again$"):
            read(write(path, content), tmp_path / "cache")


def test_what_no_format_reads_is_left_out_and_said(tmp_path):
    for name in (
        "page.html",
        "archive.tar.gz",
        "b.zip",
        "weights.bin",
        "notes.docx",
        ".git/config",
        "Makefile",
        "__pycache__/a.py",
    ):
        write(tmp_path / name, b"<p>text</p>")
    write(tmp_path / "book.txt", b"a book\n")
    inventory = take(str(tmp_path))
    assert names(tmp_path) == ["book.txt"]
    assert inventory.summary() == (
        "1 file, text, 7 B; left out: .git/ (hidden), __pycache__/ (not text), weights.bin (no .idx file), "
        "Makefile, archive.tar.gz and 3 more (not a format that is read)"
    )
    for name in ("page.html", "archive.tar.gz", "b.zip"):
        with pytest.raises(
            UserError, match=rf"{name}: no text file matches, {name} \(not a format that is read\); give text"
        ):
            take(str(write(tmp_path / name, b"\0\1\2" if name == "b.zip" else b"<p>text</p>" * 400)))


def test_files_without_suffix(tmp_path):
    """Read if nothing else is there, as wikiextractor's; beside others only if their content is unmistakable."""
    for name in ("AA/wiki_00", "AA/wiki_01"):
        write(tmp_path / name, b"plain text\n")
    write(tmp_path / "AA/_SUCCESS", b"")
    assert names(tmp_path) == ["wiki_00", "wiki_01"]
    write(tmp_path / "part-00000")
    assert names(tmp_path) == ["part-00000"]


def test_splits_of_a_download(tmp_path):
    """Only train is read, unless a split is asked for; said by name."""
    for split in ("train", "validation", "test"):
        path = tmp_path / f"data/{split}-00000-of-00001.parquet"
        path.parent.mkdir(exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.table({"text": [split]}), path)
    write(tmp_path / "README.md", b"about\n")
    left = ", ".join(f"data/{split}-00000-of-00001.parquet (split {split})" for split in ("validation", "test"))
    assert take(str(tmp_path)).summary().endswith(f"; left out: README.md (about the data), {left}")
    for path in (tmp_path, f"{tmp_path}/data/*.parquet"):
        assert read(path, tmp_path) == ["train"]
    for split, found in {
        "validation": ["validation"],
        "dev": ["validation"],
        "all": ["test", "train", "validation"],
    }.items():
        assert read(tmp_path, tmp_path, split=split) == found
    assert read(f"{tmp_path}/data/test*", tmp_path) == ["test"]
    with pytest.raises(UserError, match=r"no file of split extra; it has test, train, validation; choose another"):
        take(str(tmp_path), split="extra")


def test_names_of_splits(tmp_path):
    expected = {
        "train": ["data/train-00000-of-00002.parquet", "training.jsonl", "test/train.jsonl"],
        "validation": ["web/dev.jsonl", "Valid/a.jsonl", "c4-validation.00000-of-00008.json.gz"],
        "test": ["test.jsonl", "wiki.test.tokens", "train/eval.jsonl", "test-0/a.jsonl"],
        None: ["latest.jsonl", "contest/a.jsonl", "development/a.jsonl", "my test runs/a.jsonl"],
    }
    assert {split: [name for name in found if split_of(name) == split] for split, found in expected.items()} == expected
    for name in ("notes/test.md", "test/test_it.py", "eval.txt"):
        write(tmp_path / name, b"text\n")
    assert len(names(tmp_path)) == 3, "notes and code are no splits"
    write(tmp_path / "train.txt", b"text\n")
    assert reasons(tmp_path) == {"eval.txt": "split test"}


def test_validation_files_are_held_out(tmp_path):
    """Named by another path or a link, the file is the same; calibration does not read it either."""
    train, valid = write(tmp_path / "text/a.jsonl"), write(tmp_path / "text/held.jsonl")
    link = tmp_path / "link.jsonl"
    link.symlink_to(valid)
    for path in (valid, link):
        data = DataConfig(path=str(tmp_path / "text"), validation_path=str(path))
        assert sources.files(data) == sources.files(calibration_data(CalibrationConfig(), data)) == [train]
        assert sources.describe(data) == [
            f"data.path: {tmp_path}/text: 1 file, jsonl, {len(ROWS)} B; left out: held.jsonl (held out as data.validation_path)"
        ]
        assert sources.files(validation_data(data)) == [path]
        held_out = sources.describe(validation_data(data), "data.validation_path")
        assert held_out == [f"data.validation_path: {path}: 1 file, jsonl, {len(ROWS)} B"]
    with pytest.raises(UserError, match=r"held\.jsonl: every file is held out by data\.validation_path"):
        sources.files(DataConfig(path=str(valid), validation_path=str(link)))
    assert sources.files(DataConfig(path=str(valid), validation_path="nowhere")) == [valid]


def test_validation_reads_the_validation_split(tmp_path):
    """One folder for training and validation: each takes its split."""
    for name in ("train.jsonl", "valid.jsonl", "test.jsonl"):
        write(tmp_path / name)
    data = DataConfig(path=str(tmp_path), validation_path=str(tmp_path))
    assert [file.name for file in sources.files(data)] == ["train.jsonl"]
    assert [file.name for file in sources.files(validation_data(data))] == ["valid.jsonl"]


def test_links(tmp_path):
    """Linked folders are followed, loops and second ways to the same file are not."""
    write(tmp_path / "elsewhere/b.jsonl")
    write(tmp_path / "data/a.jsonl")
    write(tmp_path / "data/deep/c.jsonl")
    for link, target in {
        "part2": "elsewhere",
        "loop": "data",
        "again": "data/deep",
        "gone": "nowhere",
        "d.jsonl": "data/a.jsonl",
    }.items():
        (tmp_path / "data" / link).symlink_to(tmp_path / target)
    assert names(tmp_path / "data") == ["a.jsonl", "c.jsonl", "b.jsonl"]
    already = "read already under another name"
    assert reasons(tmp_path / "data") == {
        "gone": "a broken link",
        "again/": already,
        "loop/": already,
        "d.jsonl": already,
    }


def test_paths_as_people_write_them(tmp_path, monkeypatch):
    """Brackets in folder names beside a real glob, ~, relative paths; names that cannot be are one line."""
    path = write(tmp_path / "corpus [v2]/a.jsonl")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for pattern in (
        f"{tmp_path}/corpus [v2]/*.jsonl",
        "~/corpus [v2]",
        "corpus [v2]/*",
        "corpus*/a.jsonl",
        "./corpus [v2]/a.jsonl",
    ):
        assert [file.resolve() for file in take(pattern).files] == [path], pattern
    for pattern in ("~nobody-of-this-name/a", "x" * 5000, "nul\0", "nowhere/*"):
        with pytest.raises(UserError, match=r"cannot be read|no text file matches") as error:
            take(pattern)
        assert "\n" not in str(error.value) and len(str(error.value)) < 500


TEXT_FAULTS = {
    "pointer": ("a.txt", b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "is a Git LFS pointer.*git lfs pull"),
    "utf16": ("a.txt", "text\n".encode("utf-16"), r"is UTF-16, not UTF-8; convert the file \(iconv -f utf-16 "),
    "utf16_bare": ("a.md", "text\n".encode("utf-16-le"), "is UTF-16, not UTF-8"),
    "binary": ("a.txt", b"text \0 text " * 9, "is binary, not text"),
    "windows": ("a.md", "Größe\n".encode("cp1252"), "not UTF-8 near .*iconv -f windows-1252"),
    "latin_rows": ("a.jsonl", ROWS + b'{"text": "caf\xe9"}\n', r"a\.jsonl, line 8: not UTF-8 near"),
    "utf16_rows": ("a.jsonl", ROWS.decode().encode("utf-16"), "is UTF-16"),
    "list": ("a.jsonl", ROWS + b'{"text": ["x"]}\n', r"a\.jsonl, line 8: column text is not text: \['x'\]; choose"),
    "number": ("a.jsonl", ROWS + b'{"text": 7}\n', r"a\.jsonl, line 8: column text is not text: 7"),
    "cut": ("a.jsonl", ROWS[:-9], r"a\.jsonl, line 7: not a JSON object: .*is the file cut off\?"),
    "deep": ("a.jsonl", b'{"meta": ' + b"[" * 100_000 + b"]" * 100_000 + b', "text": "x"}\n', "line 1: nested too deeply"),
    "string": ("a.jsonl", b'"text"\n', r"line 1: not a JSON object: b'\"text\"'"),
}  # fmt: skip


@pytest.mark.parametrize("case", TEXT_FAULTS)
def test_faults_in_text_are_one_line_with_the_place(case, tmp_path):
    name, content, expected = TEXT_FAULTS[case]
    with pytest.raises(UserError, match=expected) as error:
        read(write(tmp_path / name, content), tmp_path / "cache")
    assert "\n" not in str(error.value) and name in str(error.value)


def test_a_byte_order_mark_is_no_text(tmp_path):
    assert read(write(tmp_path / "a.txt", "\ufefftext\n".encode()), tmp_path) == ["text\n"]
    assert read(write(tmp_path / "b.jsonl", b"\xef\xbb\xbf" + ROWS), tmp_path) == TEXTS


def test_files_that_change_while_they_are_read(tmp_path):
    """Deleted or cut: one line with the file. Longer ones are read as far as they went."""
    path = write(tmp_path / "a.jsonl")
    source: Any = sources.parts(DataConfig(path=str(path)))[0].open(ALL)
    assert source.num_blocks == 1
    write(path, ROWS + ROWS)
    assert len(list(source.read(0))) == len(TEXTS)
    write(path, ROWS[:-9])
    with pytest.raises(UserError, match=r"a\.jsonl: has \d+ bytes, but had \d+ when it was opened; restore"):
        list(source.read(0))
    path.unlink()
    for look in (lambda: list(source.read(0)), source.fingerprint):
        with pytest.raises(
            UserError,
            match=r"a\.jsonl: (cannot be read \(No such file|was deleted after this run had opened it; restore it)",
        ):
            look()


def test_copies_are_made_without_locks(tmp_path, monkeypatch):
    """Some network file systems have no flock."""

    def refused(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("minitron_train.data.lines.fcntl.flock", refused)
    assert read(write(tmp_path / "a.jsonl.gz", gzip.compress(ROWS)), tmp_path / "cache") == TEXTS


def test_kinds_that_are_set(tmp_path):
    """A set kind overrules names; files about the data are left out all the same."""
    write(tmp_path / "a.log")
    write(tmp_path / "dataset_info.json", b"{}")
    assert names(tmp_path, kind=SourceKind.jsonl) == ["dataset_info.json"]
    write(tmp_path / "b.jsonl")
    assert names(tmp_path, kind=SourceKind.jsonl) == ["b.jsonl"]
    assert reasons(tmp_path, kind=SourceKind.jsonl) == {"a.log": "not jsonl", "dataset_info.json": "about the data"}


def test_an_output_folder_inside_of_the_data_is_refused(tmp_path):
    """The run would read its own records, and find new files when it resumes."""
    file = write(tmp_path / "text/a.jsonl")
    inside = tmp_path / "text/runs/one"
    for path in (tmp_path / "text", tmp_path / "text/**/*.jsonl", tmp_path / "text/runs/.."):
        (tmp_path / "text/runs").mkdir(exist_ok=True)
        for data in (DataConfig(path=str(path)), DataConfig(path=str(file), validation_path=str(path))):
            with pytest.raises(
                UserError, match=rf"^output_dir={inside}: lies inside of .*; choose an output_dir outside"
            ):
                sources.check_outside(data, inside)
    for path in (file, tmp_path / "text/*.jsonl"):
        sources.check_outside(DataConfig(path=str(path)), inside)
    sources.check_outside(DataConfig(path=str(tmp_path / "text")), tmp_path / "text/.runs/one")
    sources.check_outside(DataConfig(path=str(tmp_path / "text")), tmp_path / "text-runs")
    sources.check_outside(DataConfig(), inside)


def test_a_model_beside_the_text(tmp_path):
    """A teacher's configuration and vocabulary are no text, wherever its folder lies; text of such names elsewhere is."""
    for folder in (tmp_path, tmp_path / "teacher"):
        for name in (
            "config.json",
            "tokenizer.json",
            "vocab.json",
            "special_tokens_map.json",
            "generation_config.json",
        ):
            write(folder / name, b"{}")
        write(folder / "merges.txt", b"a b\n")
    write(tmp_path / "a.jsonl")
    write(tmp_path / "elsewhere/tokenizer.json")
    assert names(tmp_path) == ["a.jsonl", "tokenizer.json"]
    assert set(reasons(tmp_path).values()) == {"of a model"}


def test_what_is_no_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(UserError, match=r"pipe\.jsonl: is not a regular file; write its content into a file"):
        take(str(tmp_path / "pipe.jsonl"))


def test_a_folder_that_may_be_listed_only(tmp_path, monkeypatch):
    """Its files are left out, with the reason; the rest is read."""
    write(tmp_path / "a.jsonl")
    closed = write(tmp_path / "closed/b.jsonl")
    stat = Path.stat

    def refuse(path: Path, **keys: Any) -> os.stat_result:
        if path == closed:
            raise PermissionError(13, "Permission denied")
        return stat(path, **keys)

    monkeypatch.setattr(Path, "stat", refuse)
    assert names(tmp_path) == ["a.jsonl"]
    assert reasons(tmp_path) == {"closed/b.jsonl": "cannot be read: Permission denied"}
