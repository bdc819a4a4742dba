"""Which tasks run, on which rows, and what is said of those that cannot."""

import gzip
import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import config as datasets_config
from huggingface_hub import close_session, constants

from minitron_train.config import EvalConfig
from minitron_train.errors import UserError
from minitron_train.evaluation import tasks as module
from minitron_train.evaluation.code import mbpp_examples, pass_at_1, passes
from minitron_train.evaluation.local_data import check_columns, hub_reachable, local_files, read_splits
from minitron_train.evaluation.rouge import rouge_l
from minitron_train.evaluation.task_names import check_names, names_in, shipped
from minitron_train.evaluation.tasks import load_tasks, quiet, splits, without_missing
from tests.eval_data import save_data


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("eval_data"))


def load(evaluation: EvalConfig, data_dir: Path | None) -> Any:
    with quiet():
        return load_tasks(evaluation, data_dir)


def test_unknown_task_names_the_closest_ones() -> None:
    with pytest.raises(UserError, match=r"eval.tasks: no task 'helaswag' in lm-eval; did you mean hellaswag"):
        load(EvalConfig(tasks=["helaswag"]), None)


def test_tasks_without_data_are_reported_with_the_reason(data_dir: Path) -> None:
    chosen = load(EvalConfig(tasks=["winogrande", "mmlu", "humaneval", "mbpp", "arc_challenge"]), data_dir)
    assert list(chosen.leaves) == ["winogrande"]
    assert "mmlu_abstract_algebra and 55 more" in chosen.not_run["mmlu"]
    assert "no Hugging Face hub in reach" in chosen.not_run["arc_challenge"]
    assert "eval.allow_code_execution=true" in chosen.not_run["humaneval"]
    assert "eval.allow_code_execution=true" in chosen.not_run["mbpp"]


def test_hub_is_not_asked_when_the_data_are_here(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise AssertionError("asked for the hub")

    monkeypatch.setattr(module, "hub_reachable", refuse)
    assert load(EvalConfig(tasks=["hellaswag", "mmlu_anatomy"]), data_dir).not_run == {}


def test_the_hubs_cache_serves_without_the_hub(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}]
    offline: list[bool] = []

    def cached(*_: Any, **__: Any) -> dict[str, datasets.Dataset]:
        offline.append(datasets_config.HF_HUB_OFFLINE)
        return {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}

    monkeypatch.setattr(module, "hub_reachable", lambda: False)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", cached)
    chosen = load(EvalConfig(tasks=["arc_challenge"]), data_dir)
    assert chosen.not_run == {} and chosen.data["arc_challenge"]["source"] == "cache" and set(offline) == {True}


def test_the_hub_is_asked_as_the_environment_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through a proxy, and without a port in the mirror's address."""

    class Proxy(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Proxy) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_ENDPOINT", "http://mirror.invalid")
        for proxy, found in ((f"http://127.0.0.1:{server.server_port}", True), ("http://127.0.0.1:9", False)):
            monkeypatch.setenv("HTTP_PROXY", proxy)
            monkeypatch.setenv("http_proxy", proxy)
            close_session()
            assert hub_reachable() is found
        close_session()
        server.shutdown()


def test_splits_that_stand_in_for_others_are_recorded(data_dir: Path) -> None:
    data = load(EvalConfig(tasks=["gsm8k", "hellaswag"]), data_dir).data
    assert data["gsm8k"]["splits"] == {"rows": "test", "examples": "test"}
    assert data["gsm8k"]["lm_eval_splits"] == {"rows": "test", "examples": "train"}
    assert data["hellaswag"]["splits"]["rows"] == data["hellaswag"]["lm_eval_splits"]["rows"] == "validation"
    config = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
    changed = without_missing(config, {"validation": Path("validation.parquet")})
    assert splits([{**config, **changed}]) == {"rows": "validation", "examples": "validation"}


def test_rows_are_a_fixed_random_subset(data_dir: Path) -> None:
    rows = [load(EvalConfig(tasks=["hellaswag"], limit=5, seed=seed), data_dir).rows["hellaswag"] for seed in (1, 1, 2)]
    assert rows[0] == rows[1] != rows[2] and len(set(rows[0])) == 5 and rows[0] != [0, 1, 2, 3, 4]
    assert load(EvalConfig(tasks=["hellaswag"], limit=100), data_dir).rows == {}


def test_limits_and_shots_by_task_and_for_all(data_dir: Path) -> None:
    names = ["hellaswag", "mmlu_anatomy"]
    chosen = load(EvalConfig(tasks=names, limits={"mmlu": 3}, shots={"mmlu": 5, "hellaswag": 2}), data_dir)
    assert {name: len(rows) for name, rows in chosen.rows.items()} == {"mmlu_anatomy": 3}
    assert [chosen.tasks["tasks"][name].get_config("num_fewshot") for name in names] == [2, 5]
    chosen = load(EvalConfig(tasks=names, limit=2, num_fewshot=1, limits={"mmlu": 3}, shots={"mmlu": 5}), data_dir)
    assert {name: len(rows) for name, rows in chosen.rows.items()} == {"hellaswag": 2, "mmlu_anatomy": 2}
    assert [chosen.tasks["tasks"][name].get_config("num_fewshot") for name in names] == [1, 1]


def test_examples_from_the_evaluated_split_leave_the_row_out(data_dir: Path) -> None:
    task = load(EvalConfig(tasks=["gsm8k"], num_fewshot=6), data_dir).tasks["tasks"]["gsm8k"]
    task.set_fewshot_seed(seed=0)
    for doc in task.eval_docs:  # seven rows, six examples: all but the asked one
        assert task.fewshot_context(doc, num_fewshot=6).count(doc["question"]) == 1


def test_missing_column_is_named(tmp_path: Path) -> None:
    path = tmp_path / "hellaswag" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps({"ctx_a": "", "ctx_b": "", "endings": [], "label": "0"}) + "\n")
    with pytest.raises(UserError, match=r"column 'activity_label' is missing, which lm-eval's task hellaswag reads"):
        check_columns("hellaswag", local_files("hellaswag", tmp_path))


def test_broken_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "hellaswag").mkdir()
    path = tmp_path / "hellaswag" / "validation.parquet"
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        check_columns("hellaswag", local_files("hellaswag", tmp_path))
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        read_splits(files={"test": str(lines)})
    packed = tmp_path / "rows.jsonl.gz"
    for damaged in (b"no gzip", gzip.compress(b'{"a": 1}\n' * 99)[:-9], gzip.compress(b"\xff\n")):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows\.jsonl\.gz: damaged"):
            read_splits(files={"test": str(packed)})
    lines.write_text("")
    with pytest.raises(UserError, match="holds no rows"):
        read_splits(files={"test": str(lines)})


def test_rouge_l_of_known_texts() -> None:
    assert rouge_l({"summary": "the cat sat"}, ["the cat sat"])["rougeL"] == 1.0
    assert rouge_l({"summary": "the cat sat down"}, ["the dog sat"])["rougeL"] == pytest.approx(
        2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4)
    )


def test_programs_run_within_limits(tmp_path: Path) -> None:
    assert passes("assert 1 + 1 == 2")
    assert not passes("assert 1 + 1 == 3")
    assert not passes("while True: pass", time_s=1)
    assert not passes("x = bytearray(4 << 30)")
    assert not passes("open('big', 'wb').write(b'0' * (8 << 20))")
    assert passes("import os; assert 'PATH' not in os.environ and os.listdir('.') == ['program.py']")
    assert pass_at_1(["assert one() == 1", "assert one() == 2"], [["def one(): return 1"]] * 2) == 0.5


def test_mbpp_examples_come_from_lm_eval() -> None:
    examples = mbpp_examples()
    assert [row["task_id"] for row in examples] == [2, 3, 4] and all(row["is_fewshot"] for row in examples)


def test_unknown_names_are_refused_without_an_index() -> None:
    with pytest.raises(UserError, match="no task 'helaswag' in lm-eval; did you mean hellaswag"):
        check_names(["mmlu", "helaswag"])
    check_names(["hellaswag", "mmlu", "arc_challenge", "xlsum_english", "lambada_openai"])
    check_names(["RC_tasks"])  # a tag that the file of a group has in a comment
    assert {"hellaswag", "mmlu", "ai2_arc"} <= set(names_in([shipped()]))
