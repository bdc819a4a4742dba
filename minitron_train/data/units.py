"""Units: about a megabyte of shuffled documents, tokenised. The stream is a sequence of units, and resumes inside one.

A unit depends only on its job, so any process may make it.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tokenizers import Tokenizer

from minitron_train.config import TooLong
from minitron_train.data.chat import ChatFormat, pack
from minitron_train.data.conversations import Conversation
from minitron_train.data.formats import FileFormat, JsonLines, TextFormat
from minitron_train.data.identity import Watch, read_failed
from minitron_train.data.lines import CopiedLines
from minitron_train.runtime.errors import MachineError, UserError

UNIT_BYTES = 1 << 20  # size of a unit's text; a resumed run tokenises one unit per source again


class TokenArray(Protocol):
    """The interface of a unit's tokens: a length and slices."""

    def __len__(self) -> int: ...

    def __getitem__(self, window: slice, /) -> np.ndarray: ...


@dataclass(frozen=True, slots=True)
class Unit:
    """Tokens of some documents, concatenated; each document ends before its position in `ends`."""

    tokens: TokenArray  # [T] int32
    ends: np.ndarray  # [documents] int64, rising; the last is T
    counts: np.ndarray | None = None  # [T] int8 of conversations (see chat.py); None: every token counts as a label
    num_read: int = 0  # documents read for this unit, held out or not
    num_blank: int = 0  # those of them without text (null, empty or white space), which are left out
    num_long: int = 0  # conversations longer than a sequence, which are cut or dropped
    drops_long: bool = False  # they are dropped
    num_silent: int = 0  # conversations without a token that counts, which are left out


@dataclass(frozen=True, kw_only=True, slots=True)
class Split:
    """Which documents to keep: those held out for validation, or the others."""

    held_out: bool
    fraction: float  # share of the documents that is held out, by the hash of their text

    def wants(self, text: str) -> bool:
        """Whether to keep a text. Depends on the text alone, not on seed, source or order."""
        number = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        return (number < self.fraction * 2**64) == self.held_out

    def documents(self, passages: Sequence[str]) -> Iterator[str]:
        """The wanted passages of a document; each run of consecutive ones becomes a document."""
        for wanted, run in groupby(passages, key=self.wants):
            text = "".join(run)
            if wanted and text.strip():
                yield text


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Text to tokens: the tokenizer as JSON (to send it to other processes), and the tokens around a document."""

    tokenizer_json: str
    start: tuple[int, ...]  # BOS, if the tokenizer puts it before every text
    end: int
    split_special: bool = False  # special tokens in a text are tokenised as plain text (split_special_tokens)
    num_rows: int | None = None  # rows of the model's embedding, if the tokenizer has ids beyond it

    def build(self) -> Tokenizer:
        """The tokenizer, without truncation and padding."""
        tokenizer = Tokenizer.from_str(self.tokenizer_json)
        tokenizer.no_truncation()
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = self.split_special  # the JSON does not hold it
        return tokenizer

    def sha256(self) -> str:
        """sha256 of everything that decides the tokens."""
        text = f"{self.start}\n{self.end}\n{self.tokenizer_json}" + (
            "\nsplit special tokens" if self.split_special else ""
        )
        return hashlib.sha256(text.encode()).hexdigest()


def check_ids(ids: Sequence[int] | np.ndarray, num_rows: int | None, token_of: Callable[[int], Any]) -> None:
    """Refuse a token that has no row in the model's embedding.

    Args:
        ids: [T].
        num_rows: of the embedding; None if every token has a row.
        token_of: the token of an id, for the message.

    Raises:
        UserError: `ids` holds such a token.
    """
    if num_rows is not None and (largest := int(np.max(ids, initial=0))) >= num_rows:
        raise UserError(
            f"a text holds the token {token_of(largest)!r} with id {largest}, but the model's embedding has {num_rows} "
            "rows; remove it from the text, or resize the model's embedding"
        )


@dataclass(frozen=True, slots=True)
class ReadJob:
    """Read these blocks of one source, keep the split's documents, shuffle and tokenise them."""

    source: int
    blocks: tuple[int, ...]
    seed: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodeJob:
    """Keep the split's documents among these of one source, shuffle and tokenise them."""

    source: int
    texts: tuple[str, ...]
    seed: tuple[int, ...]


class UnitMaker:
    """Runs jobs, in this process or in a worker."""

    def __init__(
        self,
        formats: dict[int, TextFormat],
        encoder: Encoder,
        split: Split,
        watches: dict[int, Watch] | None = None,
        chats: dict[int, ChatFormat] | None = None,
    ) -> None:
        self.formats = formats
        self.chats = chats or {}  # the sources of conversations
        self.watches = watches or {}  # only sources whose files may change
        self.encoder = encoder
        self.split = split
        self.tokenizer = encoder.build()

    def run(self, job: ReadJob | EncodeJob) -> Unit:
        documents: Sequence[Sequence[str]]
        documents = self.read(job) if isinstance(job, ReadJob) else [[text] for text in job.texts]
        texts = [text for passages in documents for text in self.split.documents(passages)]
        texts = [texts[i] for i in permutation(len(texts), *job.seed)]
        unit = self.encode_chat(texts, job) if job.source in self.chats else self.encode(texts)
        num_blank = sum(not any(passage.strip() for passage in passages) for passages in documents)
        return replace(unit, num_read=len(documents), num_blank=num_blank)

    def read(self, job: ReadJob) -> list[Sequence[str]]:
        """The documents of some blocks.

        Raises:
            UserError: a file has changed since the start, or does not fit its format.
            MachineError: the system fails to read.
        """
        source, watch = self.formats[job.source], self.watches.get(job.source)
        try:
            documents = [item for block in job.blocks for item in source.read(block)]
            if watch:
                assert isinstance(source, FileFormat)
                watch.check(*files_read(source, job.blocks))
        except Exception as error:
            if watch and not isinstance(error, MachineError):
                watch.check_all()  # if a file was cut off or replaced, that is the cause
            if isinstance(error, OSError):
                raise read_failed(error) from error
            raise
        return documents

    def encode(self, texts: list[str]) -> Unit:
        """Tokens of the texts, each between its start and end tokens."""
        start, end = self.encoder.start, self.encoder.end
        encodings = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        pieces = [np.asarray([*start, *encoding.ids, end], dtype=np.int32) for encoding in encodings]
        ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        tokens = np.concatenate(pieces) if pieces else np.empty(0, np.int32)
        check_ids(tokens, self.encoder.num_rows, self.tokenizer.id_to_token)
        return Unit(tokens, ends)

    def encode_chat(self, documents: list[str], job: ReadJob | EncodeJob) -> Unit:
        """Tokens of conversations, packed into rows (see chat.pack).

        Raises:
            UserError: the template rejects a conversation, or does not tell whose a token is.
        """
        form = self.chats[job.source]
        rendered = []
        for document in documents:
            with self.naming(document, job):
                rendered.append(form.render(Conversation.of(document)))
        encodings = self.tokenizer.encode_batch([text for text, _ in rendered], add_special_tokens=False)
        found, num_long = [], 0
        for document, (text, marked), encoding in zip(documents, rendered, encodings, strict=True):
            is_long = len(encoding.ids) > form.seq_length
            num_long += is_long
            if is_long and form.too_long is TooLong.drop:
                continue
            num_read = max(end for _, end in encoding.offsets[: form.seq_length]) if is_long else len(text)
            with self.naming(document, job):
                spans = form.spans(Conversation.of(document), text, marked, num_read)
            ids, counts = np.asarray(encoding.ids, np.int32), form.counted(encoding, spans)
            found.append((ids[: form.seq_length], counts[: form.seq_length]))
        kept = [(ids, counts) for ids, counts in found if counts.any()]
        packed = pack([ids for ids, _ in kept], [counts for _, counts in kept], form.seq_length, self.encoder.end)
        check_ids(packed.tokens, self.encoder.num_rows, self.tokenizer.id_to_token)
        num_silent = len(found) - len(kept)
        return Unit(
            packed.tokens,
            packed.ends,
            packed.counts,
            num_long=num_long,
            drops_long=form.too_long is TooLong.drop,
            num_silent=num_silent,
        )

    @contextmanager
    def naming(self, document: str, job: ReadJob | EncodeJob) -> Iterator[None]:
        """Turn a ValueError about a conversation into a UserError that names its file and line."""
        try:
            yield
        except ValueError as error:
            source = self.formats.get(job.source)
            place = (
                source.place_of(document, job.blocks)
                if isinstance(source, JsonLines) and isinstance(job, ReadJob)
                else None
            )
            raise UserError(f"{place or f'the conversation {document[:60]}'}: {error}") from error


def files_read(source: FileFormat, blocks: Iterable[int]) -> set[Path]:
    """The files that these blocks are read from, without the originals of seekable copies."""
    numbers = {source.locate(block)[0] for block in blocks}
    return {source.paths[number] for number in numbers if not isinstance(source.files[number], CopiedLines)}


def permutation(count: int, *seed: int) -> np.ndarray:
    """A seeded permutation of range(count). numpy guarantees that RandomState's never changes."""
    return np.random.RandomState([number % 2**32 for number in seed]).permutation(count)
