"""Exported folders in llama.cpp: which families it opens at a pruned shape, the logits, and the greedy tokens.

The rules of evaluation/serving.py are tested everywhere. Their comparison with llama.cpp needs llama-cpp-python, whose wheel is
built for minutes, and MINITRON_LLAMA_CPP: a checkout of llama.cpp, such as vendor/llama.cpp of the package's sdist.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from minitron_train.evaluation.serving import llama_cpp_problems
from minitron_train.hf import HFFolder, student_config
from tests.support.families import LAYERED
from tests.support.models import COMMON, EXPERTS, FAMILIES, save_random

if TYPE_CHECKING:
    from llama_cpp_equality import InLlamaCpp, InTransformers  # pyright: ignore[reportMissingImports]

CHECKOUT = os.environ.get("MINITRON_LLAMA_CPP", "")
installed = pytest.mark.skipif(
    not CHECKOUT or importlib.util.find_spec("llama_cpp") is None,
    reason="needs the package llama-cpp-python, and MINITRON_LLAMA_CPP=CHECKOUT",
)
sys.path.append(str(Path(__file__).parents[2] / "benchmarks" / "serving"))

SQUARE: dict[str, Any] = {"head_dim": 8}  # 8 heads, hidden size 64; COMMON has 8 x 12
TYPES = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA2 = {"model_type": "gemma2", "sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GRANITE = {
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.1,
    "logits_scaling": 8.0,
}
PLAIN = ("mistral", "qwen3", "seed_oss", "arcee", "ernie4_5", "internlm3", "iquestcoder")
SQUARE_ONLY: dict[str, dict[str, Any]] = {
    "nemotron": FAMILIES["nemotron"],
    "qwen2": {"model_type": "qwen2"},
    "phi3": {"model_type": "phi3"},
    "glm": {"model_type": "glm"},
    "granite": {"model_type": "granite", **GRANITE},
    "olmo2": {"model_type": "olmo2"},
    "olmo3": {"model_type": "olmo3", **TYPES},
}
EQUAL: dict[str, dict[str, Any]] = {
    "llama": FAMILIES["llama"],
    "llama with biases": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    **{name: {"model_type": name} | ({"sliding_window": None} if name == "mistral" else {}) for name in PLAIN},
    **{name: config | SQUARE for name, config in SQUARE_ONLY.items()},
    "stablelm": {"model_type": "stablelm", "use_qkv_bias": True} | SQUARE,
    "smollm3 of eight layers": {"model_type": "smollm3", "num_hidden_layers": 8},
    "gemma": {"model_type": "gemma"},
    "gemma2": GEMMA2 | {"query_pre_attn_scalar": COMMON["head_dim"]},
    "qwen3_moe": {"model_type": "qwen3_moe"} | EXPERTS,
    "mixtral": {"model_type": "mixtral", "intermediate_size": 24} | EXPERTS,
}
REJECTED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        f"{name} with wide heads": (config, "num_attention_heads x head_dim (96) equals")
        for name, config in SQUARE_ONLY.items()
    },
    **{name: ({"model_type": name} | SQUARE, "does not support") for name in ("ministral", "cwm", "helium")},
}
DIFFERENT: dict[str, tuple[dict[str, Any], str]] = {
    "mistral with a window": (LAYERED["mistral"], "logits differ after 7 tokens"),
    "qwen3 with windows": (LAYERED["qwen3"], "logits differ after 6 tokens"),
    "smollm3 after depth pruning": ({"model_type": "smollm3", "no_rope_layers": [1, 0, 1]}, "every fourth layer"),
    "gemma2 with another scale": (GEMMA2 | {"query_pre_attn_scalar": 24}, "scales the queries of gemma2"),
}
NAMED = REJECTED | DIFFERENT
TOKENS = torch.randint(3, COMMON["vocab_size"], (32,), generator=torch.Generator().manual_seed(0)).tolist()
TOLERANCE = 0.02  # llama.cpp looks GELU up in a table in fp16: 0.008 for gemma; others reach 0.003 of logits up to 12


def exported(config: dict[str, Any], folder: Path) -> Path:
    """A random model with the config.json of an export."""
    made = HFFolder(save_random({**COMMON, **config}, folder))
    (folder / "config.json").write_text(json.dumps(student_config(made.config, made.shape)))
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The folder of every case, converted where the converter supports it, in one process for all."""
    root = tmp_path_factory.mktemp("gguf")
    cases = EQUAL | {name: config for name, (config, _) in NAMED.items()}
    folders = {name: exported(config, root / str(number)) for number, (name, config) in enumerate(cases.items())}
    script = Path(__file__).parents[1] / "support" / "gguf_without_vocabulary.py"
    subprocess.run([sys.executable, str(script), CHECKOUT, *map(str, folders.values())], check=True)
    return folders


@pytest.mark.parametrize("name", EQUAL)
def test_no_problem_is_named(tmp_path: Path, name: str) -> None:
    assert llama_cpp_problems(exported(EQUAL[name], tmp_path)) == []


@pytest.mark.parametrize("name", NAMED)
def test_a_problem_is_named(tmp_path: Path, name: str) -> None:
    config, problem = NAMED[name]
    (found,) = llama_cpp_problems(exported(config, tmp_path))
    assert problem in found


@installed
@pytest.mark.parametrize("name", EQUAL)
def test_logits_and_greedy_tokens_are_those_of_transformers(converted: dict[str, Path], name: str) -> None:
    ours, theirs = both(converted[name])
    np.testing.assert_allclose(theirs.logits(TOKENS), ours.logits(TOKENS), rtol=0, atol=TOLERANCE)
    assert theirs.greedy(TOKENS, 32) == ours.greedy(TOKENS, 32)
    theirs.close()


@installed
@pytest.mark.parametrize("name", REJECTED)
def test_what_is_named_is_rejected(converted: dict[str, Path], name: str) -> None:
    folder = converted[name]
    if (folder / "model.gguf").exists():
        with pytest.raises(ValueError, match="Failed to load model"):
            both(folder)
    else:
        assert "not supported" in (folder / "error.txt").read_text()


@installed
@pytest.mark.parametrize("name", DIFFERENT)
def test_what_is_named_gives_other_logits(converted: dict[str, Path], name: str) -> None:
    ours, theirs = both(converted[name])
    assert np.abs(theirs.logits(TOKENS) - ours.logits(TOKENS)).max() > 10 * TOLERANCE
    theirs.close()


def both(folder: Path) -> "tuple[InTransformers, InLlamaCpp]":
    """The model in transformers and in llama.cpp."""
    from llama_cpp_equality import InLlamaCpp, InTransformers  # pyright: ignore[reportMissingImports]

    return InTransformers(folder), InLlamaCpp(folder / "model.gguf")
