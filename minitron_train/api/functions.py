"""The program as a library: each command is a function of paths and settings (docs/python.md).

    import minitron_train as mt

    pruned = mt.prune("models/teacher", "outputs/half", hidden_size=432, text="corpus.jsonl")
    trained = mt.distill("models/teacher", pruned.folder, "outputs/half", text="corpus.jsonl", num_tokens=1_000_000)
    student = mt.export("outputs/half")
    print(mt.evaluate(student.folder, output_dir="outputs/half").perplexity)

The functions run the same stages as the command line, in this process. A finished stage is skipped, an output folder is
written atomically, and a mistake raises UserError. `settings` takes any other key of the command line, like
{"calibration.num_samples": 64, "prune": "paper", "recipe": "tiny"}. Progress goes to the logger `minitron_train`, which
logging.getLogger("minitron_train").setLevel("WARNING") silences.
"""

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron_train.api.results import Distilled, Evaluated, Exported, Planned, Pruned, Scored, Taught, Timed
from minitron_train.commands import configuration, recipes, registry
from minitron_train.commands.members import settled
from minitron_train.commands.teacher_cache import cache_folder
from minitron_train.commands.workspace import Workspace
from minitron_train.config import Config
from minitron_train.config.renamed import current_settings
from minitron_train.runtime.errors import UserError, did_you_mean
from minitron_train.runtime.files import atomic_write_text
from minitron_train.runtime.launch import World
from minitron_train.stages import read_provenance
from minitron_train.stages.layout import SPEED, SPEED_FILE

if TYPE_CHECKING:
    from torch import Tensor

StrPath = str | Path
Text = str | Path | Sequence[str]  # a file, folder or glob; or the documents themselves
Settings = Mapping[str, Any]
OWN_TEXT = "text.jsonl"  # in the output folder, where the documents were given


def score(
    teacher: StrPath, output_dir: StrPath, *, text: Text | None = None, settings: Settings | None = None
) -> Scored:
    """Measure the importance of a teacher's channels, heads, neurons and layers (arXiv 2407.14679 §2.2).

    Args:
        text: what the teacher reads; default: the embedded corpus.
    """
    ws = run("score", output_dir, {"teacher.path": teacher, "data.path": text}, settings)
    facts = facts_of(ws.folder / "scores")
    return Scored(ws.folder / "scores", facts["samples"], facts["tokens"])


def prune(
    teacher: StrPath,
    output_dir: StrPath,
    *,
    hidden_size: int | None = None,
    ffn_hidden_size: int | None = None,
    num_attention_heads: int | None = None,
    num_query_groups: int | None = None,
    num_layers: int | None = None,
    num_moe_experts: int | None = None,
    moe_shared_expert_intermediate_size: int | None = None,
    dense_ffn_hidden_size: int | None = None,
    text: Text | None = None,
    settings: Settings | None = None,
) -> Pruned:
    """Cut a teacher to a smaller shape, scoring it first where that has not been done; repaired as `prune` settings say.

    Args:
        hidden_size, …, dense_ffn_hidden_size: the student's; None keeps the teacher's.
        text: calibration text; default: the embedded corpus.
    """
    sizes = {
        "hidden_size": hidden_size,
        "ffn_hidden_size": ffn_hidden_size,
        "num_attention_heads": num_attention_heads,
        "num_query_groups": num_query_groups,
        "num_layers": num_layers,
        "num_moe_experts": num_moe_experts,
        "moe_shared_expert_intermediate_size": moe_shared_expert_intermediate_size,
        "dense_ffn_hidden_size": dense_ffn_hidden_size,
    }
    values = {"teacher.path": teacher, "data.path": text} | {f"student.{name}": size for name, size in sizes.items()}
    ws = run("prune", output_dir, values, settings)
    return Pruned(ws.pruned_folder, num_parameters(ws.pruned_folder), num_parameters(ws.source_folder))


def teach(
    teacher: StrPath,
    output_dir: StrPath,
    *,
    text: Text | None = None,
    num_tokens: int | None = None,
    settings: Settings | None = None,
) -> Taught:
    """Write what a teacher predicts for training text, so that `distill` needs no teacher in memory (arXiv 2503.16870).

    Args:
        text: training text, as `distill` will read it; default: the embedded corpus.
        num_tokens: tokens from its beginning; default: train.num_tokens.
    """
    values = {"teacher.path": teacher, "data.path": text, "teach.num_tokens": num_tokens}
    ws = run("teach", output_dir, values, settings)
    folder = cache_folder(ws)
    facts = facts_of(folder)
    return Taught(folder, facts["tokens"], facts["bytes_per_token"])


def distill(
    teacher: StrPath,
    student: StrPath,
    output_dir: StrPath,
    *,
    text: Text | None = None,
    num_tokens: int | None = None,
    settings: Settings | None = None,
) -> Distilled:
    """Train a student on its teacher's logits; called again, an unfinished training resumes.

    Args:
        text: training text, of which a part is held out for validation; default: the embedded corpus.
        num_tokens: tokens to train on.
    """
    values = {"teacher.path": teacher, "student.path": student, "data.path": text, "train.num_tokens": num_tokens}
    ws = run("distill", output_dir, values, settings)
    facts = facts_of(ws.folder / "train")
    return Distilled(ws.folder / "train", facts["steps"], facts["tokens"], facts["evaluation"])


def export(
    output_dir: StrPath, *, path: StrPath | None = None, dtype: str | None = None, settings: Settings | None = None
) -> Exported:
    """The newest checkpoint of a training as a Hugging Face folder with its model card.

    Args:
        output_dir: the one that `distill` wrote to.
        path: where to; default: OUTPUT_DIR/student.
        dtype: float32, bfloat16 or float16; default: the teacher's.
    """
    ws = run("export", output_dir, {"export.path": path, "export.dtype": dtype}, settings)
    return Exported(ws.student_folder, num_parameters(ws.student_folder))


def evaluate(
    model: StrPath,
    *,
    output_dir: StrPath,
    text: Text | None = None,
    tasks: Sequence[str] = (),
    settings: Settings | None = None,
) -> Evaluated:
    """Perplexity and lm-eval's tasks of a Hugging Face folder.

    Args:
        text: held-out text; default: the held-out part of the embedded corpus.
        tasks: names of lm-eval, like hellaswag; the data come from the hub or from settings["eval.data_dir"].
    """
    folder = Path(model)
    label = f"{folder.resolve().parent.name}-{folder.resolve().name}"
    from minitron_train.evaluation.results import read_evaluation

    values = {"eval.model": folder, "eval.label": label, "eval.tasks": list(tasks), "data.validation_path": text}
    ws = run("eval", output_dir, values, settings)
    file = ws.eval_folder / f"{ws.config.eval.label}.json"
    found = read_evaluation(file)
    return Evaluated(found["perplexity"], dict(found["results"]), file)


def speed(
    output_dir: StrPath,
    *,
    teacher: StrPath | None = None,
    batch_sizes: Sequence[int] | None = None,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    settings: Settings | None = None,
) -> Timed:
    """Size, memory and tokens per second of the models of an output folder, through transformers.

    Args:
        output_dir: its teacher, pruned model and student are measured, as far as they exist.
        teacher: a Hugging Face folder to measure as the teacher; default: OUTPUT_DIR/teacher.
        batch_sizes: numbers of sequences to time together; default: 1 and 8.
        prompt_tokens, new_tokens: of each sequence; default: 128 and 16.
    """
    from minitron_train.evaluation.speed import read_speed

    values = {
        "teacher.path": teacher,
        "speed.batch_sizes": None if batch_sizes is None else list(batch_sizes),
        "speed.prompt_tokens": prompt_tokens,
        "speed.new_tokens": new_tokens,
    }
    ws = run("speed", output_dir, values, settings)
    file = ws.folder / SPEED / SPEED_FILE
    found = read_speed(file)
    assert found is not None
    return Timed(found["models"], found["machine"], file)


def plan(teacher: StrPath | None = None, *, settings: Settings | None = None) -> Planned:
    """What a recipe costs: parameters, memory, FLOPs, hours. Nothing is run or written.

    Args:
        teacher: a Hugging Face folder; default: the shape in the `model` section of the settings or of their recipe.
    """
    from minitron_train.commands.plan import planned

    with workspace("plan", ".", {"teacher.path": teacher}, settings) as ws:
        return Planned(planned(ws))


def report(output_dir: StrPath) -> Path:
    """Write one HTML page about everything in an output folder; the page."""
    from minitron_train.reporting import write_report

    return write_report(Path(output_dir))


def distillation_loss(
    student_hidden: "Tensor",
    student_weight: "Tensor",
    teacher_hidden: "Tensor",
    teacher_weight: "Tensor",
    *,
    mask: "Tensor | None" = None,
    labels: "Tensor | None" = None,
    vocab_size: int | None = None,
    group: Any = None,
    logit_memory_fraction: float | None = None,
    **options: Any,
) -> "Tensor":
    """Distillation loss per valid token, for any training loop: no logit tensor of the whole vocabulary is ever made.

    Args:
        student_hidden, teacher_hidden: inputs of the output layers, [..., H] and [..., D] with the same leading sizes.
        student_weight, teacher_weight: the output layers' weights, [V, H] and [V, D].
        mask: [...], tokens that count; labels: [...] token ids, needed with `ce_weight`.
        vocab_size, group: see distillation.loss.distillation_loss.
        logit_memory_fraction: memory beyond inputs and gradients, as a fraction of one fp32 [tokens, V] tensor; default 0.2.
        options: fields of distillation.loss.LossSpec: kind (a name of config.LossKind, such as "forward_kl"), temperature,
            temperature_squared, top_k, jsd_beta, kd_weight, ce_weight, compile_loss, function.

    Returns:
        A scalar with gradients in the student's two tensors.
    """
    from minitron_train.config import LossKind
    from minitron_train.distillation import loss as losses
    from minitron_train.distillation.loss import LossSpec
    from minitron_train.distillation.loss_blocks import Chunking

    known = [f.name for f in fields(LossSpec)]
    for name in options:
        if name not in known:
            raise UserError(
                f"distillation_loss({name}=…): no such option{did_you_mean(name, known)}; choose one of: {' '.join(known)}"
            )
    if "kind" in options:
        kinds = {kind.value: kind for kind in LossKind}
        given = str(getattr(options["kind"], "value", options["kind"]))
        if given not in kinds:
            raise UserError(f"distillation_loss(kind={given}): choose one of {', '.join(kinds)}")
        options["kind"] = kinds[given]
    parts = losses.distillation_loss(
        student_hidden.flatten(0, -2),
        student_weight,
        teacher_hidden.flatten(0, -2),
        teacher_weight,
        loss=LossSpec(**options),
        mask_N=None if mask is None else mask.flatten(),
        labels_N=None if labels is None else labels.flatten(),
        vocab_size=vocab_size,
        group=group,
        chunking=None if logit_memory_fraction is None else Chunking(logit_memory_fraction=logit_memory_fraction),
    )
    return parts.total / max(1, parts.num_valid)


# What the functions share


def run(command: str, output_dir: StrPath, values: Mapping[str, Any], settings: Settings | None) -> Workspace:
    """Run one command of the program in this process; its paths are read off the workspace."""
    with workspace(command, output_dir, values, settings) as ws:
        registry.COMMANDS[command].run(ws)
        return ws


@contextlib.contextmanager
def workspace(command: str, output_dir: StrPath, values: Mapping[str, Any], settings: Settings | None) -> Any:
    """The workspace of one call; its process groups end with it."""
    values = {key: as_path(key, value, Path(output_dir)) for key, value in values.items() if value is not None}
    twice = sorted(values.keys() & (settings or {}).keys() - {"eval.label"})
    if twice:
        raise UserError(f"settings[{twice[0]!r}]: is an argument of the function too; give it once")
    config = configure({"output_dir": str(output_dir), **values, **(settings or {})})
    typed = [
        "minitron_train.api",
        command,
        *(f"{key}={value}" for key, value in {**values, **(settings or {})}.items()),
    ]
    with contextlib.ExitStack() as stack:
        yield Workspace(settled(registry.COMMANDS[command], config), typed, World(), stack)


def as_path(key: str, value: Any, output_dir: Path) -> Any:
    """A value that Hydra takes; documents that were given as such go into a file of the output folder."""
    if isinstance(value, Path):
        return str(value)
    if key not in ("data.path", "data.validation_path") or isinstance(value, str):
        return value
    file = output_dir / ("held_out_" * (key == "data.validation_path") + OWN_TEXT)
    atomic_write_text(file, "".join(json.dumps({"text": document}) + "\n" for document in value))
    return str(file)


def configure(values: Mapping[str, Any]) -> Config:
    """The validated configuration: defaults, then the recipe and presets among `values`, then its keys.

    Raises:
        UserError: an unknown recipe, preset or key, or a value that its key does not take.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    values = current_settings(values, "settings")
    is_group = {
        key: isinstance(value, str) and (recipes.home() / "conf" / key).is_dir() for key, value in values.items()
    }
    chosen = [f"{key}={values[key]}" for key in values if is_group[key]]
    chosen += [f"+recipe={values['recipe']}"] if "recipe" in values else []
    keys = {key: value for key, value in values.items() if not is_group[key] and key != "recipe"}
    recipes.register_recipes(chosen)
    for choice in chosen:
        configuration.check_override(choice)
    for key in keys:
        configuration.check_key(key)
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(recipes.home() / "conf")):
            composed = hydra.compose("config", overrides=chosen)
        for key, value in keys.items():
            OmegaConf.update(composed, key, str(value) if isinstance(value, Path) else value, force_add=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(configuration.one_line(error)) from error
    typed = (name for key, value in keys.items() for name in configuration.dotted(key, value))
    return configuration.to_config(composed, typed)


def facts_of(folder: Path) -> dict[str, Any]:
    """What a finished stage noted about itself in its provenance.json."""
    return dict((read_provenance(folder) or {}).get("facts", {}))


def num_parameters(folder: Path) -> int:
    """Of a Hugging Face folder; tied weights count once."""
    from minitron_train.arch import architecture
    from minitron_train.hf import read_json, shape_from_config

    shape = shape_from_config(read_json(folder / "config.json"), str(folder))
    return sum(architecture(shape.architecture).parameters(shape).values())
