"""Training over pipeline stages gives what one rank gives."""

import os
import signal
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron_train.arch.pipeline import stage_layers
from minitron_train.config import DistillConfig, Precision, Recompute, TeachKind
from minitron_train.distillation.hidden import check_layers
from minitron_train.hf import HFFolder
from minitron_train.runtime.errors import UserError
from minitron_train.train.settings import check_settings
from minitron_train.train.validation import Validation
from tests.support.helpers import free_port, run_ranks, start_ranks
from tests.support.models import EXPERTS, save_tiny
from tests.support.training import (
    SEQ_LENGTH,
    Interrupted,
    Material,
    assert_equal,
    before_step,
    interrupt,
    make_config,
    make_material,
    rows,
    run,
    student_of,
    teach,
    train_here,
)


def steps(number: int) -> dict[str, Any]:
    """Settings of a run with this number of steps."""
    return {"train__num_tokens": number * 8 * SEQ_LENGTH}


TEN_STEPS = steps(10)
STAGES: dict[str, Any] = TEN_STEPS | {"parallel__pipeline_model_parallel_size": 2}
WINDOWS = {"sliding_window": 9, "sliding_window_pattern": 2, "rope_parameters": None}
BF16_TEACHER: dict[str, Any] = {"distill__teacher_precision": Precision.bf16}  # its messages have another type
LABELS: dict[str, Any] = {"distill__ce_weight": 0.5}


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Material:
    return make_material(tmp_path_factory.mktemp("tied"), "llama")


def save_deep(family: str, folder: Path, *, num_hidden_layers: int, **changes: Any) -> Path:
    """A tiny model with more layers: four, or seven in a teacher."""
    return save_tiny(family, folder, num_hidden_layers={2: 4, 3: 7}[num_hidden_layers], **changes)


def save_wide(family: str, folder: Path, **changes: Any) -> Path:
    """A tiny model; the student is as wide as the teacher."""
    return save_tiny(family, folder, **changes | {"hidden_size": 32})


def assert_same_hidden(folder: Path, other: Path) -> None:
    """The loss on hidden states and its weight are equal in each step, but for rounding."""
    for name in ("hidden_loss", "hidden_weight"):
        found, wanted = ([row[name] for row in rows(run_) if name in row] for run_ in (folder, other))
        assert wanted and found == pytest.approx(wanted, rel=1e-5), name


def assert_same_student(folder: Path, other: Path, scratch: Path) -> None:
    """The exported weights are equal but for rounding, which AdamW amplifies where a gradient is nearly zero.

    Without stages, one weight of a run with TP 2 differs by 4e-5 from one rank's.
    """
    found, wanted = (
        student_of(run_, scratch / f"{folder.name}_{k}_exported") for k, run_ in enumerate((folder, other))
    )
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(found[name], tensor, rtol=1e-4, atol=1e-4), name


@pytest.fixture(scope="module")
def one_rank(tied: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one process: an embedding that is tied to the output layer, and labels in the loss."""
    folder = tmp_path_factory.mktemp("one") / "whole"
    run(tied, folder, **TEN_STEPS | LABELS)
    return folder


def test_two_stages_train_as_one_rank(training: Material, tied: Material, one_rank: Path, tmp_path: Path) -> None:
    """Teachers of three layers (two on the first stage), students of two. Checkpoints resume in either layout."""
    whole, untied, resumed, joined, split = (
        tmp_path / name for name in ("staged", "untied", "resumed", "joined", "split")
    )
    with before_step(5, interrupt), pytest.raises(Interrupted):
        run(tied, split, **TEN_STEPS | LABELS)
    staged, stop = STAGES | LABELS, {"stop_in": 5}
    runs = [
        (tied, whole, staged),
        (training, untied, STAGES | BF16_TEACHER),
        (tied, resumed, staged | stop),
        (tied, resumed, staged),
        (tied, joined, staged | stop),
        (tied, split, staged),
    ]
    run_ranks(train_here, 2, runs)
    assert run(tied, joined, **TEN_STEPS | LABELS)["resumed_at_step"] == 3
    assert rows(resumed) == rows(whole)
    for folder in (whole, joined, split):
        assert_equal(folder, rows(one_rank))
    assert_same_student(whole, one_rank, tmp_path)
    run(training, tmp_path / "untied_whole", **TEN_STEPS | BF16_TEACHER)
    assert_equal(untied, rows(tmp_path / "untied_whole"))
    assert_same_student(untied, tmp_path / "untied_whole", tmp_path)


def test_four_ranks(tied: Material, one_rank: Path, tmp_path: Path) -> None:
    """Two stages with TP 2, and with DP 2, whose optimizer is sharded or not; a checkpoint goes from one to the other."""
    staged = STAGES | LABELS
    split = staged | {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    runs = [
        (tied, tmp_path / "tp", split),
        (tied, tmp_path / "dp", staged),
        (tied, tmp_path / "dp_to_tp", staged | {"train__distributed_optimizer": False, "stop_in": 5}),
        (tied, tmp_path / "dp_to_tp", split),
    ]
    run_ranks(train_here, 4, runs)
    for folder in list(tmp_path.iterdir()):
        assert_equal(folder, rows(one_rank))
        assert_same_student(folder, one_rank, tmp_path)


def test_stages_compare_hidden_states(training: Material, tmp_path: Path) -> None:
    """Pairs on both stages share one projection: with PP 2, PP 2 x TP 2 and PP 2 x DP 2, and after a resume.

    The second model's pair is on the first stage alone. Its widths are equal, and its weight is that of the settings.
    """
    pairs: dict[str, Any] = steps(6) | {"distill__hidden_layers": ["embedding/embedding", "0/1", "1/2"]}
    (tmp_path / "wide").mkdir()
    wide = make_material(tmp_path / "wide", "llama_untied", save_wide)
    alone: dict[str, Any] = steps(3) | {"distill__hidden_layers": ["0/0"], "distill__hidden_weight": 0.5}
    stages: dict[str, Any] = {"parallel__pipeline_model_parallel_size": 2}
    split: dict[str, Any] = stages | {"parallel__tensor_model_parallel_size": 2, "parallel__sequence_parallel": True}
    run(training, tmp_path / "whole", **pairs)
    run(wide, tmp_path / "alone", **alone)
    whole = pairs | stages
    run_ranks(
        train_here,
        2,
        [
            (training, tmp_path / "pp", whole),
            (training, tmp_path / "resumed", whole | {"stop_in": 5}),
            (training, tmp_path / "resumed", whole),
            (training, tmp_path / "joined", whole | {"stop_in": 5}),
            (wide, tmp_path / "alone_pp", alone | stages),
        ],
    )
    run_ranks(
        train_here,
        4,
        [
            (training, tmp_path / "dp", whole | {"stop_in": 5}),
            (training, tmp_path / "dp", pairs | split),
            (training, tmp_path / "dp_plain", whole | {"train__distributed_optimizer": False}),
        ],
    )
    assert run(training, tmp_path / "joined", **pairs)["resumed_at_step"] == 3
    assert rows(tmp_path / "resumed") == rows(tmp_path / "pp")
    for name in ("pp", "joined", "dp", "dp_plain"):
        assert_equal(tmp_path / name, rows(tmp_path / "whole"))
        assert_same_hidden(tmp_path / name, tmp_path / "whole")
        assert_same_student(tmp_path / name, tmp_path / "whole", tmp_path)
    assert_equal(tmp_path / "alone_pp", rows(tmp_path / "alone"))
    assert_same_hidden(tmp_path / "alone_pp", tmp_path / "alone")


def test_a_stage_without_pairs_takes_part(training: Material, tmp_path: Path) -> None:
    """The last stage's copy of the projection has gradients of 0, which DP 2 sums while the backward pass runs."""
    settings: dict[str, Any] = steps(4) | {"distill__hidden_layers": ["0/1"]}
    overlap: dict[str, Any] = {"parallel__pipeline_model_parallel_size": 2, "parallel__overlap_communication": True}
    run(training, tmp_path / "whole", **settings)
    run_ranks(train_here, 4, [(training, tmp_path / "staged", settings | overlap)])
    assert_equal(tmp_path / "staged", rows(tmp_path / "whole"))
    assert_same_hidden(tmp_path / "staged", tmp_path / "whole")


def test_a_pair_of_layers_needs_one_stage(training: Material) -> None:
    """Student: layer 0, layer 1. Teacher: layers 0 and 1, layer 2."""
    student, teacher = HFFolder(training.student).shape, HFFolder(training.teacher).shape
    check_layers(DistillConfig(hidden_layers=["embedding/embedding", "0/1", "1/2"]), student, teacher, 2)
    with pytest.raises(UserError) as refused:
        check_layers(DistillConfig(hidden_layers=["0/1", "1/1"]), student, teacher, 2)
    assert str(refused.value) == (
        "distill.hidden_layers=1/1: parallel.pipeline_model_parallel_size=2 puts the student's layer 1 on stage 1, the "
        "teacher's layer 1 on stage 0, and a pair needs one stage; choose from the teacher's layer 2, or set fewer stages"
    )


def test_stages_read_a_teacher_cache(training: Material, tmp_path: Path) -> None:
    """The last stage reads it. Three held-out sequences on two ranks: one of a rank's sequences fills up its batch."""
    short: dict[str, Any] = {"train__num_tokens": 2 * 8 * SEQ_LENGTH, "data__validation_tokens": 3 * SEQ_LENGTH}
    runs, wanted = [], {}
    for kind in TeachKind:
        cache, staged = tmp_path / f"{kind}_cache", tmp_path / f"{kind}_staged"
        teach(training, cache, **short, teach__kind=kind, teach__draws=20)
        settings: dict[str, Any] = short | {"teacher__cache": str(cache)}
        run(training, tmp_path / f"{kind}_whole", **settings)
        wanted[staged] = rows(tmp_path / f"{kind}_whole")
        runs += [(training, staged, settings | {"parallel__pipeline_model_parallel_size": 2})]
        if kind is TeachKind.hidden:
            wanted[tmp_path / "divided"] = wanted[staged]
            runs += [(training, tmp_path / "divided", settings)]  # data parallel
    run_ranks(train_here, 2, runs)
    for folder, found in wanted.items():
        assert_equal(folder, found)


def test_four_stages_with_unequal_numbers_of_layers(tmp_path: Path) -> None:
    """A teacher of 7 layers (2, 2, 2, 1) and a student of 4: experts, and layers of which every second has a window."""
    kinds = {"experts": {"model_type": "qwen3_moe", **EXPERTS}, "windows": {"model_type": "gemma3_text", **WINDOWS}}
    settings: dict[str, dict[str, Any]] = {
        "experts": {"train__router_aux_loss": 0.5, "data__document_attention": True},
        "windows": {},
    }
    runs = []
    for name, changes in kinds.items():
        (tmp_path / name).mkdir()
        material = make_material(tmp_path / name, "llama_untied", save_deep, **changes)
        run(material, tmp_path / name / "whole", **settings[name])
        staged = settings[name] | {"parallel__pipeline_model_parallel_size": 4}
        runs.append((material, tmp_path / name / "staged", staged))
    run_ranks(train_here, 4, runs)
    for name in kinds:
        assert_equal(tmp_path / name / "staged", rows(tmp_path / name / "whole"))


def test_stages_split_experts(tmp_path: Path) -> None:
    """Two stages, each of two ranks that share the experts; a checkpoint goes on in one process."""
    material = make_material(tmp_path, "llama_untied", save_tiny, **{"model_type": "qwen3_moe", **EXPERTS})
    run(material, tmp_path / "whole")
    split: dict[str, Any] = {"parallel__pipeline_model_parallel_size": 2, "parallel__expert_model_parallel_size": 2}
    runs = [(material, tmp_path / "split", split), (material, tmp_path / "resumed", split | {"stop_in": 5})]
    run_ranks(train_here, 4, runs)
    assert run(material, tmp_path / "resumed")["resumed_at_step"] == 3
    for name in ("split", "resumed"):
        assert_equal(tmp_path / name, rows(tmp_path / "whole"))
        assert_same_student(tmp_path / name, tmp_path / "whole", tmp_path)


def test_validation_keeps_all_stages_busy() -> None:
    """Four batches per stage at a time, and a last one of another size alone; without stages one by one."""
    for num_stages, sizes in ((1, [1] * 11), (2, [8, 2, 1])):
        parts = torch.arange(21).split(2)
        even: Any = SimpleNamespace(
            pp_size=num_stages,
            device=torch.device("cpu"),
            even_parts=lambda rows, size, parts=parts: (
                (part, torch.ones(len(part), dtype=torch.bool)) for part in parts
            ),
        )
        none: Any = None
        assert [len(batches) for batches in Validation(torch.zeros(21, 9), none, 2, even).rounds()] == sizes


def killed_in_step_six(rank: int, world_size: int, material: Material, folder: Path) -> str:
    """The last stage gets SIGKILL; what the first one says."""

    def kill(trainer: Any) -> None:
        trainer.checkpoints.poll(wait=True)
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with before_step(6, kill), pytest.raises(RuntimeError) as error:
        run(material, folder, **STAGES | LABELS)
    return str(error.value)


@pytest.mark.races
def test_a_killed_stage_is_named_and_training_resumes(tied: Material, one_rank: Path, tmp_path: Path) -> None:
    workers, results = start_ranks(killed_in_step_six, 2, free_port(), (tied, tmp_path))
    try:
        rank, answer, trace = results.get()
    finally:
        for worker in workers:
            worker.join(timeout=10)
            worker.kill()
    assert (rank, trace) == (0, None)
    assert answer.startswith(f"rank 0, step 6: rank 1 on {socket.gethostname()} has ended or hangs")
    run_ranks(train_here, 2, [(tied, tmp_path, STAGES | LABELS)])
    assert_equal(tmp_path, rows(one_rank))


def test_the_last_stage_gets_no_layer_of_the_rest() -> None:
    assert [len(layers) for layers in stage_layers(8, 4)] == [2, 2, 2, 2]
    assert [len(layers) for layers in stage_layers(10, 4)] == [2, 3, 3, 2]
    assert stage_layers(3, 2) == [range(2), range(2, 3)]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"eval__training_tasks": ["hellaswag"], "eval__every_tokens": 1024}, "eval.training_tasks"),
        ({"train__router_aux_loss": 0.1, "train__recompute": Recompute.selective}, "train.recompute=selective"),
    ],
)
def test_settings_that_stages_lack_are_refused(settings: dict[str, Any], named: str) -> None:
    material = Material(Path(), Path(), Path())
    check_settings(make_config(material, **settings), distilled=True)
    with pytest.raises(UserError, match=named) as refused:
        check_settings(make_config(material, **STAGES | settings), distilled=True)
    assert "parallel.pipeline_model_parallel_size=2" in str(refused.value)


@pytest.mark.parametrize(("stages", "reason"), [(2, "must divide the number of processes, 1"), (3, "student has only")])
def test_numbers_of_stages_are_refused(training: Material, tmp_path: Path, stages: int, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        run(training, tmp_path, parallel__pipeline_model_parallel_size=stages)
