"""Whether lm-eval knows a task, found by scanning its task files, which is much faster than importing lm-eval."""

import difflib
import functools
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from minitron_train.config import EvalConfig
from minitron_train.runtime.errors import UserError

OWN = Path(__file__).parent / "tasks"
FOLDERS = ("hellaswag", "mmlu/default", "arc", "winogrande", "gsm8k", "truthfulqa", "wikitext", "piqa", "openbookqa")
NAMES = re.compile(
    r"^[\"']?(?:task|group|tag)[\"']? *:(.*(?:\n[ \t]*- .*)*)", re.MULTILINE
)  # `tag: a`, `tag: [a, b]` or a list below


def shipped() -> Path:
    """Return lm-eval's folder of task files without importing the package."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "lm_eval is a dependency"
    return Path(spec.origin).parent / "tasks"


def run_programs(names: Iterable[str]) -> list[str]:
    """Return the tasks that run model-generated programs in `evaluation.code`."""
    return [
        name for name in names if (file := OWN / f"{name}.yaml").exists() and "unsafe_code: true" in file.read_text()
    ]


def names_in(folders: Iterable[Path]) -> Iterator[str]:
    """Yield the names of tasks, groups and tags in the task files below `folders`, and in the files that these include."""
    for folder in folders:
        for file in folder.rglob("*yaml"):
            for found in NAMES.findall(file.read_text(encoding="utf-8", errors="ignore")):
                yield from re.findall(r"[^\s\[\],'\"]+", re.sub(r"\s#.*|^\s*- ", " ", found, flags=re.MULTILINE))


@functools.cache
def mmlu_subjects() -> set[str]:
    """Return the 57 subjects of lm-eval's mmlu, mmlu_abstract_algebra to mmlu_world_religions. mmlu_pro is not included."""
    return {file.stem for file in (shipped() / "mmlu" / "default").glob("mmlu_*.yaml")}


def named_by(evaluation: EvalConfig) -> dict[str, list[str]]:
    """Return setting -> task names, for each setting that names tasks."""
    return {"eval.tasks": evaluation.tasks, "eval.shots": [*evaluation.shots], "eval.limits": [*evaluation.limits]}


def check_keys(evaluation: EvalConfig) -> None:
    """Reject names in eval.tasks, eval.shots and eval.limits that lm-eval does not have.

    eval.shots and eval.limits may name tasks that are not in eval.tasks: presets set them for many tasks.
    """
    for key, names in named_by(evaluation).items():
        check_names(names, key)


def check_names(names: Iterable[str], key: str = "eval.tasks") -> None:
    """Reject tasks that lm-eval does not have. The scan takes a second or two.

    A few names exist only in lm-eval's own index. This check therefore accepts a name that any task file mentions, and
    lm-eval checks it later.

    Raises:
        UserError: suggests the closest names.
    """
    root = shipped()
    missing = set(names) - set(names_in([OWN, *(root / folder for folder in FOLDERS)]))
    known = set(names_in([root])) if missing else set()
    for name in sorted(missing - known):
        if not any(name.encode() in file.read_bytes() for file in root.rglob("*") if file.is_file()):
            raise unknown(name, known, key)


def unknown(name: str, known: Iterable[str], key: str) -> UserError:
    """Return the error for an unknown task; `key` is the setting that names it."""
    close = difflib.get_close_matches(name, sorted(known), n=3) or ["hellaswag", "mmlu"]
    return UserError(f"{key}: no task {name!r} in lm-eval; did you mean {', '.join(close)}?")
