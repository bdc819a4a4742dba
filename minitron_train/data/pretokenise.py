"""Tokenise a corpus once into megatron-core's .bin/.idx, for runs with many ranks.

    python -m minitron_train.data.pretokenise PATH --tokenizer FOLDER --output PREFIX [--num-workers 8] [--text-key text]

Then set data.sources.NAME.path=PREFIX: no rank tokenises, and each reads only its own rows.
"""

import argparse
import contextlib
import sys
from collections import deque
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from minitron_train.config import DataConfig
from minitron_train.data import tokenizers
from minitron_train.data.feed import Feed
from minitron_train.data.hub import HubSource
from minitron_train.data.indexed import IndexedSource
from minitron_train.data.units import Split, Unit
from minitron_train.runtime.console import say
from minitron_train.runtime.errors import UserError, error_line
from minitron_train.runtime.files import disk_errors, parent_folders, partial_path, sync_path


def pretokenise(data: DataConfig, tokenizer: PreTrainedTokenizerBase, prefix: Path, seed: int = 0) -> dict[str, int]:
    """Write PREFIX.bin and PREFIX.idx with every document of a single source, shuffled, each with its end token.

    Nothing is held out: the stream that reads the pair holds out documents by number. Returns the numbers of documents
    and tokens.
    """
    data.validate()
    feed = Feed(data, tokenizer, Split(held_out=False, fraction=0), data.num_workers, seq_length=1)
    if len(feed.parts) != 1 or isinstance(feed.opened[0], IndexedSource | HubSource):
        raise UserError(
            "pretokenise takes one source of text files, not tokens or the hub; convert the sources one by one"
        )
    if feed.chats:
        raise UserError(
            "pretokenise: .bin/.idx holds no loss mask, which conversations (kind=chat) need; train on the files themselves"
        )
    say(feed.parts[0].describe("input") or "")
    with contextlib.closing(feed.pool), disk_errors(prefix), parent_folders(prefix):
        return write_pair(prefix, units(feed, seed), feed.vocab_size)


def units(feed: Feed, seed: int) -> Iterator[Unit]:
    """The units of one epoch; as many are requested in advance as there are tokenising processes."""
    jobs = feed.epoch(0, (seed,), {"epoch": 0, "unit": 0})
    waiting = deque(islice(jobs, feed.pool.num_workers + 1))
    while waiting:
        yield waiting.popleft()[1].result()
        waiting.extend(islice(jobs, 1))


def write_pair(prefix: Path, units: Iterator[Unit], vocab_size: int) -> dict[str, int]:
    """Write the pair. An older index is deleted first and the new one renamed last, so that a pair is never mixed."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    scratch = partial_path(prefix)
    files = {suffix: (Path(f"{scratch}{suffix}"), Path(f"{prefix}{suffix}")) for suffix in (".bin", ".idx")}
    counts = {"documents": 0, "tokens": 0}
    try:
        builder = IndexedDatasetBuilder(str(files[".bin"][0]), dtype=DType.optimal_dtype(vocab_size))
        for unit in units:
            for tokens in np.split(unit.tokens[:], unit.ends[:-1]):
                if len(tokens):
                    builder.add_document(tokens, [len(tokens)])  # type: ignore[arg-type]  # it converts to arrays anyway
                    counts["documents"] += 1
                    counts["tokens"] += len(tokens)
        if not counts["documents"]:
            raise UserError("pretokenise: the corpus is empty; give one with text")
        builder.finalize(str(files[".idx"][0]))
        for written, _ in files.values():
            sync_path(written)
        files[".idx"][1].unlink(missing_ok=True)
        for written, target in files.values():
            written.replace(target)
    finally:
        for written, _ in files.values():
            written.unlink(missing_ok=True)
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="file, folder or quoted glob of text, JSON Lines, CSV, Parquet or Arrow")
    parser.add_argument("--tokenizer", required=True, help="Hugging Face folder")
    parser.add_argument(
        "--output",
        required=True,
        type=Path,
        metavar="PREFIX",
        help="path of the .bin and .idx files, without suffix",
    )
    parser.add_argument("--num-workers", type=int, default=4, help="tokenising processes")
    parser.add_argument("--text-key", default="text", help="column that holds the text")
    arguments = parser.parse_args()
    data = DataConfig(path=arguments.path, text_key=arguments.text_key, num_workers=arguments.num_workers)
    try:
        counts = pretokenise(data, tokenizers.load(arguments.tokenizer), arguments.output)
    except UserError as error:
        print(error_line(error), file=sys.stderr)
        sys.exit(2)
    print(f"{counts['documents']:,} documents, {counts['tokens']:,} tokens in {arguments.output}.bin")


if __name__ == "__main__":
    main()
