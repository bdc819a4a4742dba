"""Tables and shapes: exact counts, complete coverage, rules."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from minitron_train.arch import ARCHITECTURES, Shape, architecture
from minitron_train.arch.convert import pack, read_shard, shards_to_parts
from minitron_train.arch.init import RandomWeights
from minitron_train.arch.rules import check_rules
from minitron_train.hf import HFFolder
from minitron_train.model import attention as core
from minitron_train.model.build import Norm, transformer_config
from minitron_train.runtime.errors import UserError

NEMOTRON_15B = Shape(
    architecture="nemotron",
    num_layers=32,
    hidden_size=6144,
    ffn_hidden_size=24576,
    num_attention_heads=48,
    num_query_groups=8,
    kv_channels=128,
    vocab_size=256000,
)
SMOLLM2 = Shape(
    architecture="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    tie_embeddings=True,
)


def attention(masked: bool) -> list[torch.Tensor]:
    """Output and gradients of core attention with two query heads per KV group."""
    layer = core.SdpaAttention(
        transformer_config(SMOLLM2, tp=1, sequence_parallel=False, dtype=torch.float32), 1, AttnMaskType.causal
    )
    torch.manual_seed(0)
    inputs = [torch.randn(6, 2, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    mask = torch.ones(2, 1, 6, 6, dtype=torch.bool).triu(1) if masked else None
    output = layer(*inputs, mask)
    return [output.detach(), *torch.autograd.grad(output.square().sum(), inputs)]


@pytest.mark.parametrize("masked", [False, True])
def test_keys_and_values_for_every_head_change_nothing(monkeypatch: pytest.MonkeyPatch, masked: bool) -> None:
    shared, expanded, expand = attention(masked), [], core.whole_heads
    monkeypatch.setattr(core, "needs_whole_heads", lambda query, mask: True)
    monkeypatch.setattr(core, "whole_heads", lambda x, heads: expanded.append(heads) or expand(x, heads))
    for one, other in zip(attention(masked), shared, strict=True):
        torch.testing.assert_close(one, other)
    assert expanded == [4, 4]


def test_which_attention_needs_keys_and_values_for_every_head() -> None:
    bf16, fp32 = (torch.empty(0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    on_gpu: dict[torch.Tensor, Any] = {x: SimpleNamespace(is_cuda=True, dtype=x.dtype) for x in (bf16, fp32)}
    assert not core.needs_whole_heads(fp32, fp32)
    assert not core.needs_whole_heads(on_gpu[bf16], None)
    assert core.needs_whole_heads(on_gpu[bf16], bf16) and core.needs_whole_heads(on_gpu[fp32], None)


def total(shape: Shape) -> int:
    return sum(architecture(shape.architecture).parameters(shape).values())


@pytest.mark.parametrize(
    ("shape", "sizes", "parameters"),
    [
        (NEMOTRON_15B, {}, 15_628_775_424),  # arXiv 2407.14679 table 5: 15.6 B
        (NEMOTRON_15B, {"hidden_size": 3072, "num_attention_heads": 24, "ffn_hidden_size": 9216}, 4_190_509_056),
        (NEMOTRON_15B, {"hidden_size": 3072, "num_attention_heads": 32, "ffn_hidden_size": 9216}, 4_391_835_648),
        (NEMOTRON_15B, {"hidden_size": 4096, "ffn_hidden_size": 16384}, 8_271_699_968),
        (SMOLLM2, {}, 134_515_008),
        (SMOLLM2, {"hidden_size": 504, "num_attention_heads": 6, "ffn_hidden_size": 1056}, 90_121_752),
    ],
)
def test_exact_parameter_counts(shape: Shape, sizes: dict[str, int], parameters: int) -> None:
    assert total(shape.smaller(**sizes)) == parameters


def test_non_embedding_count_of_the_4b() -> None:
    counts = architecture("nemotron").parameters(
        NEMOTRON_15B.smaller(hidden_size=3072, num_attention_heads=24, ffn_hidden_size=9216)
    )
    assert sum(counts.values()) - counts["embedding"] - counts["output"] == 2_617_645_056


def test_tables_cover_the_checkpoints_exactly(tiny_models: dict[str, Path]) -> None:
    for folder in tiny_models.values():
        checkpoint = HFFolder(folder)
        assert checkpoint.table.tensors(checkpoint.shape) == checkpoint.sizes


def test_qkv_is_interleaved_per_group() -> None:
    """Group by group: the group's query rows, its key rows, its value rows."""
    row = next(row for row in ARCHITECTURES["llama"].rows if "linear_qkv" in row.mcore)
    query, key, value = torch.arange(12)[:, None], 100 + torch.arange(4)[:, None], 200 + torch.arange(4)[:, None]
    fused = pack(row, [query, key, value], num_kv_groups=2).flatten().tolist()
    assert fused == [0, 1, 2, 3, 4, 5, 100, 101, 200, 201, 6, 7, 8, 9, 10, 11, 102, 103, 202, 203]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_give_back_the_parts(tiny_models: dict[str, Path], size: int) -> None:
    checkpoint = HFFolder(tiny_models["llama"])
    for row in checkpoint.table.rows_of(checkpoint.shape):
        shards = [read_shard(row, 0, checkpoint.shape, checkpoint, rank, size) for rank in range(size)]
        for name, part in shards_to_parts(row, checkpoint.shape, shards).items():
            assert torch.equal(part, checkpoint.read(name.format(i=0))), name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 7000}, "student.hidden_size=7000: larger than the teacher's 6144"),
        ({"num_attention_heads": 20}, "must be a multiple of num_query_groups=8"),
        ({"num_layers": 0}, "student.num_layers=0: must be at least 1"),
    ],
)
def test_impossible_targets_are_refused(sizes: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        NEMOTRON_15B.smaller(**sizes)


def test_parallel_size_must_divide() -> None:
    with pytest.raises(UserError, match="must divide the teacher's num_query_groups=3"):
        SMOLLM2.check_parallel(9, "teacher")
    SMOLLM2.check_parallel(3, "teacher")


def test_expert_parallel_size_must_divide() -> None:
    shape = replace(SMOLLM2, num_moe_experts=6, moe_router_topk=2)
    with pytest.raises(UserError, match="must divide the student's num_moe_experts=6; choose a divisor"):
        shape.check_experts(4, "student")
    with pytest.raises(UserError, match="expert_model_parallel_size=2: the teacher has no experts; set it to 1"):
        SMOLLM2.check_experts(2, "teacher")
    shape.check_experts(3, "student")
    SMOLLM2.check_experts(1, "teacher")


def test_rules_of_the_loaders() -> None:
    with pytest.raises(UserError, match="hidden_size=500 must be a multiple of num_attention_heads=6"):
        check_rules(SMOLLM2.smaller(hidden_size=500, num_attention_heads=6), "student")
    check_rules(SMOLLM2.smaller(hidden_size=504, num_attention_heads=6), "student")


def test_unsupported_architecture_names_the_supported() -> None:
    with pytest.raises(UserError, match=r"'gpt2' is not supported; supported: .*llama.*nemotron"):
        architecture("gpt2")


def test_random_weights_do_not_depend_on_how_they_are_read() -> None:
    shape = SMOLLM2.smaller(num_layers=2, hidden_size=66, ffn_hidden_size=32)
    weights = RandomWeights(shape, std=0.02, seed=5)
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(weights.read(name)[8:24], weights.read(name, 0, 8, 24))
    assert not torch.equal(weights.read(name), RandomWeights(shape, std=0.02, seed=6).read(name))
    assert weights.read("model.norm.weight").eq(1).all()
    assert abs(weights.read(name).std().item() / 0.02 - 1) < 0.1


def test_zero_centred_gains_are_added_in_fp32() -> None:
    """In bf16, 1 + gain has steps of 0.8 %, so that most updates of a training would not reach the forward pass."""
    config = transformer_config(NEMOTRON_15B, tp=1, sequence_parallel=False, dtype=torch.bfloat16)
    norm = Norm(config, 64)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        norm.weight.fill_(0.001)  # 1.001 is not a bf16 number
        expected = torch.nn.functional.layer_norm(x.double(), (64,), 1 + norm.weight.double(), norm.bias.double())
        assert torch.equal(norm(x), expected.bfloat16())
