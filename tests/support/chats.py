"""Conversations, and chat templates in our own words with the structure of well-known ones."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from minitron_train.data import tokenizers

CHATML = """\
{%- for turn in messages %}
{{- '<|im_start|>' + turn.role + '\n' + (turn.content or '') }}
{%- for call in turn.tool_calls or [] %}
{{- '\n<call>' + (call.function | tojson) + '</call>' }}
{%- endfor %}
{{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

HEADERS = """\
{{- bos_token }}
{%- set first = messages[0].content | trim if messages[0].role == 'system' else 'Be brief.' %}
{{- '<|head|>system<|/head|>\n\nIt is ' + strftime_now('%d %b %Y') + '. ' + first + '<|eot|>' }}
{%- if tools %}{{ '<|head|>tools<|/head|>' + (tools | tojson) + '<|eot|>' }}{% endif %}
{%- for turn in messages if turn.role != 'system' %}
{{- '<|head|>' + turn.role + '<|/head|>\n\n' + (turn.content or (turn.tool_calls | tojson)) | trim + '<|eot|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|/head|>\n\n' }}{% endif %}"""

BRACKETS = """\
{{- bos_token }}
{%- set about = namespace(text='') %}
{%- for turn in messages %}
{%- if turn.role == 'system' %}{% set about.text = turn.content + '\n\n' %}
{%- elif turn.role in ('user', 'tool') %}{{ '[INST] ' + about.text + turn.content + ' [/INST]' }}{% set about.text = '' %}
{%- elif turn.role == 'assistant' %}{{ ' ' + (turn.content or 'calls a tool') + eos_token }}
{%- else %}{{ raise_exception('Only user and assistant roles are supported') }}
{%- endif %}
{%- endfor %}"""

MARKED = """\
{%- for turn in messages %}
{{- '<|im_start|>' + turn.role + '\n' }}
{%- if turn.role == 'assistant' %}{% generation %}{{ (turn.content or 'a call') + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ turn.content + '<|im_end|>' }}{% endif %}
{{- '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

FORGETFUL = """\
{%- set last = namespace(user=-1) %}
{%- for turn in messages if turn.role == 'user' %}{% set last.user = loop.index0 %}{% endfor %}
{%- set asked = namespace(count=-1) %}
{%- for turn in messages %}
{%- if turn.role == 'user' %}{% set asked.count = asked.count + 1 %}{% endif %}
{{- '<|im_start|>' + turn.role + '\n' }}
{%- set text = turn.content or '' %}
{%- if '</think>' in text and asked.count < last.user %}{% set text = text.split('</think>')[-1] %}{% endif %}
{{- text + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TEMPLATES = {
    "chatml": CHATML,
    "headers": HEADERS,
    "brackets": BRACKETS,
    "marked": MARKED,
    "forgetful": FORGETFUL,
}
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|head|>", "<|/head|>", "<|eot|>", "[INST]", "[/INST]"]


def turn(role: str, content: str | None, **others: Any) -> dict[str, Any]:
    """One message."""
    return {"role": role, "content": content, **others}


CALL = turn(
    "assistant", None, tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"b": 1, "a": 2}}}]
)
CHATS = [
    [turn("user", "What is seven times six?"), turn("assistant", "Forty-two.")],
    [
        turn("system", "You speak naïvely 🙂."),
        turn("user", "наука?"),
        turn("assistant", "\nφύσις 🙃"),
        turn("user", "Why?"),
    ],
    [
        *[turn("user", "Add 1 and 2."), CALL, turn("tool", "3", name="add"), turn("assistant", "It is 3.")],
        *[turn("user", "  And now?  "), turn("assistant", "Still 3.")],
    ],
]


def chat_tokenizer(
    folder: Path, template: str | None, texts: list[str], vocab_size: int = 400
) -> PreTrainedTokenizerBase:
    """A tokenizer with special tokens of conversations and this template, saved in a folder and opened again."""
    tokenizers.save(tokenizers.train_bpe(texts, vocab_size), folder)
    tokenizer = tokenizers.load(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIAL})  # type: ignore[arg-type]
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return tokenizers.load(folder)


def many_chats(count: int, words: int = 20) -> list[list[dict[str, Any]]]:
    """Conversations of many lengths; each names its number."""
    return [
        [
            message
            for k in range(1 + i % 3)
            for message in (
                turn("user", f"{i}.{k}: how many?" + " plain words" * (i % 7)),
                turn("assistant", f"{i * k} things." + " data" * (i * 5 % words)),
            )
        ]
        for i in range(count)
    ]
