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
    from minitron_train.commands.registry import COMMANDS

    assert {Path(name).stem for name in JOBS} == set(COMMANDS) - {
        "plan",
        "families",
    }  # they answer at once, on the login node


def test_resources_and_warnings() -> None:
    """A warning before the time limit for what goes on where it stopped; scores would begin again, for ever."""
    texts = {Path(name).stem: (ROOT / "slurm" / name).read_text() for name in JOBS}
    warned = {command for command, text in texts.items() if "\n#SBATCH --signal=B:USR1@300\n" in text}
    assert warned == {"pretrain", "teach", "distill", "search", "run", "eval"}
    alone = {command for command, text in texts.items() if "\n#SBATCH --ntasks=1\n" in text}
    assert alone == {"fetch", "export", "report"}
    assert all(("--gpus-per-node=8" in text) == (command not in alone) for command, text in texts.items())


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
        (["4b_from_8b"], "these parts have no path: web"),
        (["micro", "--nodes=3", "--ntasks-per-node=1"], "x 3 data-parallel ranks; change one of these settings"),
        (
            ["micro", "train.lr=1e-3", "--nodes=2"],
            "--nodes=2: put sbatch's options before the settings, in the form --nodes=2",
        ),
        ([], "usage: slurm/chain.sh RECIPE"),
    ],
)
def test_mistakes_are_found_before_anything_is_queued(
    cluster: Cluster, tmp_path: Path, words: list[str], message: str
) -> None:
    refused(cluster, Lab(tmp_path / "lab", cluster, {}, real=True), ["slurm/chain.sh", *words], message)


@pytest.mark.slurm
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["+recipe=micrp"], "unknown recipe 'micrp' (did you mean 'micro'?)"),
        (["+recipe=micro", "--nodes=2"], "--nodes=2: put sbatch's options before the settings, in the form --nodes=2"),
        (["+recipe=micro", "-N2"], "-N2: put sbatch's options before"),
        (["+recipe=4b_from_8b"], "these parts have no path: web"),
    ],
)
def test_so_are_those_in_one_job(cluster: Cluster, tmp_path: Path, words: list[str], message: str) -> None:
    refused(cluster, Lab(tmp_path / "lab", cluster, {}, real=True), ["slurm/submit.sh", "distill", *words], message)


def refused(cluster: Cluster, lab: Lab, command: list[str], message: str) -> None:
    """One line, code 2, and nothing in the queue."""
    queued = ("squeue", "--noheader", "--format=%i")
    before = cluster.call(*queued).stdout
    done = cluster.call(*command, cwd=lab.folder, check=False)
    assert done.returncode == 2 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and not done.stdout
    assert cluster.call(*queued).stdout == before


@pytest.mark.slurm
def test_unknown_command_lists_the_known(lab: Lab) -> None:
    done = lab.cluster.call("slurm/submit.sh", "destill", cwd=lab.folder, check=False)
    assert done.returncode == 2 and "commands: distill eval export fetch" in done.stderr
