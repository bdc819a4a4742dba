"""Format the plan as text for a terminal."""

from typing import Any

from minitron_train.arch.shape import SIZES
from minitron_train.planning.family import format_family
from minitron_train.planning.timing import DISK_RATE
from minitron_train.runtime.files import byte_size
from minitron_train.runtime.numbers import duration

GIB = 2**30
MEMORY_ROWS = {
    "runtime": "CUDA, NCCL, libraries",
    "student_weights": "student's weights",
    "teacher_weights": "teacher's weights",
    "gradients": "gradients, fp32",
    "optimizer": "optimizer state",
    "activations": "activations",
    "loss": "fused KL: blocks, gradients",
    "total": "peak",
}
COUNTS = ("parameters", "active_parameters", "non_embedding_parameters")
PARTS = ("embedding", "attention", "mlp", "norms", "output")


def format_plan(plan: dict[str, Any]) -> str:
    """Format the whole plan, about 60 lines; of a model family a table of its members and their sum."""
    if "members" in plan:
        return format_family(plan)
    sections = [
        [f"plan {plan['name']}", ""],
        models(plan),
        ["", *costs(plan)],
        chosen_layout(plan),
        ["", *layout_table(plan)],
        ["", *stage_lines(plan)],
    ]
    return "\n".join(line for section in sections for line in section)


def models(plan: dict[str, Any]) -> list[str]:
    """Format the sizes of teacher and student."""
    teacher, student = plan["teacher"], plan["student"]
    lines = [f"{'':<28}{'teacher':>16}{'student':>16}{'kept':>8}"]
    pairs = [
        (name, teacher[name], student.get(name, 0))  # dense layers may all be dropped
        for name in (*SIZES, "moe_router_topk", "kv_channels", "vocab_size", *COUNTS)
        if name in teacher
    ]
    pairs += [(f"  {name}", teacher["parameters_by_part"][name], student["parameters_by_part"][name]) for name in PARTS]
    for name, before, after in pairs:
        share = f"{after / before:8.1%}" if before and after != before else ""
        lines.append(f"{name:<28}{before:>16,}{after:>16,}{share}")
    assumed = plan["assumed_layers"]
    return [*lines, *([f"the student's counts assume {assumed}"] if assumed else [])]


def costs(plan: dict[str, Any]) -> list[str]:
    """Format tokens, FLOPs, and the savings of a model family."""
    training, flops, family = plan["training"], plan["flops"], plan["family"]
    pretraining = plan["pretraining"]
    all_flops = f", {flops['total'] + pretraining['flops']['total']:.3g} with pretraining" if pretraining else ""
    lines = [
        f"tokens             {training['num_tokens']:,} = {training['steps']:,} steps of {training['tokens_per_step']:,}"
        f" ({training['global_batch_size']} x {training['seq_length']})",
        f"FLOPs per token    teacher forward {flops['teacher_forward_per_token']:.3g}, "
        f"student forward + backward {flops['student_training_per_token']:.3g}",
        f"FLOPs              {flops['per_step']:.3g} per step, {flops['total']:.3g} in total{all_flops}",
    ]
    if family:
        per_step = ", ".join(f"{name} {value:.1e}" for name, value in family["flops_per_step"].items())
        lines.append(
            f"from scratch       training all {len(family['flops_per_step'])} models "
            f"on {family['pretraining_tokens']:.0e} tokens takes {family['saving']:.2f}x the compute"
        )
        lines.append(
            f"                   of training the teacher and distilling (FLOPs per step, full attention: {per_step})"
        )
    return lines


def chosen_layout(plan: dict[str, Any]) -> list[str]:
    """Format memory and speed of the recommended layout, else of the configured one; nothing if it does not divide the batch."""
    machine, chosen = plan["hardware"], plan["recommended"] or plan["configured"]
    if not chosen:
        return []
    title = "recommended layout" if plan["recommended"] else "configured layout (no layout of this cluster fits)"
    heading = f"{title}, {machine['num_gpus']} x {machine['name']}: {layout_text(chosen['layout'])}"
    if kind := chosen["layout"]["cached"]:
        heading += f"; the teacher is on disk ({kind})"
    return [
        "",
        heading,
        *settings_line(plan),
        *memory(chosen, machine),
        *time_lines(chosen, machine),
        *expert_line(plan),
    ]


def expert_line(plan: dict[str, Any]) -> list[str]:
    """Say what the estimate leaves out for mixtures of experts."""
    if not plan["student"].get("num_moe_experts"):
        return []
    return ["  experts run one after the other, which this estimate does not count; expect fewer tokens/s"]


def settings_line(plan: dict[str, Any]) -> list[str]:
    """Format the settings that select the recommended layout; nothing if the recipe selects it already."""
    return [f"  set {' '.join(plan['overrides'])}"] if plan["overrides"] else []


def layout_text(layout: dict[str, Any]) -> str:
    """Format a layout: "TP 2, DP 64, micro-batch 1, …"."""
    shared = {"sequence_parallel": layout["tp"], "sharded_optimizer": layout["dp"]}  # option -> number of ranks it uses
    extra = [name.replace("_", " ") for name, ranks in shared.items() if layout[name] and ranks > 1]
    if layout["recompute"] != "none":
        extra.append(f"{layout['recompute']} recompute")
    experts = f" (EP {layout['ep']})" if layout["ep"] > 1 else ""
    stages = f"PP {layout['pp']}, " if layout["pp"] > 1 else ""
    text = f"TP {layout['tp']}, {stages}DP {layout['dp']}{experts}, micro-batch {layout['micro_batch_size']}"
    return ", ".join([text, *extra])


def memory(choice: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """Format the GiB per GPU by part."""
    parts, activations = choice["memory_bytes"], choice["activations_bytes"]
    rows = {name: text for name, text in MEMORY_ROWS.items() if parts[name]}
    if not machine["cuda"]:
        rows["runtime"] = "Python and libraries"
    if choice["layout"]["cached"]:
        rows["teacher_weights"] = "teacher's output layer"
    lines = [f"  {text:<30}{parts[name] / GIB:>9.2f} GiB" for name, text in rows.items()]
    lines[-1] += f" of {machine['memory_bytes'] / GIB:.1f}"
    lines[list(rows).index("activations")] += (
        f"   (with recompute {activations['with_recompute'] / GIB:.2f}, without {activations['without_recompute'] / GIB:.2f})"
    )
    layout = choice["layout"]
    if layout["sharded_optimizer"] and layout["dp"] > 1:
        whole = choice["unsharded_optimizer_bytes"] / GIB
        lines[list(rows).index("optimizer")] += (
            f"   (sharded over DP; {whole:.2f} with train.distributed_optimizer=false)"
        )
    host, stages = choice["host_bytes_of_save"], [f"{needed / GIB:.2f}" for needed in choice["bytes_of_stages"]]
    return [
        *lines,
        *([f"  peaks of the stages, first to last: {', '.join(stages)} GiB"] if len(stages) > 1 else []),
        f"  a checkpoint copies {host['rank'] / GIB:.2f} GiB per process to host memory, {host['node'] / GIB:.1f} GiB per node",
    ]


def time_lines(choice: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """Format speed, hours, price and network traffic."""
    step, network = choice["step_seconds"], choice["network_bytes_per_step"]
    between = f", {network['pipeline_parallel'] / GIB:.1f} GiB for PP" if choice["layout"]["pp"] > 1 else ""
    origin = "measured here" if machine["measured"] else "data sheet"
    parts = " + ".join(
        f"{name.replace('_', ' ')} {value:.2f}" for name, value in step.items() if name != "total" and value
    )
    return [
        f"  {choice['tokens_per_second']:,.0f} tokens/s, {cost_text(choice, machine)}",
        f"  at {machine['gemm_efficiency']:.0%} of {machine['peak_flops'] / 1e12:,.3g} TFLOP/s ({origin}); "
        f"one step: {step['total']:.2f} s = {parts}",
        f"  each GPU sends {network['tensor_parallel'] / GIB:.1f} GiB per step for TP, "
        + (f"{network['expert_parallel'] / GIB:.1f} GiB for EP, " if choice["layout"]["ep"] > 1 else "")
        + f"{network['data_parallel'] / GIB:.1f} GiB for DP{between}",
    ]


def cost_text(cost: dict[str, Any], machine: dict[str, Any]) -> str:
    """Format the time, and GPU-hours and dollars where there are GPUs."""
    dollars = "" if cost["dollars"] is None else f", {cost['dollars']:,.0f} dollars"
    return f"{hours_text(cost['hours'])}{gpu_hours_text(cost['gpu_hours'], machine)}{dollars}"


def hours_text(hours: float) -> str:
    """89.12 -> "89.1 hours"; less than an hour in minutes and seconds."""
    return f"{hours:,.1f} hours" if hours >= 1 else duration(hours * 3600)


def gpu_hours_text(gpu_hours: float, machine: dict[str, Any]) -> str:
    """Format ", 1,234 GPU-hours"; nothing on a machine without GPUs."""
    return f", {gpu_hours:,.{0 if gpu_hours >= 10 else 1}f} GPU-hours" if machine["cuda"] else ""


def layout_table(plan: dict[str, Any], most: int = 8) -> list[str]:
    """Format the fastest layouts that fit and their number, or the reason why no layout is valid or fits."""
    if not plan["layouts"]:
        batch, gpus = plan["training"]["global_batch_size"], plan["hardware"]["num_gpus"]
        return [
            f"train.global_batch_size={batch} cannot be divided among {gpus} GPUs; "
            f"set a multiple of {gpus}, or lower cluster.num_nodes or cluster.gpus_per_node"
        ]
    fitting = [row for row in plan["layouts"] if row["fits"]]
    lines = [
        f"{len(fitting)} of {len(plan['layouts'])} layouts fit"
        + (f"; the fastest {most}:" if len(fitting) > most else ":")
    ]
    if not fitting:
        least = min(plan["layouts"], key=lambda row: row["memory_bytes"]["total"])
        lines[0] += (
            f" the smallest, {layout_text(least['layout'])}, needs {least['memory_bytes']['total'] / GIB:.1f} GiB; "
            "use more GPUs, a smaller student or a shorter train.seq_length"
        )
    texts = [layout_text(row["layout"]) for row in fitting[:most]]
    width = max(map(len, texts), default=0)
    for text, row in zip(texts, fitting, strict=False):
        peak = row["memory_bytes"]["total"] / GIB
        lines.append(f"  {text:<{width}}{peak:>9.1f} GiB{row['tokens_per_second']:>12,.0f} tokens/s")
    return lines


def stage_lines(plan: dict[str, Any]) -> list[str]:
    """Format the other stages: pretraining, scoring, slicing, repair, and the disk space."""
    scoring, slicing = plan["scoring"], plan["slicing"]
    where = f"at {DISK_RATE / 1e9:g} GB/s" if plan["hardware"]["cuda"] else "in the page cache"
    resident, streamed = (scoring["memory_bytes"][name]["total"] / GIB for name in ("resident", "streamed"))
    lines = [
        f"scoring            {scoring['tokens']:,} tokens in {scoring['precision']}, {duration(scoring['seconds'])}; "
        f"{resident:.1f} GiB with all layers in memory, {streamed:.1f} GiB streamed",
        f"slicing            reads {slicing['read_bytes'] / GIB:.1f} GiB, writes {slicing['written_bytes'] / GIB:.1f} GiB, "
        f"{slicing['seconds']:.2g} s {where}; {slicing['memory_bytes']['total'] / GIB:.1f} GiB",
    ]
    if repair := slicing["repair_bytes"]:
        lines.append(
            f"repair             {slicing['repair_tokens']:,} tokens, {repair['total'] / GIB:.1f} GiB on one process "
            f"({repair['streams'] / GIB:.1f} of it divided among several)"
        )
    on_disk = cache_lines(plan["teacher_cache"], plan["hardware"])
    return [*pretraining_lines(plan), *lines, *on_disk, disk_line(plan["disk"])]


def cache_lines(cache: dict[str, Any], machine: dict[str, Any]) -> list[str]:
    """Format the size of a teacher on disk, and what each training saves that reads it."""
    each, size = cache["bytes_per_token"], {kind: byte_size(round(value)) for kind, value in cache["bytes"].items()}
    lines = [
        f"teacher on disk    {cache['draws']} draws: at most {each['samples']:,.1f} bytes a token, {size['samples']}; "
        f"hidden states: {each['hidden']:,.0f} bytes, {size['hidden']}"
    ]
    if "saved_hours" in cache:
        lines.append(
            f"                   a training that reads draws saves {hours_text(cache['saved_hours'])}"
            f"{gpu_hours_text(cache['saved_gpu_hours'], machine)}; teach takes about as long, once"
        )
    return lines


def pretraining_lines(plan: dict[str, Any]) -> list[str]:
    """Format the teacher's pretraining in the layout above, if the recipe pretrains its teacher."""
    pretraining = plan["pretraining"]
    if not pretraining:
        return []
    line = f"pretraining        {pretraining['num_tokens']:,} tokens = {pretraining['steps']:,} steps, "
    line += f"{pretraining['flops']['total']:.3g} FLOPs"
    if "hours" in pretraining:
        too_much = "" if pretraining["fits"] else ", which does not fit"
        line += f", {cost_text(pretraining, plan['hardware'])}; {pretraining['memory_bytes']['total'] / GIB:.1f} GiB{too_much}"
    return [line]


def disk_line(disk: dict[str, int]) -> str:
    """Format the size of the output folder by part."""
    gib = {name: size / GIB for name, size in disk.items()}
    pretraining = f"pretraining {gib['pretraining']:.1f}, " if disk["pretraining"] else ""
    cache = f"; copies of compressed text in the cache {gib['cache']:.1f}" if disk["cache"] else ""
    return (
        f"disk               {gib['total']:.1f} GiB: {pretraining}teacher {gib['teacher']:.1f}, pruned {gib['pruned']:.1f}, "
        f"checkpoints {gib['checkpoints']:.1f} ({gib['checkpoint']:.1f} each), student {gib['student']:.1f}{cache}"
    )
