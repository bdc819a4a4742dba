"""Mistakes in what a data path names: formats, encodings, splits, files cut off or nested too deep."""

import bz2
import json
import lzma
import struct

from tests.bad_input.scene import MICRO, PRUNED, TAUGHT, Case, Step, cut_off, fifo, folder, loop, write

SCORE = f"score {MICRO}"
ROWS = "".join(json.dumps({"id": k, "text": f"row {k} of a small corpus"}) + "\n" for k in range(50))
NOISE = "".join(f"{k * 7919 % 10007} " for k in range(9000)).encode()
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DEEP = '{"meta": ' + "[" * 100_000 + "]" * 100_000 + ', "text": "x"}\n'


def index(
    version: int = 1, dtype: int = 4, lengths: tuple[int, ...] = (4, 4), documents: tuple[int, ...] = (0, 1, 2)
) -> bytes:
    """A .idx of megatron-core: two sequences of int32 tokens, in two documents."""
    counts = struct.pack("<QBQQ", version, dtype, len(lengths), len(documents))
    starts = [4 * sum(lengths[:k]) for k in range(len(lengths))]
    return (
        b"MMIDIDX\0\0"
        + counts
        + struct.pack(f"<{len(lengths)}i{len(starts)}q{len(documents)}q", *lengths, *starts, *documents)
    )


TOKENS = struct.pack("<8i", *range(8))
FILES: list[tuple[str, str, str, tuple[Step, ...]]] = [  # name, the path, what is said, what the folder holds
    (
        "web page as a corpus",
        "page.html",
        r"no text file matches, page.html \(not a format that is read\)",
        (write("page.html", "<p>text</p>\n" * 99),),
    ),
    ("archive as a corpus", "a.zip", r"not a format that is read", (write("a.zip", b"PK\3\4\0\0\1" * 99),)),
    ("folder of hidden files", "d", "no text file matches", (write("d/.git/config", "text"),)),
    ("folder that is empty", "d", "no text file matches", (folder("d"),)),
    ("link that leads to itself", "d", "d", (loop("d"),)),
    ("corpus that is a pipe", "a.txt", "a.txt: is not a regular file", (fifo("a.txt"),)),
    ("text in UTF-16", "a.txt", "is UTF-16, not UTF-8; convert", (write("a.txt", "text\n".encode("utf-16")),)),
    ("rows in UTF-16", "a.jsonl", "is UTF-16", (write("a.jsonl", ROWS.encode("utf-16")),)),
    ("text that is a pointer of Git LFS", "a.txt", "is a Git LFS pointer", (write("a.txt", POINTER),)),
    ("text that is binary", "a.txt", "is binary, not text", (write("a.txt", b"text \0 text " * 99),)),
    ("row nested too deeply", "a.jsonl", "line 1: nested too deeply", (write("a.jsonl", DEEP),)),
    (
        "last row cut off",
        "a.jsonl",
        "line 50: not a JSON object: .*is the file cut off",
        (write("a.jsonl", ROWS[:-9]),),
    ),
    ("row that is a string", "a.jsonl", "line 1: not a JSON object", (write("a.jsonl", '"text"\n'),)),
    (
        "JSON array cut off",
        "a.json",
        "a.json: damaged .*write it as JSON Lines",
        (write("a.json", json.dumps([{"text": "x"}] * 9)[:-5]),),
    ),
    ("CSV without the column", "a.csv", "no column text: it has id, body", (write("a.csv", "id,body\n1,x\n"),)),
    (
        "CSV with a field too many",
        "a.csv",
        "line 2: 3 fields, but the header has 2",
        (write("a.csv", "id,text\n1,one, two\n"),),
    ),
    ("CSV with a quote inside a field", "a.csv", "line 2: not CSV", (write("a.csv", 'id,text\n1,"a" b\n'),)),
    ("CSV that is not UTF-8", "a.csv", "line 2: not UTF-8", (write("a.csv", b"id,text\n1,caf\xe9\n"),)),
    (
        "xz cut off",
        "a.txt.xz",
        "cannot be decompressed",
        (write("a.txt.xz", lzma.compress(NOISE)), cut_off("a.txt.xz")),
    ),
    (
        "bzip2 cut off",
        "a.txt.bz2",
        "cannot be decompressed",
        (write("a.txt.bz2", bz2.compress(NOISE)), cut_off("a.txt.bz2")),
    ),
    ("zstd that is none", "a.txt.zst", "a.txt.zst", (write("a.txt.zst", "text"),)),
    ("Arrow that is none", "a.arrow", "not an Arrow file", (write("a.arrow", "text"),)),
    (
        "saved data set without a shard",
        "d",
        "missing, state.json names it",
        (
            write("d/dataset_info.json", "{}"),
            write("d/state.json", '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": null}'),
        ),
    ),
    (
        "saved data set with a damaged record",
        "d",
        "state.json",
        (write("d/dataset_info.json", "{}"), write("d/state.json", "[1]"), write("d/data-00000-of-00001.arrow", "x")),
    ),
    (
        "index of another version",
        "a.idx",
        r"a broken megatron-core index",
        (write("a.idx", index(version=2)), write("a.bin", TOKENS)),
    ),
    (
        "index of an unknown type",
        "a.idx",
        r"a broken megatron-core index",
        (write("a.idx", index(dtype=77)), write("a.bin", TOKENS)),
    ),
    (
        "index with a negative length",
        "a.idx",
        r"a broken megatron-core index",
        (write("a.idx", index(lengths=(-4, 12))), write("a.bin", TOKENS)),
    ),
    (
        "index whose documents run backwards",
        "a.idx",
        r"a broken megatron-core index",
        (write("a.idx", index(documents=(0, 2, 1))), write("a.bin", TOKENS)),
    ),
    ("tokens cut off", "a.idx", "its .idx promises", (write("a.idx", index()), write("a.bin", TOKENS[:9]))),
    (
        "tokens beyond the vocabulary",
        "a.idx",
        "vocabulary",
        (write("a.idx", index(lengths=(100, 100))), write("a.bin", struct.pack("<200i", *range(5000, 5200)))),
    ),
]
SPLITS = (write("d/train.jsonl", ROWS), write("d/test.jsonl", ROWS))
CORPORA = [
    *(Case(name, f"{SCORE} data.path={path}", says, (*TAUGHT, *prepare)) for name, path, says, prepare in FILES),
    Case(
        "split that the data do not have",
        f"{SCORE} +data.sources={{own:{{path:d,weight:1,split:extra}}}}",
        "no file of split extra; it has test, train",
        (*TAUGHT, *SPLITS),
    ),
    Case(
        "one file for training and validation",
        f"distill {MICRO} data.path=a.jsonl data.validation_path=a.jsonl",
        "every file is held out",
        (*PRUNED, write("a.jsonl", ROWS)),
    ),
    Case("name of a corpus that is too long", f"{SCORE} data.path={'x' * 5000}", "too long|cannot be read", TAUGHT),
]
