"""What several commands read: a model's tokenizer, the calibration tokens, the identity of the data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron_train.arch import architecture
from minitron_train.commands.workspace import Workspace, subset
from minitron_train.config import DataConfig, EvalConfig
from minitron_train.stages.layout import SCORES


def load_tokenizer(folder: Path) -> Any:
    """The folder's tokenizer, which must fit its embedding."""
    from minitron_train.data import tokenizers
    from minitron_train.hf import read_json, shape_from_config

    loaded = tokenizers.load(folder)
    tokenizers.check_tokenizer(loaded, shape_from_config(read_json(folder / "config.json"), str(folder)).vocab_size)
    return loaded


def calibration_tokens(ws: Workspace, new_in: Path | None = None) -> Any:
    """Calibration tokens [batches, sequences, length], from a file or with the teacher's tokenizer.

    Args:
        new_in: the folder of new scores, which stores the text that the teacher writes; None: read the tokens that were scored.
    """
    from minitron_train.data.calibration import calibration_batches, check_made_with, read_tokens
    from minitron_train.data.tokenizers import has_tokenizer
    from minitron_train.pruning import samples

    config, calibration = ws.config, ws.config.calibration
    if calibration.self_generated_fraction and new_in:
        tokenizer = load_tokenizer(ws.source_folder)
        return samples.tokens_with_samples(config, ws.groups, ws.open_source(), tokenizer, new_in)
    if calibration.self_generated_fraction:
        return read_tokens(ws.folder / SCORES / samples.FILE)
    if not calibration.tokens_path:
        return calibration_batches(calibration, config.data, load_tokenizer(ws.source_folder), config.seed)
    tokens = calibration_batches(calibration, config.data, None, config.seed)
    if has_tokenizer(ws.source_folder):
        check_made_with(Path(calibration.tokens_path), load_tokenizer(ws.source_folder))
    return tokens


def save_calibration(ws: Workspace, path: Path) -> None:
    """Write the calibration tokens of finished scores to `path`, with the fingerprints of what they were made from."""
    from minitron_train.data.calibration import Made, calibration_data, write_tokens
    from minitron_train.data.tokenizers import digest

    config, calibration = ws.config, ws.config.calibration
    inputs = data_inputs(
        ws, calibration_data(calibration, config.data), "calibration.path" if calibration.path else None
    )
    if calibration.self_generated_fraction:
        inputs["teacher"] = ws.fingerprint(ws.source_folder)
    settings = dict(subset(calibration, "num_samples", "seq_length", "self_generated_fraction"))
    tokens = calibration_tokens(ws)

    def write() -> None:
        tokenizer = digest(load_tokenizer(ws.source_folder))
        write_tokens(path, tokens, Made(tokenizer=tokenizer, inputs=inputs, settings=settings, seed=config.seed))

    ws.on_rank0(write)
    ws.say_once(f"score: wrote the calibration tokens to {path}")


def data_inputs(ws: Workspace, data: DataConfig | None = None, key: str | None = None) -> dict[str, str]:
    """What the stream, or one of other data, gives: a change of any of it makes a stage stale.

    What its paths stand for is printed, once in each run.

    Args:
        key: the setting that names the only path of `data`, where it is not data.path.
    """
    from minitron_train.data.sources import check_outside, describe, identity

    chosen = data or ws.config.data
    ws.on_rank0(lambda: check_outside(chosen, ws.folder))
    for line in ws.on_rank0(lambda: describe(chosen, key)):
        ws.say_once(line)
    warn_without_bos(ws, chosen)
    return ws.on_rank0(lambda: identity(chosen))


def warn_without_bos(ws: Workspace, data: DataConfig) -> None:
    """Say that the teacher's family needs BOS before every sequence, unless `data` puts a token there."""
    if data.sequence_start is None and ws.knows_teacher_shape and architecture(ws.teacher_shape.architecture).needs_bos:
        ws.say_once(
            f"warning: models of type {ws.teacher_shape.architecture} predict far worse where a sequence does not begin with "
            "BOS; set data.sequence_start to the tokenizer's BOS, like <bos>"
        )


def stream_inputs(ws: Workspace) -> dict[str, str]:
    """What the stream gives, and the text of data.validation_path."""
    from minitron_train.data.stream import validation_data

    inputs = data_inputs(ws)
    if ws.config.data.validation_path:
        held_out = data_inputs(ws, validation_data(ws.config.data), "data.validation_path")
        inputs |= {f"validation {label}": value for label, value in held_out.items()}
    return inputs


def check_isolated(evaluation: EvalConfig, tasks: Sequence[str]) -> None:
    """Refuse tasks that run generated programs where this system cannot isolate them.

    Raises:
        UserError: the kernel grants no namespaces, and eval.allow_code_execution=true asks for them.
    """
    from minitron_train.evaluation.code import check_isolation
    from minitron_train.evaluation.task_names import run_programs

    if evaluation.allow_code_execution is True and run_programs(tasks):
        check_isolation()
