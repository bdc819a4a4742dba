"""megatron-core's speed switches: when they are on, and that the paths which a CPU can take compute the same."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import megatron.core.tensor_parallel.layers as megatron_layers
import pytest
import torch
from torch import Tensor

from minitron_train.arch import Shape
from minitron_train.arch.rules import check_fp8
from minitron_train.config import Config
from minitron_train.model.build import fused_arguments, transformer_config
from minitron_train.parallel import switches
from minitron_train.parallel.switches import CONNECTIONS, PLAIN_PATHS, Switches, connections_warning
from minitron_train.runtime.errors import UserError
from minitron_train.train.assemble import FP8
from minitron_train.train.settings import check_settings, deciding_settings
from tests.support.training import Material, assert_equal, make_config, rows, run

SIZES: dict[str, Any] = {
    "num_layers": 1,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
}


def shape(architecture: str, **changes: Any) -> Shape:
    return Shape(architecture=architecture, kv_channels=16, vocab_size=64, **SIZES | changes)


def ranks(device: str = "cuda", *, dp: int = 1, tp: int = 1) -> Any:
    return SimpleNamespace(device=torch.device(device), dp_size=dp, tp_size=tp)


@pytest.mark.parametrize(
    ("device", "dp", "wanted", "sharded", "found"),
    [
        ("cuda", 2, None, True, (True, True)),
        ("cuda", 2, None, False, (True, False)),
        ("cuda", 2, False, True, (False, False)),
        ("cuda", 1, True, True, (False, False)),
        ("cpu", 2, None, True, (False, False)),
        ("cpu", 2, True, True, (True, True)),
    ],
)
def test_when_communication_overlaps(
    device: str, dp: int, wanted: bool | None, sharded: bool, found: tuple[bool, bool]
) -> None:
    config = Config()
    config.parallel.overlap_communication, config.train.distributed_optimizer = wanted, sharded
    switched = Switches.of(config, ranks(device, dp=dp))
    assert (switched.gradient_overlap, switched.weight_overlap) == found
    assert ("gradient sums overlap" in switched.words) is found[0]


def test_too_many_connections_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    overlap = Switches(gradient_overlap=True)
    monkeypatch.delenv(CONNECTIONS, raising=False)
    assert connections_warning(ranks(tp=1), PLAIN_PATHS) is None
    assert connections_warning(ranks("cpu", tp=2), overlap) is None
    for groups, switched in ((ranks(tp=2), PLAIN_PATHS), (ranks(tp=1), overlap)):
        assert "CUDA_DEVICE_MAX_CONNECTIONS is not set; export" in str(connections_warning(groups, switched))
    monkeypatch.setenv(CONNECTIONS, "8")
    assert "CUDA_DEVICE_MAX_CONNECTIONS is 8; export" in str(connections_warning(ranks(tp=2), PLAIN_PATHS))
    monkeypatch.setenv(CONNECTIONS, "1")
    assert connections_warning(ranks(tp=2), overlap) is None


def test_the_fused_gradient_kernel_is_used_where_it_is_installed(
    training: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel in its place that does what APEX's does on a GPU: it adds the product to the fp32 sum."""
    assert not Switches.of(Config(), ranks("cpu")).fused_gradients
    run(training, tmp_path / "plain")
    num_calls = 0

    def add_product(input_NH: Tensor, grad_NF: Tensor, sum_FH: Tensor) -> None:
        nonlocal num_calls
        num_calls += 1
        sum_FH.addmm_(grad_NF.T, input_NH)

    monkeypatch.setattr(switches, "has_fused_gradients", lambda device: True)
    monkeypatch.setattr(megatron_layers, "_grad_accum_fusion_available", True)
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    monkeypatch.setattr(megatron_layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    run(training, tmp_path / "fused")
    assert num_calls == 8 * 4 * 2 * 4, "steps, micro-batches, layers, linears"
    assert_equal(tmp_path / "fused", rows(tmp_path / "plain"), 1e-6)


def test_fused_kernels_of_transformer_engine() -> None:
    """megatron-core accepts the arguments; without the package it has no rotary kernel."""
    for architecture, swiglu in (("llama", True), ("nemotron", False), ("gemma2", False)):
        found = fused_arguments(shape(architecture))
        assert found == {"bias_activation_fusion": swiglu, "bias_dropout_fusion": True, "apply_rope_fusion": False}
        config = transformer_config(
            shape(architecture), tp=1, sequence_parallel=False, dtype=torch.bfloat16, **found, **FP8
        )
        assert config.bias_activation_fusion is swiglu and config.fp8 == "e4m3"


def test_an_fp8_teacher_is_refused_without_transformer_engine() -> None:
    config = make_config(Material(Path(), Path(), Path()), distill__teacher_fp8=True)
    check_settings(config, distilled=False)
    with pytest.raises(UserError, match=r"distill.teacher_fp8=true: only Transformer Engine's layers multiply in FP8"):
        check_settings(config, distilled=True)
    check_fp8(shape("llama"), 2, 32)
    with pytest.raises(UserError, match="the teacher's ffn_hidden_size / TP is 24, no multiple of 16; remove it"):
        check_fp8(shape("llama"), 4, 32)


def test_earlier_checkpoints_have_no_record_of_fp8() -> None:
    config = Config()
    assert "teacher_fp8" not in deciding_settings(config, distilled=True)["distill"]
    config.distill.teacher_fp8 = True
    assert deciding_settings(config, distilled=True)["distill"]["teacher_fp8"] is True
