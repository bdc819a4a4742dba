"""minitron_train.commands.slurm: which jobs a chain has, and what `check` finds before a job's work."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

import pytest

from minitron_train.arch import Shape
from minitron_train.commands import configuration, slurm
from minitron_train.commands.registry import COMMANDS
from minitron_train.config import Config
from minitron_train.planning import check as plan_check
from minitron_train.planning.precision import concrete
from minitron_train.planning.stages import disk_bytes
from minitron_train.runtime import preflight
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.launch import World
from tests.slurm.conftest import ROOT
from tests.support.models import save_tiny

AFTER = ["distill", "export", "eval", "speed", "report"]


@pytest.mark.parametrize(
    ("words", "commands"),
    [
        (["+recipe=micro"], ["pretrain", "score", "prune", *AFTER]),
        (["+recipe=smollm2"], ["fetch", "score", "prune", *AFTER]),
        (["+recipe=smollm2", "teacher.path=/teacher"], ["fetch", "score", "prune", *AFTER]),  # the evaluation data
        (["+recipe=smollm2", "teacher.path=/teacher", "eval.data_dir=/data"], ["score", "prune", *AFTER]),
        (["+recipe=4b", "teacher.path=/teacher"], ["fetch", "score", "prune", *AFTER]),  # data of MMLU, from the hub
        (["+recipe=4b", "teacher.path=/teacher", "eval.tasks=[]"], ["score", "prune", *AFTER]),
        (["+recipe=micro", "student.path=/student"], ["pretrain", *AFTER]),
    ],
)
def test_chain(words: list[str], commands: list[str]) -> None:
    waits = ["-", *map(str, range(len(commands)))]
    found = [f"{before} {command}" for before, command in zip(waits, commands, strict=False)]
    assert slurm.jobs(configuration.compose(words)) == found


@pytest.mark.parametrize(
    ("words", "ranks", "message"),
    [
        (["train.micro_batch_size=1"], {"distill": 8, "pretrain": 8}, None),
        (
            ["train.micro_batch_size=1"],
            {"distill": 16},
            "must be a multiple of train.micro_batch_size=1 x 16 data-parallel",
        ),
        (["parallel.pipeline_model_parallel_size=3"], {"pretrain": 8}, "it must divide the number of processes, 8"),
        (["parallel.tensor_model_parallel_size=2"], {"distill": 3}, "must divide the number of processes, 3"),
        (["parallel.tensor_model_parallel_size=2", "train.micro_batch_size=1"], {"run": 16}, None),
        (
            ["train.micro_batch_size=2"],
            {"run": 16},
            "must be a multiple of train.micro_batch_size=2 x 16 data-parallel",
        ),
        (["train.micro_batch_size=1"], {"score": 16}, None),
    ],
)
def test_a_batch_that_the_ranks_cannot_share_is_found_before_a_job_is_queued(
    words: list[str], ranks: dict[str, int], message: str | None
) -> None:
    config = configuration.compose(["+recipe=micro", "train.global_batch_size=8", *words])
    with pytest.raises(UserError, match=message) if message else nullcontext():
        slurm.accept([COMMANDS["run"]], config, ranks)


def test_the_scripts_count_the_ranks_of_a_job(tmp_path: Path) -> None:
    """Later options win; where the options do not tell the number, nothing is checked."""
    (tmp_path / "site.env").write_text('site_sbatch_of=([distill]="--nodes=2 --ntasks-per-node=4")\n')
    asked = {"": "8", "--nodes=3": "12", "--ntasks=5": "5", "-N2": "", "--nodes=2-4": "", "--time=1": "8"}
    script = "source slurm/site.sh\n" + "".join(f'echo "$(ranks_of distill {words})"\n' for words in asked)
    environment = os.environ | {"MINITRON_SITE": str(tmp_path / "site.env")}
    done = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [f"--ranks=distill:{number}" if number else "" for number in asked.values()]


NO_DATA = ["+recipe=4b_from_8b", "calibration.num_samples=8"]  # data=nemotron4_blend, whose parts are the user's


@pytest.mark.parametrize(
    ("command", "more", "is_read"),
    [
        ("distill", [], True),
        ("eval", [], True),
        ("prune", [], True),
        ("eval", ["data.validation_path={text}"], False),
        ("score", ["calibration.path={text}"], False),
        ("score", ["calibration.path={text}s"], True),
        ("score", [f"calibration.tokens_path={__file__}"], False),
        ("distill", ["data.path={text}"], False),
        ("export", [], False),
    ],
)
def test_data_are_looked_for_before_a_job_is_queued(
    tmp_path: Path, command: str, more: list[str], is_read: bool
) -> None:
    """Where a command reads them, and only there."""
    (tmp_path / "text.txt").write_text("words")
    config = configuration.compose([*NO_DATA, *(word.format(text=tmp_path / "text.txt") for word in more)])
    with pytest.raises(UserError, match=r"no path|no text file matches") if is_read else nullcontext():
        slurm.accept([COMMANDS[command]], config)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "usage: python -m minitron_train.commands.slurm chain|"),
        (["check"], "usage: "),
        (["chian", "+recipe=tiny"], "usage: "),
        (["chain", *NO_DATA], "these parts have no path"),
        (["accept", "distill", *NO_DATA], "these parts have no path"),
        (["accept", "distill", "+recipe=tinyy"], "unknown recipe 'tinyy'"),
        (["chain", "+recipe=4b", f"data.path={__file__}"], "teacher.path is not set: "),
        (["accept", "run", "+recipe=4b", f"data.path={__file__}"], "teacher.path is not set: "),
        (["chain", "+recipe=tiny", "student.num_layers=99"], "student.num_layers=99: larger than the teacher's 6; "),
        (
            ["chain", "+recipe=tiny", "parallel.tensor_model_parallel_size=3"],
            "must divide the teacher's num_attention_heads=8",
        ),
        (["accept", "prune", "+recipe=tiny", "teacher.path=/nowhere"], "teacher.path=/nowhere: no such folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = slurm.main(["slurm.py", *words])
    said = capsys.readouterr()
    assert code == 2 and not said.out
    assert said.err.startswith("error: ") and message in said.err and len(said.err.splitlines()) == 1


GRID = ("search.target=260000", "search.tolerance=0.5", "search.hidden_size=[64,96]", "search.ffn_expansion=[2,3]")


@pytest.mark.parametrize(
    ("command", "words", "marked"),
    [
        ("pretrain", [], ["pretrain/train"]),
        ("distill", [], ["train"]),
        ("run", [], ["pretrain/train", "train"]),
        ("eval", [], []),
        ("search", ["search.evaluate=true", *GRID], []),
        ("search", ["search.retrain_tokens=1000", *GRID, "search.only=2"], ["search/l3-a4-f128-h64/train"]),
    ],
)
def test_marks(command: str, words: list[str], marked: list[str]) -> None:
    config = configuration.compose(["+recipe=micro", "output_dir=out", *words])
    assert slurm.marks(COMMANDS[command], config, World()) == [Path("out", folder, "stopped.json") for folder in marked]


def test_the_mark_is_the_one_that_training_leaves() -> None:
    from minitron_train.stages import STOPPED

    assert slurm.STOPPED == STOPPED


def test_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def complaints(gpus: str, local_size: int, **more: str) -> list[str]:
        environ = {"SLURM_GPUS_ON_NODE": gpus, "SLURMD_NODENAME": "n7", **more}
        return list(slurm.gpu_complaints(environ, World(0, 8, 0, local_size)))

    found = 1
    monkeypatch.setattr(slurm, "count_gpus", lambda: found)
    assert complaints("8", 8, SLURM_GPUS_PER_TASK="h100:1") == [], "each rank sees its own"
    assert len(complaints("2", 4)) == len(complaints("1", 4)) == 1
    assert complaints("", 4) == [] and complaints("0", 4) == []
    assert complaints(str(found + 1), 1) == [
        f"n7: the job has {found + 1} GPUs here, nvidia-smi lists {found}; leave the node out (--exclude=n7)"
    ]


def test_teacher_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["+recipe=4b_from_8b", f"output_dir={tmp_path}/out"]
    with pytest.raises(UserError, match=r"no teacher in .*; run `python -m minitron_train fetch"):
        slurm.check(COMMANDS["distill"], configuration.compose(words), World(), {})
    (tmp_path / "out" / "teacher").mkdir(parents=True)
    monkeypatch.setattr(plan_check.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    with pytest.raises(UserError, match=r"distill: needs 273 GiB of disk .* 1 GiB are free"):
        slurm.check(COMMANDS["distill"], configuration.compose(words), World(), {})
    slurm.check(COMMANDS["distill"], configuration.compose([*words, "plan.check=false"]), World(), {})
    (tmp_path / "out" / "train").mkdir()
    with (tmp_path / "out" / "train" / "checkpoint").open("wb") as file:
        file.truncate(300 * 2**30)  # sparse: a requeued job writes over its own checkpoints
    slurm.check(COMMANDS["distill"], configuration.compose(words), World(), {})


def test_own_student_is_weighed_by_its_own_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the recipe's student, nor by the teacher where no recipe names one."""
    words = [f"teacher.path={save_tiny('llama', tmp_path / 'teacher')}", f"output_dir={tmp_path}/out"]
    student = save_tiny("llama", tmp_path / "student", hidden_size=16)
    weighed = []

    def weigh(config: Config, name: str, needs: plan_check.Needs, teacher: Shape, student: Shape, folder: Path) -> None:
        weighed.append(disk_bytes(concrete(config), teacher, student)[str(needs.disk)])

    monkeypatch.setattr(plan_check, "refuse_disk", weigh)
    for command, more in (("distill", [f"student.path={student}"]), ("distill", []), ("prune", [])):
        slurm.check(COMMANDS[command], configuration.compose([*words, *more]), World(), {})
    assert weighed[0] < weighed[1] and len(weighed) == 3


@pytest.mark.parametrize("command", ["export", "eval", "report"])
def test_commands_without_a_teacher_need_none(tmp_path: Path, command: str) -> None:
    slurm.check(COMMANDS[command], configuration.compose([f"output_dir={tmp_path}/out"]), World(), {})


def ranks(size: int, *words: str, hosts: Mapping[int, str] | None = None) -> list[tuple[int, str, str]]:
    """`check distill` on some ranks, on localhost where `hosts` names no other; code, output and errors of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    started = []
    for rank in range(size):
        environ = {
            **os.environ,
            **{"SLURM_STEP_ID": "0", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(size)},
            **{"SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1", "SLURMD_NODENAME": "localhost"},
            **({"SLURMD_NODENAME": hosts[rank]} if hosts and rank in hosts else {}),
            **{"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)},
        }
        command = [sys.executable, "-m", "minitron_train.commands.slurm", "check", "distill", *words]
        started.append(
            subprocess.Popen(command, env=environ, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        )
    done = [(*process.communicate(), process.returncode) for process in started]
    return [(code, output, errors) for output, errors, code in done]


@pytest.mark.races
def test_ranks_meet(tmp_path: Path) -> None:
    (tmp_path / "teacher").mkdir()
    folder = tmp_path / "out"
    found = ranks(3, "+recipe=micro", f"teacher.path={tmp_path}/teacher", f"output_dir={folder}")
    assert found == [(0, f"{folder}/train/stopped.json\n", ""), (0, "", ""), (0, "", "")]
    assert list(folder.iterdir()) == []


@pytest.mark.races
def test_complaint_of_one_rank_ends_all(tmp_path: Path) -> None:
    first, second = ranks(2, "+recipe=micro", f"teacher.path={tmp_path}/none", f"output_dir={tmp_path}/out")
    assert first[0] == second[0] == 2 and not first[1]
    assert first[2] == f"error: teacher.path={tmp_path}/none: no such folder; give a Hugging Face folder (rank 0)\n"
    assert second[2] == first[2].replace("error: ", "error: see the message of rank 0: ").replace("rank 0)", "rank 1)")


@pytest.mark.races
def test_a_rank_that_cannot_reach_its_neighbour_is_named_by_all(tmp_path: Path) -> None:
    """Nobody connects to a multicast address: the network is unreachable at once."""
    (tmp_path / "teacher").mkdir()
    words = ["+recipe=micro", f"teacher.path={tmp_path}/teacher", f"output_dir={tmp_path}/out"]
    link = "rank 1 on localhost cannot reach rank 2 on 224.0.0.1: Network is unreachable; check for a firewall between them"
    assert ranks(3, *words, hosts={2: "224.0.0.1"}) == [
        (2, "", f"error: {'see the message of rank 0: ' if rank else ''}{link} (rank {rank})\n") for rank in range(3)
    ]


@pytest.mark.races
def test_a_neighbour_that_is_silent_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """As behind a firewall that drops packets; here the queue of connections is full."""
    monkeypatch.setattr(preflight, "CALL_S", 0.2)
    with ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        there = full.getsockname()
        for _ in range(4):
            caller = stack.enter_context(socket.socket())
            caller.setblocking(False)
            caller.connect_ex(there)
        complaints = preflight.call_neighbour([("n0", 0), there], 0)
    assert complaints == ["rank 0 on n0 cannot reach rank 1 on 127.0.0.1: timed out; check for a firewall between them"]


CARD = b'\x00\x00\x00\x4b{"rank": %d, "host": "nowhere", "port": 9, "versions": {}, "complaints": []}'


@pytest.mark.races
@pytest.mark.parametrize(
    ("message", "line"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "message from another rank: damaged"),
        (b"\x00\x00\x00\x02{}", "message from another rank: damaged"),
        (b'\x00\x00\x00\x0c{"rank":"one"', "message from another rank: damaged"),
        (b"\x00\x00\x00\x04null", "message from another rank: damaged"),
        (b"", "another rank has ended"),
        (CARD % 0, "nowhere claims rank 0 of 2, which is taken or does not exist; check that no other job uses 127"),
        (CARD % 7, "nowhere claims rank 7 of 2, which is taken or does not exist; check that no other job uses 127"),
    ],
)
def test_another_program_at_the_port(tmp_path: Path, message: bytes, line: str) -> None:
    with preflight.listen(0) as probe:
        first = ("127.0.0.1", int(probe.address[1]))

    def foreign() -> None:
        connection = preflight.call(first)
        os.write(connection.fileno(), message)
        connection.close()

    thread = threading.Thread(target=foreign, daemon=True)
    thread.start()
    card = preflight.Card(rank=0, host="127.0.0.1", port=first[1], versions={}, complaints=[])
    with pytest.raises(UserError, match=line) as caught:
        preflight.gather(card, tmp_path, first, 2, 90)
    assert "\n" not in str(caught.value)
    thread.join(timeout=10)


@pytest.mark.races
def test_what_the_others_found_outlives_a_rank_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "ANSWER_S", 1.0)
    told = {}

    def other(rank: int, answer: Callable[[Connection], object]) -> None:
        with preflight.listen(0) as own, preflight.call(first) as connection:
            preflight.send(connection, {**card, "rank": rank, "host": "127.0.0.1", "port": own.address[1]})
            preflight.receive(connection, preflight.Notice, "rank 0", 10)
            answer(connection)
            if not connection.closed:
                told[rank] = preflight.receive(connection, preflight.Complaints, "rank 0", 10)

    with preflight.listen(0) as probe:
        first = ("127.0.0.1", int(probe.address[1]))
    card = preflight.Card(rank=0, host="127.0.0.1", port=first[1], versions={}, complaints=[])
    behaviours = (lambda _: None, Connection.close, lambda connection: preflight.send(connection, ["rank 3: no way"]))
    others = [threading.Thread(target=other, args=pair, daemon=True) for pair in enumerate(behaviours, 1)]
    for thread in others:
        thread.start()
    complaints = preflight.gather(card, tmp_path, first, 4, 90)
    for thread in others:
        thread.join(timeout=10)
    silent = "rank 1 on 127.0.0.1 does not answer; check its node"
    assert complaints == [silent, "rank 2 on 127.0.0.1 has ended; see its message", "rank 3: no way"]
    assert told == {1: [silent], 3: [silent]}


@pytest.mark.races
def test_missing_rank_is_named(tmp_path: Path) -> None:
    with preflight.listen(0) as probe:
        environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.address[1])}
    with pytest.raises(UserError, match="1 s: ranks 1, 2 did not reach localhost"):
        preflight.preflight([], tmp_path, World(0, 3), environ, 1.0)


def test_different_software_is_named() -> None:
    versions = ({"python": "3.11.9", "torch": "2.9.1"}, {"python": "3.11.9", "torch": "2.8.0"})
    cards = {
        rank: preflight.Card(rank=rank, host=f"n{rank + 1}", port=9, versions=found, complaints=[])
        for rank, found in enumerate(versions)
    }
    assert preflight.version_complaints(cards) == ["rank 1 on n2: torch is 2.8.0, on rank 0 it is 2.9.1"]
    assert preflight.absent([0, 2], 12) == "1, 3, 4, 5, 6, 7, 8, 9 and 2 more"
