"""The plan against published figures, and against what autograd really keeps."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir

from minitron_train import cli
from minitron_train.arch import Shape
from minitron_train.arch.build import build
from minitron_train.config import Config, ParallelConfig, Recompute
from minitron_train.parallel import groups
from minitron_train.parallel.launch import World
from minitron_train.plan import counts, format_plan, plan
from minitron_train.plan.memory import Layout, activation_bytes
from minitron_train.train.optim import RECOMPUTE
from minitron_train.workspace import shape_of_recipe


def load(*overrides: str) -> Config:
    """The configuration that the command line would get."""
    cli.register_recipes()
    with initialize_config_dir(version_base="1.3", config_dir=str(cli.home() / "conf")):
        return cli.to_config(compose("config", overrides=list(overrides)))


def shapes(config: Config) -> tuple[Shape, Shape]:
    """Teacher's and student's, from the recipe alone."""
    teacher = shape_of_recipe(config)
    assert teacher is not None
    return teacher, teacher.smaller(**config.student.sizes())


@pytest.mark.parametrize(
    ("recipe", "total", "non_embedding"),
    [
        ("4b", 4_190_509_056, 2_617_645_056),
        ("4b_card", 4_391_835_648, 2_818_971_648),
        ("8b", 8_271_699_968, 6_174_547_968),
        ("4b_from_8b", 4_190_509_056, 2_617_645_056),
        ("smollm2", 90_121_752, 65_349_144),
    ],
)
def test_published_parameter_counts(recipe: str, total: int, non_embedding: int) -> None:
    _, student = shapes(load(f"+recipe={recipe}"))
    found = counts.parameters(student)
    assert (found["parameters"], found["non_embedding_parameters"]) == (total, non_embedding)
    assert sum(found["parameters_by_part"].values()) == total


def test_teachers_have_their_published_size() -> None:
    assert counts.parameters(shapes(load("+recipe=4b"))[0])["non_embedding_parameters"] == 12_483_047_424
    assert counts.parameters(shapes(load("+recipe=4b_from_8b"))[0])["parameters"] == 8_271_699_968
    assert counts.parameters(shapes(load("+recipe=smollm2"))[0])["parameters"] == 134_515_008
    llama = shape_of_recipe(load("model=llama31_8b"))
    assert llama is not None and counts.parameters(llama)["parameters"] == 8_030_261_248


def test_facts_of_the_papers(tmp_path: Path) -> None:
    """arXiv 2407.14679: tokens of 400 steps, steps of 94 B tokens, FLOPs per step, 1.8x for the family."""
    config = load("+recipe=4b")
    result = plan(config, *shapes(config), target=tmp_path / "plan.json")
    training = result["training"]
    assert 400 * training["tokens_per_step"] == 1_887_436_800
    assert training["steps"] == 19_922
    per_step = result["family"]["flops_per_step"]
    assert per_step == pytest.approx({"teacher": 4.4e17, "8b": 2.5e17, "4b": 1.2e17}, rel=0.02)
    assert result["family"]["saving"] == pytest.approx(1.8, abs=0.05)
    written = json.loads((tmp_path / "plan.json").read_text())
    assert written["student"]["parameters"] == 4_190_509_056
    assert written["teacher"]["non_embedding_parameters"] == 12_483_047_424
    text = format_plan(result)
    assert "4,190,509,056" in text and "19,922 steps" in text


def test_a_plan_needs_neither_torch_nor_a_teacher() -> None:
    """The shapes of a 15B model, reckoned in a process that never imports torch."""
    code = (
        "import sys; from minitron_train.arch import Shape; from minitron_train.config import Config, ClusterConfig\n"
        "from minitron_train.plan import plan\n"
        "a = dict(architecture='nemotron', num_layers=32, num_query_groups=8, kv_channels=128, vocab_size=256000)\n"
        "big = Shape(**a, hidden_size=6144, ffn_hidden_size=24576, num_attention_heads=48)\n"
        "cluster = ClusterConfig(memory_gib=79, peak_tflops=312, memory_gb_per_s=2039, gpus_per_node=8)\n"
        "plan(Config(cluster=cluster), big, big.smaller(hidden_size=3072))\n"
        "assert 'torch' not in sys.modules, 'torch was imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def saved_bytes(model: torch.nn.Module, tokens_BS: torch.Tensor) -> int:
    """Bytes of every storage that autograd keeps of a forward pass, weights and rotary angles aside."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        is_rotary = x.ndim == 4 and x.shape[1:3] == (1, 1)  # one per position, whatever the batch
        if x.untyped_storage().data_ptr() not in weights and not is_rotary:
            kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        model(tokens_BS)
    return sum(x.untyped_storage().nbytes() for x in kept.values())


@pytest.mark.parametrize(("architecture", "whole_heads"), [("nemotron", False), ("nemotron", True), ("llama", False)])
@pytest.mark.parametrize("recompute", list(Recompute))
def test_activations_are_what_autograd_keeps(
    architecture: str, whole_heads: bool, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    if whole_heads:  # as on a GPU in fp32
        monkeypatch.setattr("minitron_train.arch.build.needs_whole_heads", lambda query, mask: True)
    shape = Shape(
        architecture=architecture,
        num_layers=3,
        hidden_size=96,
        ffn_hidden_size=224,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=20,
        vocab_size=512,
    )
    layout = Layout(
        micro_batch_size=2,
        seq_length=64,
        weight_bytes=4,
        teacher_weight_bytes=4,
        recompute=recompute.name,
        cuda=torch.cuda.is_available() or whole_heads,
    )
    with groups.start(ParallelConfig(), World(), seed=1):
        model = build(shape, **RECOMPUTE[recompute]).train()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        device = next(model.parameters()).device
        measured = saved_bytes(model, torch.randint(0, 512, (2, 64), device=device))
    planned = activation_bytes(shape, layout, with_working_layer=False)
    assert planned == pytest.approx(measured, rel=0.03)


def test_layouts_have_the_optimizer_that_is_configured() -> None:
    for given, sharded in (({}, True), ({"train.distributed_optimizer": "false"}, False)):
        config = load("+recipe=4b", "cluster=h200", *(f"{key}={value}" for key, value in given.items()))
        found = plan(config, *shapes(config))["layouts"]
        assert found and all(choice["layout"]["sharded_optimizer"] is sharded for choice in found)


def test_recomputation_costs_time() -> None:
    """Selective repeats the MLP, full the whole layer: of matrices, memory traffic, and all-reduces (four before)."""
    config = load("+recipe=4b", "cluster=h200", "cluster.num_nodes=1")
    found = plan(config, *shapes(config))["layouts"]
    same = [row for row in found if row["layout"]["tp"] == 2 and row["layout"]["micro_batch_size"] == 1]
    seconds = {row["layout"]["recompute"]: row["step_seconds"] for row in same}
    assert set(seconds) == {"none", "selective", "full"}
    for part in ("matrices", "elementwise", "tp_network"):
        none, selective, full = (seconds[name][part] for name in ("none", "selective", "full"))
        assert none < selective < full


def test_slicing_reads_the_rows_that_are_kept() -> None:
    """prune_full_size.py counted 18.0 GB of the 15B's 31.3, and 8.4 GB written."""
    slicing = plan(load("+recipe=4b"), *shapes(load("+recipe=4b")))["slicing"]
    assert (slicing["read_bytes"], slicing["written_bytes"]) == (17_969_197_056, 8_381_018_112)


def test_repair_holds_two_residual_streams() -> None:
    """131,072 tokens of 6144 and 3072 channels, whatever bounds the memory of scoring."""
    config = load("+recipe=4b", "prune=default", "calibration.chunk_tokens=1000")
    found = plan(config, *shapes(config))["slicing"]
    assert found["repair_tokens"] == 131072 and found["repair_bytes"]["streams"] == 131072 * (6144 + 3072) * 4
    assert plan(load("+recipe=4b", "prune=modelopt"), *shapes(config))["slicing"]["repair_bytes"] is None


def test_the_plan_knows_the_sizes_that_the_stages_use() -> None:
    """plan imports no torch, so it repeats these."""
    from minitron_train.distill import loss_blocks, step
    from minitron_train.evaluation import forward
    from minitron_train.plan import memory
    from minitron_train.prune import slice as slicing

    assert loss_blocks.Chunking().memory_budget_u == memory.LOSS_BUDGET_U
    assert memory.SMALL_LOGITS_BYTES == step.SMALL_BYTES
    assert memory.SLICE_BLOCK_BYTES == slicing.BLOCK_BYTES
    assert memory.EVAL_LOGIT_BYTES == forward.LOGIT_BYTES
