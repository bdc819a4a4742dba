"""Rows with a conversation in one of the usual forms, each as canonical JSON.

A row has `messages` (role and content), or ShareGPT's `conversations` (from and value), or `prompt` and `completion` (texts
or lists of messages). The first of these forms that is not null counts. `tools` goes to the template; `system` is
ShareGPT's.
The canonical JSON is the document: it is held out, shuffled and fingerprinted like a text.
"""

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

PAIR = ("prompt", "completion")
COLUMNS = ("messages", "conversations", *PAIR, "tools", "system")
ROLES = {  # ShareGPT's names, and the templates' own
    "human": "user",
    "gpt": "assistant",
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
}
KEYS = (("role", "from"), ("content", "value"))  # the templates' name, and ShareGPT's
MAY_BE_EMPTY = ("system", "developer", "tool")  # roles whose content may be empty
INSTEAD_OF_CONTENT = ("tool_calls", "reasoning_content", "thinking")  # an assistant's message may have only these
OUT = "take the row out"


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation as the template gets it."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None
    num_prompt: int  # leading messages that are a prompt: the loss never counts them

    @classmethod
    def of(cls, document: str) -> "Conversation":
        """Read the canonical JSON."""
        return cls(**json.loads(document))


def is_chat(names: Collection[str]) -> bool:
    """Whether a row with these columns has a conversation."""
    return "messages" in names or "conversations" in names or set(PAIR) <= set(names)


def conversation(row: Mapping[str, Any]) -> str:
    """The canonical JSON of a row's conversation; empty where the row has null.

    Raises:
        ValueError: the row is malformed; the caller adds the file and the row to the message.
    """
    num_prompt = 0
    name = next((name for name in ("messages", "conversations") if row.get(name) is not None), None)
    if name:
        found = messages(row[name], name)
        if name == "conversations" and isinstance(system := row.get("system"), str) and system.strip():
            found.insert(0, {"role": "system", "content": system})
    elif row.get("prompt") is None and row.get("completion") is None:
        return ""
    else:
        prompt = part(row.get("prompt"), "prompt", "user")
        completion = part(row.get("completion"), "completion", "assistant")
        found, num_prompt = prompt + completion, len(prompt)
    canonical = {"messages": found, "tools": tools(row.get("tools")), "num_prompt": num_prompt}
    return without_surrogates(json.dumps(canonical, ensure_ascii=False))


def part(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    """A prompt or a completion: a text is one message of this role."""
    return messages([{"role": role, "content": value}] if isinstance(value, str) else value, name)


def messages(value: Any, name: str) -> list[dict[str, Any]]:
    """The messages of a list, with the templates' roles and keys and without null values, as transformers leaves them out."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is not a list of messages: {shown(value)}; {OUT}, or correct it")
    if not value:
        raise ValueError(f"{name} has no messages; {OUT}")
    return [message(turn, f"{name}[{number}]") for number, turn in enumerate(value)]


def message(turn: Any, where: str) -> dict[str, Any]:
    """One message with a known role and some content."""
    if not isinstance(turn, dict):
        raise ValueError(f"{where} is not an object: {shown(turn)}; give each message a role and content")
    kept = {key: value for key, value in turn.items() if value is not None and key not in ("from", "value")}
    role, content = (turn[a] if turn.get(a) is not None else turn.get(b) for a, b in KEYS)
    if not isinstance(role, str) or role not in ROLES:
        raise ValueError(
            f"{where} has the role {shown(repr(role))}; it must be one of {', '.join(ROLES)}; {OUT}, or rename the role"
        )
    says_otherwise = role in ("assistant", "gpt") and any(turn.get(key) for key in INSTEAD_OF_CONTENT)
    check_content(content, where, may_be_empty=says_otherwise or role in MAY_BE_EMPTY, may_be_null=says_otherwise)
    kept["role"] = ROLES[role]
    return kept if content is None else kept | {"content": content}


def check_content(content: Any, where: str, *, may_be_empty: bool, may_be_null: bool) -> None:
    """Refuse content that is null, empty, or something else than text and a list of texts."""
    if content is None:
        if not may_be_null:
            raise ValueError(f"{where} has no content (null); {OUT}")
        return
    if isinstance(content, list):
        kinds = [item.get("type") if isinstance(item, dict) else item for item in content]
        if others := [kind for kind in kinds if kind != "text"]:
            raise ValueError(f"{where} has content of type {shown(repr(others[0]))}; only text is read: {OUT}")
        content = "".join(str(item.get("text") or "") for item in content)
    if not isinstance(content, str):
        raise ValueError(f"{where} has content that is not text: {shown(content)}; {OUT}")
    if not content.strip() and not may_be_empty:
        raise ValueError(f"{where} is empty; {OUT}")


def tools(value: Any) -> list[Any] | None:
    """The tools of a row, which some data sets hold as JSON text; None if it has none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"tools is not JSON: {shown(value)}; {OUT}, or correct it") from error
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError(f"tools is not a list of objects: {shown(value)}; {OUT}, or correct it")
    return value


def shown(value: Any) -> str:
    """A value for a message: one line of at most 60 characters."""
    return " ".join(str(value)[:60].split())


def without_surrogates(text: str) -> str:
    r"""A text that UTF-8 can encode. JSON allows half a surrogate pair, such as "\ud83d"; it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return text
