"""Training of dense layers among layers with experts: every layout gives the losses and the student of one process."""

from pathlib import Path
from typing import Any

import pytest

from tests.distributed.test_pipeline import assert_same_student, save_deep
from tests.support.helpers import run_ranks
from tests.support.models import EXPERTS
from tests.support.training import SEQ_LENGTH, assert_equal, make_material, rows, run, train_here

SHORT: dict[str, Any] = {"train__num_tokens": 4 * 8 * SEQ_LENGTH}
STAGES: dict[str, Any] = SHORT | {"parallel__pipeline_model_parallel_size": 2}
SPLIT: dict[str, Any] = {"parallel__expert_model_parallel_size": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"mlp_only_layers": [1, 2], "intermediate_size": 40},
    "qwen2_moe": {"decoder_sparse_step": 2, "intermediate_size": 40, "shared_expert_intermediate_size": 40},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_layouts_agree(tmp_path: Path, family: str) -> None:
    """Teachers of seven layers, students of four. With two stages, a stage of Qwen3-MoE's has no dense layer.

    Ranks share experts, halves of every linear, or stages. A checkpoint of stages is resumed in one process.
    """
    material = make_material(
        tmp_path, "llama_untied", save_deep, **EXPERTS, **FAMILIES[family], model_type=family, num_experts=6
    )
    whole = tmp_path / "whole"
    run(material, whole, **SHORT)
    layouts: dict[str, dict[str, Any]] = {
        "stages_and_experts": STAGES | SPLIT,
        "stages_and_linears": STAGES | {"parallel__tensor_model_parallel_size": 2, "stop_in": 4},
        "linears_and_experts": SHORT | SPLIT | {"parallel__tensor_model_parallel_size": 2},
    }
    run_ranks(train_here, 4, [(material, tmp_path / name, settings) for name, settings in layouts.items()])
    assert run(material, tmp_path / "stages_and_linears", **SHORT)["resumed_at_step"] == 3
    for name in layouts:
        assert_equal(tmp_path / name, rows(whole))
        assert_same_student(tmp_path / name, whole, tmp_path)
