"""What of a row is its document: a column of text, or the columns of a conversation."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow

from minitron_train.data import rows
from minitron_train.data.conversations import COLUMNS, PAIR, conversation, is_chat, without_surrogates
from minitron_train.runtime.errors import UserError


class Columns(Protocol):
    """Picks the document out of a row."""

    @property
    def identity(self) -> str:
        """Distinguishes fingerprints and seekable copies of the same file."""
        ...

    def of(self, names: Sequence[str]) -> list[str]:
        """The columns to read of a table with these; a ValueError if it lacks them. The caller names the file."""
        ...

    def check(self, path: Path, schema: pyarrow.Schema) -> None:
        """Refuse a table without these columns, or with other types in them."""
        ...

    def line(self, row: dict[str, Any]) -> bytes:
        """A row of a table as JSON."""
        ...

    def document(self, row: dict[str, Any]) -> str:
        """The document of a row, empty if the row has none; a ValueError if it is malformed. The caller names the row."""
        ...


@dataclass(frozen=True, slots=True)
class TextColumn:
    """A column of text."""

    name: str

    @property
    def identity(self) -> str:
        return self.name

    def of(self, names: Sequence[str]) -> list[str]:
        if self.name not in names:
            raise ValueError(no_text(self.name, names))
        return [self.name]

    def check(self, path: Path, schema: pyarrow.Schema) -> None:
        """Refuse a table that lacks the column, has two of that name, or has another type in it."""
        rows.check_once(path, self.name, schema.names)
        if self.name not in schema.names:
            raise UserError(f"{path}: {no_text(self.name, schema.names)}")
        if not rows.is_text(kind := schema.types[schema.names.index(self.name)]):
            raise UserError(f"{path}: column {self.name} is not text but {kind}; choose another text_key")

    def line(self, row: dict[str, Any]) -> bytes:
        return json.dumps({self.name: row[self.name] or ""}).encode()

    def document(self, row: dict[str, Any]) -> str:
        text = row[self.of(list(row))[0]]
        if text is None:
            return ""
        if not isinstance(text, str):
            raise ValueError(f"column {self.name} is not text: {str(text)[:60]}; choose another text_key")
        return without_surrogates(text)


@dataclass(frozen=True, slots=True)
class ChatColumns:
    """The columns of a conversation (see `conversations`)."""

    @property
    def identity(self) -> str:
        return "kind=chat"

    def of(self, names: Sequence[str]) -> list[str]:
        if not is_chat(names):
            for half, other in PAIR, PAIR[::-1]:
                if half in names:
                    raise ValueError(f"{half} without {other}: it has {listed(names)}; add {other}")
            raise ValueError(f"no conversations: it has {listed(names)}; name the column `messages`")
        return [name for name in COLUMNS if name in names]

    def check(self, path: Path, schema: pyarrow.Schema) -> None:
        try:
            names = self.of(schema.names)
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        for name in names:
            rows.check_once(path, name, schema.names)

    def line(self, row: dict[str, Any]) -> bytes:
        return json.dumps({name: row[name] for name in self.of(list(row))}, default=str).encode()

    def document(self, row: dict[str, Any]) -> str:
        self.of(list(row))
        return conversation(row)


def no_text(name: str, names: Collection[str]) -> str:
    """The message about a wrong text_key; conversations need another kind of source."""
    if is_chat(names):
        return f"no column {name}, but conversations ({listed(names)}); set kind=chat (data.kind=chat for data.path)"
    return rows.no_column(name, listed(names))


def listed(names: Collection[str]) -> str:
    """The names of columns for a message, cut to a readable length."""
    return rows.shortened(", ".join(names)) or "none"
