"""Layers with experts and dense layers in one model, with windows: against transformers, whole, cut, repaired."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.config import Refit, Scope
from minitron_train.planning.counts import assumed_layers, parameters
from minitron_train.pruning.candidates import usable
from minitron_train.pruning.importance import importance
from minitron_train.pruning.target import check_target
from minitron_train.runtime.errors import UserError
from tests.parity.test_arch_moe import allow_only
from tests.support.models import COMMON, EXPERTS, exported, hf_logits, opened, save_random
from tests.support.pruning import configuration, measured, random_tokens, run_cut

MIXED = COMMON | EXPERTS | {"num_hidden_layers": 4, "intermediate_size": 40}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "mlp_only_layers": [1],
        "tie_word_embeddings": False,
        "use_sliding_window": True,
        "sliding_window": 7,
    },
    "qwen2_moe": {
        "model_type": "qwen2_moe",
        "use_sliding_window": True,
        "sliding_window": 5,
        "max_window_layers": 3,
        "decoder_sparse_step": 2,
        "mlp_only_layers": [3],
        "shared_expert_intermediate_size": 48,
        "num_experts": 6,
    },
}
WIDTHS = {"qwen3_moe": [7] * 4, "qwen2_moe": [5, None, 5, None]}
DENSE = {"qwen3_moe": [1], "qwen2_moe": [0, 2, 3]}
TOKENS = random_tokens()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixed")
    return {name: save_random(MIXED | config, root / name) for name, config in FAMILIES.items()}


def logits_of(folder: Path) -> torch.Tensor:
    checkpoint, model = opened(folder)
    assert not checkpoint.unexpected
    with torch.no_grad():
        return model.logits(model(TOKENS[0])).transpose(0, 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_export(models: dict[str, Path], groups: Any, name: str) -> None:
    checkpoint, model = opened(models[name])
    assert [i for i, kind in enumerate(checkpoint.shape.layer_kinds) if kind.is_dense] == DENSE[name]
    assert [kind.window for kind in checkpoint.shape.layer_kinds] == WIDTHS[name]
    torch.testing.assert_close(logits_of(models[name]), hf_logits(models[name], TOKENS[0]), rtol=0, atol=1e-4)
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes)
    assert all(torch.equal(tensor, checkpoint.read(key)) for key, tensor in found.items())
    stored = load_file(models[name] / "model.safetensors")
    assert parameters(checkpoint.shape)["parameters"] == sum(tensor.numel() for tensor in stored.values())


EACH: list[dict[str, int]] = [
    {"dense_ffn_hidden_size": 24},
    {"num_moe_experts": 3, "ffn_hidden_size": 16},
    {"num_attention_heads": 4},
    {"num_layers": 3},
]
TOGETHER = {key: value for sizes in EACH for key, value in sizes.items()}
DROPPED = {"qwen3_moe": [0], "qwen2_moe": [2]}
LEFT = {"qwen3_moe": [0], "qwen2_moe": [0, 2]}  # dense layers after that


def cut(
    folder: Path, models: dict[str, Path], groups: Any, name: str, sizes: dict[str, int], preset: str | None = None
) -> Path:
    """Prune, with the layers of DROPPED dropped if fewer layers are asked for."""
    settings = {"drop_layers": DROPPED[name]} if "num_layers" in sizes else {}
    return run_cut(folder, models[name], configuration(preset, **settings), TOKENS, groups, **sizes)


def mask(kept: torch.Tensor, count: int) -> torch.Tensor:
    """Ones at the kept positions."""
    return torch.zeros(count).index_fill_(0, kept, 1.0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sizes", [*EACH, TOGETHER])
def test_sliced_equals_masked(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str, sizes: dict[str, int]
) -> None:
    """The oracle is transformers' teacher without the dropped units."""
    folder = cut(tmp_path, models, groups, name, sizes)
    kept, size = load_file(folder / "kept.safetensors"), hf.HFFolder(folder).shape.kv_channels
    masked = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    for i, layer in enumerate(masked.model.layers):
        found = {
            part: kept.get(f"layers.{i}.{part}", torch.arange(0)) for part in ("heads", "ffn", "shared", "experts")
        }
        rows = (found["heads"][:, None] * size + torch.arange(size)).flatten()
        layer.self_attn.o_proj.weight.data *= mask(rows, layer.self_attn.o_proj.weight.shape[1])
        if i in DENSE[name]:
            assert not len(found["experts"]) and not len(found["shared"])
            layer.mlp.down_proj.weight.data *= mask(found["ffn"], 40)
            continue
        layer.mlp.experts.down_proj.data *= mask(found["ffn"], 6 * 24).view(6, 1, 24)
        if name == "qwen2_moe":
            layer.mlp.shared_expert.down_proj.weight.data *= mask(found["shared"], 48)
        if len(found["experts"]):
            allow_only(layer.mlp.gate, found["experts"])
    with torch.no_grad():
        wanted = masked(TOKENS[0]).logits
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_cut(tmp_path: Path, models: dict[str, Path], groups: Any, name: str) -> None:
    """Slicing gives back every bit. Rotation and repair change nothing."""
    plain = load_file(cut(tmp_path / "plain", models, groups, name, {}) / "model.safetensors")
    before = load_file(models[name] / "model.safetensors")
    assert plain.keys() == before.keys() and all(torch.equal(plain[key], tensor) for key, tensor in before.items())
    folder = cut(tmp_path, models, groups, name, {}, "default")
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), hf_logits(models[name], TOKENS[0]), rtol=0, atol=5e-4)


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("name", FAMILIES)
def test_student_of_every_axis_opens_in_transformers(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str, preset: str
) -> None:
    sizes = TOGETHER | {"hidden_size": 48}
    if name == "qwen2_moe":
        sizes |= {"moe_shared_expert_intermediate_size": 32}
    folder = cut(tmp_path, models, groups, name, sizes, preset)
    student, teacher = hf.HFFolder(folder), hf.HFFolder(models[name])
    assert student.shape.sizes() == teacher.shape.sizes() | sizes
    assert [i for i, kind in enumerate(student.shape.layer_kinds) if kind.is_dense] == LEFT[name]
    assert (student.config["mlp_only_layers"], student.config["decoder_sparse_step"]) == (LEFT[name], 1)
    assert student.config.keys() >= teacher.config.keys() - {"max_window_layers", "pretraining_tp"}
    torch.testing.assert_close(logits_of(folder), hf_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)
    planned = teacher.shape.smaller(DROPPED[name], **sizes)
    assert planned == student.shape
    assert parameters(planned)["parameters"] == sum(
        tensor.numel() for tensor in load_file(folder / "model.safetensors").values()
    )


def test_without_dense_layers_left(tmp_path: Path, models: dict[str, Path], groups: Any) -> None:
    folder = run_cut(tmp_path, models["qwen3_moe"], configuration(drop_layers=[1]), TOKENS, groups, num_layers=3)
    student = hf.HFFolder(folder)
    assert (student.shape.dense_ffn_hidden_size, student.config["mlp_only_layers"]) == (0, [])
    torch.testing.assert_close(logits_of(folder), hf_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)


def losses_without(folder: Path, tokens: torch.Tensor) -> list[float]:
    """transformers' loss without each layer."""
    found = []
    for dropped in range(4):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        model.model.layers = torch.nn.ModuleList(layer for i, layer in enumerate(model.model.layers) if i != dropped)
        with torch.no_grad():
            logits = model(tokens, use_cache=False).logits
        found.append(float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())))
    return found


def turns(folder: Path, tokens: torch.Tensor) -> list[float]:
    """1 - cos between the input and the output of each of transformers' layers."""
    model, streams = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    model.model.norm.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
    with torch.no_grad():
        model(tokens, use_cache=False)
    pairs = pairwise(streams)
    return [float(1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]


ORACLES = {"perplexity": losses_without, "block": turns}


@pytest.mark.parametrize("preset", [None, "default"])
@pytest.mark.parametrize("depth", ORACLES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_criterion_chooses_the_layers(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str, depth: str, preset: str | None
) -> None:
    """Layers are scored alike, dense or not. The student has the kinds of the chosen ones."""
    scores = torch.tensor(ORACLES[depth](models[name], TOKENS.flatten(0, 1)))
    wanted = scores.topk(2).indices.sort().values.tolist()
    dense = [place for place, i in enumerate(wanted) if i in DENSE[name]]
    config, sizes = configuration(preset, depth=depth), {"num_layers": 2, "dense_ffn_hidden_size": 24}
    if len(dense) == 2:
        with pytest.raises(UserError, match="would be kept, and none of them has experts; name the layers to drop in"):
            run_cut(tmp_path, models[name], config, TOKENS, groups, **sizes)
        return
    folder = run_cut(tmp_path, models[name], config, TOKENS, groups, **sizes)
    assert load_file(folder / "kept.safetensors")["layers"].tolist() == wanted
    student = hf.HFFolder(folder)
    assert (student.config["mlp_only_layers"], student.config["decoder_sparse_step"]) == (dense, 1)
    assert student.shape.dense_ffn_hidden_size == (24 if dense else 0)
    torch.testing.assert_close(logits_of(folder), hf_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)


def test_a_plan_says_which_layers_it_assumes(models: dict[str, Path]) -> None:
    """One layer of each kind, then the largest: experts have 6 x 24 neurons, dense layers 40."""
    shape = hf.HFFolder(models["qwen3_moe"]).shape
    for num_layers, dense in ((3, 1), (2, 1), (1, 0)):
        student = shape.smaller(num_layers=num_layers)
        assert [kind.is_dense for kind in student.layer_kinds].count(True) == dense
        text = f"{num_layers - dense} layers with experts and {dense} dense; prune.depth chooses them after scoring"
        assert assumed_layers(shape, student, None) == text
    assert assumed_layers(shape, shape.smaller([1], num_layers=3), [1]) is None
    assert assumed_layers(shape, shape.smaller(hidden_size=48), None) is None
    wide = shape.smaller(num_layers=2, num_moe_experts=2, ffn_hidden_size=8)
    assert [kind.is_dense for kind in wide.layer_kinds].count(True) == 1


def test_steps_drop_layers_of_both_kinds(tmp_path: Path, models: dict[str, Path], groups: Any) -> None:
    config = configuration(iterations=2, depth="perplexity")
    folder = run_cut(tmp_path, models["qwen3_moe"], config, TOKENS, groups, num_layers=2, num_moe_experts=4)
    assert hf.HFFolder(folder).shape.num_layers == 2
    torch.testing.assert_close(logits_of(folder), hf_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)


def test_a_search_keeps_all_layers_of_two_sizes(models: dict[str, Path]) -> None:
    config, shape = configuration(), hf.HFFolder(models["qwen3_moe"]).shape
    config.search.num_layers = [3, 4]
    found, refusals = usable(config, shape)
    assert [candidate.shape.num_layers for candidate in found] == [4]
    assert "search.num_layers=3: dense layers and layers with experts differ in size" in refusals[0]


@pytest.mark.parametrize("refit", [Refit.outputs, Refit.all])
def test_repair_makes_up_for_dropped_dense_neurons(
    tmp_path: Path, models: dict[str, Path], groups: Any, refit: Refit
) -> None:
    wanted, errors = hf_logits(models["qwen2_moe"], TOKENS[0]), []
    for which in (Refit.none, refit):
        folder = tmp_path / which.value
        run_cut(folder, models["qwen2_moe"], configuration(refit=which), TOKENS, groups, dense_ffn_hidden_size=24)
        errors.append(float((hf_logits(folder / "pruned", TOKENS[0]) - wanted).square().mean()))
    assert errors[1] < 0.9 * errors[0], errors


@pytest.mark.parametrize("width", ["activation", "magnitude", "random"])
@pytest.mark.parametrize("scope", Scope)
def test_scores_of_dense_layers(models: dict[str, Path], groups: Any, width: str, scope: Scope) -> None:
    """Against transformers' model: mean |activation| over tokens, then L2 over sequences; or the norm of the weights."""
    folder = models["qwen2_moe"]
    scores = importance(measured(hf.HFFolder(folder), TOKENS, groups, width=width, ffn_scope=scope))
    assert [tuple(x.shape) for x in scores.ffn] == [(40,), (6, 24), (40,), (40,)]
    assert [len(x) for x in scores.experts] == [0, 6, 0, 0] and [len(x) for x in scores.shared] == [0, 48, 0, 0]
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    layers = [model.model.layers[i].mlp for i in DENSE["qwen2_moe"]]
    for layer in layers:
        layer.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].view(12, 32, 40)))
    with torch.no_grad():
        model(TOKENS.flatten(0, 1))
    wanted = [x.abs().mean(1).square().sum(0).sqrt() for x in seen]
    if width == "magnitude":
        parts = [(x.gate_proj.weight.t(), x.up_proj.weight.t(), x.down_proj.weight) for x in layers]
        wanted = [torch.cat(weights).square().sum(0).sqrt() for weights in parts]
    if scope is Scope.network:
        wanted = [torch.stack(wanted).sum(0)] * 3
    for i, score in zip(DENSE["qwen2_moe"], wanted, strict=True) if width != "random" else ():
        torch.testing.assert_close(scores.ffn[i].float(), score, rtol=1e-4, atol=1e-5)


REFUSED = [
    ({"num_layers": 3}, [1], r"student\.num_moe_experts=6: no layer has experts"),
    ({"dense_ffn_hidden_size": 41}, None, r"student\.dense_ffn_hidden_size=41: larger than the teacher's 40"),
]


@pytest.mark.parametrize(("sizes", "dropped", "message"), REFUSED)
def test_what_cannot_be_cut(
    models: dict[str, Path], sizes: dict[str, int], dropped: list[int] | None, message: str
) -> None:
    shape, prune = hf.HFFolder(models["qwen2_moe"]).shape, configuration(drop_layers=dropped).prune
    with pytest.raises(UserError, match=message):
        check_target(shape, shape.smaller(dropped, **sizes), prune)


def test_a_model_without_dense_layers_has_no_such_size() -> None:
    shape = hf.shape_from_config(MIXED | FAMILIES["qwen3_moe"] | {"mlp_only_layers": []}, "config.json")
    with pytest.raises(UserError, match="the teacher has no dense layers among layers with experts; leave it out"):
        shape.smaller(dense_ffn_hidden_size=8)


BAD = [
    ({"mlp_only_layers": "1"}, "mlp_only_layers='1': must be a list of layer numbers"),
    ({"mlp_only_layers": [0.0]}, "must be a list of layer numbers"),
    ({"decoder_sparse_step": 0}, "decoder_sparse_step=0: must be at least 1"),
    ({"mlp_only_layers": [0, 1, 2, 3]}, "config.json: num_experts=6: no layer has experts"),
    ({"intermediate_size": None}, "intermediate_size=None is not a whole number"),
]


@pytest.mark.parametrize(("changes", "message"), BAD)
def test_bad_settings_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        hf.shape_from_config(MIXED | FAMILIES["qwen3_moe"] | {"num_experts": 6} | changes, "config.json")
    assert "\n" not in str(error.value)
