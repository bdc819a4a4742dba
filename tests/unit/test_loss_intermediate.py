"""Losses between hidden states: values by hand, one shared projection, masks, the dynamic weight."""

import math

import pytest
import torch

from minitron_train.config import HiddenLossKind
from minitron_train.distillation.intermediate import HiddenProjection, hidden_loss, intermediate_loss
from minitron_train.runtime.errors import UserError
from minitron_train.train.loop import ratio


def test_values_by_hand() -> None:
    student = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    teacher = torch.tensor([[4.0, 3.0], [0.0, 5.0]])
    assert hidden_loss(student, teacher, None, HiddenLossKind.cosine).item() == pytest.approx(1 - 24 / 25)
    assert hidden_loss(student, teacher, None, HiddenLossKind.mse).item() == pytest.approx(1 + 4.5)
    mask = torch.tensor([0, 1])
    assert hidden_loss(student, teacher, mask, HiddenLossKind.mse).item() == pytest.approx(4.5)


def test_bfloat16_is_compared_in_float32() -> None:
    student, teacher = torch.randn(50, 300).bfloat16(), torch.randn(50, 300).bfloat16()
    found = hidden_loss(student, teacher, None, HiddenLossKind.cosine)
    expected = hidden_loss(student.double(), teacher.double(), None, HiddenLossKind.cosine)
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_one_projection_for_all_pairs_and_their_mean() -> None:
    """Gradients of both pairs meet in the one matrix; the teacher has none."""
    torch.manual_seed(0)
    projection = HiddenProjection(4, 6).double()
    assert [tuple(p.shape) for p in projection.parameters()] == [(6, 4)]
    students = [torch.randn(5, 4, dtype=torch.float64) for _ in range(2)]
    teachers = [torch.randn(5, 6, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    mask = torch.tensor([1, 1, 0, 1, 0])
    for kind in HiddenLossKind:
        loss = intermediate_loss(list(zip(students, teachers, strict=True)), projection, mask_N=mask, kind=kind)
        parts = []
        for student, teacher in zip(students, teachers, strict=True):
            projected, teacher = (student @ projection.linear.weight.T)[mask > 0], teacher[mask > 0]
            if kind is HiddenLossKind.mse:
                parts.append(((projected - teacher) ** 2).sum() / 6)
            else:
                parts.append((1 - (projected * teacher).sum(1) / projected.norm(dim=1) / teacher.norm(dim=1)).sum())
        torch.testing.assert_close(loss, (parts[0] + parts[1]) / 2)
        loss.backward()
    assert projection.linear.weight.grad is not None and all(teacher.grad is None for teacher in teachers)


def test_equal_widths_need_no_projection() -> None:
    projection = HiddenProjection(6, 6)
    assert not list(projection.parameters())
    hidden = torch.randn(3, 6)
    assert projection(hidden) is hidden
    with pytest.raises(UserError, match="hidden_size=8: wider than the teacher's 6"):
        HiddenProjection(8, 6)
    with pytest.raises(UserError, match="none are named"):
        intermediate_loss([], projection)


def test_dynamic_weight() -> None:
    """alpha L_is equals L_logits; nothing to weigh is weighed with 0."""
    assert ratio(3.0, 0.5) * 0.5 == 3.0
    assert ratio(3.0, 0.0) == ratio(3.0, 5e-324) == ratio(math.nan, 0.5) == 0.0
