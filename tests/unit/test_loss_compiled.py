"""The compiled forward KL against full logits in float64: its passes, its fallback, and where it is chosen."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_train.config import DistillConfig
from minitron_train.distillation import loss_compiled
from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking
from minitron_train.distillation.loss_compiled import Compiled, CompiledForwardKL, forward_kl
from minitron_train.planning.timing import logit_passes
from tests.support.loss_reference import Case, make_case, reference, relative_error
from tests.support.passes import compiled_passes

COMPILED = LossSpec(compile_loss=True)
SMALL_BLOCKS = Chunking(logit_memory_fraction=0, vocab_tile=200, token_chunk=30)  # 100 tokens: the last chunk has 25


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    """Kernels of one test are not those of another."""
    loss_compiled.kernels.cache_clear()
    yield
    loss_compiled.kernels.cache_clear()
    torch._dynamo.reset()


def run(case: Case, spec: LossSpec, chunking: Chunking = SMALL_BLOCKS) -> tuple[Tensor, Tensor, Tensor]:
    leaves = case.leaves()
    parts = distillation_loss(
        case.student_NH, case.student_VH, case.teacher_ND, case.teacher_VD, loss=spec, chunking=chunking
    )
    hidden_grad, weight_grad = torch.autograd.grad(parts.total, leaves)
    return parts.total.detach(), hidden_grad, weight_grad


def test_the_traced_kernels_give_the_eager_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a C++ compiler: traced with dynamic shapes, so that blocks of several shapes share one graph."""
    original, calls = torch.compile, []

    def traced(function: Any, **options: Any) -> Any:
        return original(function, backend="aot_eager", fullgraph=True, **options)

    monkeypatch.setattr(torch, "compile", traced)
    monkeypatch.setattr(loss_compiled, "say", calls.append)
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    for temperature in (1.0, 1.7):
        torch._dynamo.reset()
        spec, case = LossSpec(compile_loss=True, temperature=temperature), make_case(100, 700, 16, 24, torch.float32)
        exact = reference(case.to(torch.float64), spec)
        eager = run(case, replace(spec, compile_loss=False))
        for name, one, plain, expected in zip(("loss", "hidden", "weight"), run(case, spec), eager, exact, strict=True):
            assert relative_error(one, expected) < 1.1 * relative_error(plain, expected) + 1e-7, name
    assert not calls


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_the_plan_counts_the_passes_of_the_compiled_kernels() -> None:
    """The C++ kernels are as exact as the eager path, and their code reads and writes what the plan assumes."""
    from torch._inductor.utils import run_and_get_code

    case = make_case(100, 700, 16, 24, torch.float32)
    exact, eager = reference(case.to(torch.float64), COMPILED), run(case, LossSpec(compile_loss=False))
    found, codes = run_and_get_code(run, case, COMPILED)
    for name, one, plain, expected in zip(("loss", "hidden", "weight"), found, eager, exact, strict=True):
        assert relative_error(one, expected) < 1.1 * relative_error(plain, expected) + 1e-7, name
    assert sum(map(compiled_passes, codes)) == logit_passes(DistillConfig(compile_loss=True))


def broken(function: Any, **_: Any) -> Any:
    """A compiler that is not installed: it fails at the first call."""

    def call(*args: Any) -> Any:
        raise RuntimeError("no C++ compiler")

    return call


def test_without_a_compiler_the_loss_is_the_eager_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Bit for bit, in fp32 and bf16, and each of the two kernels says it once."""
    lines: list[str] = []
    monkeypatch.setattr(loss_compiled, "say", lines.append)
    monkeypatch.setattr(torch, "compile", broken)
    for dtype in (torch.float32, torch.bfloat16):
        case = make_case(100, 700, 16, 24, dtype)
        for one, other in zip(run(case, COMPILED), run(case, LossSpec(compile_loss=False)), strict=True):
            assert torch.equal(one, other)
    assert lines == ["distillation loss: not compiled (RuntimeError); its passes are not fused"] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_kernel_that_is_compiled_wrongly_is_replaced(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """At its first call; also a kernel that writes into its argument."""
    lines: list[str] = []
    monkeypatch.setattr(loss_compiled, "say", lines.append)

    def miscompiled(function: Any, **_: Any) -> Any:
        def call(*args: Tensor) -> Any:
            result = function(*args)
            return result.mul_(1.05) if isinstance(result, Tensor) else (*result[:-1], result[-1] * 1.05)

        return call

    monkeypatch.setattr(torch, "compile", miscompiled)
    case = make_case(100, 700, 16, 24, dtype)
    for one, other in zip(run(case, COMPILED), run(case, LossSpec(compile_loss=False)), strict=True):
        assert torch.equal(one, other)
    assert lines == ["distillation loss: not compiled (its result was wrong); its passes are not fused"] * 2


def test_errors_of_a_compiled_kernel_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a failure to compile is replaced by the eager path, and never a lack of memory."""

    def positive(x: Tensor) -> Tensor:
        if x.sum() < 0:
            raise ValueError("negative")
        return x

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    kernel = Compiled(positive)
    assert kernel(torch.ones(1)) == 1
    with pytest.raises(ValueError, match="negative"):
        kernel(-torch.ones(1))

    def exhausted(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    with pytest.raises(torch.OutOfMemoryError):
        Compiled(exhausted)(torch.ones(1))


def test_a_cpu_compiles_on_request_only() -> None:
    like_N = torch.empty(4)
    assert not isinstance(forward_kl(like_N, 1.0, None), CompiledForwardKL)
    assert not isinstance(forward_kl(like_N, 1.0, False), CompiledForwardKL)
    assert isinstance(forward_kl(like_N, 1.0, True), CompiledForwardKL)


@pytest.mark.gpu
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_on_a_gpu(dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA compiles by default; nothing falls back."""
    monkeypatch.setattr(loss_compiled, "say", pytest.fail)
    spec, case = LossSpec(temperature=temperature), make_case(300, 20_000, 256, 320).to(dtype)
    expected = reference(case.to(torch.float64), spec)
    for chunking in (Chunking(), Chunking(logit_memory_fraction=0, vocab_tile=1536, token_chunk=128)):
        found = [tensor.cpu() for tensor in run(case.to("cuda"), spec, chunking)]
        assert relative_error(found[0], expected[0]) < 1e-5
        assert all(relative_error(*pair) < 5e-3 for pair in zip(found[1:], expected[1:], strict=True))
