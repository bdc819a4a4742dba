"""The plan as one nested dictionary of plain numbers, the contents of plan.json."""

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from minitron_train.arch import Shape
from minitron_train.config import Config, DistillConfig, Precision, TeachKind
from minitron_train.planning import counts
from minitron_train.planning.hardware import Hardware, hardware, is_described
from minitron_train.planning.layouts import Choice, all_choices, evaluate, shares
from minitron_train.planning.memory import (
    WEIGHT_BYTES,
    Layout,
    distill_bytes,
    live,
    optimizer_bytes,
    saved_bytes,
    stage_bytes,
)
from minitron_train.planning.precision import concrete, with_choice
from minitron_train.planning.stages import cache_token_bytes, disk_bytes, scoring, slicing
from minitron_train.planning.timing import (
    dp_bytes_per_step,
    ep_bytes_per_token,
    logit_passes,
    pp_bytes_per_step,
    step_time,
    tp_bytes_per_token,
)
from minitron_train.runtime.files import atomic_write_json

SECONDS_PER_HOUR = 3600


def make_plan(
    config: Config, teacher: Shape, student: Shape, target: Path | None = None, source: Shape | None = None
) -> dict[str, Any]:
    """Estimate the cost of a recipe without running it. torch is imported only to measure this machine.

    Args:
        target: file for the result as JSON (plan.json), written atomically; None writes nothing.
        source: the model that is pruned; None: the teacher.
    """
    on_gpus = is_described(config.cluster)
    config = with_choice(config, Precision.bf16) if on_gpus else concrete(config)
    result = plan_on(hardware(config.cluster, config.train.precision), config, teacher, student, source or teacher)
    if target is not None:
        atomic_write_json(target, result)
    return result


def plan_on(
    machine: Hardware, config: Config, teacher: Shape, student: Shape, source: Shape | None = None
) -> dict[str, Any]:
    """Estimate the cost of a recipe on given hardware."""
    base = base_layout(config, machine)
    batch_size = config.train.global_batch_size
    choices = all_choices(teacher, student, machine, base, batch_size)
    best = choices[0] if choices and choices[0].fits else None
    configured = None
    if shares(batch_size, base.dp, base.micro_batch_size):
        configured = evaluate(teacher, student, machine, base, batch_size)
    chosen = best or configured
    return {
        "name": config.title,
        "teacher": describe(teacher),
        "student": describe(student),
        "assumed_layers": counts.assumed_layers(source or teacher, student, config.prune.drop_layers),
        "training": training(config),
        "flops": flops(config, teacher, student),
        "pretraining": pretraining(config, teacher, machine, chosen and chosen.layout),
        "family": family(config, teacher, student),
        "hardware": asdict(machine),
        "configured": configured and describe_choice(config, teacher, student, machine, configured),
        "recommended": best and describe_choice(config, teacher, student, machine, best),
        "overrides": overrides(config, machine, best.layout) if best else None,
        "layouts": [describe_choice(config, teacher, student, machine, choice) for choice in choices],
        "scoring": scoring(config, source or teacher, machine),
        "slicing": slicing(config, source or teacher, student, machine),
        "teacher_cache": teacher_cache(config, teacher, student, machine, chosen and chosen.layout),
        "disk": disk_bytes(config, teacher, student),
    }


def teacher_cache(
    config: Config, teacher: Shape, student: Shape, machine: Hardware, layout: Layout | None
) -> dict[str, Any]:
    """Return the bytes of a teacher on disk, and the time that each training saves that reads samples from it.

    `bytes_per_token` of samples is the most: repeated draws are stored once. The time is that of the teacher's forward pass
    and its half of the logits, in the layout of the training; `teach` itself takes it once.
    """
    teach, train, each = config.teach, config.train, cache_token_bytes(config, teacher)
    num_tokens = teach.num_tokens or train.num_tokens
    found: dict[str, Any] = {"draws": teach.draws, "num_tokens": num_tokens, "bytes_per_token": each}
    found["bytes"] = {kind: size * num_tokens for kind, size in each.items()}
    if layout is None:
        return found
    with_teacher, alone = (
        step_time(teacher, student, machine, with_cache(layout, config, kind), train.global_batch_size).total
        for kind in (None, TeachKind.samples)
    )
    hours = (with_teacher - alone) * train.num_steps / SECONDS_PER_HOUR
    return found | {"saved_hours": hours, "saved_gpu_hours": hours * layout.num_ranks}


def with_cache(layout: Layout, config: Config, cached: TeachKind | None) -> Layout:
    """Return the layout for a training that reads such a teacher cache, or runs the teacher (None)."""
    return replace(layout, cached=cached, logit_passes=logit_passes(config.distill, cached))


def base_layout(config: Config, machine: Hardware) -> Layout:
    """Return the configured layout on this hardware."""
    return configured_layout(
        config,
        num_ranks=machine.num_gpus,
        cuda=machine.cuda,
        runtime_bytes=machine.reserved_bytes,
    )


def configured_layout(config: Config, *, num_ranks: int, cuda: bool, runtime_bytes: int) -> Layout:
    """Return the layout that the configuration asks for on so many ranks."""
    train, tp, pp = (
        config.train,
        config.parallel.tensor_model_parallel_size,
        config.parallel.pipeline_model_parallel_size,
    )
    cached = config.teach.kind if config.teacher.cache else None
    return Layout(
        tp=tp,
        ep=config.parallel.expert_model_parallel_size,
        dp=max(num_ranks // (tp * pp), 1),
        pp=pp,
        micro_batch_size=train.micro_batch_size,
        seq_length=train.seq_length,
        weight_bytes=WEIGHT_BYTES[train.precision],
        teacher_weight_bytes=WEIGHT_BYTES[config.distill.teacher_precision or train.precision],
        global_batch_size=train.global_batch_size,
        runtime_bytes=runtime_bytes,
        logit_memory_fraction=config.distill.logit_memory_fraction,
        logit_passes=logit_passes(config.distill, cached),
        cached=cached,
        recompute=train.recompute.name,
        sequence_parallel=config.parallel.splits_sequences(train.seq_length, cuda=cuda),
        sharded_optimizer=train.distributed_optimizer,
        cuda=cuda,
    )


def overrides(config: Config, machine: Hardware, layout: Layout) -> list[str]:
    """Return the settings, as key=value, that turn the configured layout into another one of this hardware."""
    parallel, train = config.parallel, config.train
    split = replace(parallel, tensor_model_parallel_size=layout.tp).splits_sequences(
        train.seq_length, cuda=machine.cuda
    )
    found = {
        "parallel.tensor_model_parallel_size": (parallel.tensor_model_parallel_size, layout.tp),
        "parallel.expert_model_parallel_size": (parallel.expert_model_parallel_size, layout.ep),
        "parallel.pipeline_model_parallel_size": (parallel.pipeline_model_parallel_size, layout.pp),
        "parallel.sequence_parallel": (split, layout.sequence_parallel),
        "train.micro_batch_size": (train.micro_batch_size, layout.micro_batch_size),
        "train.recompute": (train.recompute.name, layout.recompute),
    }
    return [f"{key}={str(new).lower()}" for key, (old, new) in found.items() if old != new]


def describe(shape: Shape) -> dict[str, Any]:
    """Return sizes and exact parameter counts of one model."""
    sizes = {"architecture": shape.architecture, **shape.sizes()}
    others = ("kv_channels", "vocab_size", *(["moe_router_topk"] if shape.num_moe_experts else []))
    return sizes | {key: getattr(shape, key) for key in others} | counts.parameters(shape)


def training(config: Config) -> dict[str, Any]:
    """Return the length of the distillation in tokens and steps."""
    train = config.train
    tokens_per_step = train.step_tokens
    return {
        "num_tokens": train.num_tokens,
        "global_batch_size": train.global_batch_size,
        "seq_length": train.seq_length,
        "tokens_per_step": tokens_per_step,
        "steps": -(-train.num_tokens // tokens_per_step),
    }


def flops(config: Config, teacher: Shape, student: Shape) -> dict[str, int]:
    """Return the FLOPs of the distillation. Causal attention counts half of the attention products."""
    seq_length = config.train.seq_length
    forward = counts.forward_flops_per_token(teacher, seq_length)
    both = counts.training_flops_per_token(student, seq_length)
    return {
        "teacher_forward_per_token": forward,
        "student_training_per_token": both,
        "per_token": forward + both,
        "per_step": (forward + both) * config.train.global_batch_size * seq_length,
        "total": (forward + both) * config.train.num_tokens,
    }


def pretraining(config: Config, teacher: Shape, machine: Hardware, layout: Layout | None) -> dict[str, Any] | None:
    """Estimate the teacher's pretraining in the layout of the distillation; None if the recipe does not pretrain it."""
    if not config.teacher.is_pretrained:
        return None
    tokens, train = config.pretrain.num_tokens, config.train
    steps = math.ceil(tokens / train.step_tokens)
    per_token = counts.training_flops_per_token(teacher, train.seq_length)
    cost = {"num_tokens": tokens, "steps": steps, "flops": {"per_token": per_token, "total": per_token * tokens}}
    if layout is None:
        return cost
    passes = logit_passes(DistillConfig(kd_weight=0, ce_weight=1))
    choice = evaluate(None, teacher, machine, replace(layout, logit_passes=passes), train.global_batch_size)
    return cost | {"fits": choice.fits, "memory_bytes": choice.memory, **duration_and_price(choice, steps, machine)}


def family(config: Config, teacher: Shape, student: Shape) -> dict[str, Any] | None:
    """Compare training one teacher and distilling pruned students with training all models from scratch.

    FLOPs are counted as in arXiv 2407.14679 (footnote 5: 4.4e17, 2.5e17, 1.2e17 per step of 1152 x 4096 tokens): three
    forward passes per token, full attention. Unlike the paper, the teacher's forward passes in distillation are included.

    Returns:
        None without plan.pretraining_tokens.
    """
    scratch_tokens = config.plan.pretraining_tokens
    if scratch_tokens is None:
        return None
    members = {name: teacher.smaller(**sizes.sizes()) for name, sizes in config.plan.family.items()} or {
        config.title: student
    }
    seq_length, tokens_per_step = config.train.seq_length, config.train.step_tokens
    cost = {name: counts.training_flops_per_token(shape, seq_length, causal=False) for name, shape in members.items()}
    teacher_cost = counts.training_flops_per_token(teacher, seq_length, causal=False)
    teaching = counts.forward_flops_per_token(teacher, seq_length, causal=False) * len(members)
    from_scratch = (teacher_cost + sum(cost.values())) * scratch_tokens
    pruned = teacher_cost * scratch_tokens + (sum(cost.values()) + teaching) * config.train.num_tokens
    return {
        "pretraining_tokens": scratch_tokens,
        "flops_per_step": {"teacher": teacher_cost * tokens_per_step}
        | {k: v * tokens_per_step for k, v in cost.items()},
        "flops_from_scratch": from_scratch,
        "flops_with_pruning": pruned,
        "saving": from_scratch / pruned,
    }


def describe_choice(
    config: Config, teacher: Shape, student: Shape, machine: Hardware, choice: Choice
) -> dict[str, Any]:
    """Return one layout as numbers: memory by part, seconds by part, hours, dollars, network."""
    layout, tokens, running = choice.layout, config.train.step_tokens, live(teacher, choice.layout)
    with_recompute, without = (
        distill_bytes(teacher, student, replace(layout, recompute=on))["activations"] for on in ("full", "none")
    )
    saved, whole = saved_bytes(student, layout), replace(layout, sharded_optimizer=False)
    return {
        "layout": {key: value for key, value in asdict(layout).items() if key != "cuda"},
        "fits": choice.fits,
        "memory_bytes": choice.memory,
        "unsharded_optimizer_bytes": max(optimizer_bytes(student, whole, stage) for stage in range(layout.pp)),
        "bytes_of_stages": [stage_bytes(teacher, student, layout, k)["total"] for k in range(layout.pp)],
        "host_bytes_of_save": {"rank": saved, "node": saved * min(machine.gpus_per_node, layout.num_ranks)},
        "activations_bytes": {"with_recompute": with_recompute, "without_recompute": without},
        "tokens_per_second": tokens / choice.step.total,
        **duration_and_price(choice, config.train.num_steps, machine),
        "network_bytes_per_step": {
            "tensor_parallel": tokens / layout.dp / layout.pp * tp_bytes_per_token(running, student, layout),
            "expert_parallel": tokens / layout.dp / layout.pp * ep_bytes_per_token(running, student, layout),
            "data_parallel": dp_bytes_per_step(student, layout),
            "pipeline_parallel": pp_bytes_per_step(running, student, layout, tokens / layout.dp),
        },
    }


def duration_and_price(choice: Choice, steps: int, machine: Hardware) -> dict[str, Any]:
    """Return the seconds of a step by part, and the hours and dollars of all steps."""
    hours = choice.step.total * steps / SECONDS_PER_HOUR
    gpu_hours, price = hours * choice.layout.num_ranks, machine.price_per_gpu_hour
    return {
        "step_seconds": asdict(choice.step) | {"total": choice.step.total},
        "hours": hours,
        "gpu_hours": gpu_hours,
        "dollars": None if price is None else gpu_hours * price,
    }
