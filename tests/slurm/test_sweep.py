"""The sweep of docs/slurm.md: Hydra's multirun through submitit's launcher (the extra `sweep`)."""

import os
import shlex
import sys

import pytest
from hydra import compose, initialize_config_dir

from minitron_train.commands import configuration, recipes, registry
from tests.slurm.conftest import ROOT, Lab
from tests.support.models import save_tiny

pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="pip install 'minitron_train[sweep]'")


def documented() -> list[str]:
    """The words after `python -m minitron_train`."""
    text = (ROOT / "docs" / "slurm.md").read_text().replace("\\\n", " ")
    line = next(line for line in text.splitlines() if "hydra/launcher=" in line)
    return shlex.split(line.split("-m minitron_train ")[1])


def test_the_documented_sweep_composes() -> None:
    command, *words, multirun = documented()
    assert command in registry.COMMANDS and multirun == "-m"
    first = [word.split(",")[0] for word in words]
    assert first != words  # something is swept
    config = configuration.compose([word for word in first if not word.startswith("hydra")])
    assert config.output_dir == "outputs/sweep/t1.0-lr0.0005"
    with initialize_config_dir(version_base="1.3", config_dir=str(recipes.home() / "conf")):
        hydra = compose("config", overrides=first, return_hydra_config=True).hydra
    assert hydra.launcher._target_.endswith("SlurmLauncher") and hydra.sweep.dir == "outputs/sweep"


@pytest.mark.races
@pytest.mark.slurm
@pytest.mark.timeout(900)  # the launcher asks for results ever more rarely
def test_the_documented_sweep_runs_as_jobs(lab: Lab) -> None:
    """As far as dry_run goes, with one good combination and one that ends the sweep."""
    for kind in ("teacher", "pruned"):
        save_tiny("nemotron", lab.folder / "outputs" / "tiny" / kind)
    swept = {"$PWD": str(lab.folder), "temperature=1,2": "temperature=1,-1", "lr=5e-4,1e-3": "lr=5e-4"}
    words = documented()
    for old, new in swept.items():
        words = [word.replace(old, new) for word in words]
    command = [sys.executable, "-m", "minitron_train", *words[:-1], "dry_run=true", "-m"]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = lab.cluster.call(*command, cwd=lab.folder, check=False, environ={"PYTHONPATH": paths}, timeout_s=500)
    assert done.returncode == 2 and "distill.temperature=-1.0: must be" in done.stderr
    logs = [path.read_text() for path in (lab.folder / "outputs" / "sweep").rglob("*_log.out")]
    assert len(logs) == 2 and sum("outputs/sweep/t1.0-lr0.0005/train" in log for log in logs) == 1
