"""The whole chain of `tiny`, made smaller still: on one process, on two, again, and what a user does with the result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

SMALLER = (
    *(
        "model.num_layers=2",
        "model.hidden_size=64",
        "model.ffn_hidden_size=128",
        "model.kv_channels=12",
        "model.vocab_size=512",
    ),
    *("student.hidden_size=48", "student.ffn_hidden_size=64", "student.num_attention_heads=4"),
    "prune=paper",  # after a repair the student is as good as this teacher, and training cannot show anything
    *("pretrain.num_tokens=65536", "train.num_tokens=8192", "train.global_batch_size=8", "train.micro_batch_size=4"),
    *(
        "train.seq_length=64",
        "calibration.num_samples=16",
        "calibration.seq_length=64",
        "calibration.micro_batch_size=4",
    ),
    *("data.validation_tokens=1024", "eval.every_tokens=4096", "checkpoint.interval_steps=8", "data.num_workers=0"),
)


def run(folder: Path, *arguments: str, ranks: int = 1, command: str = "run") -> subprocess.CompletedProcess[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    words = [*launcher, "-m", "minitron_train", command, "+recipe=tiny", f"output_dir={folder}", *SMALLER, *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=280)


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> dict[int, float]:
    return {row["step"]: row["loss"] for row in metrics(folder) if "loss" in row}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An output folder of the whole chain on one process, and what was printed."""
    folder = tmp_path_factory.mktemp("one")
    result = run(folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def test_every_stage_leaves_its_folder_and_provenance(done: tuple[Path, str]) -> None:
    folder, printed = done
    for stage in ("teacher", "scores", "pruned", "train", "student"):
        record = json.loads((folder / stage / "provenance.json").read_text())
        assert record["wall_seconds"] > 0
        assert record["peak_rss_bytes"] > 0
        assert record["config"]["name"] == "tiny"
    for label in ("teacher", "pruned", "student"):
        record = json.loads((folder / "eval" / f"{label}.json").read_text())
        assert record["perplexity"] > 1
    assert not list(folder.rglob("*.partial-*"))
    assert (folder / "report.html").stat().st_size > 10_000
    table = rows_of(printed)
    assert [row.split()[0] for row in table] == ["teacher", "pruned", "student"]
    assert "not run" in printed, "tasks without data are said, not counted as zero"
    assert rows_of(run(folder, command="eval").stdout) == table, "the command alone prints the same figures"


def rows_of(printed: str) -> list[str]:
    return [line for line in printed.splitlines() if line.startswith(("teacher ", "pruned ", "student "))]


def test_the_student_improves(done: tuple[Path, str]) -> None:
    folder, _ = done
    kl = [row["eval.validation.kl"] for row in metrics(folder) if "eval.validation.kl" in row]
    assert kl[-1] < kl[0]


def test_transformers_opens_the_student(done: tuple[Path, str]) -> None:
    folder, _ = done
    model = AutoModelForCausalLM.from_pretrained(folder / "student")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    assert (model.config.hidden_size, model.config.intermediate_size, model.config.num_attention_heads) == (48, 64, 4)
    tokens = tokenizer("import os", return_tensors="pt")
    with torch.no_grad():
        generated = model.generate(**tokens, max_new_tokens=5, do_sample=False, pad_token_id=model.config.eos_token_id)
    assert generated.shape[1] == tokens["input_ids"].shape[1] + 5


def test_a_second_run_does_nothing_again(done: tuple[Path, str]) -> None:
    folder, _ = done
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    result = run(folder)
    assert result.returncode == 0, result.stderr
    assert "already finished" in result.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == before


def test_a_changed_target_makes_only_what_follows_stale(done: tuple[Path, str]) -> None:
    folder, _ = done
    result = run(folder, "student.ffn_hidden_size=32", "dry_run=true")
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert "score: finished" in lines
    assert any(line.startswith("prune: stale (student.ffn_hidden_size was 64, is 32)") for line in lines)


def test_a_teacher_that_writes_its_calibration(done: tuple[Path, str], tmp_path: Path) -> None:
    """Its tokens are kept with the scores, and what is cut later reads them; a teacher of another share is another stage."""
    words = ["+recipe=tiny", f"teacher.path={done[0] / 'teacher'}", f"output_dir={tmp_path}", *SMALLER]

    def command(name: str, *more: str) -> str:
        line = [sys.executable, "-m", "minitron_train", name, *words, *more]
        result = subprocess.run(line, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr
        return result.stdout

    command("score", "calibration.self_generated_fraction=0.5")
    tokens = load_file(tmp_path / "scores" / "tokens.safetensors")["tokens"]
    assert tokens.shape == (4, 4, 64)
    printed = command("prune", "calibration.self_generated_fraction=0.5")
    assert "score: already finished" in printed and (tmp_path / "pruned" / "model.safetensors").exists()
    assert torch.equal(load_file(tmp_path / "scores" / "tokens.safetensors")["tokens"], tokens)
    assert "score: stale" in command("prune", "dry_run=true")
    assert not (done[0] / "scores" / "tokens.safetensors").exists()


def test_two_ranks_give_the_same_losses_step_by_step(done: tuple[Path, str], tmp_path: Path) -> None:
    one, _ = done
    result = run(tmp_path, "parallel.tensor_model_parallel_size=2", ranks=2)
    assert result.returncode == 0, result.stderr
    alone, both = losses(one), losses(tmp_path)
    assert list(alone) == list(both) and len(alone) == 16
    for step in alone:
        assert abs(alone[step] - both[step]) < 1e-4, step
