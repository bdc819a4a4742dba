"""The plan against published figures, and against what autograd really keeps."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from minitron_train.arch import Shape
from minitron_train.commands import configuration, recipes
from minitron_train.commands.workspace import shape_of_recipe
from minitron_train.config import Config, ParallelConfig, Recompute
from minitron_train.model.build import build
from minitron_train.parallel import groups
from minitron_train.planning import counts, format_plan, make_plan
from minitron_train.planning.counts import layer_parameters, parameters_per_rank
from minitron_train.planning.memory import Layout, activation_bytes
from minitron_train.runtime.launch import World
from minitron_train.train.optim import RECOMPUTE


def load(*overrides: str) -> Config:
    """The configuration that the command line would get."""
    recipes.register_recipes()
    with initialize_config_dir(version_base="1.3", config_dir=str(recipes.home() / "conf")):
        return configuration.to_config(compose("config", overrides=list(overrides)))


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
        ("qwen3_30b_a3b_half", 16_030_316_544, 15_407_986_688),
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
    assert counts.parameters(shapes(load("+recipe=qwen3_30b_a3b_half"))[0])["parameters"] == 30_532_122_624
    llama = shape_of_recipe(load("model=llama31_8b"))
    assert llama is not None and counts.parameters(llama)["parameters"] == 8_030_261_248


def test_facts_of_the_papers(tmp_path: Path) -> None:
    """arXiv 2407.14679: tokens of 400 steps, steps of 94 B tokens, FLOPs per step, 1.8x for the family."""
    config = load("+recipe=4b")
    result = make_plan(config, *shapes(config), target=tmp_path / "plan.json")
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
    """The shapes of a 15B model, estimated in a process that never imports torch."""
    code = (
        "import sys; from minitron_train.arch import Shape; from minitron_train.config import Config, ClusterConfig\n"
        "from minitron_train.planning import make_plan\n"
        "a = dict(architecture='nemotron', num_layers=32, num_query_groups=8, kv_channels=128, vocab_size=256000)\n"
        "big = Shape(**a, hidden_size=6144, ffn_hidden_size=24576, num_attention_heads=48)\n"
        "cluster = ClusterConfig(memory_gib=79, peak_tflops=312, memory_gb_per_s=2039, gpus_per_node=8)\n"
        "make_plan(Config(cluster=cluster), big, big.smaller(hidden_size=3072))\n"
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


@pytest.mark.parametrize(
    ("architecture", "whole_heads"),
    [
        *[("nemotron", False), ("nemotron", True), ("llama", False), ("mixtral", False)],
        *[("qwen3", False), ("gemma2", False), ("gemma3_text", False), ("olmo2", False)],
    ],
)
@pytest.mark.parametrize("recompute", list(Recompute))
def test_activations_are_what_autograd_keeps(
    architecture: str, whole_heads: bool, recompute: Recompute, monkeypatch: pytest.MonkeyPatch
) -> None:
    if recompute is Recompute.full and architecture in ("gemma2", "gemma3_text", "olmo2"):
        pytest.skip("megatron-core turns gradients on for a norm of the sum, whose tensors go with the layer")
    if whole_heads:  # as on a GPU in fp32
        monkeypatch.setattr("minitron_train.model.attention.needs_whole_heads", lambda query, mask: True)
    shape = Shape(
        architecture=architecture,
        num_layers=3,
        hidden_size=96,
        ffn_hidden_size=224,
        num_attention_heads=8,
        num_query_groups=4,
        kv_channels=20,
        vocab_size=512,
        **({"num_moe_experts": 6, "moe_router_topk": 2, "norm_topk_prob": True} if architecture == "mixtral" else {}),
        **({"attention_softcap": 50.0} if architecture == "gemma2" else {}),
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
        found = make_plan(config, *shapes(config))["layouts"]
        assert found and all(choice["layout"]["sharded_optimizer"] is sharded for choice in found)


def test_recomputation_costs_time() -> None:
    """Selective repeats the MLP, full the whole layer: of matrices, memory traffic, and all-reduces (four before)."""
    config = load("+recipe=4b", "cluster=h200", "cluster.num_nodes=1")
    found = make_plan(config, *shapes(config))["layouts"]
    same = [row for row in found if row["layout"]["tp"] == 2 and row["layout"]["micro_batch_size"] == 1]
    seconds = {row["layout"]["recompute"]: row["step_seconds"] for row in same}
    assert set(seconds) == {"none", "selective", "full"}
    for part in ("matrices", "elementwise", "tp_network"):
        none, selective, full = (seconds[name][part] for name in ("none", "selective", "full"))
        assert none < selective < full


def planned(*overrides: str) -> dict[str, Any]:
    """The plan of one node, or of what `overrides` say."""
    config = load("cluster=h100", "cluster.num_nodes=1", "cluster.gpus_per_node=8", *overrides)
    return make_plan(config, *shapes(config))


def test_a_layout_splits_experts_where_that_is_faster() -> None:
    """Bytes by hand: of 48 layers' 2,048 channels in bf16, each rank of four sends three tokens for each of its own."""
    plan = planned("+recipe=qwen3_30b_a3b_half")
    best, whole = plan["recommended"], next(row for row in plan["layouts"] if row["layout"]["ep"] == 1)
    assert whole["fits"] and best["tokens_per_second"] > whole["tokens_per_second"]
    assert (best["layout"]["tp"], best["layout"]["ep"]) == (2, 4)
    assert "parallel.expert_model_parallel_size=4" in plan["overrides"] and "DP 4 (EP 4)" in format_plan(plan)
    once = 2 * (4 - 1) * 48 * 2048 * 2  # an all-gather and a reduce-scatter in all layers
    passes = 1 + 2 + (best["layout"]["recompute"] != "none")  # teacher, student's forward and backward pass
    assert best["network_bytes_per_step"]["expert_parallel"] == 512 * 4096 / 4 * once * passes
    experts = 48 * 3 * 2048 * 768 * 64
    others = 16_030_316_544 - experts
    found = best["memory_bytes"]["student_weights"]
    assert abs(found - (others / 2 + experts / 2 / 4) * 2) < 1e7  # norms and routers are not split
    assert best["memory_bytes"]["optimizer"] < 1.01 * 12 * 16_030_316_544 / 8


def test_layouts_with_stages_split_experts_too() -> None:
    """Two stages hold half of the experts each, and a rank exchanges tokens for half of the layers."""
    one, two = (
        planned("+recipe=qwen3_30b_a3b_half", "parallel.expert_model_parallel_size=4",
                f"parallel.pipeline_model_parallel_size={stages}")["configured"]
        for stages in (1, 2)
    )  # fmt: skip
    assert (two["layout"]["ep"], two["layout"]["pp"], two["layout"]["dp"]) == (4, 2, one["layout"]["dp"] // 2)
    assert two["memory_bytes"]["student_weights"] == pytest.approx(one["memory_bytes"]["student_weights"] / 2, rel=0.1)
    exchanged = [plan["network_bytes_per_step"]["expert_parallel"] for plan in (one, two)]
    assert exchanged[0] == exchanged[1] > 0, "twice the tokens in half of the layers"


def test_stages_hold_the_whole_model_once() -> None:
    """The last stage has a copy of an embedding that is tied to the output layer."""
    tied = shapes(load("+recipe=smollm2"))[0]
    copy = tied.vocab_size * tied.hidden_size // 2
    for shape, more in ((tied, copy), (tied.untied(), 0)):
        parts = [parameters_per_rank(shape, 2, 1, stage, 4) for stage in range(4)]
        assert sum(parts) == parameters_per_rank(shape, 2) + more
        assert parts[0] - parts[1] == copy - layer_parameters(shape, shape.kinds, 2)  # 30 layers: 7, 8, 8, 7


GIANT = (  # the sizes of Nemotron-4 340B, half of its layers
    "model=nemotron4_15b",
    *(
        f"model.{name}={size}"
        for name, size in {"num_layers": 96, "hidden_size": 18432, "ffn_hidden_size": 73728}.items()
    ),
    *(f"model.{name}={size}" for name, size in {"num_attention_heads": 96, "kv_channels": 192}.items()),
    "student.num_layers=48",
    "train.global_batch_size=1024",
    "train.seq_length=4096",
    "cluster.num_nodes=64",
)


def test_stages_are_recommended_where_nothing_else_fits() -> None:
    """Every figure of a stage follows from its layers: 64 micro-batches through 4 stages wait 3 / 67 of the time."""
    result = planned(*GIANT)
    found = result["recommended"]
    layout, seconds = found["layout"], found["step_seconds"]
    assert (layout["tp"], layout["pp"], layout["dp"], layout["micro_batch_size"]) == (8, 4, 16, 1)
    assert not any(row["fits"] for row in result["layouts"] if row["layout"]["pp"] == 1)
    computed = sum(seconds[name] for name in ("matrices", "elementwise", "loss", "tp_network"))
    assert seconds["bubble"] / (computed + seconds["bubble"]) == pytest.approx(3 / 67)
    assert found["memory_bytes"]["total"] == max(found["bytes_of_stages"]) == found["bytes_of_stages"][0]
    tokens = 64 * layout["seq_length"]
    assert found["network_bytes_per_step"]["pipeline_parallel"] == tokens * 3 * 18432 * 2 / 8  # sequence parallel
    text = format_plan(result)
    assert "parallel.pipeline_model_parallel_size=4" in text and "TP 8, PP 4, DP 16, micro-batch 1" in text
    assert "peaks of the stages, first to last: " in text and " GiB for PP\n" in text


def test_configured_stages_are_planned() -> None:
    """Half of the layers and of the optimizer; the first stage holds the activations of two micro-batches."""
    one, two = (planned("+recipe=4b", f"parallel.pipeline_model_parallel_size={p}")["configured"] for p in (1, 2))
    assert (two["layout"]["pp"], two["layout"]["dp"]) == (2, one["layout"]["dp"] // 2)
    for part in ("student_weights", "teacher_weights"):
        assert two["memory_bytes"][part] == pytest.approx(one["memory_bytes"][part] / 2, rel=0.01)
    assert two["memory_bytes"]["activations"] == pytest.approx(one["memory_bytes"]["activations"], rel=0.1)
    assert one["step_seconds"]["bubble"] == one["network_bytes_per_step"]["pipeline_parallel"] == 0
    assert not any(row["layout"]["pp"] > 1 for row in planned("+recipe=4b")["layouts"])


def test_a_stage_holds_no_more_micro_batches_than_a_step_has() -> None:
    """With 16 data-parallel ranks: two micro-batches for four stages, then as many as stages."""
    held = {}
    for rows in (16, 32, 64, 1024):
        plan = planned(*GIANT, "parallel.tensor_model_parallel_size=8", "parallel.pipeline_model_parallel_size=4",
                       "train.micro_batch_size=1", f"train.global_batch_size={rows}")  # fmt: skip
        held[rows] = plan["configured"]["memory_bytes"]["activations"]
    each = held[32] - held[16]
    assert each > 0 and held[64] - held[32] == pytest.approx(2 * each, rel=1e-6)
    assert held[1024] == held[64]


def test_a_plan_says_that_experts_take_longer() -> None:
    assert "experts run one after the other" in format_plan(planned("+recipe=qwen3_30b_a3b_half"))
    assert "experts" not in format_plan(planned("+recipe=smollm2", "train.global_batch_size=8"))


def test_pretraining_is_planned_where_a_recipe_has_it() -> None:
    """Of `miniature`, 96 % of the operations: 6 per weight outside the embedding, and attention, for 12 M tokens."""
    result = planned("+recipe=miniature")
    pretraining, teacher = result["pretraining"], result["teacher"]
    weights = teacher["parameters"] - sum(teacher["parameters_by_part"][name] for name in ("embedding", "norms"))
    attention = 6 * teacher["num_layers"] * teacher["num_attention_heads"] * teacher["kv_channels"] * 256
    assert pretraining["flops"]["total"] == (6 * weights + attention) * 12_000_000
    assert pretraining["flops"]["total"] / (pretraining["flops"]["total"] + result["flops"]["total"]) > 0.95
    assert pretraining["steps"] == 5860 and pretraining["hours"] > 10 * result["recommended"]["hours"]
    text = format_plan(result)
    assert "1.53e+13 in total, 3.93e+14 with pretraining\n" in text
    assert "\npretraining        12,000,000 tokens = 5,860 steps, 3.77e+14 FLOPs, " in text
    fetched = planned("+recipe=smollm2", "train.global_batch_size=8")
    assert fetched["pretraining"] is None and "pretraining" not in format_plan(fetched)
    assert planned("+recipe=tiny", "teacher.path=/models/x")["pretraining"] is None


def test_pretraining_has_no_teacher_to_ask() -> None:
    """A step of distilling a model of the teacher's own size has a forward pass more, and the teacher's half of the loss."""
    own = [f"student.{name}=null" for name in ("hidden_size", "ffn_hidden_size", "num_attention_heads")]
    result = planned("+recipe=tiny", *own)
    alone, both = result["pretraining"]["step_seconds"], result["recommended"]["step_seconds"]
    assert alone["matrices"] / both["matrices"] == pytest.approx(3 / 4)
    assert alone["elementwise"] / both["elementwise"] == pytest.approx(3 / 4)
    assert alone["loss"] < 0.8 * both["loss"] and alone["optimizer"] == both["optimizer"]
    memory = result["recommended"]["memory_bytes"]
    assert result["pretraining"]["memory_bytes"]["total"] < memory["total"] - memory["teacher_weights"]


def test_the_disk_holds_what_the_chain_makes() -> None:
    """A pretrained teacher, its first weights and checkpoints; a teacher that is fetched, none that lies elsewhere."""
    tiny, parameters = planned("+recipe=tiny")["disk"], 7_019_008
    assert (tiny["teacher"], tiny["pretraining"]) == (4 * parameters, 4 * parameters + 4 * 12 * parameters)
    assert tiny["total"] == sum(tiny[name] for name in ("pretraining", "teacher", "pruned", "checkpoints", "student"))
    assert planned("+recipe=tiny", "train.precision=bf16")["disk"]["teacher"] == 4 * parameters, "fp32 in any case"
    fetched, given = (planned("+recipe=4b_from_8b", *path)["disk"] for path in ([], ["teacher.path=/models/x"]))
    assert (fetched["teacher"], given["teacher"]) == (2 * 8_271_699_968, 0)
    assert given["total"] == fetched["total"] - fetched["teacher"] and given["pretraining"] == 0


def test_a_batch_that_the_gpus_cannot_share_has_no_speed() -> None:
    result = planned("+recipe=smollm2", "cluster.num_nodes=16")
    assert (result["layouts"], result["recommended"], result["configured"]) == ([], None, None)
    text = format_plan(result)
    assert "\n\ntrain.global_batch_size=4 cannot be divided among 128 GPUs; set a multiple of 128, or lower " in text
    assert "tokens/s" not in text and "layout" not in text
    assert "1,500,000 tokens = 367 steps, 5.9e+13 FLOPs\n" in format_plan(
        planned("+recipe=tiny", "cluster.num_nodes=16")
    )
    impossible = planned("+recipe=4b", "cluster.num_nodes=128", "cluster.memory_gib=2")
    assert impossible["layouts"] and impossible["configured"] is None
    assert "0 of 156 layouts fit: the smallest, TP 8, PP 32, DP 4, " in format_plan(impossible)


def test_only_a_machine_with_gpus_has_gpu_hours() -> None:
    config = load("+recipe=micro")
    short, long = format_plan(make_plan(config, *shapes(config))), format_plan(planned("+recipe=4b"))
    assert "GPU-hours" not in short and "CUDA" not in short and re.search(r"tokens/s, \d+\.\d s\n", short)
    assert re.search(r"tokens/s, [\d.,]+ hours, [\d,]+ GPU-hours\n", long) and "CUDA, NCCL" in long


def test_the_table_of_layouts_is_aligned() -> None:
    plan = planned("+recipe=4b", "cluster.num_nodes=8", "cluster.memory_gib=46")
    rows = [line for line in format_plan(plan).splitlines() if line.startswith("  TP ") and line.endswith(" tokens/s")]
    assert any("selective recompute" in row for row in rows) and not all("selective recompute" in row for row in rows)
    assert len({row.index(" GiB") for row in rows}) == len({len(row) for row in rows}) == 1


def test_slicing_reads_the_rows_that_are_kept() -> None:
    """prune_full_size.py counted 18.0 GB of the 15B's 31.3, and 8.4 GB written."""
    slicing = make_plan(load("+recipe=4b"), *shapes(load("+recipe=4b")))["slicing"]
    assert (slicing["read_bytes"], slicing["written_bytes"]) == (17_969_197_056, 8_381_018_112)


def test_repair_holds_two_residual_streams() -> None:
    """131,072 tokens of 6144 and 3072 channels, whatever bounds the memory of scoring."""
    config = load("+recipe=4b", "prune=default", "calibration.chunk_tokens=1000")
    found = make_plan(config, *shapes(config))["slicing"]
    assert found["repair_tokens"] == 131072 and found["repair_bytes"]["streams"] == 131072 * (6144 + 3072) * 4
    assert make_plan(load("+recipe=4b", "prune=modelopt"), *shapes(config))["slicing"]["repair_bytes"] is None


def test_the_plan_knows_the_sizes_that_the_stages_use() -> None:
    """plan imports no torch, so it repeats these."""
    from minitron_train.distillation import loss_blocks, loss_memory
    from minitron_train.model import forward
    from minitron_train.planning import memory
    from minitron_train.pruning import slice as slicing

    assert loss_blocks.Chunking().logit_memory_fraction == memory.LOGIT_MEMORY_FRACTION
    assert memory.SMALL_LOGITS_BYTES == loss_memory.SMALL_BYTES
    assert memory.SLICE_BLOCK_BYTES == slicing.BLOCK_BYTES
    assert memory.EVAL_LOGIT_BYTES == forward.LOGIT_BYTES


@pytest.mark.parametrize(
    "words", [("+recipe=4b",), ("+recipe=4b", "cluster=h100"), ("+recipe=8b",), ("+recipe=llama31_4b_width",)]
)
def test_the_printed_settings_give_the_recommended_layout(words: tuple[str, ...]) -> None:
    config = load(*words)
    result = make_plan(config, *shapes(config))
    chosen = load(*words, *result["overrides"])
    again = make_plan(chosen, *shapes(chosen))
    assert again["configured"]["layout"] == result["recommended"]["layout"] and not again["overrides"]
    line = f"  set {' '.join(result['overrides'])}"
    assert (line in format_plan(result)) == bool(result["overrides"])
    assert "  set " not in format_plan(again)


def test_sequences_are_split_by_default_on_cuda_alone() -> None:
    parallel = ParallelConfig(tensor_model_parallel_size=2)
    assert parallel.splits_sequences(64, cuda=True)
    assert not parallel.splits_sequences(63, cuda=True), "the ranks would get unequal parts"
    assert not parallel.splits_sequences(64, cuda=False)
    assert ParallelConfig(tensor_model_parallel_size=2, sequence_parallel=True).splits_sequences(64, cuda=False)
    assert not ParallelConfig(sequence_parallel=True).splits_sequences(64, cuda=True), "one rank has nothing to split"


def test_a_training_that_reads_a_teacher_cache_holds_the_output_layer_alone() -> None:
    """In the same layout it takes the live training's hours, less those that the plan promises."""
    live, cached, hidden = (
        make_plan(config, *shapes(config))
        for words in ((), ("teacher.cache=x",), ("teacher.cache=x", "teach.kind=hidden"))
        if (config := load("+recipe=4b", *words))
    )
    saved = live["teacher_cache"]["saved_hours"]
    assert cached["recommended"]["hours"] == pytest.approx(live["recommended"]["hours"] - saved)
    assert cached["recommended"]["hours"] < hidden["recommended"]["hours"] < live["recommended"]["hours"]
    for plan in (cached, hidden):
        parts, tp = plan["recommended"]["memory_bytes"], plan["recommended"]["layout"]["tp"]
        assert parts["teacher_weights"] == 256_000 * 6144 * 2 // tp
        assert parts["activations"] == live["recommended"]["memory_bytes"]["activations"]
    assert "teacher's output layer" in format_plan(hidden) and "the teacher is on disk (hidden)" in format_plan(hidden)
    assert "teacher's weights" in format_plan(live)


def test_a_teacher_on_disk_states_its_bytes_and_the_hours_that_it_saves() -> None:
    """18 bits for an id of 256,000 and 6 for a number of 50 draws; the teacher is more than half of the step's FLOPs."""
    config = load("+recipe=4b")
    plan = make_plan(config, *shapes(config))
    cache, tokens = plan["teacher_cache"], config.train.num_tokens
    assert cache["bytes_per_token"] == {"samples": (6 + 50 * (18 + 6)) / 8, "hidden": 6144 * 2}
    assert cache["bytes"]["samples"] == 150.75 * tokens
    assert 0.45 < cache["saved_hours"] / plan["recommended"]["hours"] < 0.6
    weighted = load("+recipe=4b", "teach.proposal_exponent=0.8", "teach.num_tokens=1000")
    cache = make_plan(weighted, *shapes(weighted))["teacher_cache"]
    assert cache["bytes"]["samples"] == 1000 * (6 + 50 * (18 + 16)) / 8
    assert "at most 150.8 bytes a token, 14.2 TB" in format_plan(plan)
