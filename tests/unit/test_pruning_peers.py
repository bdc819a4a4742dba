"""benchmarks/quality/pruning_peers.py: methods that the program does not have (layers for a size, rotation), and tables."""

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_train import hf
from minitron_train.config import PruneConfig
from minitron_train.pruning.collect import Statistics
from minitron_train.pruning.criterion import Evidence, width_criterion
from minitron_train.pruning.layers import Layers
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import slice_checkpoint
from tests.support.models import hf_logits, save_tiny

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "quality"))
from pruning_peers_methods import (  # noqa: E402 # pyright: ignore[reportMissingImports]
    as_many_layers,
    keep_best,
    norm_tensors,
    num_parameters,
    principal_directions,
    rms_restored,
    rotated_shape,
    rotated_tensors,
)
from pruning_peers_tables import show_tasks, table, task_figures  # noqa: E402 # pyright: ignore[reportMissingImports]

TOKENS_BS = torch.arange(64).view(2, 32) % 97


@pytest.fixture
def teacher(tiny_models: dict[str, Path]) -> hf.HFFolder:
    return hf.HFFolder(tiny_models["llama"])


def rotated(teacher: hf.HFFolder, directions_HH: torch.Tensor, folder: Path) -> hf.HFFolder:
    folder.mkdir()
    config = hf.student_config(teacher.config, rotated_shape(teacher.shape))
    hf.write_folder(folder, config, rotated_tensors(teacher, directions_HH), None)
    return hf.HFFolder(folder)


def test_layers_for_a_size(teacher: hf.HFFolder) -> None:
    two = num_parameters(teacher.shape.smaller(num_layers=2))
    assert [as_many_layers(teacher.shape, two + extra).num_layers for extra in (-1000, 0, 1000, 10**9)] == [2, 2, 2, 3]


def test_a_rotated_model_is_the_model(teacher: hf.HFFolder, tmp_path: Path) -> None:
    torch.manual_seed(0)
    directions_HH = torch.linalg.qr(torch.randn(64, 64, dtype=torch.float64)).Q
    model = rotated(teacher, directions_HH, tmp_path / "rotated")
    expected = hf_logits(teacher.folder, TOKENS_BS)
    torch.testing.assert_close(hf_logits(model.folder, TOKENS_BS), expected, rtol=0.0, atol=1e-3)


def test_directions_without_variance_can_go(tmp_path: Path, groups) -> None:
    """A stream in 48 of 64 dimensions: after the cut to the 48 first principal directions it is the same function."""
    path = save_tiny("llama", tmp_path / "teacher") / "model.safetensors"
    tensors = load_file(path)
    torch.manual_seed(0)
    basis_HH = torch.linalg.qr(torch.randn(64, 64)).Q
    inside_HH = basis_HH[:, :48] @ basis_HH[:, :48].t()
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = inside_HH @ tensor
    tensors["model.embed_tokens.weight"] @= inside_HH
    save_file(tensors, path, metadata={"format": "pt"})
    teacher = hf.HFFolder(path.parent)
    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=False)
    model = rotated(teacher, principal_directions(layers, TOKENS_BS, 1), tmp_path / "rotated")
    student, gamma = rms_restored(model.shape, model.shape.smaller(hidden_size=48))
    evidence = Evidence(
        statistics=Statistics(3), source=model, table=model.table, shape=model.shape, prune=PruneConfig(), seed=1
    )
    scores = replace(width_criterion("random").width(evidence), embedding=-torch.arange(64.0))
    (tmp_path / "cut").mkdir()
    keep = keep_best(scores, model.shape, student)
    slice_checkpoint(model, keep, student, tmp_path / "cut", norm_tensors(student, gamma))
    expected, found = (hf_logits(folder, TOKENS_BS) for folder in (teacher.folder, tmp_path / "cut"))
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-3)


def test_the_table_averages_the_runs_of_a_case_and_takes_one_amount_of_tokens() -> None:
    def line(run: str, case: str, tokens: int, **losses: float) -> dict[str, object]:
        return {"run": run, "case": case, "target": "4/8/2", "tokens": tokens, "parameters": 10, **losses}

    lines = [{"run": "teacher", "target": "", "tokens": 0, "loss": 1.0}]
    for run, cut, short, long in (("random-1", 8.0, 5.0, 3.0), ("random-2", 10.0, 7.0, 4.0)):
        lines.append(line(run, "random", 0, loss=cut))
        for tokens, loss in ((100, short), (200, long)):
            lines.append(
                line(run, "random", tokens, loss=cut, loss_after=loss, own_loss_after=loss, own_kl_after=loss - 1)
            )
    lines.append(line("ours", "ours", 0, loss=6.0))
    ours, random = table(lines, ["ours", "missing", "random"], 200)
    assert (ours["loss"], ours["tokens"]) == (6.0, 0)  # not distilled yet
    assert (random["loss"], random["tokens"], random["loss_after"], random["own_kl_after"]) == (9.0, 200, 3.5, 2.5)
    assert table(lines, ["random"], 100)[0]["loss_after"] == 6.0


def test_figures_of_tasks_have_their_standard_errors() -> None:
    hellaswag = {"acc": 0.3, "acc_stderr": 0.02, "acc_norm": 0.4, "acc_norm_stderr": 0.03, "rows": 500}
    report = {"perplexity": 10.0, "results": {"hellaswag": hellaswag, "mmlu": {"acc": 0.25, "acc_stderr": 0.01}}}
    figures = task_figures(report)
    assert figures == {"own_loss": math.log(10.0), "hellaswag.acc_norm": [0.4, 0.03], "mmlu.acc": [0.25, 0.01]}


def test_figures_of_filtered_metrics_and_of_what_was_not_measured(capsys: pytest.CaptureFixture[str]) -> None:
    flexible = {"exact_match,flexible-extract": 0.125, "exact_match_stderr,flexible-extract": 0.01, "rows": 80}
    wikitext = {"word_perplexity": 42.125, "rows": 62}
    rows = [
        {"model": "teacher", **task_figures({"perplexity": 10.0, "results": {"gsm8k": flexible}})},
        {"model": "cut", **task_figures({"perplexity": None, "results": {"wikitext": wikitext}})},
    ]
    assert rows[0]["gsm8k.exact_match,flexible-extract"] == [0.125, 0.01]
    assert rows[1] == {"model": "cut", "own_loss": None, "wikitext.word_perplexity": [42.125, None]}
    show_tasks(rows)
    _, teacher, cut = (line.split() for line in capsys.readouterr().out.splitlines())
    assert teacher == "teacher 2.3026 12.5 ± 1.0 % not run".split()
    assert cut == "cut – not run 42.125".split()
