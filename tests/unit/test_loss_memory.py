"""The memory of the loss: the setting, the default, and what step 2 leaves free on a GPU."""

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from minitron_train.config import DistillConfig
from minitron_train.distillation.loss_memory import MOST, SMALL_BYTES, LossMemory
from minitron_train.parallel.groups import Groups
from tests.support.training import Material, make_config

TOKENS, ROWS = 8192, 256_000
U = TOKENS * ROWS * 4


def gpu(least: float = float("inf"), is_last_stage: bool = True) -> Groups:
    """Groups on a GPU; another rank finds the fraction `least`."""
    values = {"device": torch.device("cuda", 0), "is_last_stage": is_last_stage}
    return cast(Groups, SimpleNamespace(**values, least=lambda value: min(value, least)))


def measured(
    spare_bytes: int, step: int = 2, config: DistillConfig | None = None, groups: Groups | None = None
) -> float:
    """The fraction of U that the loss takes after a step that left `spare_bytes` free."""
    memory = LossMemory(config or DistillConfig())
    memory.end(step, TOKENS, ROWS, groups or gpu(), lambda _: spare_bytes)
    return memory.chunking(TOKENS, ROWS).logit_memory_fraction


def test_half_of_the_free_memory_is_added() -> None:
    assert measured(U) == pytest.approx(0.2 + 0.5)
    assert measured(-U) == 0.2, "a full GPU lowers nothing"


def test_the_loss_never_takes_more_than_it_can_use() -> None:
    assert measured(100 * U) == MOST


def test_the_rank_with_the_least_memory_decides() -> None:
    assert measured(U, groups=gpu(least=0.3)) == 0.3


def test_a_stage_without_the_loss_does_not_decide() -> None:
    assert measured(0, groups=gpu(least=0.7, is_last_stage=False)) == 0.7


def test_only_step_2_measures() -> None:
    assert measured(U, step=1) == measured(U, step=3) == 0.2


def test_a_setting_is_obeyed() -> None:
    assert measured(U, config=DistillConfig(logit_memory_fraction=0.1)) == 0.1


def test_small_logits_are_all_kept() -> None:
    assert LossMemory(DistillConfig()).chunking(64, 1024).logit_memory_fraction == SMALL_BYTES / (64 * 1024 * 4)


def test_a_cpu_measures_nothing() -> None:
    memory = LossMemory(DistillConfig())
    memory.end(2, TOKENS, ROWS, cast(Groups, SimpleNamespace(device=torch.device("cpu"))))
    assert memory.measured is None


@pytest.mark.parametrize(("saved_with", "expected"), [(2, 0.7), (4, None)], ids=["same", "other_micro_batch"])
def test_a_resumed_run_keeps_the_measured_memory(
    training: Material, tmp_path: Path, saved_with: int, expected: float | None
) -> None:
    """Another micro-batch has other activations, so what was measured does not hold for it."""
    from minitron_train.hf import HFFolder
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import read_world
    from minitron_train.train.assemble import assemble

    config = make_config(training, train__micro_batch_size=saved_with)
    with start(config.parallel, read_world(), config.seed) as groups, contextlib.ExitStack() as stack:
        trainer = assemble(config, groups, HFFolder(training.student), HFFolder(training.teacher), tmp_path, stack)
        trainer.objective.memory.measured = 0.7
        trainer.measure_loss_memory()
        trainer.save(wait=True)
    config = make_config(training, train__micro_batch_size=2)
    with start(config.parallel, read_world(), config.seed) as groups, contextlib.ExitStack() as stack:
        trainer = assemble(config, groups, HFFolder(training.student), HFFolder(training.teacher), tmp_path, stack)
        trainer.resume()
        assert trainer.objective.memory.measured == expected


@pytest.mark.gpu
def test_a_gpu_reports_its_free_memory() -> None:
    from minitron_train.distillation.loss_memory import spare_bytes

    device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.reset_peak_memory_stats(device)
    before = spare_bytes(device)
    held = torch.empty(64 * 2**20, dtype=torch.uint8, device=device)
    assert before - spare_bytes(device) >= held.numel() // 2
