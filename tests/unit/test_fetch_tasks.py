"""fetch brings the data of tasks before the chain, names the tasks that will not run, and copies compressed text."""

import gzip
from contextlib import ExitStack
from pathlib import Path

import pytest

from minitron_train.commands import configuration, fetch
from minitron_train.commands.workspace import Workspace
from minitron_train.evaluation import tasks
from minitron_train.runtime.launch import World
from tests.support.eval_data import save_data


def test_tasks_without_data_are_named_before_the_chain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(tasks, "hub_reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    save_data(tmp_path / "out" / "eval_data")
    words = ["+recipe=micro", f"output_dir={tmp_path}/out", "eval.tasks=[hellaswag]", "eval.training_tasks=[mbpp]"]
    config = configuration.compose([*words, "eval.allow_code_execution=unsafe"])
    with ExitStack() as stack:
        fetch.fetch(Workspace(config, [], World(), stack))
    said = capsys.readouterr()
    assert said.out == "fetch tasks: hellaswag (local)\n"
    assert (
        said.err.startswith("warning: eval.tasks: mbpp will not run: no data in ") and len(said.err.splitlines()) == 1
    )


def test_own_data_and_no_tasks_need_no_fetch() -> None:
    for words in (["eval.tasks=[]"], ["eval.data_dir=/data"]):
        assert not fetch.COMMAND.in_chain(configuration.compose(["+recipe=tiny", *words]))
    assert fetch.COMMAND.in_chain(configuration.compose(["+recipe=tiny"]))


def test_compressed_text_is_copied_before_a_job_with_gpus(tmp_path: Path) -> None:
    for name in ("a.jsonl.gz", "b.jsonl.gz"):
        (tmp_path / name).write_bytes(gzip.compress(b'{"text": "some words"}\n' * 99))
    words = ["+recipe=tiny", "eval.tasks=[]", f"data.path={tmp_path}/*.gz", f"data.cache_dir={tmp_path}/cache"]
    config = configuration.compose([*words, f"output_dir={tmp_path}/out"])
    assert fetch.COMMAND.in_chain(config)
    with ExitStack() as stack:
        fetch.fetch(Workspace(config, [], World(), stack))
    assert len(list((tmp_path / "cache").glob("*.blocks"))) == 2
