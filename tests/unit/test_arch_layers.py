"""Shapes whose layers differ: counts of published models, keys within windows, and fewer layers."""

from typing import Any

import pytest

from minitron_train.arch import Shape
from minitron_train.arch.layer_kind import LayerKind, Rope, keys_per_query
from minitron_train.arch.rules import beyond_transformer_engine
from minitron_train.hf import shape_from_config
from minitron_train.planning.counts import attention_flops_per_token, parameters

LONGROPE = {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {  # config.json, and the hub's count of parameters
    "mistralai/Mistral-7B-v0.1": (
        {
            **{"model_type": "mistral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 32768},
        },
        7_241_732_096,
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {
            **{"model_type": "smollm3", "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 11008},
            **{"num_hidden_layers": 36, "num_attention_heads": 16, "max_position_embeddings": 65536},
        },
        3_075_098_624,
    ),
    "mistralai/Ministral-8B-Instruct-2410": (
        {
            **{"model_type": "ministral", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 12288},
            **{"num_hidden_layers": 36, "num_attention_heads": 32, "head_dim": 128, "sliding_window": 32768},
        },
        8_019_808_256,
    ),
    "Qwen/Qwen2.5-0.5B": (
        {
            **{"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864},
            **{"num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2},
            "tie_word_embeddings": True,
        },
        494_032_768,
    ),
    "Qwen/Qwen3-8B": (
        {
            **{"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288},
            **{"num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
        },
        8_190_735_360,
    ),
    "ByteDance-Seed/Seed-OSS-36B-Instruct": (
        {
            **{"model_type": "seed_oss", "vocab_size": 155136, "hidden_size": 5120, "intermediate_size": 27648},
            **{"num_hidden_layers": 64, "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128},
            **{"attention_bias": True, "attention_out_bias": False, "mlp_bias": False},
        },
        36_151_104_512,
    ),
    "microsoft/Phi-4-mini-instruct": (
        {
            **{"model_type": "phi3", "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 8192},
            **{"num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8},
            **{"max_position_embeddings": 131072, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
            "rope_scaling": LONGROPE,
        },
        3_836_021_760,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_published_models(name: str) -> None:
    config, wanted = PUBLISHED[name]
    assert parameters(shape_from_config(config, name))["parameters"] == wanted


@pytest.mark.parametrize(("window", "length"), [(None, 64), (1, 64), (16, 64), (64, 64), (99, 64)])
def test_keys_within_a_window(window: int | None, length: int) -> None:
    """The mean over queries, whose own token counts half, as in the papers' S / 2 of causal attention."""
    kind = LayerKind(window=window)
    exact = sum(min(i + 1, window or length) for i in range(length)) / length
    own = 0.5 * min(window or length, length) / length  # the difference of sums to integrals
    assert keys_per_query(kind, length, causal=True) == pytest.approx(exact - own)
    assert keys_per_query(kind, length, causal=False) == min(window or length, length)


def test_attention_of_layers_that_differ() -> None:
    shape = shape_from_config(PUBLISHED["mistralai/Mistral-7B-v0.1"][0], "config.json")
    full, near = (shape.with_layers([LayerKind(window=window)] * 32) for window in (None, 4096))
    mixed = shape.with_layers([LayerKind(), LayerKind(window=4096)] * 16)
    cost = [attention_flops_per_token(one, 16384) for one in (full, near, mixed)]
    assert cost[0] == 4 * 32 * 4096 * 8192
    assert cost[2] == (cost[0] + cost[1]) / 2


def test_kinds_of_fewer_layers() -> None:
    kinds = [LayerKind(window=8), LayerKind(rope=None), LayerKind(window=8), LayerKind()]
    shape = shape_from_config(PUBLISHED["mistralai/Mistral-7B-v0.1"][0], "config.json").with_layers(kinds)
    assert (shape.kinds, shape.kind_of_layer) == ((kinds[0], kinds[1], kinds[3]), (0, 1, 0, 2))
    assert shape.windows == (8, None) and shape.ropes == (Rope(),)
    assert shape.smaller(num_layers=3).layer_kinds == tuple(kinds[:3])
    one = shape.with_layers([kinds[0], kinds[2]])
    assert (one.kinds, one.kind_of_layer, one.num_layers) == ((kinds[0],), (), 2)


@pytest.mark.parametrize(
    ("kind", "is_beyond"),
    [
        (LayerKind(), False),
        (LayerKind(window=128), False),
        (LayerKind(window=127), True),
        (LayerKind(rope=None), True),
        (LayerKind(rope=Rope(kind="yarn", attention_factor=1.1)), True),
        (LayerKind(rope=Rope(query_growth=0.1)), True),
    ],
)
def test_what_transformer_engines_layers_do_not_compute(kind: LayerKind, is_beyond: bool) -> None:
    shape = shape_from_config(PUBLISHED["mistralai/Mistral-7B-v0.1"][0], "config.json").with_layers([kind] * 4)
    assert (beyond_transformer_engine(shape, 128) is not None) == is_beyond


@pytest.mark.parametrize(("dense_neurons", "dense"), [(40, 1), (4000, 2)])
def test_layers_that_are_not_chosen_yet_are_the_largest(dense_neurons: int, dense: int) -> None:
    """Of each kind one, then those with most neurons: experts have 4 x 24, dense layers more or fewer."""
    kinds = [LayerKind(is_dense=i in (2, 4)) for i in range(6)]
    sizes = {
        "hidden_size": 64,
        "ffn_hidden_size": 24,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 16,
    }
    experts = {"num_moe_experts": 4, "moe_router_topk": 2, "dense_ffn_hidden_size": dense_neurons}
    shape = Shape(architecture="qwen3_moe", num_layers=6, vocab_size=64, **sizes, **experts).with_layers(kinds)
    assert [kind.is_dense for kind in shape.largest_layers(4)].count(True) == dense
