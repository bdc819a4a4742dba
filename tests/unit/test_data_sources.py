"""Finding and opening sources, and what a user reads when that fails."""

import contextlib
import gzip
import hashlib
import json
import pickle
import secrets
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pyarrow
import pyarrow.parquet
import pytest

from minitron_train.commands.inputs import data_inputs
from minitron_train.commands.workspace import Workspace
from minitron_train.config import CalibrationConfig, Config, DataConfig, SourceConfig, SourceKind
from minitron_train.data import formats, lines, tokenizers
from minitron_train.data.calibration import calibration_data
from minitron_train.data.sources import copied_bytes, copy_files, identity, matching_files, parts
from minitron_train.data.stream import TokenStream, validation_tokens
from minitron_train.data.units import EncodeJob, Split, UnitMaker
from minitron_train.data.workers import Pool
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import byte_size
from minitron_train.runtime.launch import World

ALL = Split(held_out=False, fraction=0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("tokenizer") / "bpe"
    tokenizers.save(tokenizers.train_bpe(["some words"], 258), folder)
    return tokenizers.load(folder)


def first_batch(data: DataConfig, tokenizer) -> None:
    TokenStream(data, tokenizer, seq_length=16, seed=1).next_batch(1)


def read_all(data: DataConfig) -> list[str]:
    """All documents of a data section with one source, block after block."""
    source = parts(data)[0].open(ALL)
    return ["".join(passages) for block in range(source.num_blocks) for passages in source.read(block)]  # type: ignore


def test_blocks_never_cut_lines_or_characters(tmp_path, monkeypatch):
    """Blocks of 7 bytes, lines in several scripts, with and without a newline at the end: every line once, in order."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 7)
    texts = ["a", "", "наука", "データベース", "🙂🙃", "x" * 30, "naïve", "y"]
    for end in ("", "\n"):
        path = tmp_path / "a.jsonl"
        path.write_bytes(("\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts) + end).encode())
        assert read_all(DataConfig(path=str(path))) == texts
        packed = tmp_path / f"a{len(end)}.jsonl.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        assert read_all(DataConfig(path=str(packed), cache_dir=str(tmp_path / "cache"))) == texts


def test_half_a_surrogate_pair_and_null(tmp_path):
    """What JSON allows and UTF-8 does not becomes U+FFFD; null is an empty document, which nobody reads."""
    lines = [r'{"text": "a\ud83d b"}', r'{"text": "\ud83d\ude42"}', '{"text": null}', ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_all(DataConfig(path=str(tmp_path / "a.jsonl"))) == ["a\ufffd\ufffd\ufffd b", "🙂", ""]


def test_text_files_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(lines, "BLOCK_BYTES", 100)
    text = "".join(f"{i} строка ライン 🙂\r\n" for i in range(200))
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert "".join(read_all(DataConfig(path=str(tmp_path / "a.txt")))) == text.replace("\r", "")


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz"])
def test_long_lines_of_text_are_cut_between_words(name, tmp_path, monkeypatch):
    """Text on one line: blocks and passages stay small, no character is cut, and nothing but line ends is new."""
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(formats, "PASSAGE_BYTES", 512)
    text = "короткая строка\n" + " ".join(f"слово{i}" for i in range(6000)) + "🙂" * 5000 + "\nend"
    raw = text.encode()
    write(tmp_path, name, gzip.compress(raw) if name.endswith("gz") else raw)
    source: Any = parts(DataConfig(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache")))[0].open(ALL)
    blocks = [list(source.read(block)) for block in range(source.num_blocks)]
    passages = [passage for block in blocks for document in block for passage in document]
    assert max(len(passage.encode()) for passage in passages) <= 1024
    assert max(sum(len(piece.encode()) for document in block for piece in document) for block in blocks) <= 2 * 4096
    assert "".join(passages).replace("\n", "") == text.replace("\n", "")
    words = {word for passage in passages for word in passage.split()}
    assert {f"слово{i}" for i in range(5999)} <= words


def test_a_line_of_many_blocks_is_read_in_linear_time(tmp_path):
    """Only the block in which a line begins reads it to its end."""
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "x" * (40 * lines.BLOCK_BYTES)}) + "\n" + json.dumps({"text": "y"}) + "\n")
    file, before = lines.open_lines(path, tmp_path), psutil.Process().io_counters().read_chars
    found = [len(list(file.read(block))) for block in range(file.num_blocks)]
    assert found == [1] + [0] * (file.num_blocks - 2) + [1]
    assert psutil.Process().io_counters().read_chars - before < 3 * path.stat().st_size


def test_a_unit_is_filled_whatever_the_size_of_blocks(tmp_path):
    """Small files, and Parquet beside a heavy column, count by their text: units keep their size."""
    for i in range(50):
        write(tmp_path / "small", f"{i}.txt", b"word " * 200)
    table = pyarrow.table({"text": ["word " * 200] * 50, "image": [secrets.token_bytes(50_000)] * 50})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5, use_dictionary=False)
    for path, size in (("small", 1000), ("a.parquet", 5 * 1004)):
        source: Any = parts(DataConfig(path=str(tmp_path / path)))[0].open(ALL)
        assert 0.9 * size < source.block_bytes < 2 * size, path  # pages have headers


def test_large_row_groups_are_copied(tmp_path, monkeypatch):
    texts = [f"{i} " + "слово " * 50 for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), tmp_path / "a.parquet")
    data = DataConfig(path=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path / "cache"))
    assert parts(data)[0].open(ALL).num_blocks == 1 and read_all(data) == texts  # type: ignore[union-attr]
    monkeypatch.setattr("minitron_train.data.formats.ROW_GROUP_BYTES", 1000)
    assert parts(data)[0].open(ALL).num_blocks > 5 and read_all(data) == texts  # type: ignore[union-attr]


def test_files_folders_globs(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", "notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{{"text": "{name}"}}\n')
    assert read_all(DataConfig(path=str(tmp_path))) == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]
    assert read_all(DataConfig(path=f"{tmp_path}/[ab].jsonl")) == ["a.jsonl", "b.jsonl"]
    assert read_all(DataConfig(path=f"{tmp_path}/b.jsonl")) == ["b.jsonl"]


def test_downloaded_data_set_of_the_hub(tmp_path):
    """What lies beside the data is left out of a folder, never of a glob; where all is text, a README is text too."""
    folder = tmp_path / "fineweb-edu"
    beside = (
        "README.md",
        "LICENSE.txt",
        ".gitattributes",
        "dataset_info.json",
        ".cache/huggingface/b.jsonl",
        "sub/a.MD",
    )
    for name in beside:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write((folder / name).parent, Path(name).name, b"about the data\n")
    text = ["LICENSE.txt", "README.md", "a.MD"]
    assert sorted(file.name for file in matching_files(str(folder), SourceKind.auto)) == text
    (folder / "data").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["x"]}), folder / "data" / "train.parquet")
    assert read_all(DataConfig(path=str(folder))) == ["x"]
    write(folder, "notes.txt", b"text\n")
    for path in (folder, f"{folder}/**/*"):
        with pytest.raises(
            UserError, match=r"several formats .*; give a narrower glob, like FOLDER/\*\*/\*\.jsonl, or"
        ):
            _ = parts(DataConfig(path=str(path)))[0].kind
    assert read_all(DataConfig(path=f"{folder}/**/*.parquet")) == ["x"]


def test_pairs_and_set_kinds(tmp_path):
    """A .bin/.idx pair is found by prefix, by either file, by glob and by folder; a set kind overrules file names."""
    for name in ("a.b.idx", "a.b.bin", "c.idx", "c.bin", "log", ".hidden.txt"):
        write(tmp_path, name, b"x")

    def names(pattern: str, kind: SourceKind = SourceKind.auto) -> list[str]:
        return [file.name for file in matching_files(f"{tmp_path}/{pattern}", kind)]

    assert names("a.b") == names("a.b.bin") == names("a.b.idx") == names("a*.bin") == ["a.b.idx"]
    assert names("") == names("", SourceKind.bin) == names("*.*") == ["a.b.idx", "c.idx"]
    write(tmp_path / "plain", "log", b"x")
    assert names("plain", SourceKind.text) == ["log"]


def test_processes_share_one_copy(tmp_path):
    """Three processes open the same compressed file at once: all read the same, one copy and no scrap is left."""
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"".join(b'{"text": "%d"}\n' % i for i in range(100_000))))
    code = (
        "import sys; from pathlib import Path; from minitron_train.data.formats import JsonLines;"
        "file = JsonLines(paths=(Path(sys.argv[1]),), cache_dir=Path(sys.argv[2]));"
        "print(sum(1 for block in range(file.num_blocks) for _ in file.read(block)))"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[0].splitlines()[-1] for process in processes] == ["100000"] * 3
    assert sorted(file.suffix for file in (tmp_path / "cache").iterdir()) == [".blocks", ".lock"]


TEXTS = [hashlib.sha256(b"%d" % i).hexdigest() for i in range(6000)]


def write_packed(folder: Path, name: str, texts: Sequence[str] = TEXTS) -> str:
    """Compressed JSON Lines; with TEXTS some 400 kB that compress to half."""
    raw = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    if name.endswith(".gz"):
        return write(folder, name, gzip.compress(raw))
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return write(folder, name, sink.getvalue().to_pybytes())


def test_copies_are_announced_once(tmp_path, tokenizer, capfd):
    """One line with what, how much and where, from the training process alone; none where the copies are there."""
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        write_packed(tmp_path / "corpus", name)
    cache = tmp_path / "cache"
    data = DataConfig(path=str(tmp_path / "corpus"), num_workers=2, cache_dir=str(cache))
    first_batch(data, tokenizer)
    said = capfd.readouterr()
    size = byte_size(sum(file.stat().st_size for file in (tmp_path / "corpus").iterdir()))
    line = f"copying {tmp_path}/corpus/a.jsonl.gz and 1 more ({size}) into {cache} (data.cache_dir), once"
    assert said.out.startswith(line) and said.out.count("\n") == 1 and "copy" not in said.err
    first_batch(replace(data, num_workers=0), tokenizer)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_progress_of_long_copies(name, tmp_path, monkeypatch, capsys):
    """By compressed megabytes or row groups; the documents are the same."""
    monkeypatch.setattr("minitron_train.runtime.console.PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setattr("minitron_train.data.formats.ROW_GROUP_BYTES", 1000)
    monkeypatch.setattr(lines, "PIECE_BYTES", 50_000)
    if name.endswith(".parquet"):
        pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / name, row_group_size=1500)
    else:
        write_packed(tmp_path, name)
    assert read_all(DataConfig(path=str(tmp_path / name), cache_dir=str(tmp_path / "cache"))) == TEXTS
    first, *steps = capsys.readouterr().out.splitlines()
    total = 4 if name.endswith(".parquet") else int(steps[0].split("/")[1].split(",")[0])
    assert first.startswith("copying ") and total >= 3
    assert [step.split(",")[-2].split(": ")[-1] for step in steps] == [f"{done}/{total}" for done in range(1, total)]


def test_missing_parts_are_named_together(tmp_path):
    sources = {
        "web": SourceConfig(suggestion="hub some/web"),
        "code": SourceConfig(path="???"),
        "late": SourceConfig(weight=0, late_weight=1),
        "unused": SourceConfig(weight=0),
        "own": SourceConfig(path=str(tmp_path)),
    }
    with pytest.raises(UserError) as error:
        parts(DataConfig(name="blend", sources=sources))
    message = str(error.value)
    assert "\n" not in message and "web (hub some/web); code; late" in message and "unused" not in message
    assert "data.sources.code.path=" in message and "own" not in message.split("own data.path")[0]


def write(folder: Path, name: str, content: bytes) -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(content)
    return str(folder / name)


MISTAKES = {  # file name, content, what the message says
    "empty": ("a.txt", b"", "corpus is empty"),
    "blank": ("a.txt", b"\n \n\n", "has 0 tokens"),
    "short": ("a.txt", b"short\n", "fewer than one sequence of 16"),
    "column": ("a.jsonl", b'{"content": "x", "id": 1}\n', "no column text: it has content, id"),
    "not_json": ("a.jsonl", b'{"text": "x"}\nplain\n', "not a JSON object: b'plain'"),
    "not_text": ("a.jsonl", b'{"text": ["x"]}\n', "column text is not text"),
    "not_utf8": ("a.txt", b"caf\xe9 au lait\n", "not UTF-8 near"),
    "corrupt": ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 999)[:40], "cannot be decompressed"),
    "no_gzip": ("a.jsonl.gz", b"plain", "cannot be decompressed"),
    "no_zstd": ("a.jsonl.zst", b"plain", "cannot be decompressed"),
    "no_parquet": ("a.parquet", b"PAR1 plain", "not a Parquet file"),
    "no_index": ("a.idx", b"plain", "missing next to its .idx"),
}


@pytest.mark.parametrize(("case", "num_workers"), [*((case, 0) for case in MISTAKES), ("not_json", 1), ("not_utf8", 2)])
def test_mistakes_in_files(case, num_workers, tmp_path, tokenizer):
    """One line with file and remedy, also when a worker meets it."""
    name, content, expected = MISTAKES[case]
    path = write(tmp_path, name, content)
    data = DataConfig(path=path, num_workers=num_workers, cache_dir=str(tmp_path / "cache"), validation_fraction=0)
    with pytest.raises(UserError) as error:
        first_batch(data, tokenizer)
    assert expected in str(error.value) and "\n" not in str(error.value)


def damaged_parquet(path: Path, at: int, damage: bytes) -> str:
    """A Parquet file whose footer is whole and whose pages are not."""
    texts = [hashlib.sha256(b"%d" % i).hexdigest() + " слово" * 9 for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, use_dictionary=False)
    content = bytearray(path.read_bytes())
    content[at : at + len(damage)] = damage
    path.write_bytes(content)
    return str(path)


@pytest.mark.parametrize(
    ("at", "damage", "copied", "num_workers"),
    [(4, b"\xff" * 40, False, 0), (600, b"\xff" * 400, False, 1), (600, b"\xff" * 400, True, 1)],
    ids=["page_header", "page", "page_of_a_copied_file"],
)
def test_damaged_parquet_pages(at, damage, copied, num_workers, tmp_path, tokenizer, monkeypatch):
    """A corrupt body is one line with the file and what to do, wherever it is read."""
    monkeypatch.setattr("minitron_train.data.formats.ROW_GROUP_BYTES", 1000 if copied else 1 << 24)
    path = damaged_parquet(tmp_path / "a.parquet", at, damage)
    data = DataConfig(path=path, num_workers=num_workers, cache_dir=str(tmp_path / "cache"), validation_fraction=0)
    with pytest.raises(UserError, match=r"a\.parquet: row group 0 cannot be read .* fetch or write it again$") as error:
        first_batch(data, tokenizer)
    assert "\n" not in str(error.value)


def test_damaged_copy(tmp_path):
    packed = write(tmp_path, "a.txt.gz", gzip.compress(b"some text\n" * 999))
    data = DataConfig(path=packed, cache_dir=str(tmp_path / "cache"))
    read_all(data)
    (copy,) = (tmp_path / "cache").glob("*.blocks")
    copy.write_bytes(copy.read_bytes()[:4] + bytes(8) + copy.read_bytes()[12:])
    with pytest.raises(UserError, match=r"\.blocks: the copy of .*a\.txt\.gz cannot be read .* delete it"):
        read_all(data)


def test_any_error_of_a_worker_reaches_the_training_process(tokenizer):
    """Also one that nobody thought of: the process lives on, and its traceback is in the message."""
    pool = Pool(UnitMaker({}, tokenizers.encoder(tokenizer, None), ALL), 1)
    with contextlib.closing(pool):
        with pytest.raises(RuntimeError, match=r"in a tokenising process: Traceback(.|\n)*AttributeError"):
            pool.submit(EncodeJob(0, (None,), (1,))).result()  # type: ignore[arg-type]
        assert len(pool.submit(EncodeJob(0, ("some words",), (1,))).result().tokens)


def test_workers_end_when_a_job_is_cut_off(tokenizer):
    """A training process that is killed while it writes leaves half a job in the pipe."""
    pool = Pool(UnitMaker({}, tokenizers.encoder(tokenizer, None), ALL), 1)
    pool.submit(EncodeJob(0, ("some words",), (1,))).result()
    process = pool.workers[0].process
    assert process.stdin
    process.stdin.write(pickle.dumps(EncodeJob(0, ("x" * 1000,), (1,)))[:500])
    process.stdin.close()
    try:
        assert process.wait(30) == 0
    finally:
        process.kill()


def test_file_names_with_magic_characters(tmp_path):
    path = write(tmp_path, "corpus[v2].jsonl", b'{"text": "x"}')
    assert matching_files(path, SourceKind.auto) == [Path(path)]


def test_other_mistakes(tmp_path, tokenizer):
    def message(data: DataConfig) -> str:
        with pytest.raises(UserError) as error:
            first_batch(data, tokenizer)
        return str(error.value)

    assert "no text file matches" in message(DataConfig(path=f"{tmp_path}/*.txt"))
    assert "no text file matches" in message(DataConfig(path=str(tmp_path)))
    pyarrow.parquet.write_table(pyarrow.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert "no column text: it has body" in message(DataConfig(path=str(tmp_path)))
    write(tmp_path, "b.txt", b"text\n")
    assert "several formats (parquet, text)" in message(DataConfig(path=str(tmp_path)))
    write(tmp_path, "c.idx", b"plain")
    write(tmp_path, "c.bin", b"plain")
    assert "not a megatron-core index" in message(DataConfig(path=str(tmp_path / "c")))
    embedded = {"a": SourceConfig(kind=SourceKind.embedded, path="poems")}
    assert "prose and code" in message(DataConfig(sources=embedded))
    assert "every weight is 0" in message(DataConfig(sources={"a": SourceConfig(weight=0, late_weight=0)}))
    late = {
        "a": SourceConfig(path=str(tmp_path / "b.txt"), late_weight=0),
        "b": SourceConfig(weight=0, late_weight=0),
    }
    with pytest.raises(UserError, match=r"^data\.late_fraction=0\.1: every late_weight is 0; give .* a late_weight$"):
        parts(DataConfig(sources=late, late_fraction=0.1))
    assert parts(DataConfig(sources=late))
    hub = {"a": SourceConfig(kind=SourceKind.hub, path=str(tmp_path / "nowhere"))}
    assert "cannot be opened on the hub" in message(DataConfig(sources=hub))
    write(tmp_path, "cache", b"a file, not a folder")
    gz = write(tmp_path, "d.txt.gz", gzip.compress(b"text\n" * 100))
    assert "set data.cache_dir" in message(DataConfig(path=gz, cache_dir=str(tmp_path / "cache")))
    with pytest.raises(UserError, match="held-out slice has fewer tokens"):
        validation_tokens(DataConfig(path=str(tmp_path / "b.txt")), tokenizer, 16, seed=1)
    with pytest.raises(UserError, match="multiple of the 2 data-parallel ranks"):
        TokenStream(DataConfig(path=gz), tokenizer, seq_length=16, seed=1, dp_size=2).next_batch(3)


def test_text_columns_of_parquet(tmp_path):
    """Large and dictionary-encoded strings are text; bytes, times and numbers are refused by their type."""
    texts = ["x" * 40, None]
    good = [pyarrow.array(texts, pyarrow.large_string()), pyarrow.array(texts).dictionary_encode()]
    for i, column in enumerate(good):
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / f"{i}.parquet")
        assert read_all(DataConfig(path=str(tmp_path / f"{i}.parquet"))) == [texts[0], ""]
    for kind in (pyarrow.binary(), pyarrow.timestamp("s"), pyarrow.int64()):
        pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(2, kind)}), tmp_path / "bad.parquet")
        with pytest.raises(UserError, match=r"bad\.parquet: column text is not text but .*; choose another text_key"):
            read_all(DataConfig(path=str(tmp_path / "bad.parquet")))


def test_inputs_of_a_stage_change_with_what_the_stream_gives(tmp_path):
    """Contents, column, weights, held-out share and end token: each by a label that says which it is."""
    lines = "".join(json.dumps({"text": f"{i}", "body": f"{i}"}) + "\n" for i in range(9))
    sources = {
        "a": SourceConfig(path=write(tmp_path, "a.jsonl", lines.encode()), weight=2),
        "b": SourceConfig(path=write(tmp_path, "b.txt", b"text\n")),
    }
    data = DataConfig(sources=sources)

    def changed(**changes: Any) -> dict[str, str]:
        with contextlib.ExitStack() as stack:
            old, new = (
                data_inputs(Workspace(Config(data=section), [], World(), stack))
                for section in (data, replace(data, **changes))
            )
        return {label: new.get(label, "") for label in {*old, *new} if old.get(label) != new.get(label)}

    assert changed(num_workers=3, name="other", validation_tokens=1) == {}
    assert changed(validation_fraction=0.5) == {"data validation_fraction": "0.5"}
    assert changed(document_end="<end>") == {"data document_end": "<end>"}
    assert changed(sequence_start="<s>") == {"data sequence_start": "<s>"}
    assert changed(sources=sources | {"a": replace(sources["a"], weight=0.5)}) == {"data a weight": "0.5"}
    assert list(changed(sources=sources | {"a": replace(sources["a"], text_key="body")})) == ["data a"]
    assert changed(late_fraction=0.1) == {"data a late_weight": "2", "data b late_weight": "1"}
    assert set(changed(sources={"a": sources["a"]})) == {"data a weight", "data b", "data b weight"}


def test_calibration_text_has_no_held_out_part(tmp_path):
    paths = [write(tmp_path, name, b"text\n") for name in ("a.txt", "b.txt")]
    data = DataConfig(path=paths[0], validation_fraction=0.5, late_fraction=0.1)
    own = identity(calibration_data(CalibrationConfig(path=paths[1]), data))
    assert own == identity(DataConfig(path=paths[1], validation_fraction=0))
    assert identity(calibration_data(CalibrationConfig(), data)) == identity(replace(data, late_fraction=0))


def test_several_copies_at_once(tmp_path, capsys, monkeypatch):
    """The documents keep the order of the files, and only the number of finished copies is shown."""
    monkeypatch.setattr("minitron_train.runtime.console.PLAIN_INTERVAL_S", -1.0)
    monkeypatch.setattr(lines, "PIECE_BYTES", 100)
    for k, name in enumerate(("a.jsonl.gz", "b.jsonl.zst", "c.jsonl.gz")):
        write_packed(tmp_path / "corpus", name, TEXTS[30 * k : 30 * k + 30])
    data = DataConfig(path=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    copy_files(data)
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["copies: 1/3", "copies: 2/3"]
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.blocks")}
    assert read_all(data) == TEXTS[:90] and len(before) == 3
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.blocks")}


def test_a_damaged_file_among_several_copies(tmp_path):
    """One line names it. No part of its copy stays, and the next attempt begins no finished copy again."""
    for name in ("a.jsonl.gz", "b.jsonl.gz", "c.jsonl.gz"):
        write_packed(tmp_path / "corpus", name)
    damaged = tmp_path / "corpus" / "b.jsonl.gz"
    damaged.write_bytes(damaged.read_bytes()[:-20])
    data = DataConfig(path=str(tmp_path / "corpus"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"b\.jsonl\.gz.*; ") as caught:
        copy_files(data)
    assert "\n" not in str(caught.value)
    kept = [path.name.split(".")[0] for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"]
    assert "b" not in kept


def test_copies_of_compressed_files_are_counted(tmp_path):
    packed = write(tmp_path, "a.txt.gz", gzip.compress(b"text\n" * 999))
    assert copied_bytes(DataConfig(path=packed)) == Path(packed).stat().st_size
    assert copied_bytes(DataConfig(path=write(tmp_path, "b.txt", b"text\n"))) == copied_bytes(DataConfig()) == 0
    assert copied_bytes(DataConfig(path="missing.gz")) == 0


@pytest.mark.parametrize(
    ("family", "start", "warns"), [("gemma3_text", None, True), ("gemma", "<bos>", False), ("llama", None, False)]
)
def test_a_teacher_that_needs_bos_is_said_to(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str, start: str | None, warns: bool
) -> None:
    config = Config(data=DataConfig(path=write(tmp_path, "a.txt", b"text\n"), sequence_start=start))
    with contextlib.ExitStack() as stack:
        ws = Workspace(config, [], World(), stack)
        ws.__dict__["teacher_shape"] = SimpleNamespace(architecture=family)
        config.model.architecture = family
        data_inputs(ws)
    assert ("set data.sequence_start" in capsys.readouterr().out) == warns
