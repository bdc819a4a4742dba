"""Vocabularies that differ in padding: every layout computes what transformers does on the real token ids."""

import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from minitron_train.hf import HFFolder, copy_tokenizer
from minitron_train.planning.counts import parameters_per_rank
from minitron_train.planning.memory import aligned_parameters
from minitron_train.train.batches import held_out_batch
from tests.support.helpers import run_ranks
from tests.support.loss_reference import spec_name, specs
from tests.support.models import save_tiny
from tests.support.training import (
    ROWS,
    SEQ_LENGTH,
    VOCAB,
    Material,
    assert_equal,
    before_step,
    rows,
    run,
    student_of,
    train_here,
)

SPLIT = {"parallel__tensor_model_parallel_size": 2}
SETTINGS = {"train__num_tokens": 2 * ROWS * SEQ_LENGTH, "distill__ce_weight": 0.2}
FILE = "losses.json"
PADDED = {  # family of the teacher, rows of teacher and student; the tokenizer has 320 entries
    "tied teacher with more rows": ("llama", 376, 328),
    "teacher with fewer rows": ("nemotron", 328, 376),
}


@pytest.fixture(scope="module", params=PADDED)
def material(request: pytest.FixtureRequest, training: Material, tmp_path_factory: pytest.TempPathFactory) -> Material:
    """Teacher and student with one tokenizer and different numbers of rows: at TP 2 their shards begin at different ids."""
    family, teacher_rows, student_rows = PADDED[request.param]
    root = tmp_path_factory.mktemp("padded")
    made = replace(training, student=root / "student", teacher=root / "teacher")
    save_tiny(family, made.teacher, vocab_size=teacher_rows)
    save_tiny("nemotron", made.student, seed=1, vocab_size=student_rows, hidden_size=48, num_hidden_layers=2)
    for folder in (made.student, made.teacher):
        copy_tokenizer(training.student, folder)
    return made


@pytest.fixture(scope="module")
def one(material: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The training of one process."""
    folder = tmp_path_factory.mktemp("one")
    train_and_write(0, 1, material, folder)
    return folder


def write_losses(folder: Path, trainer: Any) -> None:
    """Every loss of the untrained student on the validation's tokens, and the validation's own result."""
    objective, tokens = trainer.objective, trainer.validation.tokens
    found: dict[str, Any] = {"validation": trainer.validation(lambda: False), "tokens": tokens.tolist()}
    teacher = objective.teacher
    aligned = teacher.aligned_output.numel() if teacher.aligned_output is not None else 0
    found["teacher's parameters"] = sum(parameter.numel() for parameter in teacher.parameters()) + aligned
    with torch.no_grad():
        for spec in specs():
            found[spec_name(spec)] = objective.logit_loss(held_out_batch(tokens), spec).total.item()
    if trainer.groups.is_first:
        (folder / FILE).write_text(json.dumps(found))


def train_and_write(rank: int, world_size: int, material: Material, folder: Path) -> None:
    """Two steps in a layout of tensor-parallel ranks."""
    with before_step(1, partial(write_losses, folder)):
        run(material, folder, **SETTINGS, **(SPLIT if world_size > 1 else {}))


def by_transformers(material: Material, tokens: list[list[int]]) -> tuple[float, float]:
    """Mean KL and cross-entropy over the real token ids, by transformers and torch."""
    ids = torch.tensor(tokens)
    with torch.no_grad():
        student, teacher = (
            AutoModelForCausalLM.from_pretrained(folder)(ids[:, :-1]).logits[..., :VOCAB].double().log_softmax(-1)
            for folder in (material.student, material.teacher)
        )
    kl = F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1).mean()
    return kl.item(), F.nll_loss(student.flatten(0, 1), ids[:, 1:].flatten()).item()


def test_two_ranks_equal_one_and_transformers(material: Material, one: Path, tmp_path: Path) -> None:
    two = tmp_path / "two"
    two.mkdir()
    run_ranks(train_and_write, 2, material, two)
    alone, split = (json.loads((folder / FILE).read_text()) for folder in (one, two))
    shapes = HFFolder(material.teacher).shape, HFFolder(material.student).shape
    planned = parameters_per_rank(shapes[0], 2) + aligned_parameters(*shapes, 2)
    assert split["teacher's parameters"] == planned
    kl, ce = by_transformers(material, alone["tokens"])
    for found in (alone, split):
        assert found["validation"]["eval.validation.kl"] == pytest.approx(kl, rel=1e-5)
        assert found["validation"]["eval.validation.loss"] == pytest.approx(ce, rel=1e-5)
    losses = {spec_name(spec) for spec in specs()}
    assert len(losses) == len(specs()) and all(math.isfinite(alone[name]) for name in losses)
    assert {name: split[name] for name in losses} == pytest.approx({name: alone[name] for name in losses}, rel=1e-5)
    assert_equal(two, rows(one))  # losses and gradient norms of two steps
    weights, expected = student_of(two, tmp_path / "exported2"), student_of(one, tmp_path / "exported1")
    assert HFFolder(tmp_path / "exported2").shape == HFFolder(material.student).shape
    for name, value in expected.items():
        assert (weights[name] - value).norm() < 1e-4 * value.norm(), name  # AdamW may amplify a gradient close to 0


def test_pipeline_stages_of_two_ranks_equal_one(material: Material, one: Path, tmp_path: Path) -> None:
    layout = SPLIT | {"parallel__pipeline_model_parallel_size": 2}
    run_ranks(train_here, 4, [(material, tmp_path, SETTINGS | layout)])
    assert_equal(tmp_path, rows(one))
