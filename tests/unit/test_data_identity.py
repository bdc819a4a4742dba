"""Files that change under a run, and tokenising processes that end: noticed, and one line that names them."""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from minitron_train import __main__
from minitron_train.config import DataConfig
from minitron_train.data import identity, tokenizers
from minitron_train.data.identity import Watch, changes, records_of
from minitron_train.data.ledger import check_data_files, write_data_files
from minitron_train.data.sources import identity as inputs
from minitron_train.data.stream import TokenStream
from minitron_train.data.units import EncodeJob, Split, UnitMaker
from minitron_train.data.workers import Pool
from minitron_train.runtime.errors import MachineError, UserError
from tests.unit.test_data_resume import source
from tests.unit.test_data_stream import texts, write_source

pytestmark = pytest.mark.usefixtures("small_units")


def rewrite(path: Path) -> None:
    """Other bytes of the same number in the middle, the file's time as it was."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(status.st_size // 2)
        byte = file.read(1)
        file.seek(status.st_size // 2)
        file.write(bytes([byte[0] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def swap(path: Path) -> None:
    """Another file of the same size under the same name."""
    shutil.copy2(path, path.with_suffix(".new"))
    rewrite(path.with_suffix(".new"))
    path.with_suffix(".new").replace(path)


def grow(path: Path) -> None:
    """Some more bytes."""
    with path.open("ab") as file:
        file.write(b'{"text": "one more"}\n')


def cut(path: Path) -> None:
    """Half of the file."""
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "bin", "hub"])
@pytest.mark.parametrize("change", [rewrite, swap, grow, cut, Path.unlink])
def test_a_change_under_a_run_names_the_file(change: Callable[[Path], None], kind: str, tmp_path, tokenizer):
    """Replaced, cut, grown, deleted, or rewritten in place with the same size and time: the next unit stops the run."""
    data = source(tmp_path, kind, tokenizer)
    stream = TokenStream(data, tokenizer, seq_length=64, seed=3)
    before = inputs(data)
    stream.next_batch(4)
    (path,) = list(tmp_path.rglob({"bin": "*.bin", "hub": "train-1*"}.get(kind, f"corpus.{kind}")))
    change(path)
    named = f"{path}: (changed after|was deleted after) this run had opened it.*start again to resume"
    with pytest.raises(UserError, match=named):
        stream.next_batch(600)
    if path.exists():
        assert inputs(data) != before


def test_equal_files_are_the_same(tmp_path, tokenizer):
    """Touched, replaced by an equal file, or copied elsewhere with another time, a corpus is the same."""
    data = write_source(tmp_path, "jsonl", texts(100), tokenizer)
    stream, path = TokenStream(data, tokenizer, seq_length=64, seed=3), tmp_path / "corpus.jsonl"
    stream.next_batch(4)
    os.utime(path, (1, 1))
    stream.next_batch(300)
    shutil.copy(path, tmp_path / "new")
    (tmp_path / "new").replace(path)
    stream.next_batch(300)
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(path, tmp_path / "elsewhere")
    moved = TokenStream(replace(data, path=str(tmp_path / "elsewhere/corpus.jsonl")), tokenizer, seq_length=64, seed=3)
    moved.load_state_dict(stream.state_dict())


def test_large_sources_are_sampled(tmp_path, monkeypatch):
    """Beyond the limit few bytes are read; a write between the samples is told by the file's time."""
    monkeypatch.setattr(identity, "WHOLE_BYTES", 1 << 20)
    paths = [tmp_path / name for name in ("a", "b")]
    for path in paths:
        path.write_bytes(bytes(4 << 20))
    old, watch = records_of(paths), Watch(paths)
    assert not any(record.is_whole for record in old)
    with paths[0].open("r+b") as file:
        file.seek(5000)
        file.write(b"x")
    changed, doubtful = changes(old, records_of(paths))
    assert not changed and len(doubtful) == 1 and doubtful[0].startswith(f"{paths[0]} was written ")
    with pytest.raises(UserError, match=f"{paths[0]}: changed after .*same size, written 20"):
        watch.check_all()
    paths[1].write_bytes(bytes([1]) * (4 << 20))
    assert changes(old, records_of(paths))[0] == [f"{paths[1]} was rewritten with the same size"]


def test_changes_name_each_file(tmp_path):
    for name in "abcd":
        (tmp_path / name).write_bytes(b"some text\n")
    old = records_of([tmp_path / name for name in "abc"])
    rewrite(tmp_path / "a")
    grow(tmp_path / "b")
    changed, doubtful = changes(old, records_of([tmp_path / name for name in "abd"]))
    ends = ["a was rewritten with the same size", "b had 10 bytes, has 31", "c is missing", "d is new"]
    assert changed == [f"{tmp_path}/{end}" for end in ends] and not doubtful


def pool_of(tokenizer) -> Pool:
    """One tokenising process that has done one job."""
    split = Split(held_out=False, fraction=0)
    pool = Pool(UnitMaker({}, tokenizers.encoder(tokenizer, None), split), 1)
    assert len(pool.submit(EncodeJob(0, ("some words",), (1,))).result().tokens)
    return pool


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_worker_is_one_line(number, tokenizer):
    """Before a job, during one that is long, and after: the line names the process, the signal and the remedy."""
    line = (
        rf"^data.num_workers: tokenising process \d+ was killed by {number.name}.*; start again to resume at the last"
    )
    for is_busy in (True, False):
        with contextlib.closing(pool_of(tokenizer)) as pool:
            worker, job = pool.workers[0], EncodeJob(0, ("some words " * 300_000,), (1,))
            pending = pool.submit(job) if is_busy else None
            os.kill(worker.process.pid, number)
            if not is_busy:
                worker.process.wait()
            with pytest.raises(MachineError, match=line):
                (pending or pool.submit(job)).result()


@pytest.mark.races
def test_a_damaged_answer_is_one_line(tokenizer):
    """Bytes that are no unit, as a library could write them, and an object that is none."""
    for raw in (b"hello\n", b"\x80\x05]\x94.", b"\x80\x05\x95\xff"):
        with contextlib.closing(pool_of(tokenizer)) as pool:
            worker = pool.workers[0]
            near, far = os.pipe()
            os.write(far, raw)
            os.close(far)
            worker.answers.close()
            worker.answers = os.fdopen(near, "rb")
            start_s = time.monotonic()
            with pytest.raises(
                MachineError, match=r"tokenising process \d+ sent a damaged answer \(\w+\); start again"
            ):
                pool.submit(EncodeJob(0, ("some words",), (1,))).result()
            assert worker.process.poll() is not None and time.monotonic() - start_s < 60


def test_a_worker_that_cannot_start_is_one_line(tokenizer, monkeypatch):
    def refuse(*_args: object, **_kwargs: object) -> None:
        raise OSError(11, "Resource temporarily unavailable")

    pool = Pool(UnitMaker({}, tokenizers.encoder(tokenizer, None), Split(held_out=False, fraction=0)), 1)
    monkeypatch.setattr("subprocess.Popen", refuse)
    with pytest.raises(MachineError, match=r"cannot be started \(Resource temporarily unavailable\); .*num_workers=0"):
        pool.submit(EncodeJob(0, ("some words",), (1,)))


def test_a_fault_of_the_machine_is_one_line_and_code_1(monkeypatch, capsys):
    """Not 2, which says that something must be changed before the next start."""

    line = "data.num_workers: tokenising process 7 was killed by SIGKILL; start again to resume"

    def fail(*_args: object) -> None:
        raise MachineError(line)

    monkeypatch.setattr("minitron_train.commands.cli.run", fail)
    assert __main__.answer() == 1
    assert capsys.readouterr().err == f"error: {line}\n"


def test_validation_files_are_in_the_ledger(tmp_path):
    """data_files.json holds the files of data.validation_path too, so that a change of them is named."""
    for name in ("a.jsonl", "held.jsonl"):
        (tmp_path / name).write_text('{"text": "abc"}\n')
    data = DataConfig(path=str(tmp_path / "a.jsonl"), validation_path=str(tmp_path / "held.jsonl"))
    write_data_files(tmp_path, data)
    check_data_files(tmp_path, data)
    (tmp_path / "held.jsonl").write_text('{"text": "abd"}\n')
    with pytest.raises(
        UserError, match=r"started with different data .\S*held\.jsonl was rewritten with the same size"
    ):
        check_data_files(tmp_path, data)
