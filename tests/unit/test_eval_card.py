"""The model card against the files that it is made from, and the rules of serving."""

import contextlib
import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_train.evaluation.serving import serving_problems
from minitron_train.reporting.card import objective, write_card
from tests.support.eval_data import save_model

RESULTS = {
    "teacher": {"hellaswag": {"acc_norm": 0.4321, "acc_norm_stderr": 0.02, "rows": 612, "num_fewshot": 10}},
    "student": {"hellaswag": {"acc_norm": 0.3456, "acc_norm_stderr": 0.03, "rows": 612, "num_fewshot": 10}},
}
CONFIG: dict[str, Any] = {
    "teacher": {"repo_id": "nvidia/Big", "path": None},
    "prune": {
        "preset": "default",
        "batch_aggregation": "l2",
        "sequence_aggregation": "mean",
        "neuron_activation": "post",
        "heads_scope": "layer",
        "ffn_scope": "network",
    },
    "calibration": {"num_samples": 1023, "seq_length": 511},
    "distill": {"loss": "forward_kl", "temperature": 1.5},
    "train": {
        "global_batch_size": 48,
        "seq_length": 777,
        "lr": 0.00037,
        "min_lr": 0.00001,
        "schedule": "cosine",
        "warmup_steps": 9,
        "weight_decay": 0.1,
        "precision": "bf16",
    },
    "data": {"path": None, "sources": {"prose": {"weight": 3.0}, "code": {"weight": 1.0}}},
}
STAGES = {
    "teacher": ("fetch teacher", {"license": "Apache-2.0"}),
    "scores": ("score", {"tokens": 522753}),
    "pruned": ("prune", {}),
    "train": ("distill", {"tokens": 123456789, "steps": 3310}),
    "student": ("export", {}),
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An output folder with two models and the records of every stage."""
    save_model("nemotron", tmp_path / "student")
    save_model("nemotron", tmp_path / "teacher", intermediate_size=160)
    for folder, (stage, facts) in STAGES.items():
        record = {"stage": stage, "command": "python -m minitron_train run", "config": {"name": "4b", **CONFIG}}
        record |= {"facts": facts, "inputs": {"data prose": "abcd" * 16}, "git_commit": "f" * 40, "wall_seconds": 12.5}
        record["settings"] = {}
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "provenance.json").write_text(json.dumps(record))
    (tmp_path / "eval").mkdir()
    for label, results in RESULTS.items():
        report = {"perplexity": 21.5, "results": results, "not_run": {"gsm8k": "no data here"}}
        (tmp_path / "eval" / f"{label}.json").write_text(json.dumps(report))
    return tmp_path


def card(run: Path) -> str:
    return write_card(run / "student", run).read_text()


def test_every_figure_is_that_of_a_file(run: Path) -> None:
    text = card(run)
    for figure in ("123,456,789 tokens", "3,310 steps", "48 sequences of 777", "0.00037", "temperature 1.5", "bf16"):
        assert figure in text, figure
    for figure in ("1,023 sequences of 511", "522,753 tokens", "75.0 %", "25.0 %", "neurons per network", "l2"):
        assert figure in text, figure
    assert "| HellaSwag (acc_norm) | 43.2 ± 2.0 % | 34.6 ± 3.0 % | 612 | 10 | 75.0 % (10-shot) |" in text
    assert "GSM8K was not run: no data here." in text
    sizes = json.loads((run / "student" / "config.json").read_text())
    assert f"| MLP neurons | {sizes['intermediate_size']} | 160 |" in text


def test_repairs_and_other_splits_are_said_and_folders_are_not(run: Path) -> None:
    text = card(run)
    assert "rotation" not in text and "by least squares" not in text
    for file in run.rglob("provenance.json"):
        record = json.loads(file.read_text())
        record["config"]["prune"] |= {"rotate": True, "norm_scale": True, "refit": "all"}
        record["command"] += f" output_dir={run} teacher.path=/models/Big"
        file.write_text(json.dumps(record))
    sizes = json.loads((run / "teacher" / "config.json").read_text())
    save_model("nemotron", run / "teacher", hidden_size=2 * sizes["hidden_size"])
    report = json.loads((run / "eval" / "student.json").read_text())
    splits = {"rows": "validation", "examples": "test"}, {"rows": "test", "examples": "test"}
    report["data"] = {"arc_easy": dict(zip(("splits", "lm_eval_splits"), splits, strict=True))}
    report["not_run"]["gsm8k"] = f"no data in {run}/eval_data, and no hub"
    (run / "eval" / "student.json").write_text(json.dumps(report))
    text = card(run)
    assert "principal directions (rotation); norm weights are rescaled" in text
    assert "; refit by least squares: all linear layers." in text
    assert "ARC-E: rows from the validation split (lm-eval uses test)." in text
    assert str(run) not in text and "/models" not in text and "teacher.path=…/Big" in text


def test_settings_of_ones_own_are_said(run: Path) -> None:
    """A teacher and text of one's own in the place of the recipe's, and the teacher correction's loss."""
    for file in run.rglob("provenance.json"):
        record = json.loads(file.read_text())
        record["config"]["teacher"]["path"], record["config"]["data"]["path"] = "/models/mine", "/text/mine.jsonl"
        record["config"]["distill"] |= {"kd_weight": 0.0, "ce_weight": 1.0}
        record["inputs"] = {"data mine.jsonl": "1234" * 16}
        file.write_text(json.dumps(record))
    text = card(run)
    assert "- Distillation: cross-entropy on the labels; 3,310" in text and "forward_kl" not in text
    assert "| mine.jsonl | 100.0 % | `1234123412341234` |" in text and "| prose |" not in text
    assert "base_model" not in yaml.safe_load(text.split("---")[1])


def test_a_mixed_loss_is_said_with_its_weights() -> None:
    distill = {"loss": "top_k_kl", "top_k": 50, "temperature": 2.0, "kd_weight": 0.5, "ce_weight": 1.0}
    hidden = {"hidden_loss": "cosine", "hidden_layers": ["13/29"]}
    assert objective(distill | hidden) == (
        "0.5 x top_k_kl on the teacher's 50 largest logits, temperature 2.0; 1 x cross-entropy on the labels; "
        "cosine between hidden states (student/teacher 13/29)"
    )


def test_header_is_the_hubs(run: Path) -> None:
    header = yaml.safe_load(card(run).split("---")[1])
    assert header["license"] == "apache-2.0" and header["base_model"] == "nvidia/Big"
    (entry,) = header["model-index"][0]["results"]
    assert entry["metrics"] == [{"type": "acc_norm", "value": 0.3456}] and entry["dataset"]["type"] == "hellaswag"


def test_licence_is_never_invented(run: Path) -> None:
    (run / "teacher" / "provenance.json").unlink()
    text = card(run)
    assert "license" not in yaml.safe_load(text.split("---")[1]) and "states no licence" in text
    (run / "teacher" / "README.md").write_text("---\nlicense: llama3.1\n---\n# Big\n")
    assert yaml.safe_load(card(run).split("---")[1])["license"] == "llama3.1"


def test_published_values_stand_beside_the_papers_recipes_alone(run: Path) -> None:
    assert "arXiv 2407.14679, table 3" in card(run)
    for file in run.rglob("provenance.json"):
        file.write_text(file.read_text().replace('"name": "4b"', '"name": "own"'))
    assert "published by the papers' authors" not in card(run)


def test_snippet_runs(run: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", card(run), re.DOTALL)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(snippet.replace('path = "4b"', f"path = {str(run / 'student')!r}"), {})
    assert printed.getvalue().strip()


def test_serving_rules(run: Path) -> None:
    folder = run / "student"
    assert serving_problems(folder) == [] == serving_problems(folder, 4)
    assert any("not divisible by the tensor-parallel size 3" in problem for problem in serving_problems(folder, 3))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    assert serving_problems(folder) == ["config.json has dtype bfloat16, but the tensors are float32"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").unlink()
    assert serving_problems(folder) == ["tokenizer.json is missing"]


def test_the_card_names_what_llama_cpp_rejects(run: Path) -> None:
    rule = "Serving: llama.cpp requires of nemotron that num_attention_heads x head_dim (96) equals hidden_size, which is 64."
    assert rule in card(run).splitlines()


def test_the_card_of_a_student_outside_of_the_output_folder(run: Path, tmp_path: Path) -> None:
    """No stage's configuration has to name it."""
    shutil.move(run / "student", tmp_path.with_name(f"{tmp_path.name}-elsewhere"))
    elsewhere = tmp_path.with_name(f"{tmp_path.name}-elsewhere")
    assert "| export |" in write_card(elsewhere, run).read_text()
