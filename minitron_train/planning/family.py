"""The cost of a model family: each member's plan, and their sum compared with one shot and with training from scratch.

Sums count FLOPs as arXiv 2407.14679 does (footnote 5): three forward passes per token of training, full attention.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minitron_train.arch import Shape
from minitron_train.config import Config
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token

TEACHER = "teacher"


@dataclass(frozen=True, kw_only=True, slots=True)
class Member:
    """One student: its configuration, its shape, the models that it comes from, and its own plan."""

    config: Config
    shape: Shape
    pruned_from: str
    taught_by: str
    plan: Mapping[str, Any]


def family_plan(config: Config, shapes: Mapping[str, Shape], members: Mapping[str, Member]) -> dict[str, Any]:
    """Return the plans of all members and the sums.

    Args:
        shapes: of the teacher and of the members, by name.
    """
    sums = {"as_configured": 0.0, "one_shot": 0.0, "one_shot_on_all_tokens": 0.0}
    rows = {}
    for name, member in members.items():
        tokens, length = member.config.train.num_tokens, member.config.train.seq_length
        own = training_flops_per_token(member.shape, length, causal=False)
        taught, original = (
            forward_flops_per_token(shapes[model], length, causal=False) for model in (member.taught_by, TEACHER)
        )
        sums["as_configured"] += (own + taught) * tokens
        sums["one_shot"] += (own + original) * tokens
        sums["one_shot_on_all_tokens"] += (own + original) * path_tokens(members, name)
        origins = {"pruned_from": member.pruned_from, "taught_by": member.taught_by}
        rows[name] = {**origins, "path_tokens": path_tokens(members, name), "plan": member.plan}
    return {"name": config.name, "members": rows, "flops": sums, "from_scratch": from_scratch(config, shapes, sums)}


def path_tokens(members: Mapping[str, Member], name: str) -> int:
    """Return the distillation tokens that a member's weights have seen, its sources' included."""
    total = 0
    while name != TEACHER:
        total += members[name].config.train.num_tokens
        name = members[name].pruned_from
    return total


def from_scratch(config: Config, shapes: Mapping[str, Shape], sums: Mapping[str, float]) -> dict[str, Any] | None:
    """Compare training every model from scratch with training the teacher alone; None without a number of tokens."""
    tokens = config.plan.pretraining_tokens or (config.pretrain.num_tokens if config.teacher.is_pretrained else None)
    if tokens is None:
        return None
    cost = {
        name: training_flops_per_token(shape, config.train.seq_length, causal=False) for name, shape in shapes.items()
    }
    every, teacher = sum(cost.values()) * tokens, cost[TEACHER] * tokens
    found = {
        "tokens": tokens,
        "num_models": len(cost),
        "flops": every,
        "flops_with_teacher": teacher + sums["as_configured"],
    }
    return found | {"saving": every / found["flops_with_teacher"]}


def format_family(plan: Mapping[str, Any]) -> str:
    """Format a row for each member, and the sums."""
    table = [["", "pruned from", "taught by", "parameters", "tokens", "FLOPs", "GPU-hours"]]
    for name, member in plan["members"].items():
        own = member["plan"]
        chosen = own["recommended"] or own["configured"]
        numbers = [
            f"{own['student']['parameters']:,}",
            f"{own['training']['num_tokens']:,}",
            f"{own['flops']['total']:.3g}",
        ]
        hours = "no layout" if not (chosen and chosen["fits"]) else f"{chosen['gpu_hours']:,.3g}"
        table.append([name, member["pruned_from"], member["taught_by"], *numbers, hours])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [f"plan {plan['name']}", ""]
    for row in table:
        texts = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True)]
        lines.append("  ".join([*texts, *(c.rjust(w) for c, w in zip(row[3:], widths[3:], strict=True))]).rstrip())
    sums, scratch = plan["flops"], plan["from_scratch"]
    asked = sums["as_configured"]
    others = {
        "one shot            ": ("one_shot", "each member pruned from the teacher and taught by it, on its own tokens"),
        "one shot, all tokens": ("one_shot_on_all_tokens", "the same, on the tokens of its sources as well"),
    }
    lines += ["", "distillation, FLOPs with full attention:", f"  this family           {asked:.3g}"]
    lines += [f"  {name}  {sums[key]:.3g} = {sums[key] / asked:.2f}x: {text}" for name, (key, text) in others.items()]
    if scratch:
        lines += [
            f"from scratch          training all {scratch['num_models']} models on {scratch['tokens']:.3g} tokens takes "
            f"{scratch['saving']:.2f}x the compute of training the teacher and distilling ({scratch['flops']:.3g} FLOPs "
            f"against {scratch['flops_with_teacher']:.3g})"
        ]
    return "\n".join([*lines, "", "member=NAME prints layouts, memory, stages and disk of one member"])
