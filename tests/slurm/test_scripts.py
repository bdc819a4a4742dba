"""The scripts as they stand in the repository: shellcheck, Slurm's own verdict, mistakes found before anything is queued."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster
from tests.slurm.conftest import ROOT, Lab

SCRIPTS = sorted(path for path in (ROOT / "slurm").iterdir() if path.name != "site.env")
JOBS = sorted(path.name for path in SCRIPTS if path.suffix == ".sbatch")


def sbatch(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    """Ask Slurm whether it would take a job."""
    return cluster.call("sbatch", "--test-only", *words, cwd=ROOT, check=False)


@pytest.mark.skipif(
    shutil.which("shellcheck") is None and "MINITRON_REQUIRE_SLURM" not in os.environ,
    reason="shellcheck is not installed",
)
def test_shellcheck() -> None:
    done = subprocess.run(
        ["shellcheck", "--external-sources", *map(str, SCRIPTS)], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout


def test_every_command_has_a_script() -> None:
    from minitron_train.cli import COMMANDS

    assert {Path(name).stem for name in JOBS} == set(COMMANDS) - {"plan"}  # plan answers at once, on the login node


@pytest.mark.slurm
@pytest.mark.parametrize("name", JOBS)
def test_slurm_takes_the_script(cluster: Cluster, name: str) -> None:
    done = sbatch(cluster, f"slurm/{name}", "+recipe=tiny")
    assert done.returncode == 0, done.stderr


@pytest.mark.slurm
def test_slurm_refuses_what_the_cluster_has_not(cluster: Cluster) -> None:
    """That the test above can fail."""
    assert sbatch(cluster, "--nodes=3", "slurm/distill.sbatch").returncode != 0
    assert sbatch(cluster, "--gpus-per-node=9", "slurm/distill.sbatch").returncode != 0
    assert sbatch(cluster, "--partition=none", "slurm/distill.sbatch").returncode != 0


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["micrp"], "unknown recipe 'micrp' (did you mean 'micro'?)"),
        (["micro", "train.lrr=1"], "unknown key 'train.lrr' (did you mean 'lr'?)"),
        (["micro", "train.lr=-1"], "train.lr=-1.0: must be greater than 0"),
        ([], "usage: slurm/chain.sh RECIPE"),
    ],
)
def test_mistakes_are_found_before_anything_is_queued(
    cluster: Cluster, tmp_path: Path, words: list[str], message: str
) -> None:
    lab = Lab(tmp_path / "lab", cluster, {}, real=True)
    before = cluster.call("squeue", "--noheader").stdout
    done = cluster.call("slurm/chain.sh", *words, cwd=lab.folder, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert cluster.call("squeue", "--noheader").stdout == before


@pytest.mark.slurm
def test_unknown_command_lists_the_known(lab: Lab) -> None:
    done = lab.cluster.call("slurm/submit.sh", "destill", cwd=lab.folder, check=False)
    assert done.returncode == 2 and "commands: distill eval export fetch" in done.stderr
