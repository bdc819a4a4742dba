"""A throw-away Slurm cluster on this host: munged, slurmctld and three slurmd on loopback, everything in one folder.

No systemd, no cgroups, no accounting. Each slurmd lives in name spaces of its own, for a host name of its own, hence
root. What was learnt about it:

- All nodes are 127.0.0.1 with ports of their own. An address per node (127.0.1.x) makes srun hang, for its replies come
  from 127.0.0.1.
- munged wants its socket in a folder that others may enter; unix sockets want short paths. So: /tmp, mode 0755.
- slurmd loads a cgroup plugin even without cgroups, and the one for v2 asks systemd: v1, which mounts nothing by itself.
- A GPU is whatever character device gres.conf names: copies of /dev/null let scripts that ask for GPUs be submitted.
- A requeued job waits for cred_expire (120 s by default).
"""

import contextlib
import functools
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

TOOLS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "unshare", "setpriv")
NUM_NODES, NUM_CPUS, NUM_GPUS = 3, 64, 8  # of every node; what the scripts ask for, not what this machine has
SYSTEM_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"

SLURM_CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld
SlurmdLogFile={folder}/log/slurmd.%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,defer_batch=no,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait={kill_wait_s}
OverTimeLimit=0
MinJobAge=3600
SlurmctldTimeout=60
SlurmdTimeout={node_timeout_s}
MailProg=/bin/true
GresTypes=gpu
{nodes}
PartitionName=batch Nodes=n1,n2 Default=YES MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=60 State=UP
PartitionName=urgent Nodes=n1,n2 MaxTime=INFINITE DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=all Nodes=n1,n2,n3 MaxTime=INFINITE DefaultTime=10 PriorityTier=1 GraceTime=60 State=UP
PartitionName=apart Nodes=n3 MaxTime=INFINITE DefaultTime=10 PriorityTier=1 State=UP
"""
SLURMD = 'hostname "$1"; mount --bind "$2/hosts" /etc/hosts; exec slurmd -D -N "$1" -f "$2/slurm.conf"'


@functools.cache
def unavailable() -> str | None:
    """Why no cluster can be started here; None when it can."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=SYSTEM_PATH) is None]
    if missing:
        return f"not installed: {' '.join(missing)} (apt-get install slurm-wlm munge)"
    if os.geteuid() != 0:
        return "needs root"
    spaces = subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True)
    return None if spaces.returncode == 0 else "needs root that may unshare name spaces"


class Cluster:
    """`with Cluster() as cluster:` starts the daemons and ends them, with all jobs.

    Args:
        node_timeout_s: until a node that does not answer is down, and its jobs are requeued.
        kill_wait_s: between SIGTERM and SIGKILL.
    """

    def __init__(self, *, node_timeout_s: int = 60, kill_wait_s: int = 60) -> None:
        self.limits = {"node_timeout_s": node_timeout_s, "kill_wait_s": kill_wait_s}
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.daemons: list[subprocess.Popen[bytes]] = []
        self.environment = {**os.environ, "PATH": SYSTEM_PATH, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def __enter__(self) -> "Cluster":
        try:
            self._write_files()
            keys = [f"--{key}={self.folder}/munge/{key}" for key in ("socket", "seed-file", "pid-file", "log-file")]
            self._start("munged", "--foreground", "--force", f"--key-file={self.folder}/munge/key", *keys)
            until("munged's socket", (self.folder / "munge" / "socket").exists, timeout_s=30)
            self._start("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
            for node in range(1, NUM_NODES + 1):
                spaces = ("unshare", "--uts", "--mount", "--propagation", "private")
                self._start(*spaces, "bash", "-ec", SLURMD, "slurmd", f"n{node}", str(self.folder))
            until("idle nodes", lambda: self._num_idle() == NUM_NODES, timeout_s=60, otherwise=self._logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """Only what this object started: the daemons by their handles, jobs by the name spaces that they run in."""
        ours = namespace(os.getpid())
        spaces = {namespace(daemon.pid) for daemon in self.daemons} - {ours, None}
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in {daemon.pid for daemon in self.daemons if daemon.poll() is None} | inhabitants(spaces):
                try:
                    os.kill(pid, number)
                except ProcessLookupError:
                    pass
            end_s = time.monotonic() + 3
            while time.monotonic() < end_s and (
                inhabitants(spaces) or any(daemon.poll() is None for daemon in self.daemons)
            ):
                time.sleep(0.05)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write_files(self) -> None:
        self.folder.chmod(0o755)
        for name in ("munge", "state", "log", *(f"spool.n{node}" for node in range(1, NUM_NODES + 1))):
            (self.folder / name).mkdir(mode=0o755)
        key = self.folder / "munge" / "key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        nodes = [f"n{node}" for node in range(1, NUM_NODES + 1)]
        own_port, *ports = free_ports(1 + NUM_NODES)
        lines = [
            f"NodeName={name} NodeAddr=127.0.0.1 Port={port} CPUs={NUM_CPUS} RealMemory=16000 "
            f"Gres=gpu:{NUM_GPUS} State=UNKNOWN"
            for name, port in zip(nodes, ports, strict=True)
        ]
        host = os.uname().nodename.split(".")[0]
        text = SLURM_CONF.format(host=host, port=own_port, folder=self.folder, nodes="\n".join(lines), **self.limits)
        (self.folder / "slurm.conf").write_text(text)
        (self.folder / "hosts").write_text(
            Path("/etc/hosts").read_text() + "".join(f"\n127.0.0.1 {name}" for name in nodes) + "\n"
        )
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        for gpu in range(NUM_GPUS):
            os.mknod(self.folder / f"gpu{gpu}", 0o20666, os.makedev(1, 3))
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-{NUM_GPUS - 1}]\n")

    def _start(self, *command: str) -> None:
        with (self.folder / "log" / f"start.{len(self.daemons)}").open("wb") as log:
            # ended with this process, even by a kill that leaves no time for __exit__
            daemon = subprocess.Popen(
                ("setpriv", "--pdeathsig", "TERM", *command),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment,
                start_new_session=True,
            )
        self.daemons.append(daemon)

    def kill_node(self, node: int) -> None:
        """End a node as a power failure does: its daemon, and everything that runs on it."""
        space = namespace(self.daemons[1 + node].pid)
        for pid in inhabitants({space}):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _num_idle(self) -> int:
        for daemon in self.daemons:
            assert daemon.poll() is None, f"{daemon.args} ended: {self._logs()}"
        listed = self.call("sinfo", "--noheader", "--states=idle", "--format=%n", check=False).stdout
        return len(set(listed.split()))

    def _logs(self) -> str:
        return "\n".join(
            f"{path.name}: {path.read_text(errors='replace')[-2000:]}"
            for path in sorted((self.folder / "log").iterdir())
        )

    # Slurm's commands

    def call(
        self,
        *command: str,
        cwd: Path | None = None,
        check: bool = True,
        environ: Mapping[str, str] | None = None,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command with this cluster as the default one."""
        environment = {**self.environment, **(environ or {})}
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=timeout_s)
        assert not check or done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}: {done.stderr}"
        return done

    def show(self, job: str) -> dict[str, str]:
        """`scontrol show job` as a mapping: JobState, ExitCode, Restarts, Reason, …"""
        text = self.call("scontrol", "--oneliner", "show", "job", job).stdout
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def wait(self, job: str, *states: str, timeout_s: float = 180) -> dict[str, str]:
        """Until the job is in one of the states; `sbatch --wait` would answer half a minute late."""
        return until(
            f"job {job} in {' or '.join(states)}",
            lambda: shown if (shown := self.show(job))["JobState"] in states else None,
            timeout_s=timeout_s,
            otherwise=lambda: str(self.show(job)),
        )


def free_ports(count: int) -> list[int]:
    """TCP ports that nobody listens on."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def until(what: str, ready: Callable[[], T | None], *, timeout_s: float, otherwise: Callable[[], str] = str) -> T:
    """Poll until something is true and return it; AssertionError after the time."""
    end_s = time.monotonic() + timeout_s
    while not (found := ready()):
        assert time.monotonic() < end_s, f"{timeout_s:.0f} s: no {what}; {otherwise()}"
        time.sleep(0.1)
    return found


def namespace(pid: int) -> str | None:
    """The mount name space that a process lives in; None when it has ended."""
    try:
        return str(Path(f"/proc/{pid}/ns/mnt").readlink())
    except OSError:
        return None


def inhabitants(spaces: set[str | None]) -> set[int]:
    """Processes in some name spaces."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()] if spaces else []
    return {pid for pid in pids if namespace(pid) in spaces}
