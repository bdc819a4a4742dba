"""ModelOpt's own answer on a tiny Nemotron: its scores, its choice of heads, and the logits of the model it made."""

import os
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.config import Aggregation, Config, ParallelConfig, Scope
from minitron_train.parallel import groups
from minitron_train.parallel.launch import World
from minitron_train.prune.score import score
from minitron_train.prune.scores import Scores
from minitron_train.prune.select import select
from minitron_train.prune.slice import slice_checkpoint

pytestmark = pytest.mark.needs_data
NUM_LAYERS = 4
ENUMS = {
    "batch_aggregation": Aggregation,
    "sequence_aggregation": Aggregation,
    "heads_scope": Scope,
    "ffn_scope": Scope,
}


def preset(name: str) -> Config:
    """The program's configuration with one of conf/prune/*.yaml."""
    config = Config()
    file = Path(__file__).parents[2] / "conf" / "prune" / f"{name}.yaml"
    for key, value in yaml.safe_load(file.read_text()).items():
        setattr(config.prune, key, ENUMS[key](value) if key in ENUMS else value)
    return config


@pytest.fixture(scope="module")
def oracle() -> Path:
    return Path(os.environ["MINITRON_ORACLES"]) / "modelopt_minitron"


@pytest.fixture(scope="module")
def outcome(oracle, tmp_path_factory):
    """Our scores, kept indices and pruned folder for ModelOpt's target."""
    folder, config = tmp_path_factory.mktemp("modelopt"), preset("modelopt")
    teacher = hf.Checkpoint(oracle / "teacher")
    tokens = load_file(oracle / "calibration_tokens.safetensors")["tokens"]
    with groups.start(ParallelConfig(), World(), 1234) as g:
        score(config, g, teacher=teacher, tokens=tokens, folder=folder)
    student = teacher.shape.smaller(hidden_size=48, ffn_hidden_size=64, num_attention_heads=4)
    keep = select(Scores.read(folder / "scores.safetensors", teacher), config.prune, teacher.shape, student)
    (folder / "pruned").mkdir()
    slice_checkpoint(teacher, keep, student, folder / "pruned")
    return load_file(folder / "scores.safetensors"), keep, folder / "pruned", tokens


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
        torch.testing.assert_close(scores[ours].squeeze(), expected[theirs].squeeze(), rtol=1e-5, atol=0.0, msg=ours)


def test_kept_sets(oracle, outcome):
    expected, keep = load_file(oracle / "scores.safetensors"), outcome[1]
    assert set(keep.embedding.tolist()) == set(expected["hidden_size"].topk(48).indices.tolist())
    for i in range(NUM_LAYERS):
        assert set(keep.ffn[i].tolist()) == set(expected[f"layers.{i}.ffn"].topk(64).indices.tolist())
        order = expected[f"layers.{i}.head_order"].tolist()  # group by group, best first
        assert set(keep.heads[i].tolist()) == {head for g in range(2) for head in order[4 * g : 4 * g + 2]}


def test_logits_of_the_pruned_model(oracle, outcome):
    _, _, pruned, tokens = outcome
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (pruned, oracle / "pruned")]
    with torch.no_grad():
        ours, theirs = (model(tokens[0]).logits for model in models)
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-4)
