"""The training stream: global batches that depend only on the sources, the tokenizer, the seed and the length.

Each source's blocks are permuted by seed and epoch, grouped into units of about a megabyte, tokenised (by workers),
packed into windows and shuffled again. The blend chooses the source of the next window. Rank r takes rows r, r + dp_size,
… of each global batch. The numbers of workers and ranks change no batch.

The state is a few numbers per source. Resuming tokenises the current unit of each source again: a megabyte of text,
however long the run was. Every rank tokenises all text, because the position of a row depends on the rows before it. A
worker reaches 400,000 to 500,000 tokens per CPU second (docs/results.md, benchmarks/speed/stream.py). .bin/.idx sources
know their lengths, so each rank reads only its own rows: convert a large blend once if hundreds of ranks share it.
"""

# B this rank's sequences, S tokens of a sequence, N validation sequences
import hashlib
import threading
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from minitron_train.config import DataConfig
from minitron_train.data.blend import Blend
from minitron_train.data.feed import Feed, Known
from minitron_train.data.pack import Packer, Window, cut, num_windows
from minitron_train.data.sources import train_split, validation_source
from minitron_train.data.tokenizers import sequence_start
from minitron_train.data.units import Split, Unit
from minitron_train.runtime.errors import UserError


@dataclass(frozen=True, slots=True)
class Batch:
    """One rank's rows of a global batch."""

    tokens_BS: Tensor  # int64
    labels_BS: Tensor  # int64: the next token
    mask_BS: Tensor  # float32: 0 where the label belongs to another document than its token, or does not count
    documents_BS: Tensor | None  # int64, number of the document in its row; None: attention over whole rows
    sources: dict[str, int]  # sequences of each source in the whole global batch
    numbers_B: Tensor | None = None  # int64: each row's number in the stream, or among the held-out sequences


class StreamClosed(Exception):
    """Another thread closes the stream while it makes a batch."""


class TokenStream:
    """Global batches of packed sequences; `next_batch` returns this rank's rows.

    Args:
        total_tokens: decides where the late phase begins (data.late_fraction).
        known: see Feed.

    Raises:
        UserError: at once for paths and weights; at the first batch for mistakes that only reading shows.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        *,
        seq_length: int,
        seed: int,
        dp_rank: int = 0,
        dp_size: int = 1,
        total_tokens: int | None = None,
        known: Known | None = None,
    ) -> None:
        assert 0 <= dp_rank < dp_size
        if data.late_fraction and total_tokens is None:
            raise UserError(
                f"data.late_fraction={data.late_fraction}: needs the length of the run; set train.num_tokens"
            )
        self.data = data
        self.seq_length = seq_length
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_size = dp_size
        self.feed = Feed(data, tokenizer, train_split(data), data.num_workers, seq_length, known)
        self.start = sequence_start(tokenizer, data)
        self.known = self.feed.known  # of the files at this time
        late_start = None
        if data.late_fraction and total_tokens:
            late_start = round((1 - data.late_fraction) * total_tokens / seq_length)
        self.blend = Blend(weights=[part.weights for part in self.feed.parts], late_start=late_start)
        self.packers = [self.packer(i, None) for i in range(len(self.feed.parts))]
        self.closing = threading.Event()

    def packer(self, i: int, state: dict | None) -> Packer:
        """Source i from a saved state, or from its beginning."""
        units = self.feed.units(i, self.seed, state["position"] if state else None)
        return Packer(
            self.feed.parts[i].name,
            units,
            seq_length=self.seq_length,
            seed=self.seed,
            ahead=self.data.num_workers,
            num_units=partial(self.feed.num_units, i),
            state=state,
        )

    def next_batch(self, global_batch_size: int) -> Batch:
        """This rank's rows of the next `global_batch_size` sequences; the size may differ from call to call.

        Raises:
            StreamClosed: `closing` was set; this is noticed within a unit.
        """
        if global_batch_size % self.dp_size:
            raise UserError(
                f"train.global_batch_size={global_batch_size}: must be a multiple of the {self.dp_size} data-parallel "
                "ranks; change one of them"
            )
        first = self.blend.num_sequences
        drawn = [self.blend.draw() for _ in range(global_batch_size)]
        for source in set(drawn):
            self.packers[source].start()
        windows = [self.next_window(source, row) for row, source in enumerate(drawn)]
        counts = Counter(self.feed.parts[source].name for source in drawn)
        numbers = np.arange(first + self.dp_rank, first + global_batch_size, self.dp_size)
        own = begun([window for window in windows if window], self.start)
        return make_batch(own, self.data.document_attention, dict(counts), numbers)

    def next_window(self, source: int, row: int) -> Window | None:
        """The next window of a source; None if another rank takes this row of the global batch."""
        if self.closing.is_set():
            raise StreamClosed
        return self.packers[source].next_window(wanted=row % self.dp_size == self.dp_rank)

    def state_dict(self) -> dict:
        """A small JSON-able state. It is the same on every rank, and valid for any number of ranks and workers."""
        names = [part.name for part in self.feed.parts]
        states = [packer.state_dict() for packer in self.packers]
        return {
            "fingerprint": self.fingerprint(),
            "blend": self.blend.state_dict(),
            "sources": dict(zip(names, states, strict=True)),
        }

    def load_state_dict(self, state: dict) -> None:
        """Resume at the next batch of a saved state; a UserError if that stream had other contents."""
        if state["fingerprint"] != self.fingerprint():
            raise UserError(
                "data: files, weights, tokenizer, seed or seq_length differ from the checkpoint's; "
                "restore them, or start another output_dir"
            )
        self.blend.load_state_dict(state["blend"])
        saved = state["sources"]
        self.packers = [self.packer(i, saved[part.name]) for i, part in enumerate(self.feed.parts)]

    def passes(self) -> dict[str, dict[str, float | None]]:
        """By part: how often its documents were read, and the tokens of a complete pass; None where unknown."""
        return {packer.name: packer.passes() for packer in self.packers}

    def fingerprint(self) -> str:
        """sha256 of all that decides the sequence of batches (the lengths of the phases apart)."""
        text = f"{self.known.fingerprint} {self.seed} {self.seq_length} {train_split(self.data).fraction}"
        text += "" if self.start is None else f" {self.start}"
        return hashlib.sha256(text.encode()).hexdigest()

    def close(self) -> None:
        """End the tokenising processes."""
        self.feed.pool.close()


def make_batch(
    windows: list[Window], document_attention: bool, counts: dict[str, int], row_numbers: np.ndarray
) -> Batch:
    """Stack windows.

    Attention is limited to documents in windows of conversations, and in all with `document_attention`; otherwise a window
    of text counts as one document. Positions do not restart at a document: rotary embeddings depend only on distances.
    numpy does the work: torch would start a second pool of threads in a thread that prefetches.
    """
    tokens = np.stack([window.tokens for window in windows])
    inputs, labels = (torch.from_numpy(part.astype(np.int64)) for part in (tokens[:, :-1], tokens[:, 1:]))
    numbers = torch.from_numpy(row_numbers)
    limited = [document_attention or window.counts is not None for window in windows]
    if not any(limited):
        return Batch(inputs, labels, torch.from_numpy(np.ones(inputs.shape, np.float32)), None, counts, numbers)
    pairs = zip(windows, limited, strict=True)
    documents = np.stack([window.documents if by_document else 0 * window.documents for window, by_document in pairs])
    mask = (documents[:, :-1] == documents[:, 1:]).astype(np.float32)
    for row, window in zip(mask, windows, strict=True):
        if window.counts is not None:
            row *= window.counts[1:]
    documents_BS = torch.from_numpy(documents[:, :-1].astype(np.int64))
    return Batch(inputs, labels, torch.from_numpy(mask), documents_BS, counts, numbers)


def begun(windows: list[Window], start: int | None) -> list[Window]:
    """The windows, those of text with `start` as their first token.

    A window begins with the last token of the one before, so no token is lost as a label.
    """
    if start is None:
        return windows
    return [
        window if window.counts is not None else replace(window, tokens=with_first(window.tokens, start))
        for window in windows
    ]


def with_first(tokens: np.ndarray, start: int) -> np.ndarray:
    """A copy [S + 1] with another first token."""
    return np.concatenate([np.array([start], tokens.dtype), tokens[1:]])


def first_windows(units: Iterable[Unit], quota: int, seq_length: int) -> list[np.ndarray]:
    """At most `quota` windows of S + 1 tokens, packed across units, since a unit may have few held-out tokens."""
    missing, tokens = quota * seq_length + 1, []
    for unit in units if quota else ():
        tokens.append(unit.tokens[:missing])
        missing -= len(tokens[-1])
        if not missing:
            break
    joined = np.concatenate([np.empty(0, np.int32), *tokens])
    return [joined[start : start + seq_length + 1] for start in range(0, len(joined) - seq_length, seq_length)]


def first_chat_windows(units: Iterable[Unit], quota: int, seq_length: int) -> list[Window]:
    """At most `quota` windows of conversations, which are packed within their unit."""
    windows = (cut(unit, index, seq_length) for unit in units for index in range(num_windows(unit, seq_length)))
    return list(islice(windows, quota))


def with_counts(windows: Sequence[Window | np.ndarray]) -> np.ndarray:
    """Windows as int64 [N, 3, S + 1]: the tokens, whether each counts as a label, and the number of its document."""
    plain = [w if isinstance(w, Window) else Window(w, np.zeros(len(w), np.int32)) for w in windows]
    planes = [(w.tokens, np.ones(len(w.tokens)) if w.counts is None else w.counts, w.documents) for w in plain]
    return np.asarray(planes, np.int64)


def validation_data(data: DataConfig) -> DataConfig:
    """The source of the held-out tokens: data.validation_path, or else the training data."""
    if not data.validation_path:
        return data
    source = {"own": validation_source(data)}
    same = {key: getattr(data, key) for key in ("document_end", "sequence_start", "cache_dir")}
    return DataConfig(sources=source, **same)


def validation_tokens(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int, seed: int) -> Tensor:
    """Held-out sequences, int64, N <= data.validation_tokens / S. Each source gives its share of the whole run,
    in at most one pass.

    The shape is [N, S + 1]; with conversations it is [N, 3, S + 1] (see `with_counts`). `train.batches.held_out_batch` reads
    both.
    They come from data.validation_path if it is set, otherwise from the documents that `TokenStream` leaves out.
    """
    feed = validation_feed(data, tokenizer, seq_length)
    return take_held_out(feed, data, seq_length, seed, sequence_start(tokenizer, data))


def validation_feed(data: DataConfig, tokenizer: PreTrainedTokenizerBase, seq_length: int) -> Feed:
    """The sources of the held-out tokens."""
    split = Split(held_out=not data.validation_path, fraction=0 if data.validation_path else data.validation_fraction)
    return Feed(validation_data(data), tokenizer, split, 0, seq_length)


def run_shares(weights: Sequence[tuple[float, float]], late_fraction: float) -> list[float]:
    """Each source's share of a whole run, at any scale: the shares of both phases, weighted with their lengths.

    Args:
        weights: of each source in the first and in the late phase.
    """
    first, late = zip(*weights, strict=True)
    if not late_fraction:
        return list(first)
    return [
        (1 - late_fraction) * early / sum(first) + late_fraction * last / sum(late)
        for early, last in zip(first, late, strict=True)
    ]


def take_held_out(feed: Feed, data: DataConfig, seq_length: int, seed: int, start: int | None) -> Tensor:
    """`validation_tokens` of opened sources; text begins with the token `start`."""
    shares = run_shares([part.weights for part in feed.parts], data.late_fraction)
    blend = Blend(weights=[(share,) for share in shares], late_start=None)
    quotas = Counter(blend.draw() for _ in range(max(1, data.validation_tokens // seq_length)))
    windows: list[Window | np.ndarray] = []
    for i, part in enumerate(feed.parts):
        pending = feed.epoch(i, (seed, zlib.crc32(part.name.encode())), {"epoch": 0, "unit": 0})
        units = (unit.result() for _, unit in pending)
        found = (first_chat_windows if part.is_chat else first_windows)(units, quotas[i], seq_length)
        windows += [w if isinstance(w, Window) or start is None else with_first(w, start) for w in found]
    if not windows:
        raise UserError(
            f"data.validation_fraction={data.validation_fraction}: the held-out slice has fewer tokens than one "
            f"sequence of {seq_length}; raise it, give more text, or set data.validation_path"
        )
    has_chat = any(isinstance(window, Window) for window in windows)
    return torch.from_numpy(with_counts(windows) if has_chat else np.asarray(windows, np.int64))
