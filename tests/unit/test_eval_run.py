"""One evaluation from folder to files: resumed after a kill, broken weights, awkward tokenizers, and inside training."""

import json
import math
import os
import random
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.api.instance import Instance
from safetensors.torch import load_file, save_file

from minitron_train.commands.evaluate import evaluate_one
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config, EvalConfig, ParallelConfig, Precision
from minitron_train.data import tokenizers
from minitron_train.data.stream import Batch
from minitron_train.distillation.loss import LossParts, LossSpec
from minitron_train.evaluation import lm as lm_module
from minitron_train.evaluation.hooks import TaskHook, main_metrics
from minitron_train.evaluation.journal import Journal
from minitron_train.evaluation.local_data import NO_HUB
from minitron_train.evaluation.perplexity import perplexity
from minitron_train.evaluation.results import collect
from minitron_train.evaluation.run import evaluate_model, line, publish, run_tasks
from minitron_train.hf import HFFolder
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.load import load_weights
from minitron_train.parallel.groups import Groups, start
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from minitron_train.stages import Stage
from minitron_train.train.validation import Validation
from tests.support.eval_data import save_data, save_model
from tests.support.models import hf_logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    root = tmp_path_factory.mktemp("evaluation")
    return SimpleNamespace(model=save_model("llama", root / "model"), data=save_data(root / "data"))


def config_of(**evaluation: Any) -> Config:
    config = Config()
    config.eval = EvalConfig(**evaluation)
    return config


def run(config: Config, model: Path, folder: Path, data_dir: Path | None, tokens: torch.Tensor | None = None) -> Any:
    with start(ParallelConfig(), World(), seed=1) as groups:
        return evaluate_model(
            config, groups, model=model, label="m", folder=folder, data_dir=data_dir, validation_tokens=tokens
        )


def test_files_hold_what_was_measured(folders: SimpleNamespace, tmp_path: Path) -> None:
    tokens = torch.randint(0, 288, (5, 33), generator=torch.Generator().manual_seed(0))
    report = run(
        config_of(tasks=["hellaswag", "arc_challenge"], limit=6), folders.model, tmp_path, folders.data, tokens
    )
    assert json.loads((tmp_path / "m.json").read_text()) == report
    items = [json.loads(line) for line in (tmp_path / "m.items.jsonl").read_text().splitlines()]
    record = report["results"]["hellaswag"]
    assert record["rows"] == len(items) == 6 and record["num_fewshot"] == 0
    assert record["acc"] == pytest.approx(sum(item["metrics"]["acc"] for item in items) / 6)
    assert list(report["not_run"]) == ["arc_challenge"] and "arc_challenge" not in report["results"]
    assert report["bytes"] == (folders.model / "model.safetensors").stat().st_size
    weights = load_file(folders.model / "model.safetensors")
    assert report["parameters"] == sum(tensor.numel() for tensor in weights.values())
    logits = hf_logits(folders.model, tokens[:, :-1]).double().log_softmax(-1)
    nll = -logits.gather(2, tokens[:, 1:, None]).mean()
    assert report["perplexity"] == pytest.approx(nll.exp().item(), rel=1e-5)
    assert not (tmp_path / "m.partial").exists()


def test_interrupted_evaluation_goes_on(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tasks=["hellaswag", "gsm8k"], batch_tokens=256, limit=4)
    whole = run(config, folders.model, tmp_path / "whole", folders.data)
    add, calls = Journal.add, []

    def killed(self: Journal, answers: dict[str, Any]) -> None:
        add(self, answers)
        calls.append(answers)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", killed)
    with pytest.raises(KeyboardInterrupt):
        run(config, folders.model, tmp_path / "cut", folders.data)
    file = tmp_path / "cut" / "m.partial" / "rank0.jsonl"
    file.write_text(file.read_text() + '{"fingerprint": "half a li')
    known = {key for answers in calls for key in answers}
    calls.clear()
    monkeypatch.setattr(Journal, "add", lambda self, answers: (add(self, answers), calls.append(answers)))
    resumed = run(config, folders.model, tmp_path / "cut", folders.data)
    assert resumed.pop("answers_from_interrupted_run") == len(known) > 0 == whole.pop("answers_from_interrupted_run")
    assert resumed == whole
    assert not known & {key for answers in calls for key in answers}


def test_an_old_record_does_not_vouch_for_new_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two renames of a second evaluation: neither file is half, and the stage counts as unfinished."""
    publish(tmp_path, "m", {"perplexity": 1.0}, [{"row": 1}])
    record = tmp_path / "m.provenance.json"
    record.touch()
    with pytest.raises(ValueError, match="JSON"):  # refused before anything is replaced
        publish(tmp_path, "m", {"perplexity": float("nan")}, [])
    assert record.exists() and json.loads((tmp_path / "m.json").read_text()) == {"perplexity": 1.0}
    replace, renamed = os.replace, []

    def killed(source: Path, target: Path) -> None:
        if renamed:
            raise KeyboardInterrupt
        renamed.append(replace(source, target))

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, "m", {"perplexity": 2.0}, [{"row": 2}])
    assert not record.exists() and sorted(path.name for path in tmp_path.iterdir()) == ["m.items.jsonl", "m.json"]


def test_another_models_answers_are_not_taken(tmp_path: Path) -> None:
    with start(ParallelConfig(), World(), seed=1) as groups:
        Journal(tmp_path / "j", "one", groups).add({"k": "1"})
        assert Journal(tmp_path / "j", "one", groups).answers == {"k": "1"}
        assert Journal(tmp_path / "j", "two", groups).answers == {}


def test_broken_weights_name_the_row(folders: SimpleNamespace, tmp_path: Path) -> None:
    broken = save_model("llama", tmp_path / "model")
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"hellaswag: logits are not finite at .*; the weights are damaged"):
        run(config_of(tasks=["hellaswag"], limit=2), broken, tmp_path / "eval", folders.data)
    with pytest.raises(UserError, match=r"gsm8k: logits are not finite at .*; the weights are damaged"):
        run(config_of(tasks=["gsm8k"], limit=2), broken, tmp_path / "eval", folders.data)
    assert not (tmp_path / "eval" / "m.json").exists()


def live(folder: Path, groups: Groups, max_length: int, evaluation: EvalConfig, data_dir: Path) -> Any:
    checkpoint = HFFolder(folder)
    model = build(checkpoint.shape)
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    return run_tasks(model, folder, max_length, evaluation, groups, data_dir)


def test_rows_longer_than_the_context_lose_their_beginning_and_are_counted(folders: SimpleNamespace) -> None:
    evaluation = EvalConfig(tasks=["mmlu_anatomy"], shots={"mmlu": 5})
    with start(ParallelConfig(), World(), seed=1) as groups:
        report, items = live(folders.model, groups, 40, evaluation, folders.data)
    assert report["truncated_requests"] == {"mmlu_anatomy": 8 * 4}
    assert len(items) == 8


def test_tokenizer_without_bos_and_eos(folders: SimpleNamespace, tmp_path: Path) -> None:
    folder = save_model("llama", tmp_path / "model")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("bos_token", "eos_token"):
        settings.pop(key)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    with start(ParallelConfig(), World(), seed=1) as groups:
        report, _ = live(folder, groups, 512, EvalConfig(tasks=["hellaswag", "gsm8k"], limit=2), folders.data)
        assert set(report["results"]) == {"hellaswag", "gsm8k"}
        with pytest.raises(UserError, match="neither BOS nor EOS"):
            live(folder, groups, 512, EvalConfig(tasks=["wikitext"]), folders.data)


def test_generated_code_is_run_only_when_allowed(folders: SimpleNamespace) -> None:
    with start(ParallelConfig(), World(), seed=1) as groups:
        refused, _ = live(folders.model, groups, 1024, EvalConfig(tasks=["humaneval"]), folders.data)
        assert refused["results"] == {} and list(refused["not_run"]) == ["humaneval"]
        allowed = EvalConfig(tasks=["humaneval"], allow_code_execution=True, limit=1)
        report, items = live(folders.model, groups, 1100, allowed, folders.data)
        assert report["results"]["humaneval"]["pass_at_1,create_test"] == 0.0 and len(items) == 1


def test_a_task_that_does_not_fit_the_context_leaves_the_others_their_results(
    folders: SimpleNamespace, tmp_path: Path
) -> None:
    tasks = config_of(tasks=["hellaswag", "humaneval"], allow_code_execution=True, limit=2)
    report = run(tasks, folders.model, tmp_path, folders.data)
    assert list(report["results"]) == ["hellaswag"]
    assert report["not_run"] == {"humaneval": "generates 1024 tokens, the model's context has 1024"}
    assert json.loads((tmp_path / "m.json").read_text()) == report


@pytest.mark.parametrize(
    ("settings", "limit"),
    [
        ({}, 256),
        ({"max_gen_toks": 5}, 5),
        ({"max_new_tokens": 6, "max_tokens": 7}, 6),
        ({"max_tokens": 7, "do_sample": False, "temperature": 1}, 7),
    ],
)
def test_as_many_tokens_are_generated_as_lm_eval_would(
    folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], limit: int
) -> None:
    asked: list[int] = []

    def greedy(_: Any, prompts: list[list[int]], max_new_tokens: int, *__: Any) -> list[list[int]]:
        asked.append(max_new_tokens)
        return [[1] for _ in prompts]

    monkeypatch.setattr(lm_module, "greedy", greedy)
    model: Any = None
    request = Instance("generate_until", doc={}, arguments=("the cat", {"until": "\n", **settings}), idx=0)
    with start(ParallelConfig(), World(), seed=1) as groups:
        lm = lm_module.MegatronLM(model, tokenizers.load(folders.model), 512, groups, 1024)
        assert lm.generate_until([request]) == [""]
    assert asked == [limit]


def test_what_one_rank_cannot_answer_ends_all(folders: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks: the one with the mistake still comes to the gathering, and the other raises what it brings."""
    refusal, gathered = UserError("hellaswag: logits are not finite"), []

    def gather(everyone: list[Any], own: Any, group: Any) -> None:
        gathered.append(own)
        everyone[:] = [own, ({}, refusal)]

    def refuse(left: list[int], on_answers: Any) -> None:
        raise refusal

    monkeypatch.setattr(lm_module.dist, "all_gather_object", gather)
    with start(ParallelConfig(), World(), seed=1) as groups:
        two = replace(groups, dp_size=2)
        lm = lm_module.MegatronLM(None, tokenizers.load(folders.model), 512, two, 1024)  # type: ignore[arg-type]
        for compute in (refuse, lambda left, on_answers: on_answers({0: (1.0, True)})):
            with pytest.raises(UserError, match="hellaswag: logits are not finite"):
                lm.answer(["key"], compute, tuple)
    assert gathered == [({}, refusal), ({0: (1.0, True)}, None)]


@dataclass
class Training:
    """The part of a trainer that a hook sees."""

    student: LanguageModel
    objective: SimpleNamespace
    checkpoints: SimpleNamespace
    is_stopped: Callable[[], bool] = lambda: False


def test_training_is_the_same_with_and_without_the_hook(folders: SimpleNamespace, tmp_path: Path) -> None:
    checkpoints = SimpleNamespace(folder=tmp_path / "checkpoints")
    evaluation = EvalConfig(training_tasks=["hellaswag", "gsm8k"], training_limit=3, num_fewshot=1)

    def train(with_hook: bool) -> tuple[list[float], list[dict[str, float]]]:
        with start(ParallelConfig(), World(), seed=1) as groups:
            random.seed(1)
            np.random.seed(1)
            checkpoint = HFFolder(folders.model)
            student, teacher = build(checkpoint.shape), build(checkpoint.shape)
            for model in (student, teacher):
                load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
            student.train()
            hook = TaskHook(evaluation, folders.model, 512, groups, folders.data)
            optimizer = torch.optim.SGD(student.parameters(), lr=1e-4)
            losses, found = [], []
            for _ in range(3):
                tokens = torch.randint(0, 288, (2, 16)) + random.randrange(1) + np.random.randint(1)
                loss = student.logits(student(tokens)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
                if with_hook:
                    found.append(hook.evaluate(Training(student, SimpleNamespace(teacher=teacher), checkpoints)))
                    assert student.training and all(not m._forward_pre_hooks for m in student.modules())
            losses += [random.random(), float(np.random.random()), torch.rand(()).item()]
            return losses, found

    without, _ = train(False)
    losses, found = train(True)
    assert losses == without
    assert not list(tmp_path.iterdir()), "a complete evaluation leaves no journal"
    assert {"eval.hellaswag.acc_norm", "eval.hellaswag.acc_norm.teacher"} <= set(found[0])
    assert all(row["eval.hellaswag.acc_norm.teacher"] == found[0]["eval.hellaswag.acc_norm.teacher"] for row in found)


def test_a_task_in_training_is_known_by_its_own_metric() -> None:
    stderr = {"exact_match_stderr,custom-extract": 0.01, "rows": 9, "num_fewshot": 5, "version": 3.0}
    results = {
        "mmlu_pro": {**stderr, "exact_match,custom-extract": 0.25},
        "hellaswag": {"f1": 0.1, "acc": 0.3, "acc_norm": 0.4},
        "broken": {"rows": 9, "num_fewshot": 0, "version": 1.0, "not_finite": {"acc": "nan"}},
    }
    assert main_metrics(results) == {"mmlu_pro.exact_match,custom-extract": 0.25, "hellaswag.acc_norm": 0.4}


@pytest.mark.parametrize(
    ("name", "kept", "said"), [("wikitext.word_perplexity", False, "(× 2.00)"), ("piqa.acc", True, "(200.0 %)")]
)
def test_only_shares_are_kept(
    name: str, kept: bool, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(TaskHook, "measure", lambda _, model, *rest: {name: model})
    hook = TaskHook(EvalConfig(), Path(), 8, SimpleNamespace(is_first=False), None)  # pyright: ignore[reportArgumentType]
    found = hook.evaluate(SimpleNamespace(student=0.5, objective=SimpleNamespace(teacher=0.25)))  # pyright: ignore[reportArgumentType]
    assert found[f"eval.{name}.teacher"] == 0.25
    assert (f"eval.{name}.kept" in found) is kept
    assert said in capsys.readouterr().out


class LastOfMany(Groups):
    """The last of eight data-parallel ranks; the others have found 1 of everything, and no signal."""

    def sum_over_data(self, value: torch.Tensor) -> torch.Tensor:
        value[:3] += 1
        return value


def test_more_ranks_than_held_out_sequences(folders: SimpleNamespace) -> None:
    tokens = torch.zeros(7, 33, dtype=torch.int64)
    with start(ParallelConfig(), World(), seed=1) as groups:
        values: dict[str, Any] = {field.name: getattr(groups, field.name) for field in fields(Groups)}
        last = LastOfMany(**{**values, "dp_rank": 7, "dp_size": 8})
        checkpoint = HFFolder(folders.model)
        model = build(checkpoint.shape)
        assert perplexity(model, tokens, last, 2) == pytest.approx(math.exp(-1))

        def nothing(batch: Batch, spec: LossSpec) -> LossParts:
            assert not batch.mask_BS.any(), "another rank's sequence, to run as many batches as the others"
            return LossParts(*torch.zeros(3), num_valid=0)

        objective: Any = SimpleNamespace(student=model, has_teacher=False, logit_loss=nothing)
        assert Validation(tokens, objective, 2, last)(lambda: False)["eval.validation.loss"] == 1.0


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_perplexity_that_is_no_number_is_null(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    monkeypatch.setattr("minitron_train.evaluation.run.perplexity", lambda *_: value)
    run(config_of(tasks=[]), folders.model, tmp_path, folders.data, torch.zeros(1, 5, dtype=torch.int64))
    report = json.loads((tmp_path / "m.json").read_text())
    assert report["perplexity"] is None
    assert report["perplexity_reason"].startswith(f"{value}: ")


def test_a_tag_stands_for_its_tasks() -> None:
    raw: dict[str, Any] = {"results": {}, "group_subtasks": {}, "n-samples": {}, "n-shot": {}, "versions": {}}
    for task in ("arc_easy", "arc_challenge"):
        raw["results"][task], raw["n-samples"][task], raw["n-shot"][task] = {"acc,none": 0.5}, {"effective": 3}, 0
    found = collect(raw, {"ai2_arc": ["arc_challenge", "arc_easy"]})
    assert list(found) == ["arc_challenge", "arc_easy"] and found["arc_easy"]["acc"] == 0.5


def test_precision_of_the_forward_passes(
    folders: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def measured(model: LanguageModel, *_: Any) -> float:
        sizes.append(next(model.parameters()).element_size())
        return 1.0

    monkeypatch.setattr("minitron_train.evaluation.run.perplexity", measured)
    tokens = torch.zeros(1, 5, dtype=torch.int64)
    found = [
        run(config_of(tasks=[], precision=precision), folders.model, tmp_path, None, tokens)["precision"]
        for precision in (Precision.bf16, Precision.auto)
    ]
    assert (found, sizes) == (["bf16", "fp32"], [2, 4])


def stage_of(config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Stage, bool]:
    """The stage that evaluates a model as configured, and whether it is done whatever was done before."""
    asked: list[tuple[Stage, bool]] = []
    monkeypatch.setattr(Workspace, "run", lambda self, stage, work, *, force: asked.append((stage, force)))
    config.output_dir = str(folder)
    ws = Workspace(config, [], World(), ExitStack())
    ws.mark_pending(folder / "model")  # as a dry run does: it need not be there
    evaluate_one(ws, "teacher", folder / "model")
    return asked[0]


def test_another_validation_set_is_another_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(f"Some words, {name}.")
    config = Config()
    config.data.validation_path = str(tmp_path / "one.txt")
    first, _ = stage_of(config, tmp_path, monkeypatch)
    for section, name, value in (
        ("data", "validation_path", None),
        ("data", "validation_path", str(tmp_path / "two.txt")),
        ("data", "validation_tokens", 64),
        ("train", "seq_length", 64),
        ("eval", "precision", Precision.bf16),
    ):
        config = Config()
        config.data.validation_path = str(tmp_path / "one.txt")
        setattr(getattr(config, section), name, value)
        other, _ = stage_of(config, tmp_path, monkeypatch)
        assert (other.inputs, other.settings) != (first.inputs, first.settings), name


def test_tasks_without_data_are_tried_again_when_the_hub_is_in_reach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eval").mkdir()
    record = tmp_path / "eval" / "teacher.provenance.json"
    for reachable, reason, again in (
        (True, f"no data, and {NO_HUB}", True),
        (False, f"no data, and {NO_HUB}", False),
        (True, "runs generated programs", False),
    ):
        monkeypatch.setattr("minitron_train.evaluation.local_data.hub_reachable", lambda found=reachable: found)
        noted = {"stage": "eval teacher", "command": "eval", "inputs": {}, "settings": {}, "config": {}}
        record.write_text(json.dumps(noted | {"wall_seconds": 1.0, "facts": {"not_run": {"gsm8k": reason}}}))
        assert stage_of(Config(), tmp_path, monkeypatch)[1] is again


def test_metrics_that_are_no_numbers_stand_apart() -> None:
    raw = {
        "results": {"wikitext": {"word_perplexity,none": float("inf"), "byte_perplexity,none": 3.0}},
        "group_subtasks": {},
        "n-samples": {"wikitext": {"effective": 2}},
        "n-shot": {"wikitext": 0},
        "versions": {},
    }
    found = collect(raw, {"wikitext": ["wikitext"]})["wikitext"]
    assert found["not_finite"] == {"word_perplexity": "inf"} and found["byte_perplexity"] == 3.0
    assert "word_perplexity" not in found
    assert json.loads(line({"answers": [float("-inf"), (1.5, True)]})) == {"answers": [None, [1.5, True]]}
