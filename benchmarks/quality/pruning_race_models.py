"""The models that benchmarks/quality/pruning_race.py prunes: their folder, target, chat format and settings."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def smollm2_folder() -> Path:
    """SmolLM2 in this user's cache, fetched once."""
    from pruning_quality import teacher_folder

    return teacher_folder()


def gemma_folder() -> Path:
    """Gemma 3 270M in this user's cache, fetched once."""
    import gemma_teacher

    return gemma_teacher.gemma_folder()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A teacher of the race.

    Attributes:
        folder: makes its Hugging Face folder, or finds it.
        target: sizes of the student.
        turn: a question and its answer, as the model's conversations have them.
        settings: further keys of the command line.
        rows: file in docs/data of the finished runs.
    """

    folder: Callable[[], Path]
    target: Mapping[str, int]
    turn: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    rows: str


MODELS = {
    "smollm2": Model(
        folder=smollm2_folder,
        target={"hidden_size": 504, "ffn_hidden_size": 1_024, "num_attention_heads": 6},
        turn="<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>\n",
        rows="pruning_race.jsonl",
    ),
    "gemma3": Model(  # the shares of channels, neurons and heads that SmolLM2 keeps, as near as its heads allow
        folder=gemma_folder,
        target={"hidden_size": 560, "ffn_hidden_size": 1_376, "num_attention_heads": 3},
        turn="<start_of_turn>user\n{question}<end_of_turn>\n<start_of_turn>model\n{answer}<end_of_turn>\n",
        settings={"data.document_end": "<eos>", "data.sequence_start": "<bos>"},
        rows="pruning_race_gemma3.jsonl",
    ),
}
