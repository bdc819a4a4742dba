"""Data sets of the Hugging Face hub, streamed with `datasets`; resuming uses the state of `datasets`.

Documents come in the data set's order, since a shuffle buffer cannot be resumed; only those of one unit are shuffled.
`datasets` resumes at the beginning of a shard and skips rows, so prefer data sets with many shards.
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron_train.config.data import HUB_PREFIX, SourceConfig
from minitron_train.data.columns import Columns
from minitron_train.data.formats import combine
from minitron_train.data.identity import FileRecord, Watch, records_of
from minitron_train.runtime.errors import UserError, first_line


class HubSource:
    """One streamed data set: a repository id, or a local folder in the same form."""

    def __init__(self, name: str, source: SourceConfig, columns: Columns) -> None:
        self.name = name
        self.source = source
        self.columns = columns
        self.path = str(source.path).removeprefix(HUB_PREFIX)
        self.records: Mapping[str, FileRecord] | None = None  # see Watch
        self.initial_state: dict = {}  # state of `rows` before the first row

    @cached_property
    def rows(self) -> Any:
        """The streaming data set."""
        import datasets

        source, _ = self.source, self.watch  # records the files before they are opened
        try:
            rows: Any = datasets.load_dataset(
                self.path, name=source.subset, split=source.split, revision=source.revision, streaming=True
            )
        except Exception as error:  # datasets and huggingface_hub raise dozens of classes
            raise UserError(
                f"data.sources.{self.name}: {source.path} cannot be opened on the hub ({type(error).__name__}: "
                f"{first_line(error)}); check the name, the network and HF_TOKEN, or download it and give its path"
            ) from error
        if rows.column_names:
            try:
                self.columns.of(rows.column_names)
            except ValueError as error:
                raise UserError(f"{source.path}: {error}") from error
        self.initial_state = rows.state_dict()
        return rows

    @cached_property
    def watch(self) -> Watch:
        """The files of a local folder as they were when it was opened; a repository has none."""
        return Watch(self.files, self.records)

    @property
    def files(self) -> list[Path]:
        """The files of a local folder, sorted, without hidden ones."""
        folder = Path(self.path).expanduser()
        found = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
        hidden = [path for path in found if any(name.startswith(".") for name in path.relative_to(folder).parts)]
        return sorted(set(found).difference(hidden))

    def units(self, state: dict | None, unit_bytes: int) -> Iterator[tuple[dict, tuple[str, ...]]]:
        """One pass from `state`: the state before each unit, and the unit's texts. There is at least one unit, even empty.

        `datasets` applies a loaded state when the iteration begins: before the first row, `rows.state_dict()` still
        returns the state before the load. So the first unit has the given state.
        """
        rows = self.rows
        start, texts, size_bytes, num_units = state or self.initial_state, [], 0, 0
        for text in self.texts(start):
            texts.append(text)
            size_bytes += len(text)
            if size_bytes >= unit_bytes:
                self.watch.check_all()
                yield start, tuple(texts)
                start, texts, size_bytes, num_units = rows.state_dict(), [], 0, num_units + 1
        if texts or not num_units:
            self.watch.check_all()
            yield start, tuple(texts)

    def texts(self, state: dict) -> Iterator[str]:
        """The text of each row from `state` to the end of the pass; rows without text give an empty one.

        Raises:
            UserError: the state does not fit this data set, a row cannot be read, or its column is not text.
        """
        source = self.source
        where = f"data.sources.{self.name}: {source.path}"
        if state.keys() != self.initial_state.keys():
            raise UserError(f"{where}: the position was saved with another version of `datasets`; install that one")
        self.rows.load_state_dict(state)
        rows = iter(self.rows)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the network and damaged files: dozens of classes
                self.watch.check_all()
                raise UserError(
                    f"{where}: reading failed ({type(error).__name__}: {first_line(error)}); check the files or the "
                    "network, then start again to resume at the last checkpoint"
                ) from error
            try:
                yield self.columns.document(row)
            except ValueError as error:
                raise UserError(f"{source.path}: {error}") from error

    def fingerprint(self) -> str:
        """sha256 of repository, subset, split, revision and column; of a local folder, also of its files."""
        source = self.source
        keys = (source.path, source.subset, source.split, source.revision, self.columns.identity)
        return combine([*(str(key) for key in keys), *(record.sha256 for record in records_of(self.files))])
