"""The cluster, and a lab's checkout on it."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster

ROOT = Path(__file__).parents[2]
SITE = """\
site_python=({python})
site_sbatch_of=({layouts})
max_requeues=3
export OMP_NUM_THREADS=1 PYTHONPATH={root} WANDB_MODE=offline {variables}
"""


class Lab:
    """A checkout with slurm/ and site settings of its own, from which jobs are submitted.

    Args:
        layouts: sbatch options by command; "" is a single task without GPUs.
        real: jobs run this Python and the real program, not fake_trainer.py.
    """

    def __init__(
        self, folder: Path, cluster: Cluster, layouts: dict[str, str], *, real: bool, **variables: str
    ) -> None:
        self.folder, self.cluster = folder, cluster
        self.fake = folder / "fake"
        self.fake.mkdir(parents=True)
        shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("site.env"))
        python = sys.executable if real else f"{sys.executable} -S -E {ROOT}/tests/slurm/fake_trainer.py"
        given = {command.stem: "" for command in (ROOT / "slurm").glob("*.sbatch")} | layouts
        text = SITE.format(
            python=python,
            root=ROOT,
            layouts=" ".join(f'[{command}]="{ONE_TASK} {options}"' for command, options in given.items()),
            variables=" ".join(f"{key}={value}" for key, value in {"FAKE": str(self.fake), **variables}.items()),
        )
        (folder / "slurm" / "site.env").write_text(text)

    def submit(self, command: str, *words: str, environ: dict[str, str] | None = None) -> str:
        """slurm/submit.sh; returns the job's id."""
        return self.cluster.call("slurm/submit.sh", command, *words, cwd=self.folder, environ=environ).stdout.strip()

    def chain(self, *words: str, script: str = "chain") -> dict[str, str]:
        """slurm/chain.sh or search.sh; returns the jobs' ids by name."""
        printed = self.cluster.call(f"slurm/{script}.sh", *words, cwd=self.folder).stdout
        lines = [line.split() for line in printed.splitlines() if line.startswith("  ")]
        return {words[0]: words[2].rstrip(",") for words in lines}

    def log(self, job: str) -> str:
        """What a job has printed."""
        return "".join(path.read_text(errors="replace") for path in (self.folder / "logs").glob(f"*-{job}.out"))


ONE_TASK = "--nodes=1 --ntasks-per-node=1 --gpus-per-node=0"
TWO_NODES = "--nodes=2"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes for all tests of this folder."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def lab(cluster: Cluster, tmp_path: Path) -> Lab:
    """Jobs of one task that run the fake trainer."""
    return Lab(tmp_path / "lab", cluster, {}, real=False)


@pytest.fixture
def wide_lab(cluster: Cluster, tmp_path: Path) -> Lab:
    """As `lab`, training on two nodes with a rank each."""
    return Lab(tmp_path / "lab", cluster, {"distill": TWO_NODES}, real=False)
