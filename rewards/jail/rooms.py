"""The walls: what a snippet can see and how much it may take. Made once by the keeper, furnished for every snippet.

namespaces: users, mounts, network, names; a root of its own, read-only, with the interpreter's library and the
system's shared libraries and nothing else. bubblewrap: it has made all that already. rlimits: only what a process may
do to itself: limits, seccomp and Landlock.
"""

import contextlib
import os
import resource
import signal
import sys
import sysconfig
from dataclasses import dataclass

from rewards.jail import linux

DESK = "/tmp"
"""Where a snippet may write; a file system in memory of its own."""
SYSTEM_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
LINKER_CACHE = "/etc/ld.so.cache"
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
USER = 1000
FIRST_SPARE_ID = 0x60000000
"""Ids from here on, plus the process id, are no one's: a snippet of root's runs as one, so that limits hold for it."""
OWN_PROCESSES = 3
"""Where a snippet runs as the keeper's user, of that besides: the keeper, the launcher, the first process."""
MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class Room:
    """apart: every snippet has a namespace of process ids and mounts. library: folders that Python imports from.

    user: the id that a snippet becomes; 0: it is the keeper's. The rest: as `SandboxConfig`.
    """

    apart: bool
    user: int
    library: tuple[str, ...]
    memory_bytes: int
    processes: int
    files_bytes: int
    output_bytes: int

    def furnish(self) -> None:
        """In a snippet's first process, which may still do all that the keeper may."""
        if self.apart:
            linux.mount("tmpfs", DESK, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, desk_options(self.files_bytes))
            os.chdir(DESK)

    def limit(self, limit_s: float) -> None:
        """In the snippet's process, last of all. Raises: OSError."""
        processes = self.processes + (0 if self.user else OWN_PROCESSES)
        if self.apart:
            linux.drop_bounding_set()
        if self.user:
            become(self.user)
        for kind, value in (
            (resource.RLIMIT_CORE, 0),
            (resource.RLIMIT_MSGQUEUE, 0),
            (resource.RLIMIT_NOFILE, MAX_OPEN_FILES),
            (resource.RLIMIT_NPROC, processes),
            (resource.RLIMIT_FSIZE, self.output_bytes),
            (resource.RLIMIT_CPU, int(limit_s) + 1),
            (resource.RLIMIT_AS, self.memory_bytes),
        ):
            if kind != resource.RLIMIT_NPROC or self.apart or self.user:
                set_limit(kind, value)
        if self.apart:
            linux.drop_capabilities()
            linux.refuse_system_calls(alone=False)
            return
        with contextlib.suppress(OSError):  # the warning at the start has told of it
            linux.see_only((*SYSTEM_LIBRARIES, *shared_libraries(), *self.library), DEVICES)
        with contextlib.suppress(OSError):
            linux.refuse_system_calls(alone=True)


def enter(settings: dict) -> Room:
    """Puts this process where its snippets will be. Raises: OSError where the kernel does not let it."""
    library = folders()
    root, spare_id = os.geteuid() == 0, FIRST_SPARE_ID + os.getpid()
    user = 0
    if root:
        os.setgroups([])
        user = spare_id if settings["kind"] == "rlimits" else USER
    if settings["kind"] == "namespaces":
        enter_namespaces(spare_id if root else None)
        build_root(library)
    os.chdir("/")
    return Room(library=library, user=user, **settings["room"])


def enter_namespaces(spare_id: int | None) -> None:
    """A user namespace, and with its rights new ones of mounts, network, names and messages. None may lie below it.

    Args: spare_id: for root: who snippets are outside. It stays root inside, so that folders of root's can be mounted.
    """
    os.umask(0o022)
    user, group = os.geteuid(), os.getegid()
    flags = linux.CLONE_NEWNS | linux.CLONE_NEWNET | linux.CLONE_NEWUTS | linux.CLONE_NEWIPC
    if spare_id is None:
        linux.unshare(linux.CLONE_NEWUSER | flags)
        write_maps("self", f"{USER} {user} 1", f"{USER} {group} 1")
    else:
        maps = f"0 0 1\n{USER} {spare_id} 1"
        ready, go = os.pipe()
        keeper, helper = os.getpid(), os.fork()  # a map of several ids is written from outside
        if helper == 0:
            os.close(go)
            os.read(ready, 1)
            try:
                write_maps(str(keeper), maps, maps)
            finally:
                os._exit(0)
        linux.unshare(linux.CLONE_NEWUSER | flags)
        os.close(go)
        os.close(ready)
        os.waitpid(helper, 0)
        os.setresgid(0, 0, 0)
        os.setresuid(0, 0, 0)
    write("/proc/sys/user/max_user_namespaces", "0")


def write_maps(process: str, users: str, groups: str) -> None:
    if process == "self":
        write("/proc/self/setgroups", "deny")
    write(f"/proc/{process}/uid_map", users)
    write(f"/proc/{process}/gid_map", groups)


def folders() -> tuple[str, ...]:
    """Where this interpreter's standard library lies."""
    standard = sysconfig.get_paths()["stdlib"]
    return tuple(path for path in sys.path if path.startswith(standard) and os.path.isdir(path))


def build_root(library: tuple[str, ...]) -> None:
    """A root, read-only, with nothing in it but what Python needs."""
    linux.mount("none", "/", flags=linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", DESK, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=755")
    for path in dict.fromkeys((*SYSTEM_LIBRARIES, *shared_libraries(), *library, LINKER_CACHE, *DEVICES)):
        if not os.path.exists(path):
            continue
        target = DESK + path
        if os.path.isdir(path):
            os.makedirs(target, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT, 0o644))
        linux.bind(path, target, read_only=path not in DEVICES)
    os.makedirs(DESK + DESK, exist_ok=True)
    linux.change_root(DESK)
    linux.mount("none", "/", flags=linux.MS_REMOUNT | linux.MS_RDONLY | linux.MS_NOSUID | linux.MS_NODEV)


def shared_libraries() -> list[str]:
    """Folders of this interpreter's own shared libraries, such as conda's."""
    folder = sysconfig.get_config_var("LIBDIR")
    return [folder] if folder and any(".so" in name for name in os.listdir(folder)) else []


def desk_options(size: int) -> str:
    return f"size={size},nr_inodes=1000,mode=700,uid={USER},gid={USER}"


def become(user: int) -> None:
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)  # which the line above has cleared


def write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def set_limit(kind: int, value: int) -> None:
    """Soft and hard, never above what is allowed already."""
    hard = resource.getrlimit(kind)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(kind, (value, value))


def kill_children() -> None:
    """Everything that this process has below it at the moment."""
    with open(f"/proc/self/task/{os.getpid()}/children") as file:
        for pid in file.read().split():
            os.kill(int(pid), signal.SIGKILL)
