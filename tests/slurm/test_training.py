"""The real program under the scripts: the chain with everything that happens to it, and two nodes in two layouts."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, until
from tests.slurm.conftest import TWO_NODES, Lab
from tests.slurm.test_jobs import ENDED, preempt

pytestmark = [pytest.mark.slurm, pytest.mark.races, pytest.mark.timeout(1500)]

CHAIN = ["pretrain", "score", "prune", "distill", "export", "eval", "speed", "report"]
MICRO = ("+recipe=micro", "tracking.wandb.mode=disabled")
LONG_S = 600  # for a job of the real program on a busy machine
TP_2 = "parallel.tensor_model_parallel_size=2"
DP_2 = "parallel.tensor_model_parallel_size=1"


@pytest.fixture(scope="module")
def lab(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Jobs of one task that run the real program."""
    return Lab(tmp_path_factory.mktemp("real") / "lab", cluster, {}, real=True)


@pytest.fixture(scope="module")
def wide(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The same with a rank on each of two nodes."""
    return Lab(tmp_path_factory.mktemp("wide") / "lab", cluster, {"distill": TWO_NODES}, real=True)


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Rows of a training run so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def reach(lab: Lab, job: str, folder: Path, step: int) -> None:
    """Wait until a run has done some steps in its present life."""

    def there() -> bool:
        state = lab.cluster.show(job)["JobState"]
        assert state in ("PENDING", "RUNNING", "CONFIGURING"), f"{state}: {lab.log(job)}"
        return any(row["step"] >= step for row in metrics(folder))

    until(f"step {step} in {folder}", there, timeout_s=LONG_S)


def completed(lab: Lab, job: str) -> dict[str, str]:
    """Wait for a job's success."""
    shown = lab.cluster.wait(job, *ENDED, timeout_s=LONG_S)
    assert shown["JobState"] == "COMPLETED", lab.log(job)
    return shown


@pytest.fixture(scope="module")
def chained(lab: Lab) -> Iterator[tuple[Lab, dict[str, str], dict[str, str]]]:
    """The chain, cancelled in the middle of distilling; submitted again, preempted in the middle of distilling."""
    train = lab.folder / "outputs" / "micro" / "train"
    words = ("micro", "tracking.wandb.mode=disabled", "train.num_tokens=102400")
    first = lab.chain(*words)
    for command in CHAIN[:3]:
        completed(lab, first[command])
    reach(lab, first["distill"], train, 3)
    lab.cluster.call("scancel", first["distill"])
    for command in CHAIN[4:]:
        lab.cluster.wait(first[command], "CANCELLED")
    lab.cluster.wait(first["distill"], "CANCELLED")
    second = lab.chain(*words)
    reach(lab, second["distill"], train, metrics(train)[-1]["step"] + 3)
    preempt(lab.cluster)
    completed(lab, second["report"])
    yield lab, first, second


def test_chain_is_resumed_and_survives_preemption(chained: tuple[Lab, dict[str, str], dict[str, str]]) -> None:
    lab, first, second = chained
    output = lab.folder / "outputs" / "micro"
    assert list(first) == list(second) == CHAIN
    for command, line in [("pretrain", "export teacher"), ("score", "score"), ("prune", "prune")]:
        assert f"{line}: already finished" in lab.log(second[command])
    distilled = lab.cluster.show(second["distill"])
    assert (distilled["JobState"], distilled["Restarts"]) == ("COMPLETED", "1")
    log = lab.log(second["distill"])
    assert log.count("resumed at step") == 2 and "SIGTERM: saved at step" in log and "requeued (restart 1 of" in log
    assert [row["step"] for row in metrics(output / "train")] == list(range(1, 101))
    assert {path.stem for path in (output / "eval").glob("*.json")} >= {"teacher", "pruned", "student"}
    assert (output / "student" / "model.safetensors").exists() and (output / "report.html").exists()


@pytest.fixture(scope="module")
def material(chained: tuple[Lab, dict[str, str], dict[str, str]]) -> tuple[str, str]:
    """Overrides: teacher and pruned student of the chain."""
    output = chained[0].folder / "outputs" / "micro"
    return f"teacher.path={output / 'teacher'}", f"student.path={output / 'pruned'}"


def test_search_ranks_what_the_array_has_tried(lab: Lab, material: tuple[str, str]) -> None:
    grid = ("search.target=260000", "search.tolerance=0.5", "search.hidden_size=[64,96]", "search.ffn_expansion=[2,3]")
    jobs = lab.chain("micro", *grid, "search.evaluate=true", script="search")
    completed(lab, jobs["rank"])
    log = lab.log(jobs["rank"])
    assert log.count("prune: already finished") == log.count("eval pruned: already finished") == 2
    ranked = json.loads((lab.folder / "outputs" / "micro" / "search.json").read_text())["candidates"]
    found = [row["zero_shot_loss"] for row in ranked]
    assert len(found) == 2 and found == sorted(found)


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """What must be equal to the last bit."""
    return [(row["step"], row["loss"], row["grad_norm"]) for row in metrics(folder)]


def test_interrupted_runs_on_two_nodes_equal_uninterrupted_ones(wide: Lab, material: tuple[str, str]) -> None:
    """TP 2 stopped by USR1 (the time limit's warning), DP 2 by preemption; both go on by themselves."""
    jobs, folders = {}, {}

    def submit(name: str, *words: str) -> None:
        folders[name] = wide.folder / "outputs" / name / "train"
        jobs[name] = wide.submit("distill", *MICRO, *material, f"output_dir=outputs/{name}", *words)

    submit("dp_stopped", DP_2, "tracking.wandb.mode=offline")
    reach(wide, jobs["dp_stopped"], folders["dp_stopped"], 3)
    preempt(wide.cluster)
    submit("tp_stopped", TP_2)
    submit("tp", TP_2)
    submit("dp", DP_2)
    reach(wide, jobs["tp_stopped"], folders["tp_stopped"], 3)
    wide.cluster.call("scancel", "--batch", "--signal=USR1", jobs["tp_stopped"])
    shown = {name: completed(wide, job) for name, job in jobs.items()}
    for layout in ("tp", "dp"):
        stopped = f"{layout}_stopped"
        assert (shown[stopped]["Restarts"], shown[layout]["Restarts"]) == ("1", "0")
        assert "resumed at step" in wide.log(jobs[stopped])
        assert len(losses(folders[layout])) == 40 and losses(folders[stopped]) == losses(folders[layout])
    for (_, over_tp, _), (_, over_dp, _) in zip(losses(folders["tp"]), losses(folders["dp"]), strict=True):
        assert over_tp == pytest.approx(over_dp, rel=1e-3)
    runs = [path.name for path in (folders["dp_stopped"] / "wandb").glob("offline-run-*")]
    assert len(runs) == 2 and len({name.rsplit("-", 1)[1] for name in runs}) == 1  # two lives, one W&B run


def test_killed_rank_ends_the_job(wide: Lab, material: tuple[str, str]) -> None:
    """The other one waits for it inside a collective."""
    folder = wide.folder / "outputs" / "killed"
    words = (*MICRO, *material, f"output_dir={folder}", "train.num_tokens=10_000_000")
    job = wide.submit("distill", *words)
    reach(wide, job, folder / "train", 2)
    os.kill(process_of(job, rank=1), signal.SIGKILL)
    shown = wide.cluster.wait(job, *ENDED, timeout_s=120)
    assert (shown["JobState"], shown["ExitCode"], shown["Restarts"]) == ("FAILED", "137:0", "0"), wide.log(job)
    shutil.rmtree(folder)


def process_of(job: str, *, rank: int) -> int:
    """The trainer's process id: on the test cluster all nodes share this machine's."""
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
    for entry in Path("/proc").iterdir():
        try:
            found = wanted <= set((entry / "environ").read_bytes().split(b"\0"))
            if found and b"minitron_train\0distill" in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            continue
    raise AssertionError(f"no process of rank {rank} of job {job}")


def test_job_without_its_teacher_is_not_queued(lab: Lab) -> None:
    with pytest.raises(AssertionError, match=r"exit code 2: error: teacher\.path=/none: no such folder"):
        lab.submit("distill", *MICRO, "teacher.path=/none")
