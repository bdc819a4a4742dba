"""Families that are one table each, against transformers: logits, cache, export, slicing, repair, and their parameter counts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.arch import Shape, architecture
from minitron_train.hf.config import UNTRUE_KEYS
from minitron_train.model.forward import KeyValueCache, hidden_states
from minitron_train.runtime.errors import UserError
from tests.support.families import OWN_SIZES, SIZES, TABLES, save_family
from tests.support.models import exported, hf_logits, opened
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS = random_tokens()
LAYERS = ({"ffn_hidden_size": 56}, {"num_attention_heads": 4}, {"num_layers": 2})


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("tables")
    return {name: save_family(name, root / name) for name in TABLES}


@pytest.mark.parametrize("family", TABLES)
def test_logits_cache_and_export(models, groups, family):
    checkpoint, model = opened(models[family])
    assert not checkpoint.unexpected
    wanted, tokens = hf_logits(models[family], TOKENS[0]), TOKENS[0]
    with torch.no_grad():
        torch.testing.assert_close(model.logits(model(tokens)).transpose(0, 1), wanted, rtol=0, atol=1e-4)
        cache, positions = KeyValueCache(), torch.arange(32).expand(len(tokens), -1)
        steps = [
            hidden_states(model, tokens[:, part], positions[:, part], cache=cache, keep=True)
            for part in (slice(0, 20), slice(20, 21), slice(21, 32))
        ]
        logits = model.logits(torch.cat(steps, dim=1).transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes)
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.items())


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("sizes", LAYERS, ids=lambda sizes: next(iter(sizes)))
def test_sliced_equals_masked(tmp_path, models, groups, family, sizes):
    if "num_attention_heads" in sizes and family in OWN_SIZES:
        with pytest.raises(UserError, match="hidden_size=64 must be num_attention_heads=4 times head_dim=8"):
            run_cut(tmp_path, models[family], configuration(), TOKENS, groups, **sizes)
        return
    folder = run_cut(tmp_path, models[family], configuration(), TOKENS, groups, **sizes)
    wanted = masked_logits(models[family], load_file(folder / "kept.safetensors"))
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-4)


def masked_logits(folder: Path, kept: dict[str, Tensor]) -> Tensor:
    """transformers' logits of the teacher, with the inputs of the last linears of each half masked."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    head_dim = hf.HFFolder(folder).shape.kv_channels
    for i, layer in enumerate(model.model.layers):
        none = torch.tensor([], dtype=torch.int64)  # a dropped layer adds nothing to the residual stream
        heads, neurons = kept.get(f"layers.{i}.heads", none), kept.get(f"layers.{i}.ffn", none)
        channels = (heads[:, None] * head_dim + torch.arange(head_dim)).flatten()
        for weight, keep in ((layer.self_attn.o_proj.weight, channels), (layer.mlp.down_proj.weight, neurons)):
            weight.data *= torch.zeros(weight.shape[1]).index_fill(0, keep, 1.0)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if linear.bias is not None and f"layers.{i}.heads" not in kept:
                linear.bias.data.zero_()
    with torch.no_grad():
        return model(TOKENS[0]).logits


@pytest.mark.parametrize("family", TABLES)
@pytest.mark.parametrize("preset", [None, "default"])
def test_pruned_on_every_axis_opens_in_transformers(tmp_path, models, groups, family, preset):
    """With the logits that this program computes, and every key of the teacher's config.json."""
    sizes = OWN_SIZES.get(family, SIZES)
    folder = run_cut(tmp_path, models[family], configuration(preset), TOKENS, groups, **sizes)
    checkpoint, model = opened(folder)
    with torch.no_grad():
        logits = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(logits, hf_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    assert hf.HFFolder(models[family]).config.keys() - UNTRUE_KEYS - {"layer_types"} <= checkpoint.config.keys()


@pytest.mark.parametrize("family", TABLES)
def test_the_default_preset_changes_nothing_where_nothing_is_cut(tmp_path, models, groups, family):
    folder = run_cut(tmp_path, models[family], configuration("default"), TOKENS, groups)
    difference = (hf_logits(folder, TOKENS[0]) - hf_logits(models[family], TOKENS[0])).abs().max()
    assert difference <= 5e-4


def published(family: str, *sizes: int, kv_channels: int = 128, tied: bool = False, bias: bool = False) -> Shape:
    """A published model's shape; sizes are layers, hidden, MLP, heads, KV groups and vocabulary."""
    names = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    values: dict[str, Any] = dict(zip(names, sizes, strict=True))
    return Shape(architecture=family, kv_channels=kv_channels, tie_embeddings=tied, attention_bias=bias, **values)


PUBLISHED = {  # the number of parameters that the model's page gives
    "AFM-4.5B": (published("arcee", 36, 2560, 18432, 20, 4, 128004), 4_619_184_640),
    "ERNIE-4.5-0.3B": (published("ernie4_5", 18, 1024, 3072, 16, 2, 103424, tied=True), 360_748_032),
    "InternLM3-8B": (published("internlm3", 48, 4096, 10240, 32, 2, 128512), 8_804_241_408),
    "IQuest-Coder-V1-40B": (published("iquestcoder", 80, 5120, 27648, 40, 8, 76800), 39_794_283_520),
    "Helium-1-preview-2B": (published("helium", 24, 2560, 7040, 20, 20, 48000), 2_172_643_840),
    "StableLM-3B-4E1T": (published("stablelm", 32, 2560, 6912, 32, 32, 50304, kv_channels=80), 2_795_443_200),
    "Phi-3-mini": (published("phi3", 32, 3072, 8192, 32, 32, 32064, kv_channels=96), 3_821_079_552),
    "Phi-4": (published("phi3", 40, 5120, 17920, 40, 10, 100352), 14_659_507_200),
    "GLM-4-9B": (published("glm", 40, 4096, 13696, 32, 2, 151552, bias=True), 9_399_951_360),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_of_a_published_model(name):
    shape, parameters = PUBLISHED[name]
    assert sum(architecture(shape.architecture).parameters(shape).values()) == parameters
