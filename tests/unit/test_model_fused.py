"""Functions with their own backward pass: values and gradients of the plain formula under autograd."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from minitron_train.config import ParallelConfig, Recompute
from minitron_train.model import causal_attention as attention
from minitron_train.model.build import build
from minitron_train.model.fused import rms_norm, squared_relu, swiglu
from minitron_train.parallel.groups import start
from minitron_train.runtime.launch import World
from minitron_train.train.optim import RECOMPUTE
from tests.unit.test_arch import SMOLLM2

Function = Callable[..., Tensor]


def plain_swiglu(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate) * up


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def plain_attention(query: Tensor, key: Tensor, value: Tensor, window: int = 99) -> Tensor:
    heads = query.shape[2] // key.shape[2]
    key, value = (x.repeat_interleave(heads, dim=2) for x in (key, value))
    scores = torch.einsum("qbnd,kbnd->bnqk", query, key) / query.shape[-1] ** 0.5
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril().triu(1 - window)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bnqk,kbnd->qbnd", weights, value).flatten(2)


QKV = [(21, 3, 6, 8), (21, 3, 2, 8), (21, 3, 2, 8)]
CASES: dict[str, tuple[Function, Function, list[tuple[int, ...]]]] = {
    "squared_relu": (squared_relu, lambda x: x.relu().square(), [(5, 3, 16)]),
    "swiglu": (swiglu, plain_swiglu, [(5, 3, 32)]),
    "rms_norm": (lambda x, weight: rms_norm(x, weight, 1e-5), plain_norm, [(5, 3, 24), (24,)]),
    "attention": (attention.causal_attention, plain_attention, QKV),
    **{
        f"attention within {w}": (
            partial(attention.causal_attention, window=w),
            partial(plain_attention, window=w),
            QKV,
        )
        for w in (1, 5, 11, 20)
    },
}
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2}  # of the root mean square


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of queries, the last of them shorter."""
    monkeypatch.setattr(attention, "BLOCK_TOKENS", 8)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    function, plain, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found, wanted = function(*inputs), plain(*wide)
    grad = torch.randn_like(found)
    got = [found, *torch.autograd.grad(found, inputs, grad)]
    for one, other in zip(got, [wanted, *torch.autograd.grad(wanted, wide, grad.double())], strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() <= TOLERANCE[dtype] * other.norm()


@pytest.mark.parametrize("name", CASES)
def test_no_more_is_kept_than_the_inputs(name: str) -> None:
    """Nothing without gradients; otherwise nothing as large as the input, except the input or one tensor in its place."""
    function, _, shapes = CASES[name]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        function(*(torch.randn(shape) for shape in shapes))
        assert not kept
        function(*(torch.randn(shape, requires_grad=True) for shape in shapes))
    assert len([x for x in kept if x.shape in [torch.Size(shape) for shape in shapes]]) == len(shapes)
    assert all(x.shape in [torch.Size(shape) for shape in shapes] or x.shape[-1] == 1 for x in kept)


def gradients(recompute: Recompute) -> dict[str, Tensor]:
    """Of a small model in bf16 on fixed tokens."""
    shape = SMOLLM2.smaller(num_layers=2, hidden_size=64, ffn_hidden_size=96, num_attention_heads=6)
    torch.manual_seed(0)
    model = build(shape, dtype=torch.bfloat16, **RECOMPUTE[recompute]).train()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model(torch.arange(40).view(2, 20)).float().square().sum().backward()
    return {name: x.grad for name, x in model.named_parameters() if x.grad is not None}


def test_recomputation_gives_the_same_gradients_in_bf16() -> None:
    with start(ParallelConfig(), World(), seed=1):
        kept, *others = (gradients(recompute) for recompute in Recompute)
    for other in others:
        assert kept.keys() == other.keys() and all(torch.equal(kept[name], other[name]) for name in kept)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("num_queries", [1, 21])
@pytest.mark.parametrize("kind", ["all", "bool", "bool of each text", "added"])
def test_masked_attention(kind: str, num_queries: int, dtype: torch.dtype) -> None:
    """Against torch's kernel in float64; keys and values are a part of a longer cache."""
    torch.manual_seed(0)
    query = torch.randn(num_queries, 3, 6, 8).to(dtype).permute(1, 2, 0, 3)
    key, value = (torch.full((3, 2, 40, 8), torch.nan).to(dtype) for _ in range(2))
    for x in (key, value):
        x[:, :, :30] = torch.randn(3, 2, 30, 8)
    key, value = key[:, :, :30], value[:, :, :30]
    shown = torch.rand(3 if "each" in kind else 1, 1, num_queries, 30) < 0.5
    shown[..., 0] = True
    added = torch.zeros(num_queries, 30, dtype=dtype).masked_fill(~shown[0, 0], -torch.inf)
    mask = {"all": None, "added": added}.get(kind, shown)
    found = attention.masked_attention(query, key, value, mask, 0.3)
    wide = mask.double() if kind == "added" and mask is not None else mask
    inputs = (x.double() for x in (query, key, value))
    wanted = F.scaled_dot_product_attention(*inputs, attn_mask=wide, scale=0.3, enable_gqa=True)
    assert found.dtype == dtype and found.shape == wanted.shape
    assert (found - wanted).norm() <= TOLERANCE[dtype] * wanted.norm()


def test_a_query_that_sees_no_key_is_finite() -> None:
    query, key, value = (torch.randn(1, heads, 5, 8).bfloat16() for heads in (6, 2, 2))
    shown = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    assert attention.masked_attention(query, key, value, shown, None).isfinite().all()


def test_attention_takes_an_empty_batch() -> None:
    inputs = [torch.randn(21, 0, heads, 8).bfloat16().requires_grad_() for heads in (6, 2, 2)]
    query, key, value = inputs
    found = attention.causal_attention(query, key, value)
    assert found.shape == (21, 0, 48)
    found.sum().backward()


@pytest.mark.parametrize("name", CASES)
def test_second_derivatives_are_right_or_refused(name: str) -> None:
    function, plain, shapes = CASES[name]
    torch.manual_seed(0)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def second(of: Function) -> list[Tensor]:
        first = torch.autograd.grad(of(*inputs).square().sum(), inputs, create_graph=True)
        return list(torch.autograd.grad(sum(x.square().sum() for x in first), inputs))  # type: ignore[arg-type]

    try:
        found = second(function)
    except RuntimeError as error:
        assert "differentia" in str(error)
        return
    for one, other in zip(found, second(plain), strict=True):
        assert (one - other).norm() <= 1e-9 * other.norm()
