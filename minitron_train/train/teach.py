"""Write a teacher cache: what the teacher says about the beginning of the training stream and about the held-out tokens.

The random numbers of a sequence come from the seed and its number in the stream. So kills change nothing, and another
number of ranks changes results by rounding only. Each data-parallel rank writes its sequences into files of its own, which
appear atomically. Then rank 0 writes where the stream stands (position.json), and the next start resumes there.
"""

# B sequences, S tokens of a sequence, T tokens of several sequences that the loss counts, D hidden size, V output rows, K draws
import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor

from minitron_train.config import Config, TeachKind
from minitron_train.data import tokenizers
from minitron_train.data.held_out import kept_tokens, sha256
from minitron_train.data.prefetch import PrefetchingStream
from minitron_train.data.stream import Batch
from minitron_train.distillation import cache_files
from minitron_train.distillation.cache_files import CacheFormat, PartName, Row, Split, write_part
from minitron_train.distillation.cached_teacher import digests, valid_tokens
from minitron_train.distillation.loss_blocks import Projection
from minitron_train.distillation.sampling import Draws, draw
from minitron_train.distillation.step import attention_mask
from minitron_train.hf import HFFolder
from minitron_train.model.build import LanguageModel
from minitron_train.parallel.groups import Groups
from minitron_train.planning.precision import agreed
from minitron_train.runtime.console import progress, say
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_json, byte_size
from minitron_train.runtime.records import Count, read_whole_record
from minitron_train.stages import POSITION
from minitron_train.train.assemble import load_teacher, open_stream
from minitron_train.train.batches import held_out_batches, micro_batches, to_device

CHUNK_LOGITS = 1 << 22  # logits that are drawn from at once; some copies of them in fp64 are held


class SourcePosition(TypedDict, total=False):
    """Where a source stands (data.pack)."""

    position: Required[dict[str, Any]]
    taken: Required[Count]
    before: Required[Count]
    pass_windows: Required[Count | None]


class BlendPosition(TypedDict):
    """Where the blend stands (data.blend)."""

    num_sequences: Count
    counts: list[Count]


class StreamPosition(TypedDict):
    """TokenStream.state_dict."""

    fingerprint: str
    blend: BlendPosition
    sources: dict[str, SourcePosition | None]


class Position(TypedDict):
    """position.json: the sequences whose files are written, and the stream after them."""

    rows: Count
    stream: StreamPosition


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """The teacher, and how its answers are stored."""

    teacher: LanguageModel
    format: CacheFormat
    groups: Groups
    seed: int

    @torch.no_grad()
    def rows(self, batch: Batch, kind: TeachKind) -> list[Row]:
        """What is stored of each sequence of a micro-batch, equal on all tensor-parallel ranks."""
        hidden_SBD = self.teacher(batch.tokens_BS, attention_mask(batch.documents_BS))
        if self.teacher.config.sequence_parallel:
            hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD)
        valid = valid_tokens(batch)
        states = [hidden_SBD[tokens.to(hidden_SBD.device), b] for b, tokens in enumerate(valid)]
        entropies = [0.0] * len(states)
        if kind is TeachKind.hidden:
            payloads = [part.contiguous().view(torch.uint8).cpu().numpy().tobytes() for part in states]
        else:
            assert batch.numbers_B is not None
            pairs = zip(batch.numbers_B.tolist(), valid, strict=True)
            uniforms_TK = torch.cat([self.uniforms(number, batch.tokens_BS.shape[1])[part] for number, part in pairs])
            drawn = self.draws(torch.cat(states), uniforms_TK.to(hidden_SBD.device))
            sizes = [len(part) for part in states]
            columns = (drawn.ids_NK, drawn.ratios_NK, drawn.entropy_N)
            ids, ratios, entropy = (column.cpu().split(sizes) for column in columns)
            layout = self.format.layout
            payloads = [layout.encode(i.numpy(), r.numpy()) for i, r in zip(ids, ratios, strict=True)]
            entropies = [float(part.sum()) for part in entropy]
        columns = zip(payloads, digests(batch), entropies, strict=True)
        return [Row(payload=payload, digest=digest, entropy=entropy) for payload, digest, entropy in columns]

    def uniforms(self, number: int, length: int) -> Tensor:
        """The random numbers [S, K] of a sequence."""
        generator = np.random.default_rng((self.seed, number))
        return torch.from_numpy(generator.random((length, self.format.draws)))

    def draws(self, states_TD: Tensor, uniforms_TK: Tensor) -> Draws:
        """Draw for each token, in chunks."""
        output, groups = self.teacher.output, self.groups
        dtype = torch.promote_types(states_TD.dtype, torch.float32)
        projection, num_rows = Projection(states_TD, output, dtype), output.num_rows
        chunks: list[Draws] = []
        for tokens in torch.arange(len(states_TD)).split(max(1, CHUNK_LOGITS // num_rows)):
            part = slice(int(tokens[0]), int(tokens[-1]) + 1) if len(tokens) else slice(0, 0)
            logits_TV = states_TD.new_empty(len(tokens), num_rows, dtype=dtype)
            projection.logits(part, slice(0, num_rows), logits_TV)
            chunks.append(
                draw(
                    logits_TV,
                    uniforms_TK[part],
                    temperature=self.format.temperature,
                    exponent=self.format.proposal_exponent,
                    start=groups.tp_rank * num_rows,
                    group=groups.tp_group if groups.tp_size > 1 else None,
                )
            )
        return Draws(
            ids_NK=torch.cat([chunk.ids_NK for chunk in chunks]),
            ratios_NK=torch.cat([chunk.ratios_NK for chunk in chunks]),
            entropy_N=torch.cat([chunk.entropy_N for chunk in chunks]),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Writer:
    """Writes the files of one cache; every method is collective."""

    folder: Path
    answers: Answers
    config: Config

    @property
    def groups(self) -> Groups:
        return self.answers.groups

    @property
    def batches_per_file(self) -> int:
        """Global batches whose sequences fill a file of each rank."""
        train, most_bytes = self.config.train, self.answers.format.most_bytes
        rank_bytes = train.step_tokens / self.groups.dp_size * most_bytes
        return max(1, int(self.config.teach.file_mib * 2**20 / rank_bytes))

    def begin(self, tokens: Tensor) -> Position | None:
        """Remove what a killed run left, and write what no part of the stream needs; the position to resume at."""
        position = self.groups.on_rank0(self.recover)
        if position is None:
            rows: list[Row] = []
            for batch in held_out_batches(tokens, self.config.train.micro_batch_size, self.groups):
                assert batch.numbers_B is not None
                found = zip(batch.numbers_B.tolist(), self.answers.rows(batch, TeachKind.hidden), strict=True)
                rows += [row for number, row in found if number >= 0]
            self.write("held_out", 0, len(tokens), rows)
        return position

    def recover(self) -> Position | None:
        """Read position.json, and delete the files behind it; for rank 0."""
        try:
            position = read_whole_record(self.folder / POSITION, Position, cache_files.REMEDY)
        except FileNotFoundError:
            position = None
        begun: dict[Split, int] = {"training": position["rows"] if position else 0, "held_out": 0}
        for split, rows in begun.items():
            for name in cache_files.finished_parts(self.folder / split):
                if name.stop > rows and not (split == "held_out" and position):
                    (self.folder / split / name.file).unlink()
        return position

    def training_files(self, stream: PrefetchingStream, first: int) -> Iterator[None]:
        """Write the files of the stream from sequence `first` on; yields after each."""
        train, num_rows = self.config.train, self.answers.format.num_rows
        size = train.global_batch_size
        while first < num_rows:
            stop = min(first + self.batches_per_file * size, num_rows)
            rows: list[Row] = []
            for _ in range(first, stop, size):
                batch = to_device(stream.next_batch(size), self.groups.device)
                for part in micro_batches(batch, train.micro_batch_size):
                    rows += self.answers.rows(part, self.answers.format.kind)
            self.write("training", first, stop, rows)
            self.note(stop, stream)
            first = stop
            yield

    def write(self, split: Split, first: int, stop: int, rows: list[Row]) -> None:
        """Write this rank's file of some sequences."""
        failure: Exception | None = None
        if self.groups.tp_rank == 0:
            name = PartName(first=first, stop=stop, rank=self.groups.dp_rank, size=self.groups.dp_size)
            try:
                write_part(self.folder / split, name, rows)
            except Exception as error:  # of any class: raised below, on all ranks
                failure = error
        self.groups.raise_together(failure)

    def note(self, rows: int, stream: PrefetchingStream) -> None:
        """Record that all files below sequence `rows` are written."""
        position = {"rows": rows, "stream": stream.state_dict()}
        self.groups.on_rank0(lambda: atomic_write_json(self.folder / POSITION, position))


def teach(config: Config, groups: Groups, *, teacher: Path, folder: Path) -> dict[str, Any]:
    """Write the cache of a teacher into `folder`, or resume; collective.

    Returns:
        Facts for the provenance.

    Raises:
        UserError: settings or data do not match, or a file cannot be written.
    """
    files = HFFolder(teacher)
    files.announce()
    length = config.train.seq_length
    files.shape.check_length(length, "train.seq_length", "teacher")
    with contextlib.ExitStack() as stack:
        config = replace(config, train=replace(config.train, precision=agreed(config.train.precision, groups)))
        tokenizer = tokenizers.load(teacher)
        tokenizers.check_tokenizer(tokenizer, files.shape.vocab_size)
        stream = PrefetchingStream(open_stream(config, groups, tokenizer))
        stack.callback(stream.close)
        held_out = groups.tensor_from_rank0(lambda: kept_tokens(folder, config.data, tokenizer, length, config.seed))
        model = load_teacher(files, config, groups, files.shape)
        format = cache_format(config, files, model, stream.stream.fingerprint(), held_out)
        groups.on_rank0(lambda: write_format(folder, format))
        answers = Answers(teacher=model, format=format, groups=groups, seed=config.seed)
        writer = Writer(folder=folder, answers=answers, config=config)
        position = writer.begin(held_out)
        first = 0
        if position is None:
            writer.note(0, stream)
        else:
            first = position["rows"]
            stream.load_state_dict(dict(position["stream"]))
            say(f"teach: resumed at sequence {first:,} of {format.num_rows:,}")
        num_files = -(-(format.num_rows - first) // (writer.batches_per_file * config.train.global_batch_size))
        for _ in progress(writer.training_files(stream, first), "teach", num_files):
            pass
        facts = groups.on_rank0(lambda: size_of(folder, format))
        say(f"teach: {facts['bytes_per_token']:.1f} bytes a token, {byte_size(facts['bytes'])} in {folder}")
        return facts | {"resumed_at_sequence": first}


def cache_format(config: Config, files: HFFolder, model: LanguageModel, stream: str, held_out: Tensor) -> CacheFormat:
    """What cache.json says."""
    teach, train = config.teach, config.train
    num_tokens = teach.num_tokens or train.num_tokens
    return CacheFormat(
        version=cache_files.VERSION,
        kind=teach.kind,
        vocab_size=files.shape.vocab_size,
        hidden_size=files.shape.hidden_size,
        dtype="float32" if model.output_weight.dtype == torch.float32 else "bfloat16",
        draws=teach.draws,
        proposal_exponent=teach.proposal_exponent,
        temperature=config.distill.temperature,
        seq_length=train.seq_length,
        num_rows=-(-num_tokens // train.step_tokens) * train.global_batch_size,
        num_held_out=len(held_out),
        stream=stream,
        held_out=sha256(held_out),
    )


def write_format(folder: Path, format: CacheFormat) -> None:
    """Write cache.json, or compare it with the one of the run that is resumed.

    Raises:
        UserError: they differ.
    """
    if (folder / POSITION).exists() and cache_files.read_format(folder) != format:
        raise UserError(
            f"{folder}: was begun with other text or settings; restore them, or give force=true to start again"
        )
    atomic_write_json(folder / cache_files.CACHE, asdict(format))


def size_of(folder: Path, format: CacheFormat) -> dict[str, Any]:
    """The size of the files of the stream."""
    parts = cache_files.finished_parts(folder / "training")
    total = sum((folder / "training" / name.file).stat().st_size for name in parts)
    tokens = format.num_rows * format.seq_length
    return {"tokens": tokens, "bytes": total, "bytes_per_token": total / tokens}
