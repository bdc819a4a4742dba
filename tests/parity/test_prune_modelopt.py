"""ModelOpt's own answer on a tiny Nemotron: its scores, its choice of heads, and the logits of the model it made."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.pruning.prune import prune_checkpoint
from minitron_train.pruning.scoring import score_checkpoint
from tests.support.pruning import configuration

pytestmark = pytest.mark.needs_data
NUM_LAYERS = 4


@pytest.fixture(scope="module")
def oracle(oracles):
    return oracles / "modelopt_minitron"


@pytest.fixture(scope="module")
def outcome(oracle, groups, tmp_path_factory):
    """Our scores, kept indices and pruned folder for ModelOpt's target."""
    folder, config = tmp_path_factory.mktemp("modelopt"), configuration("modelopt")
    teacher = hf.HFFolder(oracle / "teacher")
    tokens = load_file(oracle / "calibration_tokens.safetensors")["tokens"]
    scores, pruned = folder / "scores.safetensors", folder / "pruned"
    pruned.mkdir()
    student = teacher.shape.smaller(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4)
    score_checkpoint(config, groups, teacher=teacher, tokens=tokens, folder=folder)
    prune_checkpoint(
        config, groups, teacher=teacher, student=student, scores=scores, tokens=lambda: tokens, folder=pruned
    )
    return load_file(scores), load_file(pruned / "kept.safetensors"), pruned, tokens


def test_every_score(oracle, outcome):
    scores, expected = outcome[0], load_file(oracle / "scores.safetensors")
    ours_to_theirs = {"embedding": "hidden_size"}
    for i in range(NUM_LAYERS):
        ours_to_theirs |= {
            f"layers.{i}.heads": f"layers.{i}.head_l2",
            f"layers.{i}.ffn": f"layers.{i}.ffn",
            f"layers.{i}.block": f"layers.{i}.depth_1mcos",
        }
    for ours, theirs in ours_to_theirs.items():
        score = scores[ours].squeeze()
        if ours.endswith("block"):  # a mean over tokens; ModelOpt sums the means of its batches, which are of one size
            score = score * len(outcome[3])
        torch.testing.assert_close(score, expected[theirs].squeeze(), rtol=1e-5, atol=0.0, msg=ours)


def test_kept_sets(oracle, outcome):
    expected, keep = load_file(oracle / "scores.safetensors"), outcome[1]
    assert set(keep["embedding"].tolist()) == set(expected["hidden_size"].topk(48).indices.tolist())
    for i in range(NUM_LAYERS):
        assert set(keep[f"layers.{i}.ffn"].tolist()) == set(expected[f"layers.{i}.ffn"].topk(64).indices.tolist())
        order = expected[f"layers.{i}.head_order"].tolist()  # group by group, best first
        assert set(keep[f"layers.{i}.heads"].tolist()) == {head for g in range(2) for head in order[4 * g : 4 * g + 2]}


def test_logits_of_the_pruned_model(oracle, outcome):
    _, _, pruned, tokens = outcome
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (pruned, oracle / "pruned")]
    with torch.no_grad():
        ours, theirs = (model(tokens[0]).logits for model in models)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)
