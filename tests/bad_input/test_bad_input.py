"""Every case ends with code 2 and one line on stderr that names the mistake, and leaves the folder as it was."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bad_input.caches import CACHES
from tests.bad_input.corpora import CORPORA
from tests.bad_input.data import DATA
from tests.bad_input.folders import FOLDERS
from tests.bad_input.fork_server import ForkServer
from tests.bad_input.models import MODELS
from tests.bad_input.paths import PATHS
from tests.bad_input.records import RECORDS
from tests.bad_input.runs import RUNS
from tests.bad_input.scene import MICRO, Case, Scene
from tests.bad_input.words import WORDS

CASES = [*WORDS, *PATHS, *MODELS, *FOLDERS, *DATA, *CORPORA, *RUNS, *RECORDS, *CACHES]
ROOT = Path(__file__).parents[2]
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

Done = subprocess.CompletedProcess[str]
Run = Callable[[Case, Path], Done]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrise by case: all of them with `--whole`, else the quick ones."""
    if "case" in metafunc.fixturenames:
        cases = [case for case in CASES if case.quick or metafunc.config.getoption("whole")]
        metafunc.parametrize("case", cases, ids=[case.name for case in cases])


@pytest.fixture(scope="module")
def material(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of recipe `micro`, trained for a few steps, with a teacher cache.

    The quick cases need none: there it does not exist.
    """
    kept = request.config.getoption("material")
    folder = Path(kept).absolute() if kept else tmp_path_factory.mktemp("material")
    if request.config.getoption("whole") and not (folder / "out" / "student").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for command in ("run", "teach"):
            done = run_fresh([command, *MICRO.split()], folder)
            assert done.returncode == 0, done.stdout + done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a case's command in a folder: with `--whole` in a fork, where the case sets no environment variables."""
    if not request.config.getoption("whole") or request.config.getoption("fresh"):
        yield lambda case, folder: run_fresh(words_of(case), folder, **case.environ)
        return
    server = ForkServer({**os.environ, **ENVIRONMENT})
    yield (
        lambda case, folder: (
            run_fresh(words_of(case), folder, **case.environ)
            if case.environ
            else server.run(words_of(case), folder, TIMEOUT_S)
        )
    )
    server.close()


@pytest.mark.timeout(1500)  # the first case makes the material
def test_the_mistake_is_one_line_and_leaves_nothing(case: Case, material: Path, run: Run, tmp_path: Path) -> None:
    if case.needs_root and os.geteuid() != 0:
        pytest.skip("mounts a file system: needs root")
    scene = Scene(tmp_path / "case", material)
    scene.folder.mkdir()
    try:
        for step in case.prepare:
            step(scene)
        before = listing(scene.folder)
        done = run(case, scene.folder)
        complaints = [*output_complaints(case, done), *folder_complaints(case, before, listing(scene.folder))]
    finally:
        scene.close()
        shutil.rmtree(scene.folder)  # hundreds of cases copy models
    assert not complaints, f"{complaints}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("code", "stderr", "complaint"),
    [
        (2, "error: seed=x: give a number\n", ""),
        (1, "error: seed=x: give a number\n", "exit code 1"),
        (2, "", "0 lines on stderr"),
        (2, "error: seed=x: give a number\nmore\n", "2 lines on stderr"),
        (2, "seed=x: give a number\n", "does not begin with `error: `"),
        (2, "error: give a number\n", "does not say 'seed=x'"),
        (2, "error: seed=x" + " " * 1000 + "!", "1014 characters"),
        (2, "Traceback: error: seed=x\n", "a traceback"),
        (2, "error: seed=x: UserWarning\n", "a warning"),
    ],
)
def test_an_unclear_line_is_noticed(code: int, stderr: str, complaint: str) -> None:
    found = output_complaints(Case("", "", "seed=x"), subprocess.CompletedProcess([], code, "", stderr))
    assert complaint in found if complaint else not found


@pytest.mark.parametrize(
    ("before", "after", "complaints"),
    [
        ({"a": "1"}, {"a": "1"}, []),
        ({"a": "1"}, {"a": "2"}, ["changed 1: a"]),
        ({"a": "1"}, {}, ["lost 1: a"]),
        ({}, {"out": "1", "out/x": "2"}, ["left 2: out, out/x"]),
        ({}, {"done/provenance.json": "1"}, []),
        ({}, {"done/.partial-1": "1", "done/provenance.json": "1"}, ["left 1: done/.partial-1"]),
    ],
)
def test_a_change_of_the_folder_is_noticed(
    before: dict[str, str], after: dict[str, str], complaints: list[str]
) -> None:
    finishes = ("done",) if "done/provenance.json" in after else ()
    assert folder_complaints(Case("", "", "", finishes=finishes), before, after) == complaints


def test_a_stage_that_should_have_finished_is_noticed() -> None:
    assert folder_complaints(Case("", "", "", finishes=("done",)), {}, {}) == ["not finished: done"]


def words_of(case: Case) -> list[str]:
    return [*case.command.split(), *case.words]


def run_fresh(words: list[str], folder: Path, **environ: str) -> Done:
    """`python -m minitron_train` with `words` in `folder`, as a process of its own."""
    command = [sys.executable, "-m", "minitron_train", *words]
    environment = {**os.environ, **ENVIRONMENT, **environ}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)


def output_complaints(case: Case, done: Done) -> list[str]:
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
    """Every path below a folder, with the hash of its content."""
    found = {}
    for path in sorted(folder.rglob("*")):
        content = path.read_bytes() if path.is_file() else b"folder"
        found[str(path.relative_to(folder))] = hashlib.sha256(content).hexdigest()
    return found


def folder_complaints(case: Case, before: dict[str, str], after: dict[str, str]) -> list[str]:
    """Paths that appeared, changed or vanished, apart from the stages that the case may finish."""
    allowed = tuple(f"{path}/" for path in (*case.finishes, *case.keeps))
    whole = all(f"{stage}/provenance.json" in after for stage in case.finishes)
    changed = [path for path in sorted({*before, *after}) if before.get(path) != after.get(path)]
    kinds = {
        path: "left" if path not in before else "lost" if path not in after else "changed"
        for path in changed
        if not f"{path}/".startswith(allowed) or ".partial-" in path
    }
    complaints = []
    for kind in sorted({*kinds.values()}):
        paths = [path for path in kinds if kinds[path] == kind]
        complaints.append(f"{kind} {len(paths)}: {', '.join(paths[:3])}")
    return complaints if whole else [*complaints, f"not finished: {', '.join(case.finishes)}"]
