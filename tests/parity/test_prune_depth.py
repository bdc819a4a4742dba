"""Depth: the loss without each layer, and 1 - cos over blocks of layers, against transformers."""

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron_train.pruning import layer_removal
from tests.support.models import save_tiny
from tests.support.pruning import configuration, random_tokens, run_cut

LAYERS, LENGTH = 5, 32
TOKENS = random_tokens()
TOKENS[1, 2, 20:] = -1  # padding


@pytest.fixture(scope="module", params=["nemotron", "llama", "llama_untied"])
def teacher(request, tmp_path_factory):
    return save_tiny(request.param, tmp_path_factory.mktemp(request.param), num_hidden_layers=LAYERS)


def logits_without(folder, dropped: int | None) -> Tensor:
    """transformers' logits [N, S, V] with its layer `dropped` taken out."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i != dropped)
    tokens = TOKENS.flatten(0, 1)
    with torch.no_grad():
        return model(tokens.clamp(min=0), use_cache=False).logits


def loss_without(folder, dropped: int | None) -> float:
    """transformers' mean loss over all tokens that are followed by one."""
    logits, tokens = logits_without(folder, dropped), TOKENS.flatten(0, 1)
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=-1
    ).item()


def block_distances(folder) -> Tensor:
    """[L, L + 1]: mean over sequences of 1 - cos between the inputs of layers i and j, at the last token."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokens = TOKENS.flatten(0, 1)
    inputs: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        model(tokens.clamp(min=0), use_cache=False)
    last = (tokens >= 0).sum(1) - 1
    ends = torch.stack(inputs)[:, torch.arange(len(tokens)), last]
    return 1 - torch.nn.functional.cosine_similarity(ends[:, None], ends[None], dim=-1).mean(-1)


@pytest.mark.parametrize(("streamed", "chunk_tokens"), [(False, 10**6), (True, 400)])
def test_losses_are_those_of_transformers_without_the_layer(
    tmp_path, teacher, groups, streamed, chunk_tokens, monkeypatch
):
    monkeypatch.setattr(layer_removal, "LOGITS", 50 * 40)  # several blocks of the vocabulary
    config = configuration(depth="perplexity")
    config.calibration.streamed, config.calibration.chunk_tokens = streamed, chunk_tokens
    folder = run_cut(tmp_path, teacher, config, TOKENS, groups, num_layers=3)
    scores = load_file(tmp_path / "scores.safetensors")
    wanted = torch.tensor([loss_without(teacher, i) for i in [*range(LAYERS), None]], dtype=torch.float64)
    torch.testing.assert_close(scores["raw.losses_without"], wanted, rtol=1e-5, atol=0)
    for i in range(LAYERS):
        assert scores[f"layers.{i}.loss_without"].item() == pytest.approx(wanted[i].item(), rel=1e-5)
    kept = load_file(folder / "kept.safetensors")["layers"]
    assert kept.tolist() == sorted(wanted[:-1].topk(3).indices.tolist())


def test_logit_changes_are_those_of_transformers_without_the_layer(tmp_path, teacher, groups, monkeypatch):
    monkeypatch.setattr(layer_removal, "LOGITS", 50 * 40)
    folder = run_cut(tmp_path, teacher, configuration(depth="logit_mse"), TOKENS, groups, num_layers=3)
    predicts = TOKENS.flatten(0, 1)[:, 1:] >= 0
    whole = logits_without(teacher, None)[:, :-1][predicts].double()
    changes = [logits_without(teacher, i)[:, :-1][predicts].double() - whole for i in range(LAYERS)]
    wanted = torch.stack([change.square().sum() / whole.square().sum() for change in changes])
    found = load_file(tmp_path / "scores.safetensors")["raw.logit_changes"]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)
    kept = load_file(folder / "kept.safetensors")["layers"]
    assert kept.tolist() == sorted(wanted.topk(3).indices.tolist())


def test_contiguous_blocks_are_those_that_turn_the_stream_least(tmp_path, teacher, groups):
    folder = run_cut(tmp_path, teacher, configuration(depth="contiguous"), TOKENS, groups, num_layers=3)
    distances = block_distances(teacher)
    spans = load_file(tmp_path / "scores.safetensors")["raw.spans"] / len(TOKENS.flatten(0, 1))
    torch.testing.assert_close(1 - spans.float(), distances, rtol=0, atol=1e-5)
    first = min(range(LAYERS - 1), key=lambda i: distances[i, i + 2].item())
    kept = load_file(folder / "kept.safetensors")["layers"]
    assert kept.tolist() == [i for i in range(LAYERS) if i not in (first, first + 1)]


def test_other_cuts_do_not_measure_losses(tmp_path, teacher, groups):
    run_cut(tmp_path, teacher, configuration(), TOKENS, groups, num_layers=3)
    assert not [name for name in load_file(tmp_path / "scores.safetensors") if "loss" in name]
