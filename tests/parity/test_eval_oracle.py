"""Every row's answers against lm-eval's own `hf` model: log-likelihoods, accuracies, rolling windows, generated texts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.config import EvalConfig, ParallelConfig
from minitron_train.runtime.launch import read_world
from tests.support.eval_data import save_data, save_model
from tests.support.helpers import run_ranks

TASKS = EvalConfig(
    tasks=["hellaswag", "mmlu_anatomy", "winogrande", "wikitext", "gsm8k", "xlsum_english"],
    shots={"mmlu": 5, "winogrande": 3, "gsm8k": 2},
)
LOGLIK_TOLERANCE = 1e-4  # natural log, of one row


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_data(tmp_path_factory.mktemp("eval_data"))


def hf_answers(folder: Path, evaluation: EvalConfig, data_dir: Path) -> dict[str, Any]:
    """lm-eval's results with its own model, fp32 with the softmax in fp64 (in fp32 it is off by 3e-6 of the value)."""
    from lm_eval.models.huggingface import HFLM

    from minitron_train.evaluation.tasks import load_tasks, quiet, run_lm_eval

    with quiet():
        lm = HFLM(pretrained=str(folder), dtype="float32", softmax_dtype="float64", device="cpu", batch_size=4)
        return run_lm_eval(lm, load_tasks(evaluation, data_dir), evaluation)


def our_answers(rank: int, world_size: int, tp: int, folder: Path, evaluation: EvalConfig, data_dir: Path) -> Any:
    """Results and rows of the same tasks on GPTModel."""
    from minitron_train.evaluation.run import run_tasks
    from minitron_train.hf import HFFolder
    from minitron_train.model.build import build
    from minitron_train.model.load import load_weights
    from minitron_train.parallel.groups import start

    with start(ParallelConfig(tensor_model_parallel_size=tp), read_world(), seed=1) as groups:
        checkpoint = HFFolder(folder)
        model = build(checkpoint.shape, tp=tp)
        load_weights(model, checkpoint.table, checkpoint.shape, checkpoint, groups.tp_rank, tp)
        length = checkpoint.shape.max_position_embeddings
        return run_tasks(model, folder, length, evaluation, groups, data_dir)


def assert_same(ours: Any, theirs: dict[str, Any]) -> None:
    """Same rows, log-likelihoods, greediness and metrics."""
    from minitron_train.evaluation.results import collect, items

    report, rows = ours
    wanted = list(items(theirs))
    assert len(rows) == len(wanted) > 0
    for found, expected in zip(rows, wanted, strict=True):
        for key in ("task", "doc_id", "filter", "prompt_hash"):
            assert found[key] == expected[key]
        if isinstance(found["answers"][0], str):
            assert found["answers"] == expected["answers"]
            continue
        flat = [torch.tensor(item["answers"], dtype=torch.float64).flatten() for item in (found, expected)]
        relative = 1e-6 if found["task"] == "wikitext" else 0  # whole texts: thousands of nats
        torch.testing.assert_close(*flat, rtol=relative, atol=LOGLIK_TOLERANCE)
    for task, record in collect(theirs, report["results"]).items():
        assert report["results"][task] == pytest.approx(record, rel=1e-5), task


def answers(ranks: int, tp: int, folder: Path, evaluation: EvalConfig, data_dir: Path) -> list[Any]:
    """Each rank's answers; one rank needs no process of its own."""
    if ranks == 1:
        return [our_answers(0, 1, tp, folder, evaluation, data_dir)]
    return run_ranks(our_answers, ranks, tp, folder, evaluation, data_dir)


@pytest.mark.parametrize(("family", "tp", "ranks"), [("nemotron", 1, 1), ("llama", 1, 1), ("nemotron", 2, 4)])
def test_answers_equal_lm_evals(tmp_path: Path, data_dir: Path, family: str, tp: int, ranks: int) -> None:
    folder = save_model(family, tmp_path / "model")
    theirs = hf_answers(folder, TASKS, data_dir)
    for ours in answers(ranks, tp, folder, TASKS, data_dir):
        assert_same(ours, theirs)


SMOLLM2_TASKS = EvalConfig(tasks=["hellaswag", "mmlu_anatomy"], limit=4, shots={"mmlu": 2})


@pytest.fixture(scope="module")
def smollm2_wanted(smollm2: Path, data: Path) -> dict[str, Any]:
    return hf_answers(smollm2, SMOLLM2_TASKS, data / "eval")


@pytest.mark.needs_data
@pytest.mark.parametrize("tp", [1, 3])
def test_smollm2_answers_equal_lm_evals(smollm2: Path, data: Path, smollm2_wanted: dict[str, Any], tp: int) -> None:
    for ours in answers(tp, tp, smollm2, SMOLLM2_TASKS, data / "eval"):
        assert_same(ours, smollm2_wanted)
