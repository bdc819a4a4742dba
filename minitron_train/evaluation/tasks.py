"""Load lm-eval's tasks, with local data where available. Importing this module imports lm-eval."""

import contextlib
import hashlib
import logging
import math
import random
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, cast
from unittest import mock

import lm_eval.api.task
import lm_eval.tasks
import yaml
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from minitron_train.config import EvalConfig
from minitron_train.config.evaluation import UNSAFE
from minitron_train.evaluation.code import check_isolation, pass_at_1
from minitron_train.evaluation.local_data import NO_HUB, check_columns, hub_reachable, local_files
from minitron_train.evaluation.task_names import FOLDERS, OWN, check_keys, named_by, shipped, unknown
from minitron_train.parallel.groups import Groups
from minitron_train.runtime.errors import UserError, first_line
from minitron_train.runtime.files import sha256_file

T = TypeVar("T")
Files = dict[str, dict[str, Path]]  # leaf task -> split -> local file; empty for a task without local data

BOOTSTRAP_ITERATIONS = 1000  # for standard errors without a formula


@dataclass(slots=True)
class TaskSet:
    """Tasks that are ready to run, and tasks that cannot run."""

    tasks: Any = None  # lm_eval.tasks.manager.TaskDict, the argument of lm_eval.evaluator.evaluate
    rows: dict[str, list[int]] = field(default_factory=dict)  # leaf task -> rows to evaluate; all rows if absent
    leaves: dict[str, list[str]] = field(default_factory=dict)  # requested task -> its leaf tasks
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # requested task -> source of its data
    not_run: dict[str, str] = field(default_factory=dict)  # requested task -> reason


@dataclass(slots=True)
class Survey:
    """What rank 0 has found out about the requested tasks, for all ranks."""

    files: dict[str, Files] = field(default_factory=dict)  # requested task that may run -> its local files
    data: dict[str, dict[str, Any]] = field(default_factory=dict)  # requested task that may run -> source of its data
    lacking: dict[str, str] = field(default_factory=dict)  # requested task -> message if the hub's cache lacks it too
    not_run: dict[str, str] = field(default_factory=dict)  # requested task that cannot run -> reason
    online: bool = True  # whether the hub is reachable


def load_tasks(
    evaluation: EvalConfig, data_dir: Path | None, groups: Groups | None = None, max_length: float = math.inf
) -> TaskSet:
    """Load tasks with their data, shots and rows as configured, the same on every rank; collective.

    Rank 0 decides which tasks can run and loads them. The other ranks then load the same tasks from the hub's cache.

    Args:
        groups: all ranks; None means one process.
        max_length: tokens of the longest context, which must hold a prompt and the text that a task generates.

    Raises:
        UserError: an unknown task, a local file without a required column, or data that only rank 0 has.
    """
    on_rank0 = groups.on_rank0 if groups else run_here
    manager = index_of(evaluation)
    found = on_rank0(lambda: survey(manager, evaluation, data_dir, max_length))
    chosen = TaskSet(tasks={"tasks": {}, "groups": {}, "group_map": {}})
    with reading_local(manager, found.files) as local:
        refused = on_rank0(lambda: load_first(chosen, local, found))
        names = [name for name in found.files if name not in refused]
        if groups and not groups.is_first:
            load_next(chosen, local, names, found.online)
    chosen.not_run = found.not_run | refused
    chosen.data = {name: found.data[name] for name in names}
    chosen.leaves = {name: leaves(manager, name) for name in names}
    for leaf, task in chosen.tasks["tasks"].items():
        configure(chosen, leaf, evaluation, manager)
        if getattr(task, "UNSAFE_CODE", False):
            task.process_results = only_by(on_rank0, task.process_results)
        if pass_at_1.__name__ in task._metric_fn_kwargs:
            task._metric_fn_kwargs[pass_at_1.__name__]["isolated"] = evaluation.allow_code_execution != UNSAFE
    return chosen


def run_here(work: Callable[[], T]) -> T:
    """Replaces Groups.on_rank0 in a single process."""
    return work()


def only_by(on_rank0: Callable[..., Any], function: Callable[..., T]) -> Callable[..., T]:
    """Wrap a function so that only rank 0 runs it. lm-eval would compute the metrics of every row on every rank."""
    return lambda *args: on_rank0(lambda: function(*args))


def index_of(evaluation: EvalConfig) -> TaskManager:
    """Return a small index of tasks if it has all names, otherwise lm-eval's full index, which takes seven seconds.

    Raises:
        UserError: a name that lm-eval does not know; the message suggests the closest names.
    """
    check_keys(evaluation)
    names = [(key, name) for key, found in named_by(evaluation).items() for name in found]
    small = TaskManager(include_defaults=False, include_path=[OWN, *(shipped() / folder for folder in FOLDERS)])
    if all(name in small.task_index for _, name in names):
        return small
    full = TaskManager(include_path=[OWN])
    for key, name in names:
        if name not in full.task_index:
            raise unknown(name, full.all_tasks, key)
    return full


def leaves(manager: TaskManager, name: str) -> list[str]:
    """Return the leaf tasks of a task, group or tag."""
    entry = manager.task_index[name]
    if entry.kind.name == "TAG":
        return sorted(entry.tags)
    if entry.kind.name != "GROUP":
        return [name]
    members = entry.cfg["task"] if entry.cfg else []
    names = [member if isinstance(member, str) else member["task"] for member in members]
    return [leaf for child in names for leaf in leaves(manager, child)]


def without_missing(config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """Return the changes to a task file that remove the splits without a file; empty if every split has one."""
    changed: dict[str, Any] = {}
    for key in ("training_split", "validation_split", "test_split"):
        if config.get(key) not in files:
            changed[key] = None
    if config.get("fewshot_split") is not None and config["fewshot_split"] not in files:
        changed["fewshot_split"] = changed.get(
            "test_split", config.get("test_split")
        )  # lm-eval then excludes the evaluated row from the examples
    return changed


def local_override(manager: TaskManager, task: str, files: dict[str, Path]) -> str:
    """Return the text of a task file that includes lm-eval's own and reads its data from `files`."""
    config = manager.task_index[task].cfg or {}
    changed: dict[str, Any] = {"include": str(manager.task_index[task].yaml_path), "task": task}
    changed["dataset_kwargs"] = {"files": {split: str(path) for split, path in files.items()}, "task": task}
    changed |= without_missing(config, files)
    return yaml.safe_dump(changed) + "custom_dataset: !function minitron_train.evaluation.local_data.read_splits\n"


def splits(configs: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """Return the splits from which lm-eval takes the rows and the few-shot examples of some leaf tasks (its own rules)."""
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
    """Within the block, `datasets` uses the hub only if `online`, otherwise directly its cache."""
    from datasets import config

    with mock.patch.object(config, "HF_HUB_OFFLINE", config.HF_HUB_OFFLINE or not online):
        yield


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Within the block, silence the progress bars and notices of lm-eval and datasets."""
    import datasets

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    with mock.patch.object(lm_eval.api.task, "tqdm", lambda items, **_: items):
        yield


def survey(manager: TaskManager, evaluation: EvalConfig, data_dir: Path | None, max_length: float) -> Survey:
    """Find out which tasks can run, and the source of their data. The hub is contacted only if a local file is missing.

    Raises:
        UserError: a local file lacks a required column.
    """
    found = Survey()
    for name in evaluation.tasks:
        members = leaves(manager, name)
        reasons = [(leaf, why_not(manager.task_index[leaf], evaluation, max_length)) for leaf in members]
        barred = next(((leaf, reason) for leaf, reason in reasons if reason), None)
        if barred:
            leaf, reason = barred
            found.not_run[name] = reason if leaf == name else f"{leaf} {reason}"
            continue
        found.files[name] = {leaf: local_files(leaf, data_dir) if data_dir else {} for leaf in members}
        for leaf, files in found.files[name].items():
            check_columns(leaf, files)
    missing = {name: [leaf for leaf in files if not files[leaf]] for name, files in found.files.items()}
    found.online = not any(missing.values()) or hub_reachable()
    for name, files in found.files.items():
        source = "local" if not missing[name] else "hub" if found.online else "cache"
        found.data[name] = {"source": source, "sha256": hash_files(files)} | splits_of(manager, files)
        if source == "cache":
            where = data_dir or "eval.data_dir (not set)"
            some = f" for {missing[name][0]} and {len(missing[name]) - 1} more" if len(missing[name]) > 1 else ""
            found.lacking[name] = f"no data in {where}{some}, and {NO_HUB}"
    return found


def why_not(entry: Any, evaluation: EvalConfig, max_length: float) -> str | None:
    """Return why a leaf task cannot run whatever its data, from its entry in lm-eval's index; None if it can.

    Raises:
        UserError: it runs generated programs, and this system cannot isolate them.
    """
    settings: Mapping[str, Any] = entry.cfg or {}
    if settings.get("unsafe_code") and evaluation.allow_code_execution != UNSAFE:
        if entry.yaml_path is None or entry.yaml_path.parent != OWN:
            own = "runs generated programs with lm-eval's own code, which does not isolate them"
            return f"{own}; allow it with eval.allow_code_execution={UNSAFE}"
        if not evaluation.allow_code_execution:
            return "runs generated programs; allow it with eval.allow_code_execution=true"
        check_isolation()
    if settings.get("output_type", "generate_until") != "generate_until":
        return None
    wanted = cast("dict[str, Any]", normalize_gen_kwargs(settings.get("generation_kwargs") or {}))
    if wanted["do_sample"]:
        return "requires sampling; only greedy generation is supported"
    if wanted["max_gen_toks"] >= max_length:
        return f"generates {wanted['max_gen_toks']} tokens, the model's context has {max_length}"
    return None


def splits_of(manager: TaskManager, files: Files) -> dict[str, dict[str, str]]:
    """Return the splits that a task uses here, and the splits that lm-eval would use."""
    usual = {leaf: manager.task_index[leaf].cfg or {} for leaf in files}
    used = [{**usual[leaf], **(without_missing(usual[leaf], found) if found else {})} for leaf, found in files.items()]
    return {"splits": splits(used), "lm_eval_splits": splits(usual.values())}


@contextlib.contextmanager
def reading_local(manager: TaskManager, files: Mapping[str, Files]) -> Iterator[TaskManager]:
    """Yield the same index, in which tasks with local files read these."""
    with tempfile.TemporaryDirectory() as folder:
        for leaf, found in (pair for parts in files.values() for pair in parts.items()):
            if found:
                (Path(folder) / f"{leaf}.yaml").write_text(local_override(manager, leaf, found))
        paths = [entry.yaml_path.parent for entry in manager.task_index.values() if entry.yaml_path]
        yield TaskManager(include_defaults=False, include_path=[*dict.fromkeys(paths), folder])


def load(chosen: TaskSet, manager: TaskManager, name: str, online: bool) -> Exception | None:
    """Add one requested task to `chosen`. Returns the error of `datasets` if the hub refuses or lacks the data set."""
    try:
        with hub_or_cache(online):
            loaded = manager.load([name])
    except (OSError, ValueError) as error:
        return error
    for part, found in loaded.items():
        chosen.tasks[part] |= found
    return None


def load_first(chosen: TaskSet, manager: TaskManager, found: Survey) -> dict[str, str]:
    """Load the tasks on rank 0. Returns requested task -> reason, for tasks whose data are not available."""
    refused: dict[str, str] = {}
    for name in found.files:
        error = load(chosen, manager, name, found.online)
        if error and (found.data[name]["source"] == "local" or isinstance(error, UserError)):
            raise error
        if error:
            refused[name] = found.lacking.get(name) or f"the hub returned no data: {first_line(error)}"
    return refused


def load_next(chosen: TaskSet, manager: TaskManager, names: list[str], online: bool) -> None:
    """Load the tasks on another rank after rank 0: from the hub's cache, or from the hub if nodes do not share the cache."""
    for name in names:
        error = load(chosen, manager, name, online=False) and load(chosen, manager, name, online)
        if error:
            raise UserError(
                f"eval.tasks: rank 0 has the data of {name}, this rank does not ({first_line(error)}); "
                "put eval.data_dir and the hub's cache (HF_HOME) on a file system that all nodes share"
            ) from error


def hash_files(files: dict[str, dict[str, Path]]) -> str | None:
    """Return one sha256 over the local files of a task, in order; None if it has none."""
    hashes = [sha256_file(path) for leaf in files.values() for path in leaf.values()]
    return hashlib.sha256("".join(hashes).encode()).hexdigest() if hashes else None


def configure(chosen: TaskSet, leaf: str, evaluation: EvalConfig, manager: TaskManager) -> None:
    """Set shots and rows of one leaf task. A task that lm-eval defines as 0-shot stays 0-shot (lm-eval's rule)."""
    task = chosen.tasks["tasks"][leaf]
    shots, limit = evaluation.num_fewshot, evaluation.limit
    if shots is None:
        shots = narrowest(evaluation.shots, leaf, manager)
    if limit is None:
        limit = narrowest(evaluation.limits, leaf, manager)
    default = task.get_config("num_fewshot")
    if default != 0:
        task.set_config(key="num_fewshot", value=default or 0 if shots is None else shots)
    num_rows = len(task.eval_docs)
    if limit is not None and limit < num_rows:
        chosen.rows[leaf] = sorted(random.Random(f"{evaluation.seed} {leaf}").sample(range(num_rows), limit))


def narrowest(values: Mapping[str, int], leaf: str, manager: TaskManager) -> int | None:
    """Return the value for a leaf task, else for the smallest group or tag that contains it.

    With {"mmlu": 5, "mmlu_stem": 3, "mmlu_anatomy": 0}, anatomy gets 0, the other STEM subjects 3, all others 5.
    """
    sizes = {key: len(members) for key in values if leaf in (members := leaves(manager, key))}
    key = leaf if leaf in values else min(sizes, key=sizes.__getitem__, default=None)
    return None if key is None else values[key]


def run_lm_eval(lm: Any, chosen: TaskSet, evaluation: EvalConfig) -> dict[str, Any]:
    """Run lm-eval on loaded tasks. A second run produces the same prompts."""
    for task in chosen.tasks["tasks"].values():
        task.set_fewshot_seed(seed=evaluation.seed)
    raw = evaluate(
        lm,
        chosen.tasks,
        samples=chosen.rows,
        bootstrap_iters=BOOTSTRAP_ITERATIONS,
        confirm_run_unsafe_code=bool(evaluation.allow_code_execution),
    )
    assert raw is not None, "lm-eval returns results on its rank 0, which every rank is"
    return dict(raw)
