"""Mask credentials in everything that is printed or recorded.

Credentials arrive in URLs (HF_ENDPOINT, a proxy, PIP_INDEX_URL, a presigned address that a hub redirects to) and in the
environment, and other libraries put them into messages. Two places mask them: standard output and error (see __main__),
and every record that a stage writes (see stages.plain).
"""

import errno
import io
import os
import re
import signal
from typing import Any, NoReturn

MASK = "***"
SECRETS = (
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HUGGINGFACE_HUB_TOKEN",
    "WANDB_API_KEY",
    "MLFLOW_TRACKING_TOKEN",
    "MLFLOW_TRACKING_PASSWORD",
    "DATABRICKS_TOKEN",
    "GITHUB_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "AWS_SESSION_TOKEN",
)
LEAST_CHARACTERS = 8  # a shorter value of a SECRETS variable is not masked: it may be part of any word
HINTS = ("@", "=", "hf_", "uthorization", "%3", "%4")  # a text without any of these matches none of PATTERNS
KEYS = (
    r"[\w-]*(?:token|secret|passw(?:or)?d|passwd|api[_-]?key|signature|credential)[\w-]*|key|sig|auth|policy|"
    r"x-(?:amz|goog)-[\w-]+|awsaccesskeyid|key-pair-id"
)
PATTERNS = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (
            r"(\b[a-z][a-z0-9+.-]*:(?:\\?/){1,2})[^\s/?#'\"<>]*@",
            rf"\1{MASK}@",
        ),  # https://me:word@host, also http:/ as a Path has it, and https:\/\/ as JSON may have it
        (r"(\b[a-z][a-z0-9+.-]*%3a%2f%2f)[^\s/?#&'\"<>]*?%40", rf"\1{MASK}%40"),  # the same in another address's query
        (r"(\b[a-z][a-z0-9+.-]*://?)[^\s/@'\"<>]+:[^\s@'\"<>]*@", rf"\1{MASK}@"),  # with / # ? in the word
        (
            r"(?<![\w/.])[\w.%+-]+:[^\s/@:'\"=]+@(?=(?:[\w.-]+|\[[\da-f:.]+\]):\d)",
            f"{MASK}@",
        ),  # me:word@proxy:3128, a proxy without http://
        (rf"((?:[?&;#]|%3f|%26)(?:{KEYS})(?:=|%3d))[^&;\s'\"#<>]+", rf"\1{MASK}"),  # ?token=…&X-Amz-Signature=…
        (
            r"(authorization['\"]?\s*[:=,]\s*b?['\"]?(?:bearer|basic|token)) +[\w.~+/=-]+",
            rf"\1 {MASK}",
        ),  # a request's header, alone, in a dictionary or in a list of pairs
        (
            r"\b((?-i:[A-Z][A-Z0-9_]*(?:TOKEN|SECRET|PASSWORD|_KEY))=)[^\s'\"]+",
            rf"\1{MASK}",
        ),  # WANDB_API_KEY=…, as in a shell
        (r"\bhf_[a-z0-9]{16,}", f"hf_{MASK}"),
    )
)


def mask_credentials(text: str) -> str:
    """Replace passwords and tokens in URLs, access tokens, and the values of SECRETS by MASK."""
    for name in SECRETS:
        value = os.environ.get(name, "")
        if len(value) >= LEAST_CHARACTERS:
            text = text.replace(value, MASK)
    if any(hint in text for hint in HINTS):
        for pattern, replacement in PATTERNS:
            text = pattern.sub(replacement, text)
    return text


class Output(io.TextIOWrapper):
    """Standard output or error with credentials masked; characters that cannot be encoded are escaped.

    When the reader has closed the pipe (`| head`), the process exits silently, as with SIGPIPE. It raises SystemExit,
    because Hydra prints a line of its own for other exceptions. When the disk of a log file is full, one line on the
    other stream reports it.
    """

    def __init__(self, stream: Any, **settings: Any) -> None:
        super().__init__(stream.buffer, stream.encoding, "backslashreplace", write_through=True, **settings)

    def write(self, text: str, /) -> int:
        """Write the masked text. Returns the length of the original."""
        try:
            super().write(mask_credentials(text))
        except OSError as error:
            self.end(error)
        return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError as error:
            self.end(error)

    def close(self) -> None:
        """Flush only: the wrapped stream stays open for its owner, also when this object is deleted."""
        if not self.closed:
            self.flush()

    def end(self, error: OSError) -> NoReturn:
        """Redirect this stream to /dev/null, so that Python's flush at exit cannot fail again, and exit."""
        if error.errno not in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT):
            raise error
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        if error.errno == errno.EPIPE:
            raise SystemExit(128 + signal.SIGPIPE) from None
        raise SystemExit("error: the disk that takes the output is full; free space and start again") from None
