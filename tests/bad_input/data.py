"""Mistakes in text, tokens and evaluation data."""

import gzip
import json

import torch

from tests.bad_input.scene import MICRO, PRUNED, TAUGHT, Case, cut_off, tensors, write

SCORE = f"score {MICRO}"
ROWS = "".join(json.dumps({"text": f"row {k} of a small corpus"}) + "\n" for k in range(50))
CHAT = ("+data.sources={a: {path: a.jsonl, kind: chat}}",)
TEMPLATE_CHAT = ("+data.sources={a: {path: a.jsonl, kind: chat, template: t.jinja}}",)
CHATS = 30 * (
    json.dumps({"messages": [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]}) + "\n"
)
TEMPLATE = "{% for turn in messages %}{{ turn.role + ': ' + turn.content }}\n{% endfor %}"
DATA = [
    Case("corpus of no bytes", f"{SCORE} data.path=a.txt", "a.txt", (*TAUGHT, write("a.txt", ""))),
    Case("corpus of blanks", f"{SCORE} data.path=a.txt", "", (*TAUGHT, write("a.txt", "\n \n\n"))),
    Case("corpus that is not there", f"{SCORE} data.path=nowhere", "nowhere: no text file matches", TAUGHT),
    Case(
        "corpus folder without files",
        f"{SCORE} data.path=a",
        "a: no text file matches",
        (*TAUGHT, write("a/b/c.bin2", "")),
    ),
    Case(
        "corpus without its column",
        f"{SCORE} data.path=a.jsonl",
        "no column text: it has body",
        (*TAUGHT, write("a.jsonl", '{"body": "x"}\n')),
    ),
    Case(
        "column that is no text",
        f"{SCORE} data.path=a.jsonl",
        "column text is not text",
        (*TAUGHT, write("a.jsonl", '{"text": 7}\n')),
    ),
    Case(
        "line that is no JSON",
        f"{SCORE} data.path=a.jsonl",
        "not a JSON object",
        (*TAUGHT, write("a.jsonl", ROWS + '{"text": "cut o\n')),
    ),
    Case(
        "conversations without a kind",
        f"{SCORE} data.path=a.jsonl",
        "but conversations .messages.; set kind=chat",
        (*TAUGHT, write("a.jsonl", CHATS)),
    ),
    Case(
        "conversations without a template",
        SCORE,
        "a.jsonl: the tokenizer .* has no chat template for conversations; set data.sources.NAME.template",
        (*TAUGHT, write("a.jsonl", CHATS)),
        words=CHAT,
    ),
    Case(
        "chat template that is not there",
        SCORE,
        "data.sources.a.template=t.jinja: cannot be read",
        (*TAUGHT, write("a.jsonl", CHATS)),
        words=TEMPLATE_CHAT,
    ),
    Case(
        "chat template that raises",
        SCORE,
        "a.jsonl, line .*the chat template rejects it .no thanks",
        (*TAUGHT, write("a.jsonl", CHATS), write("t.jinja", "{{ raise_exception('no thanks') }}")),
        words=TEMPLATE_CHAT,
    ),
    Case(
        "chat template that cannot be parsed",
        SCORE,
        "a.jsonl, line .*the chat template rejects it",
        (*TAUGHT, write("a.jsonl", CHATS), write("t.jinja", "{% for x in %}")),
        words=TEMPLATE_CHAT,
    ),
    *(
        Case(
            f"conversation with {name}",
            SCORE,
            f"a.jsonl, line 31: {says}",
            (*TAUGHT, write("a.jsonl", CHATS + json.dumps(row) + "\n"), write("t.jinja", TEMPLATE)),
            words=TEMPLATE_CHAT,
        )
        for name, row, says in (
            (
                "an unknown role",
                {"messages": [{"role": "narrator", "content": "x"}]},
                "messages.0. has the role 'narrator'",
            ),
            ("an empty turn", {"messages": [{"role": "user", "content": ""}]}, "messages.0. is empty"),
            ("null content", {"messages": [{"role": "user", "content": None}]}, "messages.0. has no content"),
            ("no list", {"messages": "hello"}, "messages is not a list of messages: hello"),
            ("no turns", {"messages": []}, "messages has no messages"),
        )
    ),
    Case(
        "text that is not UTF-8",
        f"{SCORE} data.path=a.txt",
        "not UTF-8",
        (*TAUGHT, write("a.txt", "Größe ".encode("latin-1") * 2000)),
    ),
    Case(
        "gzip cut off",
        f"{SCORE} data.path=a.jsonl.gz",
        "a.jsonl.gz",
        (*TAUGHT, write("a.jsonl.gz", gzip.compress(ROWS.encode() * 50)), cut_off("a.jsonl.gz")),
    ),
    Case("gzip that is none", f"{SCORE} data.path=a.jsonl.gz", "a.jsonl.gz", (*TAUGHT, write("a.jsonl.gz", ROWS))),
    Case(
        "Parquet that is none",
        f"{SCORE} data.path=a.parquet",
        "not a Parquet file",
        (*TAUGHT, write("a.parquet", ROWS)),
    ),
    Case(
        "index without its tokens",
        f"{SCORE} data.path=a.idx",
        "missing next to its .idx",
        (*TAUGHT, write("a.idx", b"MMIDIDX\0\0")),
    ),
    Case(
        "index cut off",
        f"{SCORE} data.path=a.idx",
        "a.idx",
        (*TAUGHT, write("a.idx", b"MMIDIDX\0\0"), write("a.bin", b"\0" * 64)),
    ),
    Case("calibration text that is not there", f"{SCORE} calibration.path=nowhere", "nowhere", TAUGHT),
    Case(
        "calibration file that is not there",
        f"{SCORE} calibration.tokens_path=nowhere",
        "calibration.tokens_path=nowhere",
        TAUGHT,
    ),
    Case(
        "calibration file that is none",
        f"{SCORE} calibration.tokens_path=a",
        "calibration.tokens_path=a: not a readable",
        (*TAUGHT, write("a", "x")),
    ),
    Case(
        "calibration tokens of another type",
        f"{SCORE} calibration.tokens_path=a",
        "must be int64",
        (*TAUGHT, tensors("a", tokens=torch.zeros(1, 2, 8))),
    ),
    Case(
        "calibration tokens of another form",
        f"{SCORE} calibration.tokens_path=a",
        "int64 128; must be",
        (*TAUGHT, tensors("a", tokens=torch.zeros(128, dtype=torch.int64))),
    ),
    Case(
        "calibration tokens under another name",
        f"{SCORE} calibration.tokens_path=a",
        "not `tokens`",
        (*TAUGHT, tensors("a", ids=torch.zeros(1))),
    ),
    Case(
        "calibration tokens beyond the vocabulary",
        f"{SCORE} calibration.tokens_path=a",
        "token 5000 is outside the vocabulary of 1024",
        (*TAUGHT, tensors("a", tokens=torch.full((1, 2, 8), 5000))),
    ),
    Case("validation text that is not there", f"distill {MICRO} data.validation_path=nowhere", "nowhere", PRUNED),
    Case(
        "samples that do not divide",
        f"{SCORE} calibration.num_samples=17",
        "must be a multiple of calibration.micro_batch_size",
        TAUGHT,
    ),
    Case(
        "task that lm-eval does not know",
        f"eval {MICRO} eval.model=teacher eval.tasks=[helaswag]",
        "no task 'helaswag'.*hellaswag",
        TAUGHT,
    ),
    Case(
        "task data without a column",
        f"eval {MICRO} eval.model=teacher eval.tasks=[hellaswag] eval.data_dir=d",
        "hellaswag",
        (*TAUGHT, write("d/hellaswag/validation.jsonl", '{"x": 1}\n')),
    ),
    Case(
        "task data that is no JSON",
        f"eval {MICRO} eval.model=teacher eval.tasks=[hellaswag] eval.data_dir=d",
        "line 1 is not a JSON object",
        (*TAUGHT, write("d/hellaswag/validation.jsonl", "x\n")),
    ),
    Case(
        "folder of task data that is not there",
        f"eval {MICRO} eval.model=teacher eval.tasks=[hellaswag] eval.data_dir=nowhere",
        "eval.data_dir=nowhere",
        TAUGHT,
    ),
]
