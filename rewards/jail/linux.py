"""System calls that Python 3.11 has no words for: namespaces, mounts, capabilities, seccomp."""

import ctypes
import os
import platform
import struct
from collections.abc import Sequence
from typing import Any

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x02000000, 0x04000000, 0x08000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET, CLONE_NEWTIME = 0x10000000, 0x20000000, 0x40000000, 0x00000080
CLONE_THREAD = 0x00010000
NEW_NAMESPACES = (
    CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET
) | CLONE_NEWTIME

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MS_NOATIME, MS_NODIRATIME, MS_RELATIME = 0x4000, 1 << 18, 1024, 2048, 1 << 21
MNT_DETACH = 2

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP = 1, 4, 24
PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP = 36, 38, 22
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

AF_UNIX = 1
EPERM, ENOSYS = 1, 38

# Flags of a mount that a remount inside a user namespace must keep, by what statvfs calls them.
_KEPT_FLAGS = (
    (os.ST_NOSUID, MS_NOSUID), (os.ST_NODEV, MS_NODEV), (os.ST_NOEXEC, MS_NOEXEC), (os.ST_NOATIME, MS_NOATIME),
    (os.ST_NODIRATIME, MS_NODIRATIME), (os.ST_RELATIME, MS_RELATIME),
)  # fmt: skip

# What no snippet needs and what has let others out of sandboxes before. Numbers of (x86_64, aarch64).
_REFUSED = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "pidfd_getfd": (438, 438), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429),
    "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "init_module": (175, 105),
    "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "open_by_handle_at": (304, 265), "personality": (135, 92),
}  # fmt: skip
# Refused as well where there is no namespace of process ids.
_TOUCH_PROCESSES = {
    "kill": (62, 129), "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "fork": (57, None), "vfork": (58, None), "setpriority": (141, 140),
    "prlimit64": (302, 261), "sched_setaffinity": (203, 122),
}  # fmt: skip
_CLONE, _CLONE3, _SOCKET, _TGKILL = (56, 220), (435, 435), (41, 198), (234, 131)
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_WRITE_FILE, _READ_FILE, _READ_DIR = 2, 4, 8
_ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> None:
    """A function of libc that returns below 0 where it fails. Raises: OSError, which names it."""
    if getattr(_libc, name)(*args) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    call("unshare", flags)


def prctl(option: int, value: int = 0) -> None:
    call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    try:
        call("mount", source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), data.encode())
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} ({kind or source} on {target})") from None


def bind(source: str, target: str, *, read_only: bool) -> None:
    """Mount what lies at `source` at `target` as well, without what is mounted below it."""
    mount(source, target, flags=MS_BIND)
    if read_only:
        have = os.statvfs(target).f_flag
        kept = sum(flag for stat_flag, flag in _KEPT_FLAGS if have & stat_flag)
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY | MS_NOSUID | MS_NODEV | kept)


def change_root(folder: str) -> None:
    """`folder`, a mount of its own, becomes the root of all paths; what was there before is gone."""
    os.chdir(folder)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def drop_bounding_set() -> None:
    """Nothing that is executed later gets a capability back."""
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0) < 0:
            break


def drop_capabilities() -> None:
    header, none = struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24)
    call("capset", header, none)


def refuse_system_calls(*, alone: bool) -> None:
    """No new namespaces, mounts, traced processes, keys, kernel rings, or sockets other than unix ones.

    alone: nor other processes: neither made nor signalled. For where no namespace keeps them apart.
    Raises: OSError where the kernel has no seccomp, or for an architecture that is not listed.
    """
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    program = _filter(alone)
    buffer = ctypes.create_string_buffer(program)
    head = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    call("prctl", PR_SET_SECCOMP, ctypes.c_ulong(SECCOMP_MODE_FILTER), head, 0, 0)


def see_only(folders: Sequence[str], devices: Sequence[str]) -> None:
    """Landlock: read what lies in `folders`, use `devices`, touch no other file. Raises: OSError where it is absent."""
    version = _system_call(_LANDLOCK_CREATE, None, 0, 1)
    handled = (1 << (13 if version == 1 else 14 if version == 2 else 15)) - 1
    rules = _system_call(_LANDLOCK_CREATE, struct.pack("Q", handled), 8, 0)
    for paths, access in ((folders, _READ_FILE | _READ_DIR), (devices, _READ_FILE | _WRITE_FILE)):
        for path in paths:
            if os.path.exists(path):
                place = os.open(path, os.O_PATH)
                allowed = access if os.path.isdir(path) else access & ~_READ_DIR
                _system_call(_LANDLOCK_ADD, rules, 1, struct.pack("=Qi", allowed, place), 0)
                os.close(place)
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    _system_call(_LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)


def _system_call(*args: Any) -> int:
    result = _libc.syscall(*(ctypes.c_long(arg) if isinstance(arg, int) else arg for arg in args))
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"system call {args[0]}: {os.strerror(number)}")
    return result


def _filter(alone: bool) -> bytes:
    """A program of classic BPF over `struct seccomp_data`: nr at 0, architecture at 4, arguments from 16 on."""
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        raise OSError(ENOSYS, f"no list of system calls for {machine}")
    architecture, column = _ARCHITECTURES[machine]
    load, equal, any_bit, at_least, give = 0x20, 0x15, 0x45, 0x35, 0x06
    allow, kill, refuse, absent = 0x7FFF0000, 0x80000000, 0x00050000 | EPERM, 0x00050000 | ENOSYS

    def step(code: int, k: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("HBBI", code, yes, no, k)

    def first_argument(number: int, test: bytes) -> bytes:
        """For one call: refused where `test` jumps over the next step, allowed where it goes on to it."""
        return step(equal, number, 0, 4) + step(load, 16) + test + step(give, allow) + step(give, refuse)

    names = _REFUSED | (_TOUCH_PROCESSES if alone else {})
    program = step(load, 4) + step(equal, architecture, 1, 0) + step(give, kill) + step(load, 0)
    if machine == "x86_64":
        program += step(at_least, 0x40000000, 0, 1) + step(give, refuse)  # the x32 calls
    for numbers in names.values():
        if numbers[column] is not None:
            program += step(equal, numbers[column], 0, 1) + step(give, refuse)
    program += step(equal, _CLONE3[column], 0, 1) + step(give, absent)  # its flags lie in memory; glibc then uses clone
    if alone:
        program += first_argument(_CLONE[column], step(any_bit, CLONE_THREAD, 0, 1))
        program += first_argument(_TGKILL[column], step(equal, os.getpid(), 0, 1))
    else:
        program += first_argument(_CLONE[column], step(any_bit, NEW_NAMESPACES & ~CLONE_NEWTIME, 1, 0))
    program += first_argument(_SOCKET[column], step(equal, AF_UNIX, 0, 1))
    return program + step(give, allow)
