"""config.json: every key of transformers' classes is known, read as transformers reads it, and true of a student."""

import dataclasses
import json
import sys
import time
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from minitron_train.arch import ARCHITECTURES, Architecture, architecture
from minitron_train.arch.table import COMMON_FACTS, HARMLESS_KEYS, WINDOW_KEYS
from minitron_train.arch.wrappers import TEXTS
from minitron_train.hf import DTYPES, portable_tokenizer_config, read_json, shape_from_config, student_config
from minitron_train.model.rotary import frequencies
from minitron_train.runtime.errors import UserError
from minitron_train.train.export import default_dtype

SIZES = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 12,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ABSENT = "ABSENT"
INSIDE = {
    table.name for table in TEXTS
}  # text models of vision-language folders, see tests/parity/test_arch_wrapped.py
ALONE = sorted(ARCHITECTURES.keys() - INSIDE)
OWN_SIZES: dict[str, dict[str, Any]] = {"stablelm": {"head_dim": ABSENT, "num_attention_heads": 4}}


def config_of(family: str, **changes: Any) -> dict[str, Any]:
    """A small model's config.json without its norm's epsilon, which has a default."""
    values = {"model_type": family, **SIZES, **OWN_SIZES.get(family, {}), **changes}
    return {key: value for key, value in values.items() if value != ABSENT}


def theirs(config: Mapping[str, Any]) -> Any:
    """transformers' own reading of a config.json; it changes nested objects in place."""
    return CONFIG_MAPPING[config["model_type"]].from_dict(json.loads(json.dumps(config)))


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_every_key_of_transformers_stands_in_one_list(family: str) -> None:
    """A key that a new transformers adds must be read, restricted or called harmless before this passes again."""
    table = architecture(family)
    lists = {
        "config_keys": table.config_keys.values(),
        "config_read": table.config_read,
        "config_facts": table.config_facts,
        "HARMLESS_KEYS": HARMLESS_KEYS,
    }
    wrong = {}
    for key in [field.name for field in dataclasses.fields(CONFIG_MAPPING[family])]:
        found = [name for name, keys in lists.items() if key in keys]
        if len(found) != 1:
            wrong[key] = found
    assert not wrong, f"{family}: each key must be in exactly one of {', '.join(lists)}; it is in: {wrong}"
    assert not COMMON_FACTS.keys() & set().union(*lists.values())


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_missing_keys_have_transformers_defaults(family: str) -> None:
    table = architecture(family)
    known = {field.name: field.default for field in dataclasses.fields(CONFIG_MAPPING[family])}
    needed = {"num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"}
    if family == "nemotron":
        needed |= {"num_key_value_heads"}  # its class says null, with which transformers cannot run it
    if family in INSIDE:
        known["tie_word_embeddings"] = False  # the outer config has the key
    for key in set(table.config_keys.values()) - needed:
        assert table.config_defaults[key] == known.get(key), key  # Qwen2's class lacks head_dim and derives it
    assert table.config_defaults.keys() <= set(table.config_keys.values()) | table.config_read
    types = {field.name: typing.get_args(field.type) for field in dataclasses.fields(CONFIG_MAPPING[family])}
    nullable = {key for key in {*table.config_keys.values(), *WINDOW_KEYS} if type(None) in types.get(key, ())}
    assert table.config_nullable == nullable - needed
    for key, supported in table.config_facts.items():
        assert known.get(key, supported[0]) == supported[0], key  # some keys are read by code, and are no fields


@pytest.mark.parametrize("family", ALONE)
@pytest.mark.parametrize("key", ["head_dim", "num_key_value_heads", "max_position_embeddings", "tie_word_embeddings"])
def test_a_missing_key_reads_as_in_transformers(family: str, key: str) -> None:
    changes: dict[str, Any] = {key: ABSENT}
    if key == "num_key_value_heads":  # as many heads as the family's default for the missing key needs
        heads = architecture(family).config_defaults.get(key) or 32
        changes |= {"num_attention_heads": heads, "hidden_size": heads * 8}
    config = config_of(family, **changes)
    if (family, key) == ("nemotron", "num_key_value_heads"):
        with pytest.raises(UserError, match="the key 'num_key_value_heads' is missing or null"):
            shape_from_config(config, "config.json")
        return
    shape, wanted = shape_from_config(config, "config.json"), theirs(config)
    assert shape.num_query_groups == wanted.num_key_value_heads
    assert shape.kv_channels == (getattr(wanted, "head_dim", None) or wanted.hidden_size // wanted.num_attention_heads)
    assert shape.max_position_embeddings == wanted.max_position_embeddings
    assert shape.tie_embeddings == wanted.tie_word_embeddings


YARN = {"rope_type": "yarn", "factor": 4.0}
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top level": {"rope_theta": 5e5},
    "today's place": {"rope_theta": 5e5, "rope_parameters": {"rope_theta": 2e4, "rope_type": "default"}},
    "inside rope_scaling": {"rope_theta": 1e4, "rope_scaling": {"rope_type": "default", "rope_theta": 1e6}},
    "rope_scaling replaces all": {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "default"}},
    "an empty rope_scaling does not": {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {}},
    "older name of the type": {"rope_scaling": {"type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64}},
    "llama3, length at the top": {
        "rope_scaling": {**LLAMA3, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 16,
    },
    "llama3, no length": {"rope_scaling": LLAMA3},
    "llama3, other constants": {"rope_parameters": {**LLAMA3, "low_freq_factor": 2, "high_freq_factor": 3}},
    "partial": {"partial_rotary_factor": 0.25},
    "partial, inside": {"partial_rotary_factor": 0.25, "rope_parameters": {"partial_rotary_factor": 0.75}},
    "linear": {"rope_scaling": {"type": "linear", "factor": 3}},
    "yarn": {"rope_scaling": {**YARN, "original_max_position_embeddings": 32}},
    "yarn, no length": {"rope_theta": 1e6, "rope_scaling": YARN},
    "yarn, factor from the lengths": {
        "rope_parameters": {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 128}
    },
    "yarn, everything": {
        "rope_parameters": {
            **{"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64, "truncate": False},
            **{"beta_fast": 8, "beta_slow": 2.0, "mscale": 1.0, "mscale_all_dim": 0.8, "rope_theta": 500.0},
        }
    },
    "yarn, attention factor": {"rope_scaling": {**YARN, "attention_factor": 1.25, "mscale": 2.0, "beta_fast": None}},
}


def theirs_type(config: Mapping[str, Any]) -> str:
    """The rope type that config.json names."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return rope.get("rope_type", rope.get("type", "default"))


def rotary_class(family: str) -> Any:
    """The rotary embedding of the family's code in transformers."""
    module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]].__module__]
    return next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))


def is_refused(config: Mapping[str, Any], table: Architecture) -> bool:
    """Whether transformers cannot run the family with this rope: partial and scaled, or without its factors."""
    given = (
        config.get("rope_scaling") or config.get("rope_parameters") or table.config_defaults.get("rope_parameters", {})
    )
    kind = given.get("rope_type", given.get("type", "default"))
    is_partial = "partial_rotary_factor" in {*config, *given}
    is_longrope = (table.rope_types or {}).get(kind) == "longrope"  # whose factors ROPES does not give
    return (kind != "default" and is_partial and not table.partial_rotary) or is_longrope


@pytest.mark.parametrize("family", [name for name in ALONE if architecture(name).local_rope is None])
@pytest.mark.parametrize("name", ROPES)
def test_rotary_frequencies_are_transformers(family: str, name: str) -> None:
    """Also after one more reading of what a student's config.json says."""
    table = architecture(family)
    needed = {table.query_growth: 0.2, "original_max_position_embeddings": 99} if table.query_growth else {}
    given = {key: needed | value if isinstance(value, dict) and value else value for key, value in ROPES[name].items()}
    config = config_of(family, **given)
    types = table.rope_types
    if types is not None and theirs_type(config) not in types:
        with pytest.raises(UserError, match=f"is not supported for {family}; supported: {', '.join(sorted(types))}"):
            shape_from_config(config, "config.json")
        return
    if is_refused(config, table):
        with pytest.raises(UserError, match=r"partial_rotary_factor|short_factor"):
            shape_from_config(config, "config.json")
        return
    rotary = rotary_class(family)
    oracle = rotary(theirs(config))
    wanted = oracle.inv_freq
    shape = shape_from_config(config, "config.json")
    assert shape.ropes[0].attention_factor == pytest.approx(oracle.attention_scaling)
    (rope,) = shape.ropes
    torch.testing.assert_close(frequencies(rope, shape.kv_channels, torch.device("cpu")), wanted, rtol=1e-6, atol=0)
    student = student_config(config, shape)
    torch.testing.assert_close(rotary(theirs(student)).inv_freq, wanted, rtol=1e-6, atol=0)
    assert student["rope_theta"] == rope.theta  # transformers 4 reads the top level alone
    assert (student["rope_scaling"] or {"rope_type": "default"})["rope_type"] == theirs(student).rope_parameters[
        "rope_type"
    ]
    assert shape_from_config(student, "config.json") == shape


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"is_causal": False}, "is_causal=False: only True is supported for llama"),
    ("qwen2", {"is_causal": None}, "is_causal=None: only True"),
    ("qwen3", {"per_layer_config": {"1": {"intermediate_size": 8}}}, "per_layer_config=.*only None or {}"),
    ("llama", {"attribute_map": {"hidden_size": "width"}}, "attribute_map="),
    ("llama", {"text_config": {"num_hidden_layers": 1}}, "text_config="),
    ("llama", {"attention_bias": "yes"}, "attention_bias='yes' is neither true nor false"),
    ("seed_oss", {"attention_bias": False}, "attention_bias=False: only True is supported for seed_oss"),
    ("nemotron", {"mlp_bias": None}, "the key 'mlp_bias' is missing or null"),
    ("nemotron", {"hidden_act": "silu"}, "hidden_act='silu': only 'relu2' is supported for nemotron"),
    ("llama", {"hidden_act": "gelu"}, "hidden_act='gelu': only 'silu' or 'swish'"),
    ("llama", {"layer_types": ["sliding_attention"] * 4}, "layer_types holds 'sliding_attention': only full_attention"),
    ("mistral", {"layer_types": ["chunked_attention"] * 4}, "layer_types holds 'chunked_attention'"),
    ("qwen2", {"layer_types": ["full_attention"] * 3}, "layer_types=.*a list of 4 names"),
    ("qwen2", {"layer_types": [["full_attention"]] * 4}, r"layer_types holds \['full_attention'\]"),
    ("qwen3", {"layer_types": ["sliding_attention"] * 4}, "no window is set"),
    ("mistral", {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "no window is set"),
    ("mistral", {"sliding_window": 0}, "sliding_window=0: must be at least 1"),
    ("mistral", {"sliding_window": "4096"}, "sliding_window='4096' is not a whole number"),
    ("qwen2", {"use_sliding_window": 1}, "use_sliding_window=1 is neither true nor false"),
    ("qwen2", {"use_sliding_window": True, "max_window_layers": None}, "max_window_layers=None is not a whole number"),
    ("llama", {"rope_scaling": {"rope_type": "axial", "factor": 2.0}}, "rope type 'axial' is not supported"),
    ("phi3", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "rope type 'linear' is not supported for phi3"),
    ("llama", {"rope_scaling": {"rope_type": "yarn"}}, "rope type 'yarn' without factor"),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": "32"}}, "beta_fast='32' is not a number"),
    ("llama", {"rope_scaling": {**YARN, "truncate": 1}}, "truncate=1 is neither true nor false"),
    ("glm", {"head_dim": 10, "rope_scaling": YARN}, "rotates 5 of 10 channels: rope type 'yarn' needs an even number"),
    (
        "llama",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
        r"short_factor=\[1.0\]: must be a list of 6",
    ),
    (
        "llama",
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 6}},
        "long_factor=None: must be a list of 6",
    ),
    ("ministral3", {"rope_parameters": YARN}, "rope type 'yarn' without llama_4_scaling_beta"),
    ("smollm3", {"no_rope_layers": [1, 0]}, r"no_rope_layers=\[1, 0\]: must be a list of 4 numbers"),
    ("smollm3", {"no_rope_layers": [1, 0, 2, 1]}, "no_rope_layers=.*0 for a layer without rotary embedding"),
    ("smollm3", {"no_rope_layer_interval": 0}, "no_rope_layer_interval=0: must be at least 1"),
    *(
        (
            family,
            {"sliding_window": None, "layer_types": types},
            "no window is set, and transformers.* set sliding_window",
        )
        for family in ("cwm", "gemma2", "gemma3_text", "olmo3", "ministral")
        for types in (ABSENT, ["full_attention"] * 4)
    ),
    ("llama", {"rope_scaling": {"type": None}}, "rope type None is not supported"),
    ("llama", {"rope_scaling": {"type": ["llama3"]}}, r"rope type \['llama3'\] is not supported"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": -2.0}}, "factor of rope_scaling=-2.0: must be above 0"),
    ("llama", {"rope_scaling": {"type": "dynamic"}}, "rope type 'dynamic' without factor"),
    ("llama", {"rope_scaling": {**LLAMA3, "factor": 0}}, "factor of rope_scaling=0: must be above 0"),
    ("llama", {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}}, "high_freq_factor=1: must be above"),
    ("llama", {"rope_scaling": {**LLAMA3, "original_max_position_embeddings": None}}, "embeddings=None is not a whole"),
    ("llama", {"rope_scaling": LLAMA3, "partial_rotary_factor": 0.5}, "transformers cannot run llama"),
    ("qwen3", {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, "one rotary embedding per type of layer"),
    ("llama", {"rope_theta": None}, "rope_theta=None is not a number"),
    ("llama", {"rope_theta": -1.0}, "rope_theta=-1.0: must be above 0"),
    ("llama", {"rope_theta": 10**400}, "rope_theta=.*must be above 0, from 1e-30 to 1e.30"),
    ("llama", {"rope_scaling": {**YARN, "beta_fast": 1e-320}}, "beta_fast=1e-320: must be above 0, from 1e-30"),
    ("llama", {"rope_theta": 1.0, "rope_scaling": YARN}, "rope_theta=1, by whose logarithm YaRN divides"),
    ("nemotron", {"partial_rotary_factor": 1.5}, "partial_rotary_factor=1.5 rotates 18 of 12"),
    ("nemotron", {"partial_rotary_factor": 0.01}, "rotates 0 of 12"),
    ("nemotron", {"rope_percent": 1.0}, "rope_percent=1.0: transformers reads partial_rotary_factor alone, 0.5 here"),
    ("llama", {"head_dim": 11}, "head_dim=11: fully rotated heads need an even number"),
    ("llama", {"hidden_size": 64.0}, "hidden_size=64.0 is not a whole number without a decimal point"),
    ("llama", {"hidden_size": True}, "hidden_size=True is not a whole number"),
    ("llama", {"hidden_size": None}, "the key 'hidden_size' is missing or null"),
    ("llama", {"hidden_size": -64}, "hidden_size=-64: must be at least 1"),
    ("llama", {"vocab_size": 10**5000}, "vocab_size=.*must be at least 1 and at most"),
    ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: must be at least 1 and at most 10,000"),
    ("llama", {"num_hidden_layers": [[[4]]]}, r"num_hidden_layers=\[\[\[4\]\]\] is not a whole number"),
    ("qwen3", {"head_dim": None}, "the key 'head_dim' is missing or null"),
    ("mistral", {"num_key_value_heads": None}, "the key 'num_key_value_heads' is missing or null"),
    ("llama", {"tie_word_embeddings": 0}, "tie_word_embeddings=0 is neither true nor false"),
    ("llama", {"rms_norm_eps": 1}, "rms_norm_eps=1 is not a number from 0.0 to below 1.0"),
    ("llama", {"rms_norm_eps": -1e-5}, "rms_norm_eps=-1e-05 is not a number"),
    ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0: only None is supported"),
    ("qwen3_moe", {"mlp_only_layers": "1"}, "mlp_only_layers='1': must be a list of layer numbers"),
    ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be at least 1"),
    ("stablelm", {"partial_rotary_factor": 0.6}, "rotates 9 of 16 channels: StableLmForCausalLM needs an even number"),
    ("qwen3_moe", {"num_experts": 8, "num_local_experts": 4}, "num_experts=8 and num_local_experts=4 are one setting"),
    ("qwen3_moe", {"num_experts": 4}, "config.json: num_experts=4: the router sends each token to 8 experts; choose"),
    ("mixtral", {"num_local_experts": 10**9}, "num_local_experts=1000000000: must be at least 1 and at most 10,000"),
    ("llama", {"model_type": ["llama"]}, r"model_type \['llama'\] is not supported"),
    ("llama", {"model_type": "x" * 10**6}, "model_type 'xx"),
]


@pytest.mark.parametrize(("family", "changes", "message"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused_is_named_in_one_short_line(family: str, changes: dict[str, Any], message: str) -> None:
    start_s = time.process_time()
    with pytest.raises(UserError, match=message) as caught:
        shape_from_config(config_of(family, **changes), "config.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert time.process_time() - start_s < 1


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"a": NaN}', "[" * 100_000, '{"a": ' * 100_000, "\udcff", '{"a": "\\ud800"}', ""]
)
def test_damaged_json_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, errors="surrogateescape")
    with pytest.raises(UserError, match=r"config\.json: damaged \(.*\); correct it, or copy the file again") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


NO: list[int | None] = [None] * 4
WINDOWS: list[tuple[str, dict[str, Any], list[int | None]]] = [
    ("mistral", {}, [4096] * 4),
    ("mistral", {"sliding_window": None}, NO),
    ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, NO),  # AutoConfig takes it for Ministral
    ("mistral", {"sliding_window": 8, "layer_types": None}, [8] * 4),
    ("mixtral", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, [8] * 4),  # its code ignores the list
    ("phi3", {"sliding_window": 8}, [8] * 4),
    ("phi3", {}, NO),
    ("llama", {"sliding_window": 8}, NO),
    ("ministral", {"sliding_window": 8}, [8] * 4),
    ("ministral", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, NO),
    ("ministral3", {}, NO),
    ("ministral3", {"sliding_window": 8}, [8] * 4),
    ("cwm", {"sliding_window": 8}, [None, 8, 8, 8]),
    ("smollm3", {}, NO),
    ("smollm3", {"use_sliding_window": True, "sliding_window": 8}, [None, None, None, 8]),
    (
        "smollm3",
        {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [0, 1, 1, 1]},
        [8, None, None, None],
    ),
    ("llama", {"sliding_window": 8, "layer_types": ["full_attention"] * 4}, NO),
    ("qwen2", {}, NO),
    ("qwen2", {"sliding_window": 8}, NO),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4}, NO),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}, [None, None, None, 8]),
    ("qwen3", {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, NO),
    ("qwen3", {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["full_attention"] * 4}, NO),
    ("qwen3_moe", {}, NO),
    ("qwen3_moe", {"use_sliding_window": True}, [4096] * 4),
    ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 8}, [8] * 4),
    ("qwen2_moe", {"sliding_window": 8}, NO),
    ("qwen2_moe", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}, [8, None, None, None]),
]


@pytest.mark.parametrize(("family", "changes", "widths"), WINDOWS)
def test_windows_of_the_layers(family: str, changes: dict[str, Any], widths: list[int | None]) -> None:
    shape = shape_from_config(config_of(family, **changes), "config.json")
    assert [kind.window for kind in shape.layer_kinds] == widths
    shape.check_length(512, "seq", "teacher")
    with pytest.raises(UserError, match="seq=513: the teacher was made for 512 positions"):
        shape.check_length(513, "seq", "teacher")


def test_a_student_says_nothing_untrue_of_itself() -> None:
    untrue = {
        "quantization_config": {"quant_method": "gptq"},
        "auto_map": {"AutoConfig": "own.Own"},
        "_name_or_path": "/home/someone/model",
        "partial_rotary_factor": 0.5,  # Llama's code ignores it, other programs that serve it do not
        "pretraining_tp": 2,
    }
    untrue |= {"attn_implementation": "flash_attention_2", "_attn_implementation": "flash_attention_2"}
    true = {"bos_token_id": 1, "eos_token_id": [1, 2, 3, 4], "transformers_version": "4.40.0", "anything": [1, 2]}
    config = config_of("llama", **untrue, **true, no_rope_layers=[1, 1, 0, 1], torch_dtype="float16")
    shape = shape_from_config(config, "config.json").smaller(num_layers=3)
    student = student_config(config, shape, torch.bfloat16, layers=[0, 2, 3])
    assert not untrue.keys() & student.keys()
    assert {key: student[key] for key in true} == true
    assert student["no_rope_layers"] == [1, 0, 1]
    assert student["architectures"] == ["LlamaForCausalLM"]
    assert student["dtype"] == student["torch_dtype"] == "bfloat16"
    assert student_config(config, shape)["dtype"] == "float16"


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("auto", None),
        ("nothing of torch", None),
        ("float8_e4m3fn", None),
        ({"": "float16"}, None),
        (None, None),
        ("torch.float16", "float16"),
        ("half", "float16"),
        ("bfloat16", "bfloat16"),
        ("float64", "float64"),
    ],
)
@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_a_students_number_type_is_one_that_transformers_opens(key: str, named: Any, written: str | None) -> None:
    config = config_of("llama", **{key: named}, **({"torch_dtype": None} if key == "dtype" else {"dtype": None}))
    student = student_config(config, shape_from_config(config, "config.json"))
    assert (student.get("dtype"), student.get("torch_dtype")) == (written, written)
    assert default_dtype(config) == (written if written in DTYPES else "float32")


def test_windows_go_with_their_layers() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = config_of("qwen3", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    shape = shape_from_config(config, "config.json")
    student = student_config(config, shape.smaller(num_layers=2), layers=[0, 3])
    assert theirs(student).layer_types == ["full_attention", "sliding_attention"]
    assert student["max_window_layers"] == 1
    student = student_config(config, shape.smaller(num_layers=2), layers=[0, 2])
    assert theirs(student).layer_types == ["full_attention", "full_attention"]
    assert shape_from_config(student, "config.json").windows == (None,)
    by_number = config_of("qwen2", use_sliding_window=True, sliding_window=8, max_window_layers=2)
    student = student_config(by_number, shape_from_config(by_number, "x").smaller(num_layers=2), layers=[0, 3])
    assert theirs(student).layer_types == ["full_attention", "sliding_attention"]


def test_the_tokenizers_class_has_its_older_name() -> None:
    written = {
        "tokenizer_class": "TokenizersBackend",
        "auto_map": {"AutoTokenizer": ["own.Own", None]},
        "eos_token": "x",
    }
    assert portable_tokenizer_config(written) == {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "x"}
    older = {"tokenizer_class": "LlamaTokenizer", "extra_special_tokens": {"image_token": "<image>"}}
    assert portable_tokenizer_config(older) == older
    listed = {"extra_special_tokens": ["<|im_end|>"], "is_local": True}
    assert portable_tokenizer_config(listed) == {"additional_special_tokens": ["<|im_end|>"]}


def test_mistral_with_layer_types_is_exported_as_what_transformers_takes_it_for() -> None:
    config = config_of("mistral", sliding_window=8, layer_types=["full_attention", *["sliding_attention"] * 3])
    shape = shape_from_config(config, "config.json")
    student = student_config(config, shape.with_layers(shape.layer_kinds[1:]), layers=[1, 2, 3])
    assert (student["model_type"], student["architectures"]) == ("ministral", ["MinistralForCausalLM"])
    assert theirs(student).layer_types == ["sliding_attention"] * 3


def test_layers_without_rope_go_with_their_layers() -> None:
    config = config_of("smollm3", num_hidden_layers=8)
    shape = shape_from_config(config, "config.json")
    assert [kind.rope is not None for kind in shape.layer_kinds] == [True, True, True, False] * 2
    student = student_config(config, shape.smaller(num_layers=3), layers=[0, 3, 6])
    assert theirs(student).no_rope_layers == [1, 0, 1]
    kinds = shape_from_config(student, "config.json").layer_kinds
    assert kinds == tuple(shape.layer_kinds[i] for i in (0, 3, 6))


@pytest.mark.parametrize("family", ["llama", "nemotron"])
@pytest.mark.parametrize(
    "more", [{}, {"factor": 8.0}, {"attention_factor": 1.5}, {"original_max_position_embeddings": 64}]
)
def test_longrope(family: str, more: dict[str, Any]) -> None:
    """Frequencies of short and long texts, and the factor of attention."""
    short, long = [1.0, 1.1, 1.5, 2.0, 3.0, 4.0], [1.5, 2.0, 4.0, 8.0, 9.0, 9.5]
    if family == "nemotron":
        short, long = short[:3], long[:3]
    config = config_of(family, rope_scaling={"type": "longrope", "short_factor": short, "long_factor": long, **more})
    shape, oracle = shape_from_config(config, "config.json"), rotary_class(family)(theirs(config))
    (rope,) = shape.ropes
    for length in (rope.original_length, rope.original_length + 1):
        oracle(torch.zeros(1), torch.arange(length)[None])
        found = frequencies(rope, 12, torch.device("cpu"), is_long=length > rope.original_length)
        torch.testing.assert_close(found, oracle.inv_freq, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(oracle.attention_scaling)
    assert shape_from_config(student_config(config, shape), "config.json") == shape
