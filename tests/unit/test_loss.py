"""The fused loss against full logits in float64: every kind, every way of splitting the work, masks, padding, refusals."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron_train.config import DistillConfig, LossKind
from minitron_train.distillation import loss_autograd
from minitron_train.distillation.loss import MAKE_TERM, LossSpec, distillation_loss
from minitron_train.distillation.loss_blocks import Chunking, Projection
from minitron_train.model.vocabulary import LogitMap, OutputLayer, bf16_operands
from minitron_train.planning.timing import LOGIT_PASSES
from minitron_train.runtime.errors import UserError
from tests.support.loss_reference import Case, huber, make_case, reference, relative_error, row_losses, spec_name, specs

CE_ONLY = LossSpec(kd_weight=0, ce_weight=1)


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """The loss works in buffers that start uninitialised: torch fills them with NaN in its deterministic mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def run(case: Case, spec: LossSpec, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Like `reference`, by the function under test."""
    leaves = case.leaves()
    parts = distillation_loss(
        case.student_NH, case.student_VH, case.teacher_ND, case.teacher_VD, labels_N=case.labels_N, loss=spec, **options
    )
    hidden_grad, weight_grad = torch.autograd.grad(parts.total, leaves)
    return parts.total.detach(), hidden_grad, weight_grad


def assert_equal(found: tuple[Tensor, ...], expected: tuple[Tensor, ...], tolerance: float) -> None:
    for name, one, other in zip(("loss", "hidden gradient", "weight gradient"), found, expected, strict=True):
        assert relative_error(one, other) < tolerance, name


@pytest.mark.parametrize("spec", specs(), ids=spec_name)
@pytest.mark.parametrize(
    ("tokens", "student_hidden", "chunking"),
    [
        (20, 64, Chunking()),  # both models' logits fit into the storage of the weight gradient
        (50, 64, Chunking(logit_memory_fraction=0, vocab_tile=40)),  # the student's fit, the teacher's are made again
        (50, 16, Chunking(logit_memory_fraction=0, vocab_tile=33, token_chunk=7)),  # several token chunks; some fit
        (50, 16, Chunking(logit_memory_fraction=0.5, vocab_tile=20)),  # a part is kept beside
        (50, 16, Chunking(logit_memory_fraction=9, token_chunk=1, vocab_tile=1 << 20)),  # all is kept
    ],
)
def test_equals_full_logits(spec: LossSpec, tokens: int, student_hidden: int, chunking: Chunking) -> None:
    case = make_case(tokens, 301, student_hidden, 24)
    assert_equal(run(case, spec, chunking=chunking), reference(case, spec), 1e-12)


@pytest.mark.parametrize("spec", specs(), ids=spec_name)
@pytest.mark.parametrize("chunking", [Chunking(), Chunking(logit_memory_fraction=0, vocab_tile=33, token_chunk=7)])
def test_logits_that_a_family_divides_or_caps(spec: LossSpec, chunking: Chunking) -> None:
    """A student of Granite and a teacher of Gemma 2, and the other way round: the cap is near the logits' size."""
    case, maps = make_case(20, 301, 16, 24), (LogitMap(divisor=0.7), LogitMap(divisor=1.3, softcap=4.0))
    for pair in (maps, maps[::-1]):
        assert_equal(run(case, spec, chunking=chunking, maps=pair), reference(case, spec, maps=pair), 1e-12)


def test_float32_gradients_are_as_exact_as_the_plain_path() -> None:
    """Logits of standard deviation 3, as a language model's are."""
    case = make_case(128, 5000, 128, 128)
    _, hidden_grad, weight_grad = reference(case, LossSpec())
    single = case.to(torch.float32)
    for found, plain, exact in zip(
        run(single, LossSpec())[1:], reference(single, LossSpec())[1:], (hidden_grad, weight_grad), strict=True
    ):
        assert relative_error(found, exact) < min(1e-5, 1.05 * relative_error(plain, exact))


def plain_bfloat16(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients of the forward KL as a training loop in bf16 has them: bf16 products, softmax in fp32, autograd."""
    leaves = case.leaves()
    student_NV = (case.student_NH @ case.student_VH.T).float()
    teacher_NV = (case.teacher_ND @ case.teacher_VD.T).float()
    log_p, log_q = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    hidden_grad, weight_grad = torch.autograd.grad((log_q.exp() * (log_q - log_p)).sum(), leaves)
    return hidden_grad, weight_grad


@pytest.mark.parametrize(
    "chunking", [Chunking(vocab_tile=256), Chunking(vocab_tile=256, token_chunk=20)], ids=["one_chunk", "chunks"]
)
def test_bfloat16_inputs_have_a_float32_softmax(chunking: Chunking) -> None:
    """The loss is exact for the rounded inputs.

    Three roundings to bfloat16 affect the gradients on a CPU: those of p - q, of each product and of the sum. One rounding
    has an error of 1.7e-3 (root mean square). The plain path has an error of 8e-3, because it also rounds the logits.
    """
    case = make_case(64, 3000, 32, 48).to(torch.bfloat16)
    spec = LossSpec(ce_weight=0.5)
    total, hidden_grad, weight_grad = run(case, spec, chunking=chunking)
    expected = reference(case.to(torch.float64), spec)
    assert hidden_grad.dtype == weight_grad.dtype == torch.bfloat16
    assert relative_error(total, expected[0]) < 1e-6
    assert_equal((total, hidden_grad, weight_grad), expected, 3e-3)
    exact = reference(case.to(torch.float64), LossSpec())[1:]
    for found, plain, one in zip(
        run(case, LossSpec(), chunking=chunking)[1:], plain_bfloat16(case), exact, strict=True
    ):
        assert relative_error(found, one) < 0.5 * relative_error(plain, one)


def test_float32_weights_are_never_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only products of bf16 weights and bf16 hidden states may round their operands; the setting is restored on errors."""
    precisions = set()
    original = OutputLayer.logits

    def watch(self: OutputLayer, hidden_NH: Tensor, out_NV: Tensor | None = None) -> Tensor:
        precisions.add(torch.get_float32_matmul_precision())
        return original(self, hidden_NH, out_NV)

    monkeypatch.setattr(OutputLayer, "logits", watch)
    case = make_case(20, 301, 32, 24, torch.float32)
    run(case, LossSpec())
    assert precisions == {"highest"}
    run(replace(case.to(torch.bfloat16), student_NH=case.student_NH, teacher_ND=case.teacher_ND), LossSpec())
    assert precisions == {"highest"}
    run(case.to(torch.bfloat16), LossSpec())
    assert precisions == {"highest", "medium"}
    with pytest.raises(ValueError, match="inside"), bf16_operands():
        raise ValueError("inside")
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.gpu
@pytest.mark.parametrize("kind", list(LossKind), ids=lambda kind: kind.value)
def test_bfloat16_on_a_gpu(kind: LossKind) -> None:
    spec = LossSpec(kind=kind, ce_weight=0.5, top_k=50 if kind is LossKind.top_k_kl else 0)
    case = make_case(300, 20_000, 256, 320).to(torch.bfloat16)
    expected = reference(case.to(torch.float64), spec)
    for chunking in (Chunking(), Chunking(logit_memory_fraction=0, vocab_tile=1536, token_chunk=128)):
        found = tuple(tensor.cpu() for tensor in run(case.to("cuda"), spec, chunking=chunking))
        assert relative_error(found[0], expected[0]) < 1e-5
        assert_equal(found, expected, 5e-3)


def test_mixed_dtypes() -> None:
    """A bfloat16 teacher beside a float32 student."""
    case = make_case(20, 301, 24, 24)
    rounded = case.to(torch.bfloat16).to(torch.float32)
    mixed = Case(
        rounded.student_NH,
        rounded.student_VH,
        rounded.teacher_ND.to(torch.bfloat16),
        rounded.teacher_VD.to(torch.bfloat16),
        case.labels_N,
    )
    assert_equal(run(mixed, LossSpec()), reference(rounded.to(torch.float64), LossSpec()), 1e-5)


@pytest.mark.parametrize("spec", specs()[:7], ids=spec_name)
def test_gradcheck(spec: LossSpec) -> None:
    """Also of a scaled sum: the caller divides by the number of tokens."""
    spec = LossSpec(kind=spec.kind, temperature=spec.temperature, top_k=min(spec.top_k, 5), ce_weight=0.3)
    case = make_case(3, 11, 4, 5)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        options = {"labels_N": case.labels_N, "loss": spec, "chunking": Chunking(vocab_tile=4, token_chunk=2)}
        return distillation_loss(hidden, weight, case.teacher_ND, case.teacher_VD, **options).total / 3

    assert torch.autograd.gradcheck(loss, case.leaves())


def test_masked_tokens_are_not_read() -> None:
    """Their hidden states may be NaN and their labels -100."""
    case = make_case(30, 301, 16, 24)
    mask = torch.arange(30) % 3 != 0
    expected = reference(
        Case(case.student_NH[mask], case.student_VH, case.teacher_ND[mask], case.teacher_VD, case.labels_N[mask]),
        LossSpec(ce_weight=0.5),
    )
    with torch.no_grad():
        for tensor in (case.student_NH, case.teacher_ND):
            tensor[~mask] = float("nan")
        case.labels_N[~mask] = -100
    total, hidden_grad, weight_grad = run(case, LossSpec(ce_weight=0.5), mask_N=mask.float())
    assert_equal((total, hidden_grad[mask], weight_grad), expected, 1e-12)
    assert (hidden_grad[~mask] == 0).all()


def test_no_valid_token() -> None:
    """A rank whose batch is all padding adds nothing, and has gradients to reduce."""
    case = make_case(5, 301, 16, 16)
    for spec in specs():
        total, hidden_grad, weight_grad = run(case, spec, mask_N=torch.zeros(5))
        assert total == 0 and not hidden_grad.any() and not weight_grad.any()
        assert weight_grad.shape == case.student_VH.shape


def test_parts() -> None:
    """Unweighted sums for the log, with the temperature's factor; only the total carries gradients."""
    case = make_case(30, 301, 16, 24)
    spec = LossSpec(temperature=2, temperature_squared=True, kd_weight=0.4, ce_weight=0.6)
    mask = torch.arange(30) < 20
    case.leaves()
    inputs = case.student_NH, case.student_VH, case.teacher_ND, case.teacher_VD
    parts = distillation_loss(*inputs, labels_N=case.labels_N, loss=spec, mask_N=mask)
    kd_N, ce_N = row_losses(case, spec)
    torch.testing.assert_close(parts.kd_sum, kd_N[mask].sum())
    torch.testing.assert_close(parts.ce_sum, ce_N[mask].sum())
    torch.testing.assert_close(parts.total, 0.4 * parts.kd_sum + 0.6 * parts.ce_sum)
    assert parts.num_valid == 20
    assert parts.total.requires_grad and not parts.kd_sum.requires_grad and not parts.ce_sum.requires_grad


def test_without_a_teacher() -> None:
    case = make_case(30, 301, 16, 24)
    leaves = case.leaves()
    parts = distillation_loss(case.student_NH, case.student_VH, None, None, labels_N=case.labels_N, loss=CE_ONLY)
    assert_equal((parts.total, *torch.autograd.grad(parts.total, leaves)), reference(case, CE_ONLY), 1e-12)
    assert parts.kd_sum == 0


@pytest.mark.parametrize("spec", specs(), ids=spec_name)
def test_padded_vocabularies(spec: LossSpec) -> None:
    """Padding rows, of different number in the two models and full of large values, change nothing."""
    case = make_case(20, 301, 32, 24)
    case.labels_N.clamp_(max=289)
    padded = Case(
        case.student_NH,
        torch.cat([case.student_VH[:290], torch.full((30, 32), 1e4, dtype=torch.float64)]),
        case.teacher_ND,
        torch.cat([case.teacher_VD[:290], torch.full((94, 24), -1e4, dtype=torch.float64)]),
        case.labels_N,
    )
    total, hidden_grad, weight_grad = run(padded, spec, vocab_size=290, chunking=Chunking(vocab_tile=64))
    expected = reference(case, spec, vocab_size=290)
    assert_equal((total, hidden_grad, weight_grad[:290]), (*expected[:2], expected[2][:290]), 1e-12)
    assert (weight_grad[290:] == 0).all()


def test_large_logits_do_not_overflow() -> None:
    """A growing maximum over the tiles rescales the sums; rows of logits around ±1000 stay exact."""
    case = make_case(16, 301, 16, 16)
    ramp = torch.linspace(-1000, 1000, 301, dtype=torch.float64)[:, None]
    shifted = Case(
        torch.cat([case.student_NH, torch.ones(16, 1, dtype=torch.float64)], dim=1),
        torch.cat([case.student_VH, ramp], dim=1),
        torch.cat([case.teacher_ND, torch.ones(16, 1, dtype=torch.float64)], dim=1),
        torch.cat([case.teacher_VD, ramp], dim=1),
        case.labels_N,
    )
    for spec in (LossSpec(), LossSpec(kind=LossKind.reverse_kl), LossSpec(kind=LossKind.jsd), CE_ONLY):
        found = run(shifted.to(torch.float32), spec, chunking=Chunking(vocab_tile=30))
        assert relative_error(found[0], reference(shifted, spec)[0]) < 1e-3
        assert all(tensor.isfinite().all() for tensor in found)


def test_frozen_parts() -> None:
    """Only what asks for gradients gets them; a frozen output layer does without the gradient's memory."""
    case = make_case(20, 301, 32, 24)
    _, hidden_grad, weight_grad = reference(case, LossSpec())
    teacher = (case.teacher_ND, case.teacher_VD)
    total = distillation_loss(case.student_NH, case.student_VH.detach(), *teacher, loss=LossSpec()).total
    assert relative_error(torch.autograd.grad(total, case.student_NH)[0], hidden_grad) < 1e-12
    total = distillation_loss(case.student_NH.detach(), case.student_VH, *teacher, loss=LossSpec()).total
    assert relative_error(torch.autograd.grad(total, case.student_VH)[0], weight_grad) < 1e-12
    with torch.no_grad():
        assert not distillation_loss(case.student_NH, case.student_VH, *teacher, loss=LossSpec()).total.requires_grad


def test_second_backward_pass_and_changed_weights() -> None:
    """What the first pass used up is computed again; a weight changed since the forward pass is refused."""
    case = make_case(20, 301, 32, 24)
    leaves = case.leaves()

    inputs = case.student_NH, case.student_VH, case.teacher_ND, case.teacher_VD

    def total() -> Tensor:
        return distillation_loss(*inputs, loss=LossSpec()).total

    loss = total()
    first = torch.autograd.grad(2 * loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, 2 * other)
    loss = total()
    with torch.no_grad():
        leaves[1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("tokens", "student_hidden", "fraction", "expected"),
    [
        (64, 128, 0.0, {"student": 1.0, "teacher": 1.0}),  # 2 N <= H: nothing is computed twice
        (64, 64, 0.0, {"student": 1.0, "teacher": 2.0}),  # N <= H: the student's logits wait in the gradient's storage
        (64, 32, 0.0, {"student": 2.0, "teacher": 2.0}),
        (64, 64, 0.6, {"student": 1.0, "teacher": 1.5}),  # half of the teacher's are kept beside
    ],
)
def test_how_often_logits_are_computed(
    monkeypatch: pytest.MonkeyPatch, tokens: int, student_hidden: int, fraction: float, expected: dict[str, float]
) -> None:
    case = make_case(tokens, 4000, student_hidden, 16, torch.float32)
    counts = {"student": 0.0, "teacher": 0.0}
    original = Projection.logits

    def count(self: Projection, rows: slice, columns: slice, out: Tensor) -> None:
        counts["student" if self.width == student_hidden else "teacher"] += out.numel() / (tokens * 4000)
        original(self, rows, columns, out)

    monkeypatch.setattr(Projection, "logits", count)
    run(case, LossSpec(), chunking=Chunking(logit_memory_fraction=fraction, vocab_tile=100))
    assert counts == pytest.approx(expected, abs=0.051)


def peak_bytes(case: Case, chunking: Chunking) -> int:
    """The most memory alive at once between the call and the end of the backward pass, as torch's allocator counts."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run(case, LossSpec(), chunking=chunking)
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.6])
def test_memory_stays_within_the_budget(fraction: float, dtype: torch.dtype) -> None:
    """Beyond the two gradients, which are results, and a few rows of bookkeeping."""
    tokens, vocab, hidden = 128, 20_000, 64
    case = make_case(tokens, vocab, hidden, 64, dtype)
    peak = peak_bytes(case, Chunking(logit_memory_fraction=fraction))
    gradients, bookkeeping, logits = dtype.itemsize * hidden * (vocab + tokens), 300_000, 4 * tokens * vocab
    assert gradients < peak < gradients + bookkeeping + fraction * logits


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (LossSpec(temperature=0), "temperature=0"),
        (LossSpec(kind=LossKind.mse, temperature=2), "temperature=2: must be 1 with loss=mse"),
        (LossSpec(kind=LossKind.top_k_kl), "top_k=0"),
        (LossSpec(top_k=5), "top_k=5"),
        (LossSpec(kind=LossKind.top_k_kl, top_k=302), "top_k=302: the vocabulary has 301"),
        (LossSpec(jsd_beta=1), "jsd_beta=1"),
        (LossSpec(kd_weight=-1), "kd_weight=-1"),
        (LossSpec(ce_weight=-1), "ce_weight=-1"),
        (LossSpec(kd_weight=0), "kd_weight=0: must not be 0 together with ce_weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_settings(spec: LossSpec, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(make_case(4, 301, 8, 8), spec)


@pytest.mark.parametrize("kind", LossKind)
def test_a_kind_is_complete(kind: LossKind) -> None:
    """A new kind needs all of these (CONTRIBUTING.md)."""
    docs = Path(__file__).parents[2] / "docs"
    lacking = {
        "MAKE_TERM of distillation/loss.py": kind not in MAKE_TERM,
        "LOGIT_PASSES of planning/timing.py": kind.value not in LOGIT_PASSES,
        "specs() of tests/support/loss_reference.py": kind not in [spec.kind for spec in specs()],
        "the table of losses in docs/method.md": f"| `{kind.value}` |" not in (docs / "method.md").read_text(),
        "the row `kind` of docs/python.md": f'`"{kind.value}"`' not in (docs / "python.md").read_text(),
    }
    assert not any(lacking.values()), [place for place, missing in lacking.items() if missing]


def test_the_section_has_the_rules_of_the_loss() -> None:
    with pytest.raises(UserError, match=r"distill.temperature=2: must be 1 with distill.loss=mse"):
        DistillConfig(loss=LossKind.mse, temperature=2).validate()
    with pytest.raises(UserError, match=r"distill.vocab_tile=0: must be at least 1"):
        DistillConfig(vocab_tile=0).validate()


def test_refused_inputs() -> None:
    case = make_case(4, 301, 8, 8)
    weights = (case.student_NH, case.student_VH, case.teacher_ND)
    with pytest.raises(UserError, match="needs a teacher"):
        distillation_loss(*weights[:2], None, None, loss=LossSpec())
    with pytest.raises(UserError, match="needs labels"):
        distillation_loss(*weights, case.teacher_VD, loss=LossSpec(ce_weight=1))
    with pytest.raises(UserError, match=r"student 301, teacher 290.*give vocab_size"):
        distillation_loss(*weights, case.teacher_VD[:290], loss=LossSpec())
    with pytest.raises(UserError, match=r"vocab_size=300.*student 301, teacher 290"):
        distillation_loss(*weights, case.teacher_VD[:290], loss=LossSpec(), vocab_size=300)
    case.labels_N[2] = 301
    with pytest.raises(UserError, match=r"outside 0 … 300"):
        distillation_loss(*weights, case.teacher_VD, loss=LossSpec(ce_weight=1), labels_N=case.labels_N)
    with pytest.raises(UserError, match="logit_memory_fraction=-1"):
        run(case, LossSpec(), chunking=Chunking(logit_memory_fraction=-1))
    with pytest.raises(UserError, match="vocab_tile=0"):
        run(case, LossSpec(), chunking=Chunking(vocab_tile=0))


def test_a_function_of_logits_is_chunked_over_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven tokens at a time; their gradients add up to those of all at once."""
    seen: list[tuple[int, ...]] = []

    def loss(student_CV: Tensor, teacher_CV: Tensor) -> Tensor:
        seen.append(tuple(student_CV.shape))
        return huber(student_CV, teacher_CV)

    monkeypatch.setattr(loss_autograd, "CHUNK_BYTES", 7 * 290 * 8)
    case = make_case(50, 301, 16, 24)
    case.labels_N.clamp_(max=289)
    spec = LossSpec(function=loss, ce_weight=0.5)
    assert_equal(run(case, spec, vocab_size=290), reference(case, LossSpec(function=huber, ce_weight=0.5), 290), 1e-12)
    assert seen[:8] == [(7, 290)] * 7 + [(1, 290)]


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda s, t: (s - t).square().mean(),
            r"returned a tensor of \[\] for 20 tokens; it must return one loss per token",
        ),
        (lambda s, t: None, "returned NoneType for 20 tokens"),
        (
            lambda s, t: (s.detach() - t).square().mean(1),
            "returned a loss without gradients; compute it from the student's",
        ),
    ],
)
def test_a_function_without_a_loss_per_token_or_gradients_is_refused(function: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run(make_case(20, 301, 16, 24), LossSpec(function=function))


def test_a_function_goes_with_no_other_kind() -> None:
    with pytest.raises(UserError, match="replaces kind, temperature and top_k"):
        LossSpec(function=huber, temperature=2.0).validate()
