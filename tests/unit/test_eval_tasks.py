"""Which tasks run, on which rows, and what is said of those that cannot."""

import gzip
import json
import pickle
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from datasets import config as datasets_config
from huggingface_hub import close_session, constants

from minitron_train.config import EvalConfig
from minitron_train.evaluation import tasks as module
from minitron_train.evaluation.code import mbpp_examples
from minitron_train.evaluation.local_data import check_columns, hub_reachable, local_files, read_splits
from minitron_train.evaluation.rouge import rouge_l
from minitron_train.evaluation.task_names import check_keys, check_names, names_in, shipped
from minitron_train.evaluation.tasks import load_tasks, quiet, splits, without_missing
from minitron_train.runtime.errors import UserError
from tests.support.eval_data import save_data, write_jsonl


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("eval_data"))


def load(evaluation: EvalConfig, data_dir: Path | None, **settings: Any) -> Any:
    with quiet():
        return load_tasks(evaluation, data_dir, **settings)


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


def test_tasks_that_the_model_cannot_answer_are_reported_with_the_reason(data_dir: Path) -> None:
    evaluation = EvalConfig(tasks=["humaneval", "truthfulqa", "hellaswag"], allow_code_execution=True)
    chosen = load(evaluation, data_dir, max_length=200)
    assert list(chosen.leaves) == ["hellaswag"]
    assert chosen.not_run == {
        "humaneval": "generates 1024 tokens, the model's context has 200",
        "truthfulqa": "truthfulqa_gen generates 256 tokens, the model's context has 200",
    }
    evaluation.tasks = ["humaneval"]
    assert [list(load(evaluation, data_dir, max_length=size).leaves) for size in (1024, 1025)] == [[], ["humaneval"]]


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "temperature": 0.2}, "requires sampling"),
        ({"temperature": 0.7}, "requires sampling"),
        ({"do_sample": False, "temperature": 1}, None),  # greedy, says lm-eval
        ({"max_new_tokens": 512}, "generates 512 tokens, the model's context has 512"),
        ({"max_tokens": 511}, None),
        (None, None),
    ],
)
def test_generation_settings_are_read_as_lm_eval_reads_them(settings: Any, reason: str | None) -> None:
    with quiet():
        found = module.why_not(SimpleNamespace(cfg={"generation_kwargs": settings}), EvalConfig(), 512)
        assert found == reason or (reason and found and found.startswith(reason))
        scored = {"generation_kwargs": settings, "output_type": "multiple_choice"}  # as some task files have it
        assert module.why_not(SimpleNamespace(cfg=scored), EvalConfig(), 512) is None


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


def test_shots_and_limits_reach_into_groups_and_tags(tmp_path: Path) -> None:
    row = {"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}
    for name in ("arc_easy", "arc_challenge"):
        for split in ("train", "test"):
            write_jsonl(tmp_path / name / f"{split}.jsonl", [row] * 4)
    given = {"arc_challenge": 2, "ai2_arc": 3, "mmlu": 1}
    chosen = load(EvalConfig(tasks=["ai2_arc"], shots=given, limits=given), tmp_path)
    shots = {name: task.get_config("num_fewshot") for name, task in chosen.tasks["tasks"].items()}
    assert shots == {"arc_challenge": 2, "arc_easy": 3}
    assert {name: len(rows) for name, rows in chosen.rows.items()} == shots


def test_the_narrowest_setting_counts() -> None:
    manager = module.index_of(EvalConfig(tasks=["mmlu"]))
    given = {"mmlu": 5, "mmlu_stem": 3, "mmlu_anatomy": 0, "hellaswag": 9}
    names = ("mmlu_anatomy", "mmlu_astronomy", "mmlu_virology", "winogrande")
    assert [module.narrowest(given, name, manager) for name in names] == [0, 3, 5, None]


@pytest.mark.parametrize("setting", ["shots", "limits"])
def test_shots_and_limits_of_unknown_tasks_are_refused(setting: str) -> None:
    evaluation = EvalConfig(tasks=["ai2_arc"])
    setattr(evaluation, setting, {"arc_chalenge": 25})
    with pytest.raises(UserError, match=rf"eval.{setting}: no task 'arc_chalenge' in lm-eval; did you mean arc_chall"):
        load(evaluation, None)
    setattr(evaluation, setting, {"hellaswag": 25})  # as a preset for more tasks has
    check_keys(evaluation)


@pytest.mark.parametrize("label", ["a/b", "..", ".hidden", "a b", ""])
def test_labels_that_are_no_file_names_are_refused(label: str) -> None:
    with pytest.raises(UserError, match=r"eval.label=.*: must be letters, digits"):
        EvalConfig(label=label).validate()
    EvalConfig(label="Minitron-4B_v1.5").validate()


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
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        read_splits(files={"test": str(lines)})
    packed = tmp_path / "rows.jsonl.gz"
    for damaged in (b"no gzip", gzip.compress(b'{"a": 1}\n' * 99)[:-9], gzip.compress(b"\xff\n")):
        packed.write_bytes(damaged)
        with pytest.raises(UserError, match=r"rows\.jsonl\.gz: damaged"):
            read_splits(files={"test": str(packed)})
    lines.write_text("")
    with pytest.raises(UserError, match="has no rows"):
        read_splits(files={"test": str(lines)})


def test_rouge_l_of_known_texts() -> None:
    assert rouge_l({"summary": "the cat sat"}, ["the cat sat"])["rougeL"] == 1.0
    assert rouge_l({"summary": "the cat sat down"}, ["the dog sat"])["rougeL"] == pytest.approx(
        2 * (2 / 3 * 2 / 4) / (2 / 3 + 2 / 4)
    )


class TwoRanks:
    """Groups of the first rank, and once it is done those of another, which is given what the first has sent."""

    def __init__(self) -> None:
        self.is_first, self.sent = True, list[bytes]()

    def on_rank0(self, work: Callable[[], Any]) -> Any:
        if self.is_first:
            self.sent.append(pickle.dumps(work()))
            return pickle.loads(self.sent[-1])
        return pickle.loads(self.sent.pop(0))


def test_the_first_rank_decides_loads_and_runs_programs_for_all(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, offline, runs = [], [], tmp_path / "runs"
    rows = [{"id": "1", "question": "q", "choices": {"text": ["a"], "label": ["A"]}, "answerKey": "A"}]

    def from_hub(path: str, **_: Any) -> dict[str, datasets.Dataset]:
        if "mbpp" in path:
            raise OSError("no such set") if groups.is_first else AssertionError("the first rank has none")
        offline.append(datasets_config.HF_HUB_OFFLINE)
        return {split: datasets.Dataset.from_list(rows) for split in ("train", "validation", "test")}

    monkeypatch.setattr(module, "hub_reachable", lambda: asked.append(groups.is_first) or groups.is_first)
    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", from_hub)
    evaluation = EvalConfig(tasks=["arc_challenge", "humaneval", "mbpp"], allow_code_execution="unsafe")
    groups: Any = TwoRanks()
    found = []
    for value in (1, 2):
        with quiet():
            chosen = load_tasks(evaluation, data_dir, groups)
        program = f"def one():\n    open({str(runs)!r}, 'a').write('x')\n    return {value}\n"
        task = chosen.tasks["tasks"]["humaneval"]
        metrics = task.process_results(next(iter(task.eval_docs)), [[program]])
        found.append((sorted(chosen.tasks["tasks"]), chosen.leaves, chosen.data, chosen.not_run, metrics))
        groups.is_first = False
    assert found[0] == found[1] and found[0][0] == ["arc_challenge", "humaneval"]
    assert found[0][3] == {"mbpp": "the hub returned no data: no such set"}
    assert asked == [True] and (offline[0], offline[-1]) == (False, True)
    assert metrics == {"pass_at_1": 1.0} and runs.read_text() == "x"


def test_data_that_only_the_first_rank_has_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    offline: list[bool] = []

    def refuse(*_: Any) -> Any:
        offline.append(datasets_config.HF_HUB_OFFLINE)
        raise OSError("no such set\nand more")

    monkeypatch.setattr(datasets_config, "HF_HUB_OFFLINE", False)
    manager: Any = SimpleNamespace(load=refuse)
    with pytest.raises(UserError, match=r"data of arc_easy, this rank does not \(no such set\); put eval.data_dir and"):
        module.load_next(module.TaskSet(), manager, ["arc_easy"], online=True)
    assert offline == [True, False]  # the cache before the hub


def test_mbpp_examples_come_from_lm_eval() -> None:
    examples = mbpp_examples()
    assert [row["task_id"] for row in examples] == [2, 3, 4] and all(row["is_fewshot"] for row in examples)


def test_unknown_names_are_refused_without_an_index() -> None:
    with pytest.raises(UserError, match="no task 'helaswag' in lm-eval; did you mean hellaswag"):
        check_names(["mmlu", "helaswag"])
    check_names(["hellaswag", "mmlu", "arc_challenge", "xlsum_english", "lambada_openai"])
    check_names(["RC_tasks"])  # a tag that the file of a group has in a comment
    assert {"hellaswag", "mmlu", "ai2_arc"} <= set(names_in([shipped()]))
