"""Open a teacher cache for a training, or refuse one that does not belong to it.

The teacher's folder must still be there: its output layer is read from it, and nothing else. Hidden states need it in each
step. Samples need it in validation only, whose KL is exact with either kind.
"""

from dataclasses import dataclass
from pathlib import Path

from minitron_train.arch.shape import Shape
from minitron_train.config import Config, DistillConfig, LossKind, TeachKind
from minitron_train.distillation.cache_files import CacheFormat, CacheReader, read_format
from minitron_train.distillation.cached_teacher import CachedTeacher
from minitron_train.hf import DTYPES, HFFolder
from minitron_train.model.build import logit_map
from minitron_train.model.load import share_output_rows
from minitron_train.model.vocabulary import OutputLayer
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a training reads, to be compared with what the teacher has seen: see CacheFormat."""

    stream: str
    held_out: str
    student: Shape


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """The teacher of the training stream and of the held-out tokens."""

    training: CachedTeacher
    held_out: CachedTeacher


def open_cache(config: Config, groups: Groups, teacher: HFFolder, reading: Reading) -> Cache:
    """Open the cache that teacher.cache names; collective.

    Raises:
        UserError: it lacks what this training needs, belongs to another one, or is damaged.
    """
    assert config.teacher.cache
    folder = Path(config.teacher.cache)
    format = groups.on_rank0(lambda: read_format(folder))
    check_cache(config, format, reading)
    num_sequences = config.train.num_steps * config.train.global_batch_size
    groups.on_rank0(lambda: CacheReader.of(folder, "training", num_sequences) and None)
    shape, dtype = teacher.shape, DTYPES[format.dtype]
    num_rows = reading.student.rank_rows(groups.tp_size)  # both models' shards then match
    rows_VH = share_output_rows(teacher.table, shape, teacher, groups, dtype, num_rows)
    output = OutputLayer(rows_VH, logit_map(shape))
    training = CachedTeacher(
        reader=CacheReader.of(folder, "training", num_sequences),
        format=format,
        output=output if format.kind is TeachKind.hidden else None,
        device=groups.device,
    )
    held_out = CachedTeacher(
        reader=CacheReader.of(folder, "held_out", format.num_held_out),
        format=format,
        output=output,
        device=groups.device,
    )
    return Cache(training=training, held_out=held_out)


def check_cache(config: Config, format: CacheFormat, reading: Reading) -> None:
    """Refuse a cache that cannot give this training what its own teacher would.

    Raises:
        UserError: the first difference.
    """
    folder, train, distill = config.teacher.cache, config.train, config.distill
    num_rows = train.num_steps * train.global_batch_size
    check_loss_fits(distill, format)
    remedies = (
        (format.seq_length == train.seq_length, "has another train.seq_length"),
        (format.stream == reading.stream, "was written for another text, tokenizer, blend or seed"),
        (format.held_out == reading.held_out, "was written with other held-out tokens (data.validation_…)"),
    )
    for fits, why in remedies:
        if not fits:
            raise UserError(
                f"teacher.cache={folder}: {why}; restore the settings that `teach` had, or run `teach` again"
            )
    if format.num_rows < num_rows:
        raise UserError(
            f"teacher.cache={folder}: has {format.num_rows * format.seq_length:,} tokens, this run reads "
            f"{num_rows * train.seq_length:,}; lower train.num_tokens, or run `teach` with a larger teach.num_tokens"
        )
    if format.kind is TeachKind.samples and format.vocab_size != reading.student.vocab_size:
        raise UserError(
            f"teacher.cache={folder}: has samples of {format.vocab_size} output rows, the student has "
            f"{reading.student.vocab_size}; pad both alike, or use teach.kind=hidden"
        )


def check_loss_fits(distill: DistillConfig, format: CacheFormat) -> None:
    """Refuse losses that need more than the cache holds.

    Raises:
        UserError: names the setting.
    """
    if distill.hidden_layers:
        raise UserError(
            "distill.hidden_layers: needs the teacher's inner layers, which no cache holds; leave it out, or teacher.cache"
        )
    if format.kind is TeachKind.hidden or not distill.kd_weight:
        return
    remedy = "choose it, use teach.kind=hidden, or leave out teacher.cache"
    if distill.loss_function or distill.loss is not LossKind.forward_kl:
        name = "loss_function" if distill.loss_function else "loss"
        value = distill.loss_function or distill.loss.value
        raise UserError(f"distill.{name}={value}: the cache has samples, which serve loss=forward_kl only; {remedy}")
    if distill.temperature != format.temperature:
        raise UserError(
            f"distill.temperature={distill.temperature}: the cache has samples at temperature {format.temperature}; {remedy}"
        )
