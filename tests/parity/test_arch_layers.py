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
from minitron_train.runtime.errors import UserError
from tests.support.families import LAYERED, save_layered
from tests.support.models import exported, hf_logits
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS = random_tokens()
LONG = torch.randint(0, 128, (2, 300), generator=torch.Generator().manual_seed(5))
EVERY = pytest.mark.parametrize("name", LAYERED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("layers")
    return {name: save_layered(name, root / name) for name in LAYERED}


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


def test_a_cached_text_does_not_cross_longropes_length(folders: dict[str, Path], groups: Any) -> None:
    """Neither grown token by token nor as a prefix; each alone is computed."""
    _, model = opened(folders["phi3"])
    with pytest.raises(UserError, match=r"a text grows beyond 32 tokens, where .* \(longrope\) changes"):
        greedy(model, [LONG[0, :31].tolist()], 4, [lambda text: False], groups)
    assert len(greedy(model, [LONG[0, :33].tolist()], 4, [lambda text: False], groups)[0]) == 4
    cache = KeyValueCache()
    with inference(model):
        start, rest = (torch.arange(first, stop)[None] for first, stop in ((0, 20), (20, 50)))
        hidden_states(model, LONG[:1, :20], start, cache=cache, keep=True, min_length=33)
        found = model.output.logits(hidden_states(model, LONG[:1, 20:50], rest, cache=cache))
    close(found, hf_logits(folders["phi3"], LONG[:1, :50])[:, 20:])
