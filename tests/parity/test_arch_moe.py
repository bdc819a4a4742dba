"""Mixtures of experts against transformers: logits, export, counts of published models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.arch.rules import check_rules
from minitron_train.config import ExpertImportance, Refit
from minitron_train.model.build import build
from minitron_train.model.generate import greedy
from minitron_train.model.load import load_weights
from minitron_train.planning.counts import parameters
from minitron_train.pruning.importance import importance
from minitron_train.runtime.errors import UserError
from tests.support.models import COMMON, EXPERTS, exported, hf_logits, save_random
from tests.support.pruning import configuration, measured, random_tokens, run_cut

FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"model_type": "qwen3_moe", "tie_word_embeddings": False},
    "qwen3_moe, probabilities as they are": {"model_type": "qwen3_moe", "norm_topk_prob": False},
    "qwen2_moe": {"model_type": "qwen2_moe", "shared_expert_intermediate_size": 40},
    "mixtral": {"model_type": "mixtral", "intermediate_size": 24},
    "olmoe": {"model_type": "olmoe", "intermediate_size": 24, "head_dim": 8},
}
TOKENS = random_tokens()
QWEN3_30B_A3B = {
    "model_type": "qwen3_moe",
    "num_hidden_layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
}
QWEN15_MOE_A27B = {
    "model_type": "qwen2_moe",
    "num_hidden_layers": 24,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "moe_intermediate_size": 1408,
    "shared_expert_intermediate_size": 5632,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": False,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "rope_theta": 1e6,
}
OLMOE_1B_7B = {
    "model_type": "olmoe",
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "num_experts": 64,
    "num_experts_per_tok": 8,
    "vocab_size": 50304,
}
MIXTRAL_8X7B = {
    "model_type": "mixtral",
    "num_hidden_layers": 32,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 32000,
    "rope_theta": 1e6,
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("moe")
    return {name: save_random({**COMMON, **EXPERTS, **config}, root / name) for name, config in FAMILIES.items()}


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_export(models: dict[str, Path], groups: Any, name: str) -> None:
    checkpoint = hf.HFFolder(models[name])
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    with torch.no_grad():
        logits = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(logits, hf_logits(models[name], TOKENS[0]), rtol=0, atol=1e-4)
    found = exported(model, checkpoint)
    assert set(found) == set(checkpoint.sizes) and not checkpoint.unexpected
    assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in found.items())


@pytest.mark.parametrize("name", ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe"])
def test_experts_stored_together_are_read(tmp_path: Path, models: dict[str, Path], groups: Any, name: str) -> None:
    """transformers 5 writes them so on request. The student's folder has each expert's tensors, as published folders do."""
    folder = tmp_path / "together"
    AutoModelForCausalLM.from_pretrained(models[name]).save_pretrained(folder, save_original_format=False)
    assert any(key.endswith("experts.gate_up_proj") for key in load_file(folder / "model.safetensors"))
    single, together = hf.HFFolder(models[name]), hf.HFFolder(folder)
    assert together.sizes == single.sizes and not together.unexpected
    assert all(torch.equal(together.read(key), single.read(key)) for key in single.sizes)
    if name == "mixtral":
        pruned = run_cut(tmp_path, folder, configuration(), TOKENS, groups)
        written, stored = (load_file(path / "model.safetensors") for path in (pruned, models[name]))
        assert written.keys() == stored.keys() and all(torch.equal(written[key], x) for key, x in stored.items())


def test_experts_stored_together_of_another_number_are_refused(tmp_path: Path, models: dict[str, Path]) -> None:
    AutoModelForCausalLM.from_pretrained(models["mixtral"]).save_pretrained(tmp_path, save_original_format=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_local_experts": 5}))
    with pytest.raises(UserError, match="experts"):
        hf.HFFolder(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_with_a_cache_is_the_full_pass(models: dict[str, Path], groups: Any, name: str) -> None:
    checkpoint = hf.HFFolder(models[name])
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    prompts = [TOKENS[0][0, :9].tolist(), TOKENS[0][1, :5].tolist()]
    for prompt, found in zip(prompts, greedy(model, prompts, 8, [lambda _: False] * 2, groups), strict=True):
        logits = hf_logits(models[name], torch.tensor([prompt + found]))[0]
        assert logits.argmax(-1)[len(prompt) - 1 : -1].tolist() == found


@pytest.mark.parametrize(
    ("config", "total", "active"),
    [
        (QWEN3_30B_A3B, 30_532_122_624, 3_353_032_704),
        (QWEN15_MOE_A27B, 14_315_784_192, 2_689_173_504),
        (MIXTRAL_8X7B, 46_702_792_704, 12_879_925_248),
        (OLMOE_1B_7B, 6_919_161_856, 1_282_017_280),
    ],
)
def test_counts_of_published_models(config: dict[str, Any], total: int, active: int) -> None:
    """The hub's figures: 30,532,122,624, 14,315,784,192, 46,702,792,704 and 6,919,161,856 parameters."""
    counts = parameters(hf.shape_from_config(config, "config.json"))
    assert (counts["parameters"], counts["active_parameters"]) == (total, active)


def patterns(count: int) -> list[dict[str, int]]:
    """The sizes that are cut one at a time, and all but the hidden size together."""
    each = [{"num_moe_experts": 3}, {"ffn_hidden_size": 16}, {"num_attention_heads": 4}, {"num_layers": 2}]
    return [*each, {key: value for sizes in each for key, value in sizes.items()}][:count]


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("sizes", patterns(5))
def test_sliced_equals_masked(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str, sizes: dict[str, int]
) -> None:
    """The oracle is transformers' teacher, whose router cannot choose dropped experts."""
    if name == "olmoe":  # its norms over all heads see the dropped ones
        sizes = {key: value for key, value in sizes.items() if key != "num_attention_heads"}
    if name == "qwen2_moe":
        sizes = sizes | {"moe_shared_expert_intermediate_size": 24}
    folder = run_cut(tmp_path, models[name], configuration(), TOKENS, groups, **sizes)
    kept = load_file(folder / "kept.safetensors")
    masked = AutoModelForCausalLM.from_pretrained(models[name], dtype=torch.float32)
    size = hf.HFFolder(folder).shape.kv_channels
    num_experts, _, width = masked.model.layers[0].mlp.experts.down_proj.shape
    for i, layer in enumerate(masked.model.layers):
        is_dropped = f"layers.{i}.heads" not in kept
        rows = (
            torch.arange(0)
            if is_dropped
            else (kept[f"layers.{i}.heads"][:, None] * size + torch.arange(size)).flatten()
        )
        layer.self_attn.o_proj.weight.data *= mask(rows, layer.self_attn.o_proj.weight.shape[1])
        neurons = torch.arange(0) if is_dropped else kept[f"layers.{i}.ffn"]
        layer.mlp.experts.down_proj.data *= mask(neurons, num_experts * width).view(num_experts, 1, width)
        if name == "qwen2_moe":
            shared = torch.arange(0) if is_dropped else kept[f"layers.{i}.shared"]
            assert is_dropped or len(shared) == 24
            layer.mlp.shared_expert.down_proj.weight.data *= mask(shared, 40)
        if not is_dropped:
            allow_only(layer.mlp.gate, kept[f"layers.{i}.experts"])
    with torch.no_grad():
        wanted = masked(TOKENS[0]).logits
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-4)


def mask(kept: torch.Tensor, count: int) -> torch.Tensor:
    """Ones at the kept positions."""
    return torch.zeros(count).index_fill_(0, kept, 1.0)


def allow_only(router: torch.nn.Module, experts: torch.Tensor) -> None:
    """Give other experts a probability of zero, by a linear that adds -inf to their logits."""
    hidden = torch.full((len(router.get_parameter("weight")),), -torch.inf).index_fill_(0, experts, 0.0)
    plain = torch.nn.functional.linear

    def forward(hidden_states: torch.Tensor) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.functional, "linear", lambda x, weight: plain(x, weight) + hidden)
            return type(router).forward(router, hidden_states)

    router.forward = forward


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_channels_are_those_of_every_expert(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str
) -> None:
    sizes = {"hidden_size": 48, "num_moe_experts": 3, "ffn_hidden_size": 16}
    if name == "olmoe":  # its heads fill the hidden size
        sizes |= {"num_attention_heads": 6, "num_query_groups": 3}
    if name == "qwen2_moe":
        sizes |= {"moe_shared_expert_intermediate_size": 24}
    folder = run_cut(tmp_path, models[name], configuration(), TOKENS, groups, **sizes)
    teacher, student, kept = hf.HFFolder(models[name]), hf.HFFolder(folder), load_file(folder / "kept.safetensors")
    channels, experts = kept["embedding"], kept["layers.1.experts"].tolist()
    neurons = kept["layers.1.ffn"].view(3, 16) - torch.tensor(experts)[:, None] * 24
    for row in student.table.rows:
        for tensor in row.hf if "mlp" in row.mcore and not row.dense else ():
            for e, before in enumerate(experts if row.per_expert else [0]):
                old, new = teacher.read(tensor.format(i=1, e=before)), student.read(tensor.format(i=1, e=e))
                index = {"embd": channels, "ffn": neurons[e], "expert": torch.tensor(experts), "one": torch.arange(1)}
                index["shared"] = kept.get("layers.1.shared", channels)
                for dim, axis in enumerate(row.hf[tensor]):
                    old = old.index_select(dim, index[axis])
                assert torch.equal(old, new), tensor


def oracle(folder: Path, tokens_BS: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Of each layer of transformers' model: router probabilities [N, E] (0: not chosen), output norms, neurons [N, E, F]."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []

    def see(module: Any, inputs: tuple[torch.Tensor]) -> None:
        x = inputs[0].flatten(0, 1)
        _, probs, index = module.gate(x)
        gate, up = torch.einsum("nh,efh->nef", x, module.experts.gate_up_proj).chunk(2, dim=-1)
        neurons = torch.nn.functional.silu(gate) * up
        norms = torch.einsum("nef,ehf->neh", neurons, module.experts.down_proj).norm(dim=-1)
        found.append((torch.zeros(len(x), norms.shape[1]).scatter(1, index, probs), norms, neurons))

    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(see)
    with torch.no_grad():
        model(tokens_BS.clamp(min=0))
    return found


@pytest.mark.parametrize("which", ExpertImportance)
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_scores_of_experts_and_their_neurons(
    models: dict[str, Path], groups: Any, name: str, which: ExpertImportance
) -> None:
    """REAP is the mean over an expert's tokens of router probability x norm of its output (arXiv 2510.13999, eq. 9)."""
    tokens = TOKENS.clone()
    tokens[0, :, 20:], tokens[1, 2, 5:] = -1, -1
    evidence = measured(hf.HFFolder(models[name]), tokens, groups, expert_importance=which)
    scores = importance(evidence)
    valid = tokens.flatten() >= 0
    for i, (probs, norms, neurons) in enumerate(oracle(models[name], tokens.flatten(0, 1))):
        chosen = (probs > 0) & valid[:, None]
        weights = {"reap": probs * norms, "norm": norms, "tokens": chosen.sum(0).float()[None]}[which]
        wanted = (weights * chosen).sum(0) / chosen.sum(0).clamp(min=1)
        torch.testing.assert_close(scores.experts[i].float(), wanted, rtol=1e-4, atol=1e-5)
        by_sequence = [part * rows[..., None] for part, rows in zip(neurons.split(32), chosen.split(32), strict=True)]
        counts = [rows.sum(0).clamp(min=1)[:, None] for rows in chosen.split(32)]
        means = torch.stack([part.abs().sum(0) / n for part, n in zip(by_sequence, counts, strict=True)])
        torch.testing.assert_close(scores.ffn[i].float(), means.square().sum(0).sqrt(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_magnitude_of_experts(models: dict[str, Path], groups: Any, name: str) -> None:
    teacher = hf.HFFolder(models[name])
    found = importance(measured(teacher, TOKENS, groups, width="magnitude")).experts[1]
    rows = [row for row in teacher.table.rows if "mlp.router" in row.mcore or row.per_expert]
    for e in range(teacher.shape.num_moe_experts):
        parts = [teacher.read(tensor.format(i=1, e=e)) for row in rows for tensor in row.hf]
        squares = parts[0][e].square().sum() + sum(part.square().sum() for part in parts[1:])
        torch.testing.assert_close(found[e].float(), squares.sqrt(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", ["activation", "magnitude"])
def test_scores_of_the_neurons_of_a_shared_expert(models: dict[str, Path], groups: Any, width: str) -> None:
    """Against transformers' model: mean |activation| over tokens, then L2 over sequences; or the norm of the weights."""
    folder = models["qwen2_moe"]
    found = importance(measured(hf.HFFolder(folder), TOKENS, groups, width=width)).shared
    model, seen = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), []
    experts = [layer.mlp.shared_expert for layer in model.model.layers]
    for expert in experts:
        expert.down_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].view(12, 32, 40)))
    with torch.no_grad():
        model(TOKENS.flatten(0, 1))
    for i, expert in enumerate(experts):
        down = expert.down_proj.weight.square().sum(0)
        weights = expert.gate_proj.weight.square().sum(1) + expert.up_proj.weight.square().sum(1) + down
        wanted = weights.sqrt() if width == "magnitude" else seen[i].abs().mean(1).square().sum(0).sqrt()
        torch.testing.assert_close(found[i].float(), wanted, rtol=1e-4, atol=1e-5)


def test_wanda_is_refused_in_one_line(models: dict[str, Path], groups: Any) -> None:
    with pytest.raises(UserError, match=r"prune\.width=wanda: the inputs of single experts are not measured"):
        importance(measured(hf.HFFolder(models["mixtral"]), TOKENS, groups, width="wanda"))


def test_a_width_with_which_transformers_products_fail_is_refused(models: dict[str, Path]) -> None:
    shape = hf.HFFolder(models["mixtral"]).shape
    for changes in ({"ffn_hidden_size": 20}, {"hidden_size": 60}):
        with pytest.raises(UserError, match=r"=[26]0 must be a multiple of 8, or"):
            check_rules(shape.smaller(**changes), "student")
    check_rules(shape.smaller(ffn_hidden_size=16, hidden_size=56), "student")


def test_targets_without_enough_experts_are_refused(models: dict[str, Path], tiny_models: dict[str, Path]) -> None:
    with pytest.raises(
        UserError, match=r"student\.num_moe_experts=1: the router sends each token to 2 experts; choose"
    ):
        hf.HFFolder(models["mixtral"]).shape.smaller(num_moe_experts=1)
    with pytest.raises(UserError, match=r"intermediate_size=2: the teacher has no shared expert; leave it out"):
        hf.HFFolder(models["mixtral"]).shape.smaller(moe_shared_expert_intermediate_size=2)
    with pytest.raises(UserError, match=r"student\.num_moe_experts=2: the teacher has no experts; leave it out"):
        hf.HFFolder(tiny_models["llama"]).shape.smaller(num_moe_experts=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_repair_of_nothing_changes_nothing(tmp_path: Path, models: dict[str, Path], groups: Any, name: str) -> None:
    folder = run_cut(tmp_path, models[name], configuration("default"), TOKENS, groups)
    wanted = hf_logits(models[name], TOKENS[0])
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=5e-4)


REPAIRED = [
    ("qwen3_moe", {"num_moe_experts": 3, "ffn_hidden_size": 16}),
    ("qwen2_moe", {"moe_shared_expert_intermediate_size": 16}),
]


@pytest.mark.parametrize(("name", "sizes"), REPAIRED)
def test_repair_makes_up_for_what_was_cut(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str, sizes: dict[str, int]
) -> None:
    """On the tokens that it is fitted to: dropped experts and neurons of the others, or neurons of the shared expert."""
    wanted, errors = hf_logits(models[name], TOKENS[0]), []
    for refit in (Refit.none, Refit.outputs, Refit.all):
        folder = tmp_path / refit.value
        run_cut(folder, models[name], configuration(refit=refit), TOKENS, groups, **sizes)
        errors.append(float((hf_logits(folder / "pruned", TOKENS[0]) - wanted).square().mean()))
    assert errors[1] < 0.9 * errors[0] and errors[2] < errors[1], errors


@pytest.mark.parametrize("preset", ["default", "paper"])
@pytest.mark.parametrize("name", FAMILIES)
def test_student_of_every_axis_opens_in_transformers(
    tmp_path: Path, models: dict[str, Path], groups: Any, name: str, preset: str
) -> None:
    sizes = {"hidden_size": 48, "ffn_hidden_size": 16, "num_attention_heads": 4, "num_layers": 2, "num_moe_experts": 3}
    if name == "olmoe":  # its heads fill the hidden size
        sizes |= {"hidden_size": 32}
    if name == "qwen2_moe":
        sizes |= {"moe_shared_expert_intermediate_size": 24}
    folder = run_cut(tmp_path, models[name], configuration(preset), TOKENS, groups, **sizes)
    student, teacher = hf.HFFolder(folder), hf.HFFolder(models[name])
    assert student.shape.sizes() == teacher.shape.sizes() | sizes
    assert student.config.keys() >= teacher.config.keys() - {"layer_types", "max_window_layers", "pretraining_tp"}
    model = build(student.shape).eval()
    load_weights(model, student.table, student.shape, student)
    with torch.no_grad():
        logits = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(logits, hf_logits(folder, TOKENS[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("iterations", [1, 2])
def test_kept_indices_of_steps_are_the_teachers(
    tmp_path: Path, models: dict[str, Path], groups: Any, iterations: int
) -> None:
    """The student's tensors are the teacher's at the indices that kept.safetensors names, after one step or two."""
    sizes = {"num_moe_experts": 2, "ffn_hidden_size": 8}
    config = configuration(iterations=iterations)
    folder = run_cut(tmp_path, models["mixtral"], config, TOKENS, groups, **sizes)
    teacher, student, kept = hf.HFFolder(models["mixtral"]), hf.HFFolder(folder), load_file(folder / "kept.safetensors")
    for e, before in enumerate(kept["layers.2.experts"].tolist()):
        name = "model.layers.2.block_sparse_moe.experts.{e}.w1.weight"
        neurons = kept["layers.2.ffn"].view(2, 8)[e] - 24 * before
        assert torch.equal(teacher.read(name.format(e=before))[neurons], student.read(name.format(e=e)))
