"""Models whose layers differ: windows, layers without rotary embedding. Every pass against transformers' one full pass."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.config import Refit
from minitron_train.distillation.step import attention_mask
from minitron_train.evaluation.packing import Request
from minitron_train.evaluation.scoring import score
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.forward import KeyValueCache, hidden_states, inference
from minitron_train.model.generate import greedy
from minitron_train.model.load import load_weights
from minitron_train.pruning.layers import Layers, forward
from minitron_train.pruning.shards import RowReader
from tests.support.models import COMMON, exported, hf_logits, save_random
from tests.support.pruning import configuration, random_tokens, run_cut

GROWTH = {"llama_4_scaling_beta": 0.4}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.5}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.2, 1.5, 2.0],
    "long_factor": [1.5, 3.0, 5.0, 8.0],
}
MODELS: dict[str, dict[str, Any]] = {
    "mistral": {"model_type": "mistral", "sliding_window": 7},
    "qwen2": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 2,
        "head_dim": 12,
    },
    "qwen3": {
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0, 1], "tie_word_embeddings": False},
    "smollm3 with windows": {
        "model_type": "smollm3",
        "no_rope_layer_interval": 2,
        "use_sliding_window": True,
        "sliding_window": 6,
    },
    "ministral": {"model_type": "ministral", "sliding_window": 9},
    "ministral with full layers": {
        "model_type": "ministral",
        "sliding_window": 5,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "ministral3": {"model_type": "ministral3", "rope_parameters": YARN | GROWTH},
    "ministral3 with a window": {
        "model_type": "ministral3",
        "sliding_window": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "original_max_position_embeddings": 8} | GROWTH,
    },
    "cwm": {"model_type": "cwm", "sliding_window": 6, "hidden_size": 64, "rope_parameters": LLAMA3},
    "phi3": {
        "model_type": "phi3",
        "partial_rotary_factor": 0.67,
        "original_max_position_embeddings": 32,
        "hidden_size": 96,
        "rope_parameters": LONGROPE,
    },
    "phi3 with a window": {"model_type": "phi3", "sliding_window": 6, "hidden_size": 96},
}
TOKENS = random_tokens()
LONG = torch.randint(0, 128, (2, 300), generator=torch.Generator().manual_seed(5))
EVERY = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layers")
    return {
        name: save_random({**COMMON, "max_position_embeddings": 512, "initializer_range": 0.2, **config}, root / name)
        for name, config in MODELS.items()
    }


def opened(folder: Path, **arguments: Any) -> tuple[hf.HFFolder, LanguageModel]:
    """A folder, and its model."""
    checkpoint = hf.HFFolder(folder)
    model = build(checkpoint.shape, **arguments).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    return checkpoint, model


def close(found: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


@EVERY
def test_logits_and_export(folders: dict[str, Path], groups: Any, name: str) -> None:
    checkpoint, model = opened(folders[name])
    for tokens in (TOKENS[0][:, :4], TOKENS[0], LONG):
        with torch.no_grad():
            close(model.logits(model(tokens)).transpose(0, 1), hf_logits(folders[name], tokens))
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes)
    assert all(torch.equal(tensor, checkpoint.read(key)) for key, tensor in found.items())


@EVERY
def test_documents_in_one_row(folders: dict[str, Path], groups: Any, name: str) -> None:
    """With a mask, each document's logits are those of a row in which the others' tokens are hidden."""
    _, model = opened(folders[name])
    documents = (torch.arange(32) >= 13).long()[None]
    with torch.no_grad():
        found = model.logits(model(TOKENS[0][:1], attention_mask(documents))).transpose(0, 1)
        whole = model.logits(model(TOKENS[0][:1], attention_mask(documents * 0))).transpose(0, 1)
    close(found[:, :13], hf_logits(folders[name], TOKENS[0][:1, :13]))
    close(whole, hf_logits(folders[name], TOKENS[0][:1]))


@EVERY
def test_cache_equals_the_full_pass(folders: dict[str, Path], groups: Any, name: str) -> None:
    """Tokens in pieces of several lengths, each after the cached ones."""
    _, model = opened(folders[name])
    cache, parts, first = KeyValueCache(), [], 0
    with inference(model):
        for length in (4, 9, 1, 1, 17):
            piece = TOKENS[0][:, first : first + length]
            positions = torch.arange(first, first + length).expand_as(piece)
            parts.append(hidden_states(model, piece, positions, cache=cache, keep=True))
            first += length
        logits = model.output.logits(torch.cat(parts, dim=1))
    close(logits, hf_logits(folders[name], TOKENS[0]))


@EVERY
def test_greedy_texts_are_transformers(folders: dict[str, Path], groups: Any, name: str) -> None:
    """Prompts of different lengths, in one batch."""
    _, model = opened(folders[name])
    prompts = [TOKENS[0][row, : 3 + 6 * row].tolist() for row in range(4)]
    found = greedy(model, prompts, 12, [lambda text: False] * 4, groups)
    oracle = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32).eval()
    for prompt, text in zip(prompts, found, strict=True):
        with torch.no_grad():
            logits = oracle(torch.tensor([prompt + text[:-1]])).logits[0]
        assert logits[len(prompt) - 1 :].argmax(-1).tolist() == text


@EVERY
def test_packed_requests_have_the_scores_of_their_own_texts(folders: dict[str, Path], groups: Any, name: str) -> None:
    """Trees in one row, and rows after a cached prefix."""
    _, model = opened(folders[name])
    trunk, other = LONG[0, :140].tolist(), LONG[1].tolist()
    texts = [(*trunk, *other[k : k + 9 + k]) for k in range(3)] + [tuple(other[100 : 120 + 3 * k]) for k in range(4)]
    scores: dict[int, Any] = {}
    score(model, [Request(k, text, 6) for k, text in enumerate(texts)], groups, 512, scores.update)
    for k, text in enumerate(texts):
        logprobs = hf_logits(folders[name], torch.tensor([text]))[0].log_softmax(-1)
        wanted = logprobs[range(len(text) - 7, len(text) - 1), text[-6:]].sum()
        assert abs(scores[k][0] - wanted.item()) < 1e-3


@EVERY
def test_bf16_is_as_near_as_transformers_own(folders: dict[str, Path], groups: Any, name: str) -> None:
    _, model = opened(folders[name], dtype=torch.bfloat16)
    oracle = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16).eval()
    with torch.no_grad():
        ours, theirs = model.logits(model(LONG)).transpose(0, 1), oracle(LONG).logits.float()
    wanted = hf_logits(folders[name], LONG)
    assert (ours - wanted).square().mean() < 1.5 * (theirs - wanted).square().mean()


@EVERY
def test_streamed_layers_equal_resident_ones(folders: dict[str, Path], groups: Any, name: str) -> None:
    teacher = hf.HFFolder(folders[name])
    ends = []
    for resident in (True, False):
        layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=resident)
        with torch.no_grad():
            hidden = layers.embed(TOKENS[0])
            for i in range(teacher.shape.num_layers):
                hidden = forward(layers[i], hidden, layers.rotary(32))
            ends.append(layers.final_norm(hidden))
    assert torch.equal(*ends)
    head = teacher.read(teacher.table.output_name(teacher.shape))
    close(ends[1].transpose(0, 1) @ head.t(), hf_logits(folders[name], TOKENS[0]))


@EVERY
@pytest.mark.parametrize("dropped", [[], [0], [1]])
def test_sliced_equals_masked(
    tmp_path: Path, folders: dict[str, Path], groups: Any, name: str, dropped: list[int]
) -> None:
    """A kept layer keeps its kind, whichever layers go."""
    config = configuration(drop_layers=dropped or None)
    sizes = {"num_attention_heads": 4, "ffn_hidden_size": 56, "num_layers": 3 - len(dropped)}
    if name == "phi3":  # its heads must fill the hidden size
        del sizes["num_attention_heads"]
    folder = run_cut(tmp_path, folders[name], config, TOKENS, groups, **sizes)
    kept = load_file(folder / "kept.safetensors")
    masked = AutoModelForCausalLM.from_pretrained(folders[name], dtype=torch.float32)
    for i, layer in enumerate(masked.model.layers):
        q = f = torch.tensor([], dtype=torch.int64)
        if i not in dropped:
            q = (
                kept[f"layers.{i}.heads"][:, None] * layer.self_attn.head_dim + torch.arange(layer.self_attn.head_dim)
            ).flatten()
            f = kept[f"layers.{i}.ffn"]
        for weight, keep in ((layer.self_attn.o_proj.weight, q), (layer.mlp.down_proj.weight, f)):
            weight.data *= torch.zeros(weight.shape[1]).index_fill_(0, keep, 1.0)
    with torch.no_grad():
        close(hf_logits(folder, TOKENS[0]), masked(TOKENS[0]).logits)
    _, model = opened(folder)
    with torch.no_grad():
        close(model.logits(model(TOKENS[0])).transpose(0, 1), hf_logits(folder, TOKENS[0]))
    teacher, student = hf.HFFolder(folders[name]), hf.HFFolder(folder)
    assert student.shape.layer_kinds == tuple(teacher.shape.layer_kinds[i] for i in kept["layers"].tolist())
    assert student.config.keys() >= teacher.config.keys() - {"pretraining_tp"}


@EVERY
def test_default_preset_with_nothing_cut(tmp_path: Path, folders: dict[str, Path], groups: Any, name: str) -> None:
    folder = run_cut(tmp_path, folders[name], configuration("default", refit=Refit.all), TOKENS, groups)
    close(hf_logits(folder, TOKENS[0]), hf_logits(folders[name], TOKENS[0]), 5e-4)


@EVERY
def test_repair_of_a_dropped_layer(tmp_path: Path, folders: dict[str, Path], groups: Any, name: str) -> None:
    """Teacher and student run with kinds of their own: the repair makes the loss smaller, never larger."""
    errors = []
    for refit in (Refit.none, Refit.all):
        config = configuration(drop_layers=[0], refit=refit)
        folder = run_cut(tmp_path / refit.name, folders[name], config, TOKENS, groups, num_layers=2)
        errors.append((hf_logits(folder, TOKENS[0]) - hf_logits(folders[name], TOKENS[0])).square().mean())
    assert errors[1] < 0.5 * errors[0]
