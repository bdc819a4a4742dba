"""What a user can get wrong, tried on the real command line: is every mistake one clear line, and is nothing left behind?

    python benchmarks/bad_input.py [--quick] [--json FILE] [--only TEXT] [--material FOLDER] [--fresh]

Every case runs `python -m minitron_train …` in a fresh folder and is clear when the process ends with code 2 and exactly one
line on stderr that names what is wrong, without a traceback, and when the folder holds what it held before (stages that were
finished before the mistake was met, named by the case, may have been added). The model is recipe `micro`, trained for a moment.
The cases are the tables of the bad_input_*.py beside this file. A case's process is a fork of one that has imported the
program (bad_input_fork.py), or a fresh Python where the case sets environment variables, and with `--fresh`. `--quick` tries
a few cases that need no model.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from bad_input_corpora import CORPORA
from bad_input_data import DATA
from bad_input_folders import FOLDERS
from bad_input_fork import import_all, run_forked
from bad_input_models import MODELS
from bad_input_paths import PATHS
from bad_input_records import RECORDS
from bad_input_runs import RUNS
from bad_input_scene import MICRO, Case, Scene
from bad_input_words import WORDS

CASES = [*WORDS, *PATHS, *MODELS, *FOLDERS, *DATA, *CORPORA, *RUNS, *RECORDS]
ROOT = Path(__file__).parents[1]
TIMEOUT_S = 300
LONGEST_LINE = 1000  # characters: some lines list everything that is missing
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "0",
    "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens: a case that reaches for the network finds none
    "PIP_INDEX_URL": "http://127.0.0.1:9/simple",
    "PIP_RETRIES": "0",
}


@dataclass(frozen=True, slots=True)
class Row:
    """What one case did. `complaints` is empty when the case is clear."""

    name: str
    command: str
    exit_code: int
    line: str
    seconds: float
    complaints: list[str]


def main() -> None:
    """Make the material, try every case, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a dozen cases that need no model, within a minute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--fresh", action="store_true", help="a fresh Python for every case (slow)")
    parser.add_argument("--material", type=Path, help="where the trained model is kept for the next time")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.only in case.name and (case.quick or not options.quick)]
    if not (options.fresh or options.quick):
        os.environ.update(ENVIRONMENT)
        import_all()
    with tempfile.TemporaryDirectory(prefix="bad_input-") as scratch:
        material = options.material or Path(scratch) / "material"
        if not options.quick and not (material / "out" / "student").exists():
            make_material(material)
        rows, skipped = [], []
        for number, case in enumerate(chosen):
            if case.needs_root and os.geteuid() != 0:
                skipped.append(case.name)
                continue
            is_fresh = options.fresh or options.quick or bool(case.environ)
            row = attempt(case, Scene(Path(scratch) / f"case{number}", material / "out"), is_fresh)
            rows.append(row)
            print(f"{'NOT CLEAR' if row.complaints else 'clear':<10}{row.seconds:5.1f} s  {row.name}")
            print(f"{'':<19}{row.line}", *(f"{'':<19}! {text}" for text in row.complaints), sep="\n", flush=True)
    clear = sum(not row.complaints for row in rows)
    print(f"{len(rows)} cases, {clear} clear" + (f"; not run without root: {', '.join(skipped)}" if skipped else ""))
    if options.json:
        figures = {"cases": len(rows), "clear": clear, "not_run": skipped, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n")
    sys.exit(clear != len(rows))


def make_material(folder: Path) -> None:
    """The whole chain of recipe `micro`, a few steps of training: teacher, scores, pruned, train, student."""
    folder.mkdir(parents=True, exist_ok=True)
    done = run(["run", *MICRO.split()], folder, {})
    assert done.returncode == 0, done.stdout + done.stderr


def run(words: list[str], folder: Path, environ: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """One `python -m minitron_train …` in `folder`."""
    command = [sys.executable, "-m", "minitron_train", *words]
    environment = {**os.environ, **ENVIRONMENT, **environ}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def attempt(case: Case, scene: Scene, is_fresh: bool) -> Row:
    """Prepare a fresh folder, run the command there, and look at what it said and left."""
    scene.folder.mkdir(parents=True)
    try:
        for step in case.prepare:
            step(scene)
        before = listing(scene.folder)
        start_s = time.perf_counter()
        words = [*case.command.split(), *case.words]
        done = run(words, scene.folder, case.environ) if is_fresh else run_forked(words, scene.folder, TIMEOUT_S)
        seconds = time.perf_counter() - start_s
        complaints = [*heard(case, done), *left_behind(case, before, listing(scene.folder))]
    finally:
        scene.close()
        shutil.rmtree(scene.folder)
    said = done.stderr.strip().splitlines()
    return Row(case.name, " ".join(words), done.returncode, said[-1] if said else "", round(seconds, 2), complaints)


def heard(case: Case, done: subprocess.CompletedProcess[str]) -> list[str]:
    """What is wrong with exit code and output."""
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    rules = {
        f"exit code {done.returncode}": done.returncode == 2,
        f"{len(lines)} lines on stderr": len(lines) == 1,
        "does not begin with `error: `": last.startswith("error: "),
        f"does not say {case.says!r}": re.search(case.says, last) is not None,
        f"{len(last)} characters": len(last) <= LONGEST_LINE,
        "a traceback": "Traceback" not in done.stdout + done.stderr,
        "a warning": "Warning" not in done.stdout + done.stderr,
    }
    return [complaint for complaint, kept in rules.items() if not kept]


def listing(folder: Path) -> dict[str, str]:
    """Every path below a folder, with the hash of what it holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b"folder"
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def left_behind(case: Case, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Paths that appeared, changed or went, apart from the stages that the case may finish."""
    allowed = tuple(f"{path}/" for path in (*case.finishes, *case.keeps))
    whole = all(f"{stage}/provenance.json" in after for stage in case.finishes)
    changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    extra = [path for path in changed if not f"{path}/".startswith(allowed) or ".partial-" in path]
    kinds = Counter("left" if path not in before else "lost" if path not in after else "changed" for path in extra)
    complaints = [f"{kind} {count}: {', '.join(extra[:3])}" for kind, count in kinds.items()]
    return complaints if whole else [*complaints, f"not finished: {', '.join(case.finishes)}"]


if __name__ == "__main__":
    main()
