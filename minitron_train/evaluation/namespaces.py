"""Linux namespaces that isolate a generated program and end with it.

The module uses only the standard library and ctypes, because the process that calls `enter` then runs untrusted code. It
needs no privileges besides user namespaces (user_namespaces(7)). Root becomes nobody.
"""

import contextlib
import ctypes
import os
import resource
import signal
import sys
from pathlib import Path
from typing import NoReturn

from minitron_train.evaluation.syscalls import refuse_calls

NOBODY = 65534
UNAVAILABLE = 97  # exit status if the kernel denies the namespaces; the reason is on stderr
SCRATCH_BYTES = 64 * 2**20
SCRATCH_FILES = 2048
ROOT_OPTIONS = "size=1m,nr_inodes=2k,mode=755"

CLONE_NEW = {
    "user": 0x10000000,
    "mount": 0x00020000,
    "pid": 0x20000000,
    "network": 0x40000000,
    "ipc": 0x08000000,
    "uts": 0x04000000,
}
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
KEPT_FLAGS = {4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}  # statvfs -> mount: a remount must not clear them
SYS_MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE = 442, -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
CAPABILITY_VERSION = 0x20080522
MNT_DETACH = 2

LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache")
DEVICES = ("null", "zero", "full", "random", "urandom")

libc = ctypes.CDLL(None, use_errno=True)


def call(what: str, *arguments: object) -> None:
    """Call a function of libc that returns 0 on success; raises an OSError that names it otherwise."""
    if getattr(libc, what)(*arguments) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), what)


def enter(root: str) -> None:
    """Continue in a child process inside new namespaces. The calling process exits when that child exits.

    The child has no network, sees only its own processes, and runs as nobody without capabilities. It can write to a
    scratch folder of limited size, which holds its empty working directory. Only the libraries of Python and of the system
    are visible, read-only. Its processes are killed when it exits, or when the calling process or that one's parent ends.

    Args:
        root: an empty folder on which to mount the new root; outside the namespaces it stays empty.
    """
    try:
        own_uid, own_gid = os.geteuid(), os.getegid()
        unshare_as(own_uid, own_gid)
        end_with_parent()
        child = os.fork()
        if child:
            end_as(child)
        build_root(root)  # this is the first process of the pid namespace
        become_nobody()
    except OSError as error:
        print(f"{error.filename or 'namespaces'}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(UNAVAILABLE)
    os.setsid()  # its process group has members outside the namespaces
    end_with_parent()
    child = os.fork()
    if child:
        end_as(child)


def end_as(child: int) -> NoReturn:
    """Wait for `child`, reap other children, and exit with its status. This also ends all processes of a pid namespace."""
    while True:
        pid, status = os.wait()
        if pid == child:
            os._exit(min(255, abs(os.waitstatus_to_exitcode(status))))


def end_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends. A change of user resets this, so call it again then."""
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def unshare_as(uid: int, gid: int) -> None:
    """Create the namespaces. Root keeps root for the mounts and also maps nobody; another user is mapped to nobody."""
    waiting, go = os.pipe()
    helper = map_from_outside(waiting, go, os.getpid()) if uid == 0 else None
    if helper:
        with contextlib.suppress(OSError):  # some containers forbid it; the process then keeps its groups
            os.setgroups([])
    flags = 0
    for flag in CLONE_NEW.values():
        flags |= flag
    try:
        call("unshare", flags)
    finally:
        os.close(waiting)
        os.close(go)
    if helper and os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1]) == 0:
        return
    for name, line in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {uid} 1"), ("gid_map", f"{NOBODY} {gid} 1")):
        Path("/proc/self", name).write_text(line)


def map_from_outside(waiting: int, go: int, pid: int) -> int:
    """Fork a process that maps root and nobody into the user namespace of `pid`, after `go` is closed there.

    Only a process outside the namespace may map more than its own user.
    """
    helper = os.fork()
    if helper:
        return helper
    try:
        os.close(go)
        os.read(waiting, 1)
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    except OSError:
        os._exit(1)
    os._exit(0)


def visible() -> list[Path]:
    """Return the folders and files that stay readable: Python's library, installed packages, shared libraries."""
    packages = [path for path in map(Path, sys.path) if path.name in ("site-packages", "dist-packages")]
    wanted = {*map(Path, LIBRARIES), Path(os.__file__).parent, Path(sys.base_prefix, "lib"), *packages}
    chosen: list[Path] = []
    for path in sorted(path.absolute() for path in wanted if path.exists()):
        if not any(path.is_relative_to(above) for above in chosen):
            chosen.append(path)
    return chosen


def build_root(root: str) -> None:
    """Make `root` the root of the file system, with read-only libraries, a writable scratch folder and five devices."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, ROOT_OPTIONS)
    Path(root, "tmp").mkdir()
    options = f"size={SCRATCH_BYTES},nr_inodes={SCRATCH_FILES},mode=1777"
    mount("tmpfs", f"{root}/tmp", "tmpfs", MS_NOSUID | MS_NODEV, options)
    for path in visible():  # mounted after the scratch folder, because this Python may be below /tmp
        bind(path, root)
    for name in DEVICES:
        bind(Path("/dev", name), root, read_only=False)
    Path(root, "dev/shm").symlink_to("/tmp")
    mount(None, root, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV)
    os.chdir(root)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    work = Path("/tmp/work")  # empty even if this Python is below /tmp
    work.mkdir()
    work.chmod(0o777)  # the program runs as nobody
    os.chdir(work)


def mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    """mount(2)."""
    words = [word.encode() if word is not None else None for word in (source, target, kind, options)]
    try:
        call("mount", words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    except OSError as error:
        raise OSError(error.errno, error.strerror, f"mount {target}") from None


def bind(path: Path, root: str, *, read_only: bool = True) -> None:
    """Bind-mount `path` under `root`. A symbolic link in / is copied as a link (/lib on many systems)."""
    target = Path(f"{root}{path}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() and path.parent == Path("/"):
        target.symlink_to(path.readlink())
        return
    if path.is_dir():
        target.mkdir(exist_ok=True)
    else:
        target.touch()
    mount(str(path), str(target), None, MS_BIND | MS_REC)
    if read_only:
        protect(str(target))


def protect(target: str) -> None:
    """Make a mount and the mounts below it read-only; before Linux 5.12 only the mount itself."""
    attributes = (ctypes.c_uint64 * 4)(MS_RDONLY | MS_NOSUID | MS_NODEV, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(attributes))
    where = (ctypes.c_int(AT_FDCWD), target.encode(), ctypes.c_uint(AT_RECURSIVE))
    if libc.syscall(ctypes.c_long(SYS_MOUNT_SETATTR), *where, ctypes.byref(attributes), size) == 0:
        return
    present = os.statvfs(target).f_flag
    kept = sum(flag for bit, flag in KEPT_FLAGS.items() if present & bit)
    mount(None, target, None, MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def become_nobody() -> None:
    """Permanently drop root (if this is root inside the namespace), all capabilities, and the calls denied by `syscalls`."""
    if os.geteuid() != NOBODY:
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION, 0)
    call("capset", ctypes.byref(header), ctypes.byref((ctypes.c_uint32 * 6)()))
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    refuse_calls()


def limit(values: dict[int, int]) -> None:
    """Set hard resource limits, by their number in `resource`. Root outside the namespaces could raise them again."""
    for number, value in values.items():
        resource.setrlimit(number, (value, value))
