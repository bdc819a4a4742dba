"""What a job script does around the program: words, secrets, signals, requeues, failures. The program is a fake one."""

import json
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, until
from tests.slurm.conftest import TWO_NODES, Lab

pytestmark = [pytest.mark.slurm, pytest.mark.races]

ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")


@pytest.fixture(scope="module", autouse=True)
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Lab, str]]:
    """Jobs that reach their time limit on a node of their own, while the other tests run: it takes a minute and more."""
    found = {}
    for act in ("train",):
        lab = Lab(tmp_path_factory.mktemp(act) / "lab", cluster, {}, real=False)
        options = ("--partition=apart", "--time=1", "--signal=B:USR1@30")
        found[act] = lab, lab.submit("pretrain", *options, f"act.pretrain={act}")
    return found


def started(lab: Lab, *, life: int = 1) -> None:
    """Wait until the fake trainer runs, and has had a moment to install its handlers."""
    lives = lab.fake / "lives"
    until("start of the step", lambda: lives.exists() and f"{life}\n" in lives.read_text(), timeout_s=60)
    time.sleep(0.3)


def lives(lab: Lab) -> list[str]:
    """Every start of rank 0."""
    return (lab.fake / "lives").read_text().split()


def test_words_reach_python_as_they_are(lab: Lab) -> None:
    words = ["+recipe=micro", "tracking.wandb.name='a  b'", "name=$(touch pwned)", "x=`id`", 'y="q";*', "eval.tasks=[]"]
    job = lab.submit("eval", "--comment=two words", *words)
    assert lab.cluster.wait(job, *ENDED)["JobState"] == "COMPLETED", lab.log(job)
    assert json.loads((lab.fake / "argv.0").read_text()) == ["eval", *words]
    assert not (lab.folder / "pwned").exists()


def test_environment_is_logged_without_secrets(lab: Lab) -> None:
    secrets = {"WANDB_API_KEY": "wandb-123", "HF_TOKEN": "hf-123", "NCCL_AUTH": "nccl-123", "MY_PASSWORD": "my-123"}
    job = lab.submit("eval", environ={**secrets, "NCCL_DEBUG": "WARN", "UNRELATED": "private"})
    lab.cluster.wait(job, "COMPLETED")
    log = lab.log(job)
    assert "NCCL_DEBUG=WARN" in log and "MASTER_ADDR=n" in log and f"SLURM_JOB_ID={job}" in log
    assert "HF_TOKEN=(set, not shown)" in log
    assert not any(value in log for value in [*secrets.values(), "private"])


def test_signal_saves_and_requeues(wide_lab: Lab) -> None:
    """As Slurm warns before the time limit: the batch script gets USR1 and passes it on."""
    lab = wide_lab
    job = lab.submit("distill", "act.distill=train")
    started(lab)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], shown["Restarts"], lives(lab)) == ("COMPLETED", "1", ["1", "2"]), lab.log(job)
    log = lab.log(job)  # one file for both lives
    assert "SIGUSR1: passed on" in log and "requeued (restart 1 of at most 3)" in log


def test_evaluation_at_its_time_limit_goes_on(lab: Lab) -> None:
    """It has no handler: the signal ends it, and its journal is what the next life begins with."""
    job = lab.submit("eval", "act.eval=load")
    started(lab)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], shown["Restarts"], lives(lab)) == ("COMPLETED", "1", ["1", "2"]), lab.log(job)


def test_signal_while_loading_begins_again(wide_lab: Lab) -> None:
    lab = wide_lab
    job = lab.submit("distill", "act.distill=load")
    started(lab)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], lives(lab)) == ("COMPLETED", ["1", "2"]), lab.log(job)


def test_preempted_job_gives_way_and_comes_back(wide_lab: Lab) -> None:
    """Slurm tells only the step (SIGTERM) and gives a minute: the job must not use it up."""
    lab, cluster = wide_lab, wide_lab.cluster
    job = lab.submit("distill", "act.distill=train")
    started(lab)
    urgent = preempt(cluster)
    shown = cluster.wait(job, *ENDED)
    assert (shown["JobState"], shown["Restarts"], lives(lab)) == ("COMPLETED", "1", ["1", "2"]), lab.log(job)
    waited_s = seconds(cluster.show(urgent)["StartTime"]) - seconds(cluster.show(urgent)["SubmitTime"])
    assert waited_s < 30, "the preempted job used up its grace time"


def test_preempted_command_without_checkpoints_begins_again(lab: Lab) -> None:
    job = lab.submit("score", "--nodes=2", "--exclusive", "act.score=load")
    started(lab)
    preempt(lab.cluster)
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], lives(lab)) == ("COMPLETED", ["1", "2"]), lab.log(job)


def preempt(cluster: Cluster) -> str:
    """Take both nodes for a moment."""
    options = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1")
    return cluster.call("sbatch", "--parsable", *options).stdout.strip()


def seconds(time_text: str) -> float:
    """Slurm's 2026-01-31T12:00:00 as seconds."""
    return time.mktime(time.strptime(time_text, "%Y-%m-%dT%H:%M:%S"))


def test_cancelled_job_stays_cancelled(wide_lab: Lab) -> None:
    """It is sent SIGTERM too, and its ranks save."""
    lab = wide_lab
    job = lab.submit("distill", "act.distill=train")
    started(lab)
    lab.cluster.call("scancel", job)
    lab.cluster.wait(job, "CANCELLED")
    time.sleep(2)
    assert lab.cluster.show(job)["JobState"] == "CANCELLED" and lives(lab) == ["1"]


def test_requeues_are_capped(lab: Lab) -> None:
    site = lab.folder / "slurm" / "site.env"
    site.write_text(site.read_text().replace("max_requeues=3", "max_requeues=0"))
    job = lab.submit("distill", "act.distill=train")
    after = lab.submit("export", f"--dependency=afterok:{job}", "--kill-on-invalid-dep=yes")
    started(lab)
    lab.cluster.call("scancel", "--batch", "--signal=USR1", job)
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "75:0")
    assert "(max_requeues=0): giving up" in lab.log(job)
    assert lab.cluster.wait(after, *ENDED)["JobState"] == "CANCELLED"


@pytest.mark.parametrize(("act", "code"), [("fail", "3:0"), ("vanish", "137:0")])
def test_failed_rank_ends_the_job(wide_lab: Lab, act: str, code: str) -> None:
    """The other rank would wait for ever; a job that only failed is not requeued."""
    lab = wide_lab
    job = lab.submit("distill", f"act.distill={act}")
    shown = lab.cluster.wait(job, *ENDED, timeout_s=100)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", code), lab.log(job)
    assert lives(lab) == ["1"]


def test_a_failure_after_a_checkpoint_goes_on_from_there(lab: Lab) -> None:
    """The second life fails before it has saved again: that is not retried."""
    job = lab.submit("distill", "act.distill=crash")
    shown = lab.cluster.wait(job, *ENDED, timeout_s=100)
    assert (shown["JobState"], shown["ExitCode"], lives(lab)) == ("FAILED", "1:0", ["1", "2"]), lab.log(job)
    assert "failed with exit code 1, after a checkpoint" in lab.log(job)


@pytest.mark.parametrize("act", ["break_down", "miss"])
def test_a_failed_node_is_left_out(wide_lab: Lab, act: str) -> None:
    """The node where the first rank failed, or that the other ranks miss: both are n2 here, and n3 takes its place."""
    job = wide_lab.submit("distill", "--partition=all", f"act.distill={act}")
    shown = wide_lab.cluster.wait(job, *ENDED, timeout_s=100)
    log = wide_lab.log(job)
    assert (shown["JobState"], shown["Restarts"], lives(wide_lab)) == ("COMPLETED", "1", ["1", "2"]), log
    assert (shown["ExcNodeList"], shown["NodeList"]) == ("n2", "n[1,3]"), log
    assert "n2 failed; the next start excludes it" in log


def test_a_node_without_a_substitute_is_not_left_out(wide_lab: Lab) -> None:
    """Otherwise the job would wait for ever: its partition has two nodes."""
    job = wide_lab.submit("distill", "act.distill=break_down")
    shown = wide_lab.cluster.wait(job, *ENDED, timeout_s=100)
    assert (shown["JobState"], shown["Restarts"], shown["ExcNodeList"]) == ("COMPLETED", "1", "(null)")
    assert "too few other nodes of partition batch are in service (1)" in wide_lab.log(job)


def test_a_job_survives_the_death_of_its_node(tmp_path: Path) -> None:
    """Slurm itself requeues it, and the node is down; the cluster is another one, for what it does to its node."""
    with Cluster(node_timeout_s=15, kill_wait_s=10) as cluster:
        lab = Lab(tmp_path / "lab", cluster, {"distill": TWO_NODES}, real=False)
        job = lab.submit("distill", "--partition=all", "act.distill=train")
        started(lab)
        cluster.kill_node(2)
        shown = cluster.wait(job, *ENDED)
        assert (shown["JobState"], shown["Restarts"], shown["NodeList"]) == ("COMPLETED", "1", "n[1,3]"), lab.log(job)
        assert lives(lab) == ["1", "2"]


def test_requeues_by_slurm_are_capped_too(lab: Lab) -> None:
    site = lab.folder / "slurm" / "site.env"
    site.write_text(site.read_text().replace("max_requeues=3", "max_requeues=0"))
    job = lab.submit("distill", "act.distill=train")
    started(lab)
    lab.cluster.call("scontrol", "requeue", job)
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], shown["ExitCode"], lives(lab)) == ("FAILED", "75:0", ["1"]), lab.log(job)


def test_failed_stage_cancels_the_rest(lab: Lab) -> None:
    jobs = lab.chain("micro", "act.score=refuse")
    assert list(jobs) == ["score", "prune", "distill", "export"]
    shown = lab.cluster.wait(jobs["score"], *ENDED)
    assert (shown["JobState"], shown["ExitCode"]) == ("FAILED", "2:0")
    for command in ("prune", "distill", "export"):
        assert lab.cluster.wait(jobs[command], *ENDED)["JobState"] == "CANCELLED"


def test_a_failed_member_stops_only_what_comes_from_it(lab: Lab) -> None:
    """Member b comes from a, and c from the teacher; the last job reports on all."""
    members = {"a": "0", "b": "3", "c": "0"}
    lines, ends = ["- pretrain"], []
    for member, waits in members.items():
        for command in ("prune", "distill", "export", "eval"):
            lines.append(f"{waits} {command} member={member}")
            waits = str(len(lines) - 1)
        ends.append(waits)
    (lab.fake / "chain").write_text("\n".join([*lines, f"{','.join(ends)} report"]))
    jobs = lab.chain("micro", "act.distill.a=refuse")
    assert list(jobs)[:3] == ["pretrain", "prune-a", "distill-a"] and len(jobs) == 14
    shown = {name: lab.cluster.wait(job, *ENDED)["JobState"] for name, job in jobs.items()}
    cancelled = [
        "export-a",
        "eval-a",
        *(f"{command}-b" for command in ("prune", "distill", "export", "eval")),
        "report",
    ]
    wanted = dict.fromkeys(jobs, "COMPLETED") | dict.fromkeys(cancelled, "CANCELLED") | {"distill-a": "FAILED"}
    assert shown == wanted


def test_second_chain_waits_for_the_first(lab: Lab) -> None:
    """Two jobs of one stage must not write the same folder."""
    first = lab.chain("micro", "act.score=load")
    started(lab)
    second = lab.chain("micro")
    assert lab.cluster.show(second["score"])["JobState"] == "PENDING"
    lab.cluster.call("scancel", *first.values())
    assert lab.cluster.wait(second["export"], *ENDED)["JobState"] == "COMPLETED"


def test_search_tries_the_candidates_side_by_side(lab: Lab) -> None:
    jobs = lab.chain("micro", "act.search=load", script="search")
    assert list(jobs) == ["score", "try", "rank"]
    lab.cluster.wait(jobs["score"], "COMPLETED")

    def running() -> list[str]:
        listed = lab.cluster.call(
            "squeue", "--noheader", "--states=running", "--array", "--format=%K", "-j", jobs["try"]
        )
        return sorted(listed.stdout.split())

    until("three tasks at once", lambda: running() == ["1", "2", "3"], timeout_s=60)
    words = until(
        "a try", lambda: [w for w in json.loads((lab.fake / "argv.0").read_text()) if "only" in w], timeout_s=60
    )
    assert words[0] in {f"search.only={k}" for k in (1, 2, 3)}
    assert lab.cluster.show(jobs["rank"])["JobState"] == "PENDING"
    lab.cluster.call("scancel", jobs["try"])
    assert lab.cluster.wait(jobs["rank"], *ENDED)["JobState"] == "CANCELLED"


@pytest.mark.parametrize(("act", "signal"), [("train", "USR1")])
def test_time_limit_saves_and_requeues(limited: dict[str, tuple[Lab, str]], act: str, signal: str) -> None:
    """Slurm itself sends the warning, up to a minute early; at the limit it is SIGTERM, and KillWait to obey."""
    lab, job = limited[act]
    shown = lab.cluster.wait(job, *ENDED)
    assert (shown["JobState"], shown["Restarts"], lives(lab)) == ("COMPLETED", "1", ["1", "2"]), lab.log(job)
    assert f"saved after SIG{signal}" in lab.log(job)
