"""One contestant of step.py: the benchmark of this or another checkout, which takes a step for each line on stdin.

    python benchmarks/speed/step_contestant.py SETTINGS

SETTINGS is the JSON of `Contestant` in step.py. Every checkout's benchmark has the names that are replaced here: the shapes,
`make_config` and `timed_step`. PYTHONPATH selects the code that it measures.
"""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any


def main() -> None:
    """Run `measure` of the checkout's benchmark on the given models, precision and seed."""
    settings = json.loads(sys.argv[1])
    benchmark = load(Path(settings["benchmark"]))
    for name in ("TEACHER", "STUDENT"):
        setattr(benchmark, name, benchmark.Shape(**settings[name.lower()]))
    benchmark.BATCH = settings["batch"]
    configure(benchmark, settings["precision"], settings["seed"])
    if settings["in_turns"]:
        take_turns(benchmark, settings["num_steps"] + benchmark.WARMUP_STEPS)
    benchmark.measure(Path(settings["folder"]), settings["num_steps"])


def load(file: Path) -> Any:
    """Import a Python file as a module."""
    spec = importlib.util.spec_from_file_location("benchmark", file)
    assert spec is not None and spec.loader is not None, f"{file} is not a Python file"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def configure(benchmark: Any, precision: str, seed: int) -> None:
    """Set precision and seed of every configuration that the benchmark makes."""
    make_config = benchmark.make_config

    def configured(folder: Path, tp: int) -> Any:
        config = make_config(folder, tp)
        config.train.precision = type(config.train.precision)(precision)
        config.seed = seed
        config.data.cache_dir = str(folder / "cache")  # checkouts differ in the format of its files
        return config

    benchmark.make_config = configured


def take_turns(benchmark: Any, num_turns: int) -> None:
    """Before each of the first `num_turns` steps, and before the one after them, wait for a line on stdin.

    After each of the first `num_turns` steps a line with its seconds goes to stdout.
    """
    timed_step, num_taken = benchmark.timed_step, 0

    def step_in_turn(*arguments: Any, **options: Any) -> dict[str, float]:
        nonlocal num_taken
        num_taken += 1
        if num_taken <= num_turns + 1 and not sys.stdin.readline():
            sys.exit("step.py has ended")
        seconds = timed_step(*arguments, **options)
        if num_taken <= num_turns:
            print(json.dumps({"step_s": seconds["total"]}), flush=True)
        return seconds

    benchmark.timed_step = step_in_turn


if __name__ == "__main__":
    main()
