"""lm-eval's own tasks, with their data from this disk where there is any. Importing this module imports lm-eval."""

import contextlib
import hashlib
import logging
import random
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import lm_eval.api.task
import lm_eval.tasks
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from minitron_train.config import EvalConfig
from minitron_train.evaluation.local_data import NO_HUB, check_columns, hub_reachable, local_files
from minitron_train.evaluation.task_names import FOLDERS, OWN, check_names, shipped, unknown
from minitron_train.files import sha256_file

BOOTSTRAP_ITERATIONS = 1000  # of standard errors that have no formula


@dataclass(slots=True)
class TaskSet:
    """Tasks ready to run, and those that cannot be."""

    tasks: Any = None  # as lm_eval.evaluator.evaluate takes it: lm_eval.tasks.manager.TaskDict
    rows: dict[str, list[int]] = field(default_factory=dict)  # leaf task -> rows to evaluate; all when absent
    leaves: dict[str, list[str]] = field(default_factory=dict)  # requested task -> its leaf tasks
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # requested task -> where its data come from
    not_run: dict[str, str] = field(default_factory=dict)  # requested task -> reason


def index_of(names: list[str]) -> TaskManager:
    """The smallest index of tasks that knows all names: reading all of lm-eval's takes seven seconds.

    Raises:
        UserError: a name that lm-eval does not know; says the closest ones.
    """
    check_names(names)
    small = TaskManager(include_defaults=False, include_path=[OWN, *(shipped() / folder for folder in FOLDERS)])
    if all(name in small.task_index for name in names):
        return small
    full = TaskManager(include_path=[OWN])
    for name in names:
        if name not in full.task_index:
            raise unknown(name, full.all_tasks)
    return full


def leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks behind a task, group or tag."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = entry.cfg["task"] if entry.cfg else []
    names = [member if isinstance(member, str) else member["task"] for member in members]
    return [leaf for child in names for leaf in leaves(manager, child)]


def without_missing(config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """Settings of a task file with the splits taken out for which there is no file; empty: all are there."""
    changed: dict[str, Any] = {}
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) not in files:
            changed[key] = None
    if config.get("fewshot_split") is not None and config["fewshot_split"] not in files:
        changed["fewshot_split"] = changed.get(
            "test_split", config.get("test_split")
        )  # lm-eval then leaves the asked row out
    return changed


def local_override(manager: TaskManager, task: str, files: dict[str, Path]) -> str:
    """A task file that includes lm-eval's and reads its data from `files`."""
    config = manager.task_index[task].cfg or {}
    changed: dict[str, Any] = {"include": str(manager.task_index[task].yaml_path), "task": task}
    changed["dataset_kwargs"] = {"files": {split: str(path) for split, path in files.items()}}
    changed |= without_missing(config, files)
    return yaml.safe_dump(changed) + "custom_dataset: !function minitron_train.evaluation.local_data.read_splits\n"


def splits(configs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Which split lm-eval asks the rows of some leaf tasks from, and which it takes examples from (its own rules)."""
    rows, examples = set(), set()
    for config in configs:
        rows.add(config.get("test_split") or config.get("validation_split"))
        if config.get("fewshot_split") or "samples" not in (config.get("fewshot_config") or {}):
            keys = ("fewshot_split", "training_split", "validation_split", "test_split")
            examples.add(next((config[key] for key in keys if config.get(key)), None))
    named = {"rows": rows, "examples": examples}
    return {key: ", ".join(sorted(filter(None, values))) for key, values in named.items()}


@contextlib.contextmanager
def hub_or_cache(online: bool) -> Iterator[None]:
    """A block in which `datasets` asks the hub only when it is in reach, else its cache at once."""
    from datasets import config

    with mock.patch.object(config, "HF_HUB_OFFLINE", config.HF_HUB_OFFLINE or not online):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """A block without lm-eval's and datasets' own progress bars and notices."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items):
        yield


def load_tasks(evaluation: EvalConfig, data_dir: Path | None) -> TaskSet:
    """Tasks with data, shots and rows set as the configuration says.

    Raises:
        UserError: an unknown task; a local file without a needed column.
    """
    manager = index_of(evaluation.tasks)
    chosen = TaskSet()
    overrides: dict[str, str] = {}
    lacking: dict[str, str] = {}  # requested task -> what is to be said when the hub's cache has nothing either
    online: bool | None = None
    for name in evaluation.tasks:
        files = {leaf: local_files(leaf, data_dir) if data_dir else {} for leaf in leaves(manager, name)}
        missing = [leaf for leaf, found in files.items() if not found]
        unsafe = [leaf for leaf in files if (manager.task_index[leaf].cfg or {}).get("unsafe_code")]
        if unsafe and not evaluation.allow_code_execution:
            chosen.not_run[name] = "runs generated programs; allow it with eval.allow_code_execution=true"
            continue
        if missing and online is None:
            online = hub_reachable()
        if missing and not online:
            where = data_dir or "eval.data_dir (not given)"
            some = f" for {missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else ""
            lacking[name] = f"no data in {where}{some}, and {NO_HUB}"
        for leaf, found in files.items():
            check_columns(leaf, found)
            if found:
                overrides[leaf] = local_override(manager, leaf, found)
        source = "local" if not missing else "cache" if name in lacking else "hub"
        usual = {leaf: manager.task_index[leaf].cfg or {} for leaf in files}
        used = [
            {**usual[leaf], **(without_missing(usual[leaf], found) if found else {})} for leaf, found in files.items()
        ]
        chosen.data[name] = {"source": source, "sha256": hash_files(files)}
        chosen.data[name] |= {"splits": splits(used), "lm_eval_splits": splits(usual.values())}
    runnable = [name for name in evaluation.tasks if name not in chosen.not_run]
    with tempfile.TemporaryDirectory() as folder:
        for leaf, text in overrides.items():
            (Path(folder) / f"{leaf}.yaml").write_text(text)
        paths = [entry.yaml_path.parent for entry in manager.task_index.values() if entry.yaml_path]
        manager = TaskManager(include_defaults=False, include_path=[*dict.fromkeys(paths), folder])
        chosen.tasks = {"tasks": {}, "groups": {}, "group_map": {}}
        for name in runnable:
            try:
                with hub_or_cache(online is not False):
                    loaded = manager.load([name])
            except (OSError, ValueError) as error:  # what `datasets` raises when the hub refuses or has no such set
                if chosen.data[name]["source"] == "local":
                    raise
                chosen.not_run[name] = lacking.get(name) or f"the hub gave no data: {str(error).splitlines()[0]}"
                continue
            for part, found in loaded.items():
                chosen.tasks[part] |= found
            chosen.leaves[name] = leaves(manager, name)
    chosen.data = {name: data for name, data in chosen.data.items() if name in chosen.leaves}
    for name, members in chosen.leaves.items():
        for leaf in members:
            configure(chosen, name, leaf, evaluation)
    return chosen


def hash_files(files: dict[str, dict[str, Path]]) -> str | None:
    """One sha256 over the files of a task, in order; None when there are none."""
    hashes = [sha256_file(path) for leaf in files.values() for path in leaf.values()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def configure(chosen: TaskSet, name: str, leaf: str, evaluation: EvalConfig) -> None:
    """Shots and rows of one leaf task. A task that lm-eval defines as 0-shot stays so (its own rule)."""
    task = chosen.tasks["tasks"][leaf]
    shots = evaluation.num_fewshot if evaluation.num_fewshot is not None else by_task(evaluation.shots, name)
    default = task.get_config("num_fewshot")
    if default != 0:
        task.set_config(key="num_fewshot", value=default or 0 if shots is None else shots)
    limit = evaluation.limit if evaluation.limit is not None else by_task(evaluation.limits, name)
    num_rows = len(task.eval_docs)
    if limit is not None and limit < num_rows:
        chosen.rows[leaf] = sorted(random.Random(f"{evaluation.seed} {leaf}").sample(range(num_rows), limit))


def by_task(values: dict[str, int], name: str) -> int | None:
    """The value for a task; one of MMLU's subjects or categories takes MMLU's."""
    return values.get(name, values.get("mmlu") if name.startswith("mmlu_") else None)


def run_lm_eval(lm: Any, chosen: TaskSet, evaluation: EvalConfig) -> dict[str, Any]:
    """lm-eval's evaluation of tasks that were loaded before; running it again gives the same prompts."""
    for task in chosen.tasks["tasks"].values():
        task.set_fewshot_seed(seed=evaluation.seed)
    raw = evaluate(
        lm,
        chosen.tasks,
        samples=chosen.rows,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        confirm_run_unsafe_code=evaluation.allow_code_execution,
    )
    assert raw is not None, "lm-eval returns results on its rank 0, which every rank is"
    return dict(raw)
