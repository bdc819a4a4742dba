"""Conversations to tokens: rendered by a chat template in transformers' sandbox, with the tokens that the loss counts.

The ids are those of transformers' `apply_chat_template`. Where a template marks what the model generates
({% generation %}), the counted tokens are those of `return_assistant_tokens_mask`. Otherwise an assistant's message is
what the template adds to the messages before it: the text of `messages[:i + 1]` after that of `messages[:i]` with a
generation prompt.
"""

# S sequence length in tokens
import hashlib
import json
import re
import resource
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Encoding

from minitron_train.config import ChatLoss, TooLong
from minitron_train.data.conversations import Conversation
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import byte_size
from minitron_train.runtime.preflight import deadline

GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
DATE_FORMAT = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1""")
DATE = datetime(2024, 7, 26)  # for templates that write today's date, which would change the stream every day
RENDER_S = 60.0  # of one conversation; 10 MB take less than a second
RENDER_BYTES = 2**30  # likewise, beyond what the process has
COUNTED, SILENT, PADDING = 1, 0, -1  # of a token as a label: counts, does not count, is padding

Span = tuple[int, int]  # characters of a rendered conversation


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatFormat:
    """How a source's conversations become tokens. It can be sent to other processes."""

    template: str
    tool_template: str  # for conversations with tools
    special_tokens: dict[str, Any]  # the template's variables, such as bos_token
    loss: ChatLoss
    too_long: TooLong
    seq_length: int

    def sha256(self) -> str:
        """sha256 of everything that decides the tokens and what counts."""
        values = [self.template, self.tool_template, sorted(self.special_tokens.items()), self.loss, self.too_long]
        return hashlib.sha256(json.dumps([*values, self.seq_length]).encode()).hexdigest()

    def render(
        self, chat: Conversation, num_messages: int | None = None, prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text of the first messages, and the parts that a template with {% generation %} marks.

        Args:
            num_messages: default: all.
            prompt: add the generation prompt.

        Raises:
            ValueError: the template rejects the conversation; the caller adds the file and the row.
        """
        from transformers.utils.chat_template_utils import render_jinja_template  # loads jinja2

        template = self.tool_template if chat.tools else self.template
        values: dict[str, Any] = {"add_generation_prompt": prompt, "tools": chat.tools} | self.special_tokens
        marks = not prompt and GENERATION.search(template) is not None
        try:
            with limits():
                rendered: Any = render_jinja_template(  # its annotation says text alone
                    [chat.messages[:num_messages]],
                    chat_template=with_fixed_date(template),
                    return_assistant_tokens_mask=marks,
                    **values,
                )
        except MemoryError as error:
            raise ValueError(
                f"the chat template needs more than {byte_size(RENDER_BYTES)} of memory; correct it"
            ) from error
        except Exception as error:  # templates are programs: they raise any class
            raise ValueError(
                f"the chat template rejects it ({first_line(error)}); correct the row or the template"
            ) from error
        texts, spans = rendered
        return texts[0], spans[0] if marks else []

    def spans(self, chat: Conversation, text: str, marked: list[Span], num_read: int) -> list[Span]:
        """The characters that the loss counts.

        Args:
            text: the rendered conversation.
            marked: what the template marks in it; empty if it marks nothing.
            num_read: characters that are read. Turns beyond them are not searched: each costs two more renderings.

        Raises:
            ValueError: the template does not tell what belongs to which message.
        """
        if self.loss is ChatLoss.all and not chat.num_prompt:
            return [(0, len(text))]
        answers = [i for i, turn in enumerate(chat.messages) if turn["role"] == "assistant" and i >= chat.num_prompt]
        if self.loss is ChatLoss.last_turn:
            answers = answers[-1:]
        if self.loss is ChatLoss.all:
            return [(self.prefix(chat, text, chat.num_prompt, prompt=True), len(text))]
        if not marked or not answers:
            begins = ((i, self.prefix(chat, text, i, prompt=True)) for i in answers)
            return [
                (begin, self.prefix(chat, text, i + 1)) for i, begin in takewhile(lambda b: b[1] < num_read, begins)
            ]
        if self.loss is ChatLoss.assistant and not chat.num_prompt:
            return marked
        start = self.prefix(chat, text, answers[0], prompt=True)
        return [(max(begin, start), end) for begin, end in marked if end > start]

    def prefix(self, chat: Conversation, text: str, num_messages: int, prompt: bool = False) -> int:
        """Characters of the rendered first messages; a ValueError if the whole text does not begin with them."""
        if num_messages in (0, len(chat.messages)):
            return len(text) if num_messages else 0
        try:
            part = self.render(chat, num_messages, prompt)[0]
        except ValueError:  # some templates accept whole conversations alone
            part = None
        if part is None or not text.startswith(part):
            remedies = [f"loss={loss}" for loss in (ChatLoss.last_turn, ChatLoss.all) if loss is not self.loss]
            raise ValueError(
                f"loss={self.loss}: the chat template renders the first {num_messages} messages differently in the whole "
                f"conversation; set {' or '.join(remedies)}, or a template with {{% generation %}}"
            )
        return len(part)

    def counted(self, encoding: Encoding, spans: list[Span]) -> np.ndarray:
        """Which tokens count as labels, int8 [T]: those that share a character with a span. The first never does, because
        nothing of the conversation predicts it.
        """
        found = np.full(len(encoding.ids), SILENT, np.int8)
        offsets = np.asarray(encoding.offsets, np.int64).reshape(-1, 2)
        for start, end in spans:
            found[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = COUNTED
        found[:1] = SILENT
        return found


@contextmanager
def limits() -> Iterator[None]:
    """Stop a template that loops for ever or makes an endless text, which the sandbox allows.

    Signals reach a process's main thread alone, and the limit of memory would hold for all threads. The workers have no other
    thread, and in the training process the first batch is made in the main one.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    allowed = RENDER_BYTES + resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
    if soft == resource.RLIM_INFINITY or allowed < soft:
        resource.setrlimit(resource.RLIMIT_AS, (allowed, hard))
    try:
        with deadline(RENDER_S, lambda: "it has not ended"):
            yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def with_fixed_date(template: str) -> str:
    """A template whose calls of strftime_now give the same date every day."""
    formats = {found[1] for found in DATE_FORMAT.findall(template)}
    if not formats:
        return template
    dates = json.dumps({name: DATE.strftime(name) for name in sorted(formats)})
    return f"{{% macro strftime_now(format) %}}{{{{ {dates}[format] }}}}{{% endmacro %}}\n{template}"  # \n: trim_blocks


def read_template(path: Path, where: str) -> str:
    """The text of a template file."""
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise UserError(f"{where}={path}: cannot be read ({reason}); give a file with a Jinja template") from error


@dataclass(frozen=True, slots=True)
class Packed:
    """Conversations in rows of S tokens, filled up with the end token."""

    tokens: np.ndarray  # [T] int32: S tokens of each row, and one more
    ends: np.ndarray  # [documents] int64, rising: ends of conversations and of paddings
    counts: np.ndarray  # [T] int8: COUNTED, SILENT or PADDING


def pack(pieces: Sequence[np.ndarray], counts: Sequence[np.ndarray], seq_length: int, end: int) -> Packed:
    """Pack conversations of at most S tokens into rows, so that no row cuts one: the longest first, each into the first row
    with room for it. The stream's windows of S + 1 tokens, which begin every S tokens, are then the rows.
    """
    rows: list[list[int]] = []
    room = np.zeros(len(pieces), np.int64)
    for i in sorted(range(len(pieces)), key=lambda i: -len(pieces[i])):
        fitting = np.flatnonzero(room[: len(rows)] >= len(pieces[i]))
        if not len(fitting):
            room[len(rows)] = seq_length
            rows.append([])
        row = int(fitting[0]) if len(fitting) else len(rows) - 1
        rows[row].append(i)
        room[row] -= len(pieces[i])
    tokens, marks, lengths = [np.empty(0, np.int32)], [np.empty(0, np.int8)], []
    for number, row in enumerate(rows):
        tokens += [pieces[i] for i in row]
        marks += [counts[i] for i in row]
        lengths += [len(pieces[i]) for i in row]
        if padding := int(room[number]) + (number == len(rows) - 1):  # the last window has a label after its row
            tokens.append(np.full(padding, end, np.int32))
            marks.append(np.full(padding, PADDING, np.int8))
            lengths.append(padding)
    return Packed(np.concatenate(tokens), np.cumsum(lengths, dtype=np.int64), np.concatenate(marks))
