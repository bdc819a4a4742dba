"""Whether lm-eval knows a task, read off its task files: importing lm-eval and indexing them takes many times as long."""

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
    """lm-eval's folder of task files; the package is not imported."""
    spec = find_spec("lm_eval")
    assert spec is not None and spec.origin is not None, "lm_eval is a dependency"
    return Path(spec.origin).parent / "tasks"


def run_programs(names: Iterable[str]) -> list[str]:
    """Those of the tasks that run what the model writes, in `evaluation.code`."""
    return [
        name for name in names if (file := OWN / f"{name}.yaml").exists() and "unsafe_code: true" in file.read_text()
    ]


def names_in(folders: Iterable[Path]) -> Iterator[str]:
    """Names of tasks, groups and tags in the task files below some folders, and in the files that those include."""
    for folder in folders:
        for file in folder.rglob("*yaml"):
            for found in NAMES.findall(file.read_text(encoding="utf-8", errors="ignore")):
                yield from re.findall(r"[^\s\[\],'\"]+", re.sub(r"\s#.*|^\s*- ", " ", found, flags=re.MULTILINE))


@functools.cache
def mmlu_subjects() -> set[str]:
    """mmlu_abstract_algebra … mmlu_world_religions: the 57 parts of lm-eval's mmlu; mmlu_pro is none of them."""
    return {file.stem for file in (shipped() / "mmlu" / "default").glob("mmlu_*.yaml")}


def named_by(evaluation: EvalConfig) -> dict[str, list[str]]:
    """Every setting that names tasks, with the names."""
    return {"eval.tasks": evaluation.tasks, "eval.shots": [*evaluation.shots], "eval.limits": [*evaluation.limits]}


def check_keys(evaluation: EvalConfig) -> None:
    """Refuse tasks, and tasks in shots and limits, that lm-eval does not have.

    Shots and limits of tasks that are not chosen are fine: presets have some, and the tasks are often fewer.
    """
    for key, names in named_by(evaluation).items():
        check_names(names, key)


def check_names(names: Iterable[str], key: str = "eval.tasks") -> None:
    """Refuse tasks that lm-eval does not have, in a second or two.

    A few names are made in ways that only lm-eval's own index sees; what some task file mentions is left to it.

    Raises:
        UserError: says the closest names.
    """
    root = shipped()
    missing = set(names) - set(names_in([OWN, *(root / folder for folder in FOLDERS)]))
    known = set(names_in([root])) if missing else set()
    for name in sorted(missing - known):
        if not any(name.encode() in file.read_bytes() for file in root.rglob("*") if file.is_file()):
            raise unknown(name, known, key)


def unknown(name: str, known: Iterable[str], key: str) -> UserError:
    """The error for a task that there is not; `key` is the setting that names it."""
    close = difflib.get_close_matches(name, sorted(known), n=3) or ["hellaswag", "mmlu"]
    return UserError(f"{key}: no task {name!r} in lm-eval; did you mean {', '.join(close)}?")
