"""On a CUDA device: Transformer Engine's layers, an FP8 teacher and fused kernels compute what the plain paths compute.

These tests have only been imported: no machine with Transformer Engine or APEX was at hand.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_train.parallel import switches
from minitron_train.train.assemble import FIRST_WITH_FP8, FP8
from tests.support.models import save_tiny
from tests.support.training import Material, make_material, rows, run

pytestmark = pytest.mark.gpu
TOKENS_BS = torch.arange(2 * 32).view(2, 32) * 7 % 128  # 64 tokens: FP8 products need multiples of 16
SIZES: dict[str, Any] = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
BF16_ERROR, FP8_ERROR = 0.02, 0.2  # largest accepted relative error of logits: two bf16 paths, and FP8 against bf16


@pytest.fixture
def engine() -> None:
    """Skip without Transformer Engine."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("the package transformer_engine is not installed")


@pytest.fixture
def fp8(engine: None) -> None:
    """Skip on a GPU without FP8 products."""
    if torch.cuda.get_device_capability() < FIRST_WITH_FP8:
        pytest.skip(f"{torch.cuda.get_device_name()} has no FP8 products")


def logits_of(folder: Path, **arguments: Any) -> Tensor:
    """fp32 logits [S, B, V] of a folder's model in bf16, built with further arguments of `build`."""
    from minitron_train.config import ParallelConfig
    from minitron_train.hf import HFFolder
    from minitron_train.model.build import build
    from minitron_train.model.load import load_weights
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import World

    with start(ParallelConfig(), World(), seed=1) as groups, torch.no_grad():
        files = HFFolder(folder)
        model = build(files.shape, dtype=torch.bfloat16, **arguments).eval()
        load_weights(model, files.table, files.shape, files)
        return model.logits(model(TOKENS_BS.to(groups.device))).float().cpu()


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("family", ["llama_untied", "nemotron"])
def test_transformer_engine_gives_the_same_logits(engine: None, tmp_path: Path, family: str) -> None:
    """Llama takes the fused SwiGLU kernel, Nemotron has squared ReLU and zero-centred gains."""
    folder = save_tiny(family, tmp_path / family, **SIZES)
    assert relative_error(logits_of(folder, transformer_engine=True), logits_of(folder)) < BF16_ERROR


def test_fp8_logits_are_near_those_of_bf16(fp8: None, tmp_path: Path) -> None:
    """They differ, or the products were not computed in FP8."""
    folder = save_tiny("llama_untied", tmp_path / "teacher", **SIZES)
    error = relative_error(
        logits_of(folder, transformer_engine=True, **FP8), logits_of(folder, transformer_engine=True)
    )
    assert 1e-4 < error < FP8_ERROR


@pytest.fixture
def material(tmp_path: Path) -> Material:
    return make_material(tmp_path, "llama_untied")


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder) if "loss" in row]


def test_training_with_fused_kernels_and_an_fp8_teacher(fp8: None, material: Material, tmp_path: Path) -> None:
    """Eight steps with Transformer Engine's layers, with and without the FP8 teacher, follow those without it."""
    from minitron_train.config import Precision

    bf16: dict[str, Any] = {"train__precision": Precision.bf16}
    fused = bf16 | {"train__transformer_engine": True}
    for name, settings in (("plain", bf16), ("fused", fused), ("fp8", fused | {"distill__teacher_fp8": True})):
        run(material, tmp_path / name, **settings)
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=BF16_ERROR)
    assert losses(tmp_path / "fp8") == pytest.approx(losses(tmp_path / "plain"), rel=FP8_ERROR)
    assert losses(tmp_path / "fp8") != losses(tmp_path / "fused")


def test_the_kernel_for_weight_gradients(
    material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """APEX's kernel adds to the fp32 sum what the plain path computes first in bf16."""
    from minitron_train.config import Precision

    if not switches.has_fused_gradients(torch.device("cuda")):
        pytest.skip("APEX's kernel fused_weight_gradient_mlp_cuda is not installed")
    run(material, tmp_path / "fused", train__precision=Precision.bf16)
    assert "weight gradients are added by APEX's kernel" in capsys.readouterr().out
    monkeypatch.setattr(switches, "has_fused_gradients", lambda device: False)
    run(material, tmp_path / "plain", train__precision=Precision.bf16)
    assert losses(tmp_path / "fused") == pytest.approx(losses(tmp_path / "plain"), rel=BF16_ERROR)
