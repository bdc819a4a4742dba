"""Criteria: their scores against sums by hand, how they are found by name, and one that comes from outside the package."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.config import PruneConfig
from minitron_train.pruning.collect import Statistics
from minitron_train.pruning.criterion import (
    Evidence,
    Width,
    check_layers,
    check_width,
    depth_criterion,
    names,
    outside_criteria,
    width_criterion,
)
from minitron_train.pruning.select import select
from minitron_train.runtime.errors import UserError
from tests.support.pruning import configuration, evidence_of, measured, random_tokens, run_cut

LAYER, HEAD, NEURON, CHANNEL = "model.layers.1.", 5, 17, 40


def unmeasured(folder: Path, seed: int = 0, **prune: str) -> Evidence:
    teacher = hf.HFFolder(folder)
    return evidence_of(teacher, Statistics(teacher.shape.num_layers), PruneConfig(**prune), seed)  # type: ignore[arg-type]


def weights_of(tensors: dict[str, Tensor], kv_channels: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """All weights that go with HEAD and NEURON of layer 1, and with CHANNEL."""
    rows = slice(HEAD * kv_channels, (HEAD + 1) * kv_channels)
    head = [tensors[LAYER + "self_attn.q_proj.weight"][rows], tensors[LAYER + "self_attn.o_proj.weight"][:, rows]]
    neuron = [tensors[f"{LAYER}mlp.{part}_proj.weight"][NEURON] for part in ("gate", "up")]
    neuron.append(tensors[LAYER + "mlp.down_proj.weight"][:, NEURON])
    channel = []
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            channel.append(tensor[CHANNEL : CHANNEL + 1])
        else:
            writes = name.endswith(("o_proj.weight", "down_proj.weight"))
            channel.append(tensor[CHANNEL] if writes else tensor[:, CHANNEL])
    return head, neuron, channel


def test_magnitude_is_the_norm_of_all_that_goes_with_a_channel_head_or_neuron(tiny_models: dict[str, Path]) -> None:
    evidence = unmeasured(tiny_models["llama"])
    tensors = load_file(tiny_models["llama"] / "model.safetensors")
    scores = width_criterion("magnitude").width(evidence)
    found = (scores.heads[1][HEAD], scores.ffn[1][NEURON], scores.embedding[CHANNEL])
    for score, parts in zip(found, weights_of(tensors, evidence.shape.kv_channels), strict=True):
        torch.testing.assert_close(score, torch.cat([part.flatten() for part in parts]).double().norm())


@torch.no_grad()
@pytest.mark.parametrize("include_final_norm", [False, True])
def test_wanda_is_weight_times_input_norm_as_transformers_computes_it(
    tiny_models: dict[str, Path], groups, include_final_norm: bool
) -> None:
    tokens, teacher = random_tokens(), hf.HFFolder(tiny_models["llama"])
    evidence = measured(teacher, tokens, groups, include_final_norm=include_final_norm)
    scores = width_criterion("wanda").width(evidence)

    model = AutoModelForCausalLM.from_pretrained(teacher.folder, dtype=torch.float32).eval()
    products: dict[str, Tensor] = {}  # Σ over outputs of (|W| ‖x‖)², by linear
    for name, linear in model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            linear.register_forward_pre_hook(
                lambda module, args, name=name: products.__setitem__(
                    name, (module.weight.abs() * args[0].flatten(0, 1).norm(dim=0)).double().square().sum(0)
                )
            )
    model(tokens.flatten(0, 1), use_cache=False)
    size = evidence.shape.kv_channels
    head = products[LAYER + "self_attn.o_proj"][HEAD * size : (HEAD + 1) * size].sum().sqrt()
    readers = ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", *(["lm_head"] if include_final_norm else [])]
    channel = sum(value for name, value in products.items() if name.endswith(tuple(readers))).sqrt()  # type: ignore[union-attr]
    close = {"rtol": 1e-4, "atol": 0.0}
    torch.testing.assert_close(scores.heads[1][HEAD], head, **close)
    torch.testing.assert_close(scores.ffn[1], products[LAYER + "mlp.down_proj"].sqrt(), **close)
    torch.testing.assert_close(scores.embedding, channel, **close)


def test_random_follows_the_seed_and_keeps_groups_whole(tiny_models: dict[str, Path], groups) -> None:
    evidence = unmeasured(tiny_models["llama"], seed=1, width="random")
    scores = width_criterion("random").width(evidence)
    evidence.statistics.blocks.update({f"layers.{i}.block": torch.ones(2) for i in range(evidence.shape.num_layers)})
    keep = select(evidence, evidence.shape.smaller(hidden_size=48, ffn_hidden_size=40, num_attention_heads=4))
    assert [head // 2 for head in keep.heads[2].tolist()] == [0, 1, 2, 3]
    assert set(keep.embedding.tolist()) == set(scores.embedding.topk(48).indices.tolist())
    other = width_criterion("random").width(replace(evidence, seed=2))
    assert not torch.equal(other.embedding, scores.embedding)


def test_criteria_are_found_by_the_names_of_their_files() -> None:
    width, depth = ["activation", "magnitude", "random", "wanda"], ["block", "contiguous", "logit_mse", "perplexity"]
    assert names() == sorted([*width, *depth])
    assert all(width_criterion(name).summary for name in width)
    method = (Path(__file__).parents[2] / "docs" / "method.md").read_text()
    for key, criteria in (("width", width), ("depth", depth)):
        help_text = PruneConfig.__dataclass_fields__[key].metadata["help"]
        for name in criteria:
            assert name in help_text, f"minitron_train/config/prune.py: the help of prune.{key} lacks {name}"
            assert f"| `{name}`" in method, f"docs/method.md: the table of prune.{key} lacks {name}"
    assert [name for name in depth if depth_criterion(name).needs_layer_removal] == ["logit_mse", "perplexity"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("taylor", r"prune\.width=taylor: no such criterion; choose one of activation, magnitude, .*wanda, or"),
        ("block", r"prune\.width=block: .*criteria\.block defines no function width"),
        ("no_lab.taylor", r"prune\.width=no_lab\.taylor: cannot be imported \(No module named 'no_lab'\)"),
        ("../x", r"prune\.width=\.\./x: is not the name of a Python module"),
        ("", r"prune\.width=: no such criterion"),
    ],
)
def test_a_wrong_name_is_refused_with_those_that_exist(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        width_criterion(name)


CHANNELS, HEADS, NEURONS = torch.arange(64.0), torch.arange(8.0), torch.arange(96.0)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (CHANNELS, r"returned a tensor of type float32 and size \[64\]; return a Width"),
        (Width(CHANNELS[:60], [HEADS] * 3, [NEURONS] * 3), r"embedding holds .*size \[60\]; .* size \[64\]"),
        (Width(CHANNELS, [NEURONS] * 3, [NEURONS] * 3), r"heads holds .*size \[96\]; return scores of size \[8\]"),
        (Width(CHANNELS, [HEADS] * 2, [NEURONS] * 3), "heads has 2 tensors; return one for each of 3 layers"),
        (Width(CHANNELS, [HEADS] * 3, [NEURONS * torch.nan] * 3), "ffn holds NaN"),
    ],
)
def test_wrong_scores_are_rejected(tiny_models: dict[str, Path], found: object, message: str) -> None:
    """A wrong size or NaN would keep the wrong units without any error."""
    with pytest.raises(UserError, match=rf"prune\.width=my_lab: {message}"):
        check_width("my_lab", found, hf.HFFolder(tiny_models["llama"]).shape)


@pytest.mark.parametrize("found", [[0, 1], torch.tensor([1, 0]), torch.arange(3), torch.tensor([2, 3]), torch.rand(2)])
def test_wrong_layers_are_rejected(found: object) -> None:
    with pytest.raises(UserError, match=r"prune\.depth=my_lab: returned .*; return the numbers of 2 of the 3 layers"):
        check_layers("my_lab", found, 2, 3)


WIDTH_FROM_OUTSIDE = '''"""Channels, heads and neurons from the last to the first."""

import torch

from minitron_train.pruning.criterion import Evidence, Width


def width(evidence: Evidence) -> Width:
    shape, layers = evidence.shape, range(evidence.shape.num_layers)
    return Width(
        embedding=torch.arange(shape.hidden_size).double(),
        heads=[torch.arange(shape.num_attention_heads).double() for _ in layers],
        ffn=[torch.arange(shape.ffn_hidden_size).double() for _ in layers],
    )
'''
DEPTH_FROM_OUTSIDE = '''"""The first layers stay."""

import torch


def depth(evidence, num_layers):
    return torch.arange(num_layers)
'''


def test_criteria_from_outside_the_package(
    tmp_path: Path, tiny_models: dict[str, Path], groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One new file each, named in the settings, decides what a whole score and prune keep."""
    lab = tmp_path / "my_lab"
    lab.mkdir()
    (lab / "last_units.py").write_text(WIDTH_FROM_OUTSIDE)
    (lab / "first_layers.py").write_text(DEPTH_FROM_OUTSIDE)
    monkeypatch.syspath_prepend(tmp_path)
    config = configuration(width="my_lab.last_units", depth="my_lab.first_layers")
    sizes = {"num_layers": 2, "hidden_size": 48, "ffn_hidden_size": 40, "num_attention_heads": 4}
    folder = run_cut(tmp_path, tiny_models["llama"], config, random_tokens(), groups, **sizes)
    before = outside_criteria(config.prune)
    assert set(before) == {"criterion my_lab.last_units", "criterion my_lab.first_layers"}
    (lab / "last_units.py").write_text(WIDTH_FROM_OUTSIDE + "# edited")
    assert outside_criteria(config.prune)["criterion my_lab.last_units"] != before["criterion my_lab.last_units"]
    kept = load_file(folder / "kept.safetensors")
    assert kept["layers"].tolist() == [0, 1]
    assert kept["embedding"].tolist() == list(range(16, 64))
    assert kept["layers.1.ffn"].tolist() == list(range(56, 96))
    assert kept["layers.1.heads"].tolist() == [1, 3, 5, 7]  # the last head of every group
