"""Makes a tiny model with a tokenizer, and evaluation files in the layout of eval.data_dir."""

import json
import random
from pathlib import Path
from typing import Any

from minitron_train.data import tokenizers
from tests.support.models import save_tiny

WORDS = """
the a small big red old cat dog man woman bird house tree river stone runs jumps reads writes sings under over near with of
and then slowly quickly water bread music paper light dark morning evening garden winter summer
""".split()


def sentence(source: random.Random, low: int, high: int) -> str:
    return " ".join(source.choice(WORDS) for _ in range(source.randint(low, high)))


def save_model(name: str, folder: Path, **changes: Any) -> Path:
    """A random model of one family (tests.support.models) with a BPE tokenizer of its vocabulary."""
    source = random.Random(0)
    text = [sentence(source, 5, 20) for _ in range(400)]
    sizes = {"vocab_size": 288, "max_position_embeddings": 1024, "initializer_range": 0.2}
    save_tiny(name, folder, **sizes, bos_token_id=0, eos_token_id=1, **changes)
    tokenizers.save(tokenizers.train_bpe(text, 288), folder / "tokenizer", 1024)
    for file in (folder / "tokenizer").iterdir():
        file.rename(folder / file.name)
    (folder / "tokenizer").rmdir()
    return folder


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def hellaswag_row(source: random.Random) -> dict[str, Any]:
    """The columns that lm-eval's task reads."""
    return {
        "activity_label": sentence(source, 1, 3),
        "ctx_a": sentence(source, 5, 20).capitalize() + ".",
        "ctx_b": sentence(source, 1, 6),
        "endings": [sentence(source, 3, 15) + "." for _ in range(4)],
        "label": str(source.randrange(4)),
    }


def mmlu_row(source: random.Random) -> dict[str, Any]:
    """The columns that lm-eval's task reads."""
    return {
        "question": sentence(source, 8, 25) + "?",
        "choices": [sentence(source, 1, 5) for _ in range(4)],
        "answer": source.randrange(4),
    }


def winogrande_row(source: random.Random) -> dict[str, Any]:
    """The columns that lm-eval's task reads."""
    text = f"{sentence(source, 4, 9)} _ {sentence(source, 3, 8)}."
    return {"sentence": text, "option1": "the cat", "option2": "a dog", "answer": "1"}


def save_data(folder: Path) -> Path:
    """HellaSwag, one MMLU subject with its examples, WinoGrande, GSM8K, WikiText, XLSum, HumanEval: a few rows each."""
    source = random.Random(1)
    write_jsonl(folder / "hellaswag/validation.jsonl", [hellaswag_row(source) for _ in range(12)])
    write_jsonl(folder / "mmlu/anatomy/dev.jsonl", [mmlu_row(source) for _ in range(5)])
    write_jsonl(folder / "mmlu/anatomy/test.jsonl", [mmlu_row(source) for _ in range(8)])
    write_jsonl(folder / "winogrande/validation.jsonl", [winogrande_row(source) for _ in range(6)])
    gsm8k = [{"question": sentence(source, 5, 12), "answer": f"{sentence(source, 3, 6)} #### {k}"} for k in range(7)]
    write_jsonl(folder / "gsm8k/test.jsonl", gsm8k)
    write_jsonl(folder / "wikitext/test.jsonl", [{"page": sentence(source, *size)} for size in ((700, 900), (20, 40))])
    xlsum = [{"text": sentence(source, 20, 40), "summary": sentence(source, 4, 8)} for _ in range(3)]
    write_jsonl(folder / "xlsum/test.jsonl", xlsum)
    humaneval = {"prompt": "def one():\n", "test": "def check(f):\n    assert f() == 1\n", "entry_point": "one"}
    write_jsonl(folder / "humaneval/test.jsonl", [humaneval, humaneval])
    return folder
