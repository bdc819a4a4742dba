"""The report: right numbers, one self-contained and well-formed page, whatever is missing said and never an exception."""

import json
import math
import re
import shutil
import struct
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from minitron_train.arch import architecture
from minitron_train.hf import shape_from_config
from minitron_train.reporting import summary_table, write_report
from minitron_train.reporting.load import load_run
from minitron_train.runtime.errors import UserError

NUM_LAYERS, HIDDEN, FFN, HEADS = 4, 32, 48, 6
VOID = {"meta", "path", "br", "img", "link", "input", "hr"}


def model_config(hidden_size: int, ffn: int, heads: int, num_layers: int) -> dict:
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "intermediate_size": ffn,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "num_hidden_layers": num_layers,
        "head_dim": 8,
        "vocab_size": 100,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


STAGES = (
    ("score", "scores/provenance.json"),
    ("prune", "pruned/provenance.json"),
    ("distill", "train/provenance.json"),
    ("eval student", "eval/student.provenance.json"),
)
CONFIGS = {
    "teacher": model_config(HIDDEN, FFN, HEADS, NUM_LAYERS),
    "pruned": model_config(24, 32, 4, NUM_LAYERS - 1),
    "student": model_config(24, 32, 4, NUM_LAYERS - 1),
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def write_models(folder: Path) -> None:
    for label, config in CONFIGS.items():
        write_json(folder / label / "config.json", config)
        write_weights(folder / label, config, 3_000_000 if label == "teacher" else 1_500_000)
        (folder / label / "of-another-reader.safetensors").write_bytes(bytes(1_000_000))


def write_weights(folder: Path, config: dict, num_bytes: int) -> None:
    """A model of zeros in one file of `num_bytes`: a header may end with blanks."""
    shape = shape_from_config(config, "config.json")
    described, end = {}, 0
    for name, size in architecture(shape.architecture).tensors(shape).items():
        begin, end = end, end + 4 * math.prod(size)
        described[name] = {"dtype": "F32", "shape": size, "data_offsets": [begin, end]}
    header = json.dumps(described).encode().ljust(num_bytes - end - 8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(end))


def write_importance(folder: Path) -> None:
    rng = np.random.default_rng(0)
    scores = {"embedding": rng.random(HIDDEN), "raw.statistic": np.zeros((2, 3))}
    kept = {"embedding": np.argsort(-scores["embedding"])[:24], "layers": np.array([0, 1, 3])}
    for i in range(NUM_LAYERS):
        scores |= {f"layers.{i}.heads": rng.random(HEADS), f"layers.{i}.ffn": rng.random(FFN)}
        scores[f"layers.{i}.block"] = np.array([0.1 if i == 2 else 0.4])
        if i != 2:
            kept |= {f"layers.{i}.heads": np.array([0, 1, 3, 4]), f"layers.{i}.ffn": np.arange(32)}
    for file, tensors in (("scores/scores.safetensors", scores), ("pruned/kept.safetensors", kept)):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        dtype = np.int64 if "kept" in file else np.float32
        save_file(
            {
                name: np.sort(value).astype(dtype) if dtype is np.int64 else value.astype(dtype)
                for name, value in tensors.items()
            },
            folder / file,
        )


def write_metrics(file: Path) -> None:
    rows = []
    for step in range(1, 21):
        loss = 3.0 - 0.1 * step
        row = {"step": step, "tokens": 64 * step, "loss": loss, "kd_loss": loss, "lr": 1e-4, "grad_norm": 2.0}
        row |= {"tokens_per_second": 512.0, "source.prose": 0.75, "source.code": 0.25}
        if step % 10 == 0:
            row |= {"eval.validation.kl": loss + 0.125, "eval.validation.perplexity": 40.0 - step}
        rows.append(json.dumps(row))
    rows[4] = '{"step": 5, "tokens": 320, "loss": null, "kd_loss": null, "lr": 1e-4, "grad_norm": null}'
    rows.insert(7, '{"step": 7, "tokens": 448, "loss": 99.0, "kd_loss": 99.0}')  # before a resume
    rows.insert(8, rows[6])
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(rows) + '\n{"step": 21, "tok')  # a line still being written


def write_evals(folder: Path) -> None:
    for label, perplexity, accuracy in (("teacher", 18.214, 0.43), ("pruned", 312.4, 0.28), ("student", 26.9, 0.36)):
        hellaswag = {"acc": 0.3, "acc_norm": accuracy, "acc_norm_stderr": 0.049, "rows": 100, "num_fewshot": 0}
        part = {"acc": 0.21, "acc_stderr": 0.02, "rows": 5, "num_fewshot": 5}
        mmlu = {"acc": 0.26, "acc_stderr": 0.03, "rows": 285, "num_fewshot": 5, "parts": {"mmlu_stem": part}}
        not_run = {"arc_challenge": "no data in <eval_data>"}
        write_json(
            folder / "eval" / f"{label}.json",
            {"perplexity": perplexity, "results": {"hellaswag": hellaswag, "mmlu": mmlu}, "not_run": not_run},
        )


def write_provenance(folder: Path, name: str = "smollm2") -> None:
    for k, (stage, place) in enumerate(STAGES):
        record = {
            "stage": stage,
            "command": f"python -m minitron_train {stage} +recipe={name}",
            "config": {"name": name, "seed": 1234, "teacher": {"path": None, "wheel": "some-llm==1.0"}},
            "inputs": {"teacher": "0123456789abcdef" * 4},
            "settings": {},
            "packages": {"torch": "2.13.0"},
            "started_at": f"2026-01-0{k + 1}T10:00:00+00:00",
            "wall_seconds": 60.0 + k,
            "peak_rss_bytes": 1_500_000_000,
            "facts": {"url": "https://example.org/"},
        }
        write_json(folder / place, record)


@pytest.fixture
def output_dir(tmp_path: Path) -> Path:
    write_models(tmp_path)
    write_importance(tmp_path)
    write_metrics(tmp_path / "train" / "metrics.jsonl")
    write_evals(tmp_path)
    write_provenance(tmp_path)
    return tmp_path


class Page(HTMLParser):
    """Text, tags and attributes of a page; refuses tags that do not nest."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID or tag == "path":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] != ["style"]:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))


def parameters(label: str) -> int:
    shape = shape_from_config(CONFIGS[label], label)
    return sum(architecture("llama").parameters(shape).values())


def test_page_holds_the_measured_numbers(output_dir: Path) -> None:
    text = Page(write_report(output_dir)).text
    teacher, student = parameters("teacher"), parameters("student")
    for expected in (
        "smollm2",
        "some-llm==1.0 (llama, ",
        "Configuration of score, prune, distill, eval student",
        f"{teacher:,} {student:,} {student / teacher:.1%}".replace("%", " %"),
        "18.21 312.4 26.90",
        "43.0 ± 4.9 % 28.0 ± 4.9 % 36.0 ± 4.9 % 83.7 % 100 0",
        "26.0 ± 3.0 %",
        "mmlu stem 21.0 ± 2.0 %",
        "ARC-C was not run: no data in <eval_data>",
        "24 of 32 channels were kept",
        "12 of 24 heads were kept",
        "96 of 192 neurons were kept",
        "Dropped: 2.",
        "Validation changed from 2.12 to 1.12.",
        "Omitted steps without a finite loss: 1.",
        "code 25.0 %, prose 75.0 %",
        "0123456789ab",
        "1 min 1 s",
        "1.5 GB",
        "3.0 MB",
    ):
        assert expected in text, expected
    assert "99.0" not in text  # the line before the resume


def test_seconds_of_a_resumed_training_are_said_to_be_those_of_its_last_start(output_dir: Path) -> None:
    assert "last start" not in Page(write_report(output_dir)).text
    record = output_dir / "train" / "provenance.json"
    write_json(record, json.loads(record.read_text()) | {"facts": {"resumed_at_step": 1500}})
    text = Page(write_report(output_dir)).text
    assert "a resumed training counts since its last start" in text and "s from step 1,500" in text


def test_page_names_the_runs_of_trackers(output_dir: Path) -> None:
    runs = {"wandb": {"run_id": "a", "place": "https://host/<lab>/runs/a"}, "mlflow": {"run_id": "b", "place": None}}
    write_json(output_dir / "train" / "trackers.json", runs)
    text = write_report(output_dir).read_text()
    assert "W&amp;B <code>https://host/&lt;lab&gt;/runs/a</code>" in text and "MLflow" not in text
    write_json(output_dir / "train" / "trackers.json", {"wandb": "a"})
    with pytest.raises(UserError, match=r"trackers.json: damaged .*; delete it"):
        write_report(output_dir)


def test_page_is_self_contained(output_dir: Path) -> None:
    page = Page(write_report(output_dir))
    assert not [entry for entry in page.attributes if entry[1] in ("src", "href") or "://" in entry[2]]
    assert "https://example.org/" in page.text  # as text only
    source = (output_dir / "report.html").read_text()
    assert "@import" not in source and "url(" not in source and "<script" not in source
    assert len(source) < 300_000


def test_page_has_every_figure(output_dir: Path) -> None:
    titles = {
        value.split(".")[0] for _, name, value in Page(write_report(output_dir)).attributes if name == "aria-label"
    }
    assert titles == {
        "HellaSwag",
        "MMLU",
        "Embedding channels",
        "Layers",
        "Attention heads",
        "MLP neurons",
        "Importance kept, layer by layer",
        "Loss",
        "Validation perplexity",
        "Learning rate",
        "Gradient norm",
        "Tokens per second",
    }


def test_outlined_heads_are_the_kept_ones(output_dir: Path) -> None:
    source = write_report(output_dir).read_text()
    titles = re.findall(r'<path class="(outlined kept|fill cut)"[^>]*><title>layer (\d+), head (\d+):', source)
    kept = {(int(layer), int(head)) for kind, layer, head in titles if kind == "outlined kept"}
    assert kept == {(layer, head) for layer in (0, 1, 3) for head in (0, 1, 3, 4)}
    assert len(titles) == NUM_LAYERS * HEADS


@pytest.mark.parametrize(
    ("writers", "lines"),
    [
        ((), ("No teacher yet", "Not scored yet", "Not distilled yet", "Not evaluated yet", "No stage has finished")),
        ((write_models,), ("Not scored yet", "Not distilled yet", "Not evaluated yet")),
        ((write_importance,), ("No teacher yet", "Not distilled yet")),
        ((write_models, write_evals), ("Not scored yet", "Not distilled yet")),
        ((write_models, write_importance, write_provenance), ("Not distilled yet", "Not evaluated yet")),
    ],
)
def test_missing_stages_are_said(tmp_path: Path, writers: tuple, lines: tuple[str, ...]) -> None:
    for write in writers:
        write(tmp_path)
    text = Page(write_report(tmp_path, tmp_path / "page" / "report.html")).text
    assert all(line in text for line in lines)
    assert summary_table(tmp_path)


def test_scores_before_pruning_keep_everything(tmp_path: Path) -> None:
    write_importance(tmp_path)
    (tmp_path / "pruned" / "kept.safetensors").unlink()
    text = Page(write_report(tmp_path)).text
    assert "Nothing has been pruned yet: 24 heads" in text
    assert "Importance kept" not in text


def test_importance_is_that_of_the_pruning(tmp_path: Path) -> None:
    """`prune` with another preset ranks the same statistics otherwise; scores.safetensors stays as it was."""
    write_importance(tmp_path)
    file = tmp_path / "pruned" / "kept.safetensors"
    ranked = np.linspace(1, 2, FFN, dtype=np.float32)
    save_file(load_file(file) | {"importance.layers.1.ffn": ranked}, file)
    axes = load_run(tmp_path).axes
    assert np.array_equal(axes["ffn"].scores[1], ranked)
    assert axes["ffn"].scores[0].max() < 1


@pytest.mark.parametrize("file", ["scores/scores.safetensors", "pruned/kept.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, file: str) -> None:
    write_importance(tmp_path)
    (tmp_path / file).write_bytes((tmp_path / file).read_bytes()[:-8])
    with pytest.raises(UserError, match=rf"{file}: .*remove .* and run its stage again"):
        load_run(tmp_path)


def test_names_are_escaped(output_dir: Path) -> None:
    evil = "<script>alert(1)</script>&\"'"
    write_provenance(output_dir, evil)
    (output_dir / "eval" / "student.json").rename(output_dir / "eval" / "<b>own.json")
    page = Page(write_report(output_dir))
    source = (output_dir / "report.html").read_text()
    assert evil in page.text and "<b>own" in page.text
    assert "<script" not in source and "<b>" not in source


def test_metrics_lines(output_dir: Path) -> None:
    columns = load_run(output_dir).metrics["train"]
    assert columns["step"].tolist() == list(range(1, 21))
    assert np.isnan(columns["loss"][4]) and np.isnan(columns["kd_loss"][4])
    assert columns["loss"][6] == pytest.approx(2.3)
    assert np.isfinite(columns["eval.validation.kl"]).sum() == 2


@pytest.mark.parametrize("step", ['"a"', "null", "[1]", "NaN", "Infinity"])
def test_a_line_without_the_number_of_its_step_is_left_out(tmp_path: Path, step: str) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text(f'{{"step": 1, "loss": 2.0}}\n{{"step": {step}, "loss": 3.0}}\n')
    assert load_run(tmp_path).metrics["train"]["loss"].tolist() == [2.0]


def test_only_non_finite_metrics(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text('{"step": 1, "tokens": 8, "loss": NaN}\n' * 3)
    assert "Distillation" in Page(write_report(tmp_path)).text


def test_large_models_stay_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    scores = {"embedding": rng.random(12288)}
    kept = {"embedding": np.arange(6000), "layers": np.arange(48)}
    for i in range(48):
        scores |= {f"layers.{i}.heads": rng.random(64), f"layers.{i}.ffn": rng.random(24576)}
        kept |= {f"layers.{i}.heads": np.arange(32), f"layers.{i}.ffn": rng.permutation(24576)[:9216]}
    for file, tensors in (("scores/scores.safetensors", scores), ("pruned/kept.safetensors", kept)):
        (tmp_path / file).parent.mkdir()
        save_file(tensors, tmp_path / file)
    steps = [{"step": k, "tokens": k * 4_718_592, "loss": 2 + 1 / (k + 1), "lr": 1e-4} for k in range(20_000)]
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "metrics.jsonl").write_text("\n".join(map(json.dumps, steps)))
    assert write_report(tmp_path).stat().st_size < 1_500_000


def test_summary_table(output_dir: Path) -> None:
    lines = summary_table(output_dir).splitlines()
    rows = {
        line.split()[0]: re.split(r"\s{2,}", line)
        for line in lines
        if line.startswith(("teacher", "pruned", "student"))
    }
    student = f"{parameters('student'):,}"
    assert rows["teacher"] == [
        "teacher",
        f"{parameters('teacher'):,}",
        "3.0 MB",
        "18.21",
        "43.0 ± 4.9 %",
        "26.0 ± 3.0 %",
        "not run",
    ]
    assert rows["student"] == ["student", student, "1.5 MB", "26.90", "36.0 ± 4.9 %", "26.0 ± 3.0 %", "not run"]
    assert lines[0].split() == ["HellaSwag", "MMLU", "ARC-C"] and lines[1].split() == ["acc_norm", "acc"]
    assert "100 rows" in lines[2] and "285 rows" in lines[2]
    assert lines[-1] == "ARC-C was not run: no data in <eval_data>"


def test_a_model_without_evaluation_has_no_note(output_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(output_dir, tmp_path / "out")
    (tmp_path / "out" / "eval" / "teacher.json").unlink()
    table = summary_table(tmp_path / "out")
    assert "not run" in table and "was not evaluated" not in table


def test_models_elsewhere_are_found(tmp_path: Path) -> None:
    write_json(tmp_path / "elsewhere" / "config.json", CONFIGS["teacher"])
    record = {"stage": "score", "command": "score", "inputs": {}, "settings": {}, "wall_seconds": 1.0}
    record["config"] = {"teacher": {"path": str(tmp_path / "elsewhere")}}
    write_json(tmp_path / "out/scores/provenance.json", record)
    write_json(tmp_path / "out/eval/own.json", {"perplexity": 5.0, "parameters": 77, "bytes": 154, "results": {}})
    table = summary_table(tmp_path / "out")
    assert f"{parameters('teacher'):,}" in table
    assert re.search(r"own +77 +154 B +5\.00", table)


def test_pretraining_has_its_own_section(tmp_path: Path) -> None:
    write_metrics(tmp_path / "pretrain" / "train" / "metrics.jsonl")
    text = Page(write_report(tmp_path)).text
    assert "Pretraining of the teacher" in text and "Not distilled yet" in text


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_damaged_file_is_named(output_dir: Path) -> None:
    (output_dir / "eval" / "student.json").write_text("{")
    with pytest.raises(UserError, match=r"student\.json"):
        write_report(output_dir)
