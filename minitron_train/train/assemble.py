"""Build the parts of a training run from two Hugging Face folders, in the state of step 0."""

import contextlib
import importlib.util
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from minitron_train.arch import Shape
from minitron_train.arch.rules import check_fp8, check_transformer_engine
from minitron_train.config import Config
from minitron_train.data import tokenizers
from minitron_train.data.feed import Known
from minitron_train.data.held_out import kept_tokens, sha256
from minitron_train.data.prefetch import PrefetchingStream
from minitron_train.data.stream import TokenStream
from minitron_train.distillation import cache
from minitron_train.distillation.hidden import HiddenPairs, check_layers
from minitron_train.distillation.loss import real_rows
from minitron_train.distillation.loss_memory import LossMemory
from minitron_train.distillation.step import Objective, loss_spec
from minitron_train.hf import HFFolder, copy_tokenizer, student_config, write_rest
from minitron_train.model.build import DTYPES, LanguageModel, build
from minitron_train.model.load import share_output_rows, share_weights
from minitron_train.parallel.groups import Groups
from minitron_train.parallel.switches import Switches
from minitron_train.planning.counts import forward_flops_per_token, training_flops_per_token
from minitron_train.planning.hardware import data_sheet_flops, gemm_flops
from minitron_train.planning.precision import agreed
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_folder, atomic_write_json
from minitron_train.runtime.heartbeat import Heartbeat
from minitron_train.runtime.signals import StopSignals
from minitron_train.stages import plain
from minitron_train.train.best import BestMetric
from minitron_train.train.checkpoint import CheckpointManager
from minitron_train.train.export import MODEL
from minitron_train.train.loop import Trainer
from minitron_train.train.metrics import ThroughputMeter
from minitron_train.train.optim import Optimizer, student_arguments
from minitron_train.train.reporter import Reporter
from minitron_train.train.settings import check_ranks, check_settings, deciding_settings, flat
from minitron_train.train.state import RunState
from minitron_train.train.stragglers import Stragglers
from minitron_train.train.validation import Validation

FIRST_WITH_FP8 = (8, 9)  # compute capability: Ada, and Hopper after it
# TransformerConfig arguments: one scale for each tensor, computed when it is used, since a frozen model has no history of scales
FP8 = {"fp8": "e4m3", "fp8_recipe": "tensorwise"}


def check(config: Config, groups: Groups, student: Shape, teacher: Shape | None) -> None:
    """Reject settings before weights are read: batches that do not divide over the ranks, layers that do not exist.

    Args:
        groups: without pipeline stages.

    Raises:
        UserError: names the setting and the remedy.
    """
    check_settings(config, distilled=teacher is not None)
    stages = config.parallel.pipeline_model_parallel_size
    for shape, name in ((student, "student"), (teacher, "teacher")) if teacher else ((student, "model"),):
        shape.check_experts(groups.ep_size, name)
        shape.check_stages(stages, name)
    check_ranks(config, groups.world_size)
    train = config.train
    if train.transformer_engine and not (torch.cuda.is_available() and importlib.util.find_spec("transformer_engine")):
        raise UserError("train.transformer_engine=true: needs CUDA and the transformer_engine package; remove it")
    if train.transformer_engine:
        for shape, name in ((student, "student"), (teacher, "teacher")) if teacher else ((student, "model"),):
            check_transformer_engine(shape, name, train.seq_length)
    if teacher is not None and config.distill.teacher_fp8:
        if torch.cuda.get_device_capability() < FIRST_WITH_FP8:
            raise UserError(f"distill.teacher_fp8=true: {torch.cuda.get_device_name()} has no FP8 products; remove it")
        check_fp8(teacher, groups.tp_size, train.micro_batch_size * train.seq_length)
    student.check_length(train.seq_length, "train.seq_length", "student" if teacher else "model")
    if teacher is not None:
        teacher.check_length(train.seq_length, "train.seq_length", "teacher")
        check_layers(config.distill, student, teacher, stages)


def assemble(
    config: Config,
    groups: Groups,
    student_files: HFFolder,
    teacher_files: HFFolder | None,
    folder: Path,
    stack: contextlib.ExitStack,
) -> Trainer:
    """Build all parts of a run, in the state of step 0. `stack` closes them."""
    signals = stack.enter_context(StopSignals())  # before the models, which may take minutes to load
    config = replace(config, train=replace(config.train, precision=agreed(config.train.precision, groups)))
    switches = Switches.of(config, groups)
    train, best_metric = config.train, BestMetric.of(config, distilled=teacher_files is not None)
    tokenizer, vocab_size = open_tokenizer(config, groups, student_files, teacher_files)
    stream = PrefetchingStream(open_stream(config, groups, tokenizer))
    stack.callback(stream.close)
    student = load_model(student_files, config, groups, **student_arguments(train, switches))
    held_out = groups.tensor_from_rank0(
        lambda: kept_tokens(folder, config.data, tokenizer, train.seq_length, config.seed)
    )
    cached = teacher = None
    if teacher_files is not None and config.teacher.cache:
        facts = cache.Reading(
            stream=stream.stream.fingerprint(), held_out=sha256(held_out), student=student_files.shape
        )
        cached = cache.open_cache(config, groups, teacher_files, facts)
    elif teacher_files is not None:
        teacher = load_teacher(teacher_files, config, groups, student_files.shape)
    hidden = hidden_pairs(config, student, teacher, groups)
    optimizer = Optimizer(student, train, switches)
    objective = Objective(
        student=optimizer.model,
        teacher=teacher,
        spec=loss_spec(config.distill, teacher_files is not None),
        groups=groups,
        memory=LossMemory(config.distill),
        hidden=hidden,
        vocab_size=vocab_size,
        cached=cached and cached.training,
    )
    validation = Validation(
        held_out,
        objective if cached is None else replace(objective, cached=cached.held_out),
        train.micro_batch_size,
        groups,
    )
    settings = checkpoint_settings(config, student_files, teacher_files)
    checkpoints = CheckpointManager(folder / "checkpoints", config.checkpoint, groups, best_metric, settings)
    if groups.is_first:
        write_model_files(folder / "checkpoints" / MODEL, student_files)
    heartbeat = stack.enter_context(Heartbeat(groups.rank, groups.world_size))
    return Trainer(
        config=config,
        groups=groups,
        student=student,
        objective=objective,
        optimizer=optimizer,
        stream=stream,
        validation=validation,
        checkpoints=checkpoints,
        best_metric=best_metric,
        reporter=Reporter(
            groups,
            throughput_meter(config, groups, student_files, teacher_flops(config, teacher_files, cached)),
            train.log_every_steps,
        ),
        state=RunState(),
        heartbeat=heartbeat,
        stragglers=Stragglers(groups, train.straggler_every_steps, heartbeat.host_of),
        signals=signals,
        switches=switches,
    )


def open_stream(config: Config, groups: Groups, tokenizer: PreTrainedTokenizerBase) -> TokenStream:
    """Open the training data; collective. Only rank 0 reads the files to identify them."""
    opened: list[TokenStream] = []

    def open_here(known: Known | None = None) -> Known:
        opened.append(
            TokenStream(
                config.data,
                tokenizer,
                seq_length=config.train.seq_length,
                seed=config.seed,
                dp_rank=groups.dp_rank,
                dp_size=groups.dp_size,
                total_tokens=config.train.num_tokens,
                known=known,
            )
        )
        return opened[0].known

    known = groups.on_rank0(open_here)
    if not groups.is_first:
        open_here(known)
    return opened[0]


def open_tokenizer(
    config: Config, groups: Groups, student: HFFolder, teacher: HFFolder | None
) -> tuple[PreTrainedTokenizerBase, int | None]:
    """Open the tokenizer, which both models must share.

    Returns:
        The tokenizer, and the number of real rows of the output layers; None if the models have the same rows, and tensor
        parallelism adds none.
    """
    tokenizer = tokenizers.load(student.folder)
    rows = {"student": student.shape.vocab_size} | ({} if teacher is None else {"teacher": teacher.shape.vocab_size})
    tokenizers.check_tokenizer(tokenizer, min(rows.values()))
    same_rows = student.shape.vocab_size if student.shape.vocab_size % groups.tp_size else None
    if teacher is None:
        return tokenizer, same_rows
    tokenizers.check_same(tokenizer, teacher.folder)
    has_same = len(set(rows.values())) == 1
    vocab_size = same_rows if has_same else min(tokenizers.vocab_size(tokenizer), *rows.values())
    real_rows(rows, vocab_size, 1, config.distill.top_k)  # load_teacher aligns the ranks' rows
    return tokenizer, vocab_size


def load_teacher(files: HFFolder, config: Config, groups: Groups, student: Shape) -> LanguageModel:
    """Load the frozen teacher. Each rank gets the output rows of the token ids that its shard of the student has."""
    dtype = DTYPES[agreed(config.distill.teacher_precision or config.train.precision, groups)]
    fp8 = FP8 if config.distill.teacher_fp8 else {}
    teacher = load_model(files, config, groups, dtype=dtype, **fp8).requires_grad_(False).eval()
    if groups.tp_size > 1 and student.vocab_size != files.shape.vocab_size:
        rows = student.rank_rows(groups.tp_size)
        real = files.shape.real_rows(groups.tp_rank, groups.tp_size, rows)
        teacher.replace_output(share_output_rows(files.table, files.shape, files, groups, dtype, rows), real)
    return teacher


def hidden_pairs(
    config: Config, student: LanguageModel, teacher: LanguageModel | None, groups: Groups
) -> HiddenPairs | None:
    """Attach the configured pairs of layers, before the optimizer wraps the student; None without any."""
    if teacher is None or not config.distill.hidden_layers:
        return None
    return HiddenPairs.attach(config.distill, student, teacher, config.seed, groups)


def load_model(files: HFFolder, config: Config, groups: Groups, **arguments: Any) -> LanguageModel:
    """Load this rank's tensor-parallel shard of a Hugging Face folder."""
    model = build(
        files.shape,
        tp=groups.tp_size,
        ep=groups.ep_size,
        stage=groups.pp_rank,
        num_stages=groups.pp_size,
        sequence_parallel=config.parallel.splits_sequences(config.train.seq_length, cuda=groups.device.type == "cuda"),
        transformer_engine=config.train.transformer_engine,
        **arguments,
    )
    share_weights(model, files.table, files.shape, files, groups)
    return model


def checkpoint_settings(config: Config, student: HFFolder, teacher: HFFolder | None) -> dict[str, Any]:
    """Return the settings, as one flat dict, that a checkpoint must agree with before this run resumes from it."""
    values = flat(deciding_settings(config, distilled=teacher is not None))
    for label, files in (("student", student), ("teacher", teacher)):
        if files is not None:
            values |= {f"{label}.{key}": plain(value) for key, value in asdict(files.shape).items()}
    return values


def write_model_files(target: Path, student: HFFolder) -> None:
    """Write what `export` needs besides weights: config.json, the tokenizer, and the tensors around a text model."""
    with atomic_folder(target) as scratch:
        atomic_write_json(scratch / "config.json", student_config(student.config, student.shape))
        copy_tokenizer(student.folder, scratch)
        write_rest(scratch, student.rest)


def teacher_flops(config: Config, teacher: HFFolder | None, cached: cache.Cache | None) -> int:
    """Return the teacher's FLOPs per token: a forward pass; of cached hidden states the output layer, of samples nothing."""
    if teacher is None:
        return 0
    if cached is None:
        return forward_flops_per_token(teacher.shape, config.train.seq_length)
    return 0 if cached.training.output is None else 2 * teacher.shape.vocab_size * teacher.shape.hidden_size


def throughput_meter(config: Config, groups: Groups, student: HFFolder, taught_flops: int) -> ThroughputMeter:
    """Return a meter that counts the FLOPs of the student's forward and backward pass and the teacher's `taught_flops`."""
    flops = training_flops_per_token(student.shape, config.train.seq_length) + taught_flops
    precision, cuda = config.train.precision, groups.device.type == "cuda"
    peak = data_sheet_flops(torch.cuda.get_device_name(groups.device), precision, config.cluster) if cuda else None
    return ThroughputMeter(flops, gemm_flops(precision, cuda), groups.world_size, peak)
