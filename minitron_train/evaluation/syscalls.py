"""A seccomp filter that denies generated programs the system calls which namespaces do not isolate.

Namespaces share the kernel's keyrings, which may hold Kerberos tickets. Sockets to a virtual machine's host (AF_VSOCK)
belong to no network namespace. System V shared memory is not covered by a process's memory limit. The module uses only
the standard library and ctypes, like `namespaces`. Format of the filter: seccomp(2), linux/filter.h.
"""

import ctypes
import errno
import os
import socket
import struct

PR_SET_SECCOMP, FILTER_MODE = 22, 2
ALLOW, ERRNO, KILL = 0x7FFF0000, 0x00050000, 0x80000000
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, JUMP_ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, MACHINE_AT, FIRST_ARGUMENT_AT = 0, 4, 16  # offsets in seccomp_data on little-endian machines
OTHER_ABI = 0x40000000  # x86-64 numbers its x32 calls from here
NEW_NAMESPACES = 0x7E020000  # flags of clone(2)
FAMILIES = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # AUDIT_ARCH, column of the tables
SOCKET, CLONE, CLONE3 = (41, 198), (56, 220), (435, 435)
REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "mount_setattr": (442, 442),
    "open_by_handle_at": (304, 265),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
}


def refuse_calls() -> None:
    """Deny these calls to this process and its descendants, permanently. Requires no_new_privs.

    Raises:
        OSError: the kernel does not support seccomp filters, or MACHINES lacks this machine's call numbers.
    """
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"the system call numbers of {machine} are unknown", "seccomp")
    code = b"".join(struct.pack("HBBI", *line) for line in build_filter(*MACHINES[machine]))
    kept = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HP", len(code) // 8, ctypes.addressof(kept))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(FILTER_MODE), program, ctypes.c_ulong(0), ctypes.c_ulong(0)) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "seccomp")


def build_filter(machine: int, column: int) -> list[tuple[int, int, int, int]]:
    """Return the filter's instructions: operation, jump if true, jump if false, operand."""
    lines = [
        (LOAD, 0, 0, MACHINE_AT),
        (JUMP_EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),  # calls of another ABI (int 0x80) use different numbers
        (LOAD, 0, 0, NUMBER_AT),
        (JUMP_AT_LEAST, 0, 1, OTHER_ABI),
        (RETURN, 0, 0, KILL),
        (JUMP_EQUAL, 0, 1, CLONE3[column]),
        (
            RETURN,
            0,
            0,
            ERRNO | errno.ENOSYS,
        ),  # a filter cannot read its flags behind a pointer; libc falls back to clone
    ]
    for call in REFUSED.values():
        lines += [(JUMP_EQUAL, 0, 1, call[column]), (RETURN, 0, 0, ERRNO | errno.EPERM)]
    lines += [
        (JUMP_EQUAL, 0, 4, CLONE[column]),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
        (JUMP_ANY_BIT, 0, 1, NEW_NAMESPACES),
        (RETURN, 0, 0, ERRNO | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
        (JUMP_EQUAL, 1, 0, SOCKET[column]),
        (RETURN, 0, 0, ALLOW),
        (LOAD, 0, 0, FIRST_ARGUMENT_AT),
    ]
    for family in FAMILIES:
        lines += [(JUMP_EQUAL, 0, 1, family), (RETURN, 0, 0, ALLOW)]
    return [*lines, (RETURN, 0, 0, ERRNO | errno.EAFNOSUPPORT)]
