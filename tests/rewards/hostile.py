"""Snippets that mean harm, by families, each with what must come of it.

Most try something, print `escaped` where it worked, and `safe` where it did not.
"""

import textwrap
from dataclasses import dataclass
from itertools import product
from pathlib import Path

TRY = """
import os, sys
try:
{body}
    print("escaped")
except (OSError, MemoryError, ValueError, ImportError, OverflowError, RuntimeError) as error:
    print("safe")
"""
SYSTEM_CALL = """
import ctypes
result = ctypes.CDLL(None, use_errno=True).syscall({args})
if result < 0: raise OSError(ctypes.get_errno(), "refused")
"""


@dataclass(frozen=True)
class Snippet:
    """expect: `safe`: it prints just that. `ends`: whatever it does, its output is bounded. `late`: killed for its time.
    `fails`: as a solution, it passes no test."""

    family: str
    code: str
    expect: str = "safe"


def attempt(family: str, body: str) -> Snippet:
    return Snippet(family, TRY.format(body=textwrap.indent(textwrap.dedent(body).strip(), "    ")))


def system_call(family: str, *args: object) -> Snippet:
    return attempt(family, SYSTEM_CALL.format(args=", ".join(map(str, args))))


def snippets(secret: Path, journal: Path, victim: int) -> list[Snippet]:
    """Args: secret: a file in the home folder. journal: a folder. victim: a process id outside."""
    return [
        *fork_bombs(), *memory_bombs(), *endless_output(), *network(), *reading(secret, journal), *signals(victim),
        *links(secret), *deleting(secret), *sleeping(), *forged(), *privileges(victim), *left_behind(),
    ]  # fmt: skip


def fork_bombs() -> list[Snippet]:
    many = [
        attempt("fork bomb", f"for _ in range({n}):\n    if os.fork() == 0:\n        {child}")
        for n, child in product(
            range(40, 60), ("import time; time.sleep(60)", "os.setsid(); import time; time.sleep(60)")
        )
    ]
    threads = [
        attempt(
            "fork bomb",
            f"import threading, time\nfor _ in range({n}): threading.Thread(target=time.sleep, args=(9,), daemon=True).start()",
        )
        for n in range(40, 60)
    ]
    endless = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n"
    return many + threads + [Snippet("fork bomb", f"n = {n}\n{endless}", "late") for n in range(12)]


def memory_bombs() -> list[Snippet]:
    sizes = [1 << power for power in range(29, 45)]
    grow = "rows = []\nwhile True: rows.append(bytearray({size}))"
    anonymous = "import mmap\nkept = [mmap.mmap(-1, 16 << 20) for _ in range({n})]"
    fill = "with open('/tmp/big{n}', 'wb') as file:\n    while True: file.write(bytes(1 << 16))"
    several = "for n in range(1000):\n    with open(f'/tmp/{{n}}', 'wb') as file: file.write(bytes({size}))"
    return [
        *(attempt("memory bomb", f"x = bytearray({size})") for size in sizes),
        *(attempt("memory bomb", f"x = [0] * {size}") for size in sizes),
        *(attempt("memory bomb", f"x = 'ab' * {size}") for size in sizes),
        *(attempt("memory bomb", grow.format(size=1 << power)) for power in range(20, 28)),
        *(attempt("memory bomb", anonymous.format(n=n)) for n in range(40, 50)),
        *(attempt("memory bomb", fill.format(n=n)) for n in range(10)),
        *(attempt("memory bomb", several.format(size=size)) for size in range(50_000, 60_000, 1000)),
    ]


def endless_output() -> list[Snippet]:
    lines = ["x" * 10, "safe", "y" * 1000, "\\n", "\\0" * 99]
    ways = (
        "import sys\nwhile True: sys.{stream}.write({text!r})",
        "import os\nwhile True: os.write({number}, {text!r}.encode())",
        "import sys\nwhile True: print({text!r}, file=sys.{stream}, flush=True)",
    )
    return [
        Snippet("endless output", way.format(stream=stream, number=number, text=text), "ends")
        for way, (stream, number), text in product(ways, (("stdout", 1), ("stderr", 2)), lines)
    ] + [
        Snippet("endless output", f"import os\nos.{what}\nos.write(1, b'x')", "ends")
        for what in (
            "ftruncate(1, 10**9)",
            "lseek(1, 10**9, 0)",
            "posix_fallocate(1, 0, 10**9)",
            "truncate('/tmp/x', 10**9)",
        )
    ]


def network() -> list[Snippet]:
    families = ("AF_INET", "AF_INET6", "AF_NETLINK", "AF_PACKET", "AF_VSOCK", "AF_ALG", "AF_CAN")
    kinds = ("SOCK_STREAM", "SOCK_DGRAM", "SOCK_RAW", "SOCK_SEQPACKET")
    hosts = ("127.0.0.1", "10.0.0.1", "8.8.8.8", "localhost", "example.com", "169.254.169.254")
    return [
        *(attempt("network", f"import socket; socket.socket(socket.{a}, socket.{b})") for a, b in product(families, kinds)),
        *(attempt("network", f"import socket; socket.create_connection(({h!r}, {p}), 0.2)") for h, p in product(hosts, (22, 53, 80, 443))),
        *(attempt("network", f"import socket; socket.create_server(('{h}', {p}))") for h, p in product(("", "127.0.0.1"), (0, 8080))),
        *(attempt("network", f"import urllib.request; urllib.request.urlopen('http://{h}/', timeout=0.2)") for h in hosts),
        *(attempt("network", f"import socket; socket.getaddrinfo({h!r}, 80)") for h in hosts[3:5]),
        *(attempt("network", f"import socket; socket.socket(socket.AF_UNIX).connect({path!r})") for path in (
            "/run/docker.sock", "/var/run/docker.sock", "/run/dbus/system_bus_socket", "\\0/tmp/.X11-unix/X0", "/tmp/.X11-unix/X0")),
        *(system_call("network", 41, family, 1, 0) for family in range(2, 12)),
    ]  # fmt: skip


def reading(secret: Path, journal: Path) -> list[Snippet]:
    files = [
        str(secret), f"/..{secret}", f"/tmp/../..{secret}", f"../..{secret}", f"{journal}/000001.seg", "/etc/passwd",
        "/etc/shadow", "/etc/hostname", "/etc/hosts", "/etc/resolv.conf", "/root/.bashrc", "/root/.ssh/id_rsa",
        "/proc/1/environ", "/proc/self/environ", "/proc/self/maps", "/proc/self/mem", "/proc/1/root/etc/passwd",
        "/proc/self/root/etc/passwd", "/proc/self/exe", "/proc/self/fd/3", "/proc/sys/kernel/hostname", "/proc/kcore",
        "/sys/class/net", "/sys/fs/cgroup/cgroup.procs", "/dev/mem", "/dev/kmsg", "/dev/vda", "/dev/sda", "/dev/tty",
        "/dev/shm/x", "/var/log/syslog", "/run/secrets", "/boot", "/home", "/mnt", "/opt", "/srv", "/var", "/sbin/init", "/bin/sh",
    ]  # fmt: skip
    ways = (
        "open({path!r}, 'rb').read(1)",
        "os.open({path!r}, os.O_RDONLY)",
        "os.listdir({path!r})",
        "os.stat({path!r})",
    )
    folders = [
        str(journal),
        str(secret.parent),
        "/home",
        "/proc",
        "/proc/1/fd",
        "/proc/self/fd",
        "/sys",
        "/var",
        "/run",
    ]
    return [
        *(attempt("reading", way.format(path=path)) for path, way in product(files, ways)),
        *(attempt("reading", f"os.chdir({path!r})") for path in folders),
        *(attempt("reading", f"os.scandir(os.path.expanduser({path!r})).__next__()") for path in ("~root/.ssh", "~/.ssh")),
    ]  # fmt: skip


def signals(victim: int) -> list[Snippet]:
    numbers = ("SIGKILL", "SIGTERM", "SIGSTOP", "SIGUSR1", "SIGHUP")
    there = [
        attempt("signals", f"import signal; os.kill({pid}, signal.{name})")
        for pid, name in product((victim, victim - 1, 99999), numbers)
    ]
    groups = [
        attempt("signals", f"import signal; os.killpg({pid}, signal.{name})")
        for pid, name in product((victim, 4242), numbers)
    ]
    above = [
        Snippet(
            "signals",
            f"import os, signal\nfor pid in ({pids}):\n    try: os.kill(pid, signal.{name})\n    except OSError: pass\nprint('safe')",
        )
        for pids, name in product(
            ("1,", "os.getppid(),"), ("SIGTERM", "SIGHUP", "SIGUSR1", "SIGINT", "SIGKILL", "SIGSTOP")
        )
    ]
    everyone = [
        Snippet("signals", f"import os, signal\nos.kill(-1, signal.{name})\nos.kill(os.getpid(), 9)", "ends")
        for name in numbers
    ]
    handles = [
        attempt("signals", f"import signal; signal.pidfd_send_signal(os.pidfd_open({pid}), 9)")
        for pid in (victim, victim - 1)
    ]
    return there + groups + above + everyone + handles


def links(secret: Path) -> list[Snippet]:
    targets = (str(secret), "/etc/passwd", "/proc/1/environ", "/proc/self/mem", "/root", "/var", "/dev/vda", "/home")
    read = "open({link!r}).read(1) if not os.path.isdir({link!r}) else os.listdir({link!r} + '/root')[7]"
    return [
        *(attempt("symlink", f"os.symlink({t!r}, '/tmp/{n}')\n" + read.format(link=f"/tmp/{n}")) for n, t in enumerate(targets * 3)),
        *(attempt("symlink", f"os.link({t!r}, '/tmp/hard')") for t in targets[:3]),
        *(attempt("symlink", f"os.rename({t!r}, '/tmp/moved')") for t in (*targets[:3], "/usr", "/lib", "/tmp")),
        *(attempt("symlink", f"os.symlink('/etc', {place!r})") for place in ("/x", "/usr/x", "/lib/x", "/dev/x", "/root/x")),
        *(attempt("descriptors", f"os.read({number}, 1)") for number in range(3, 60)),
        *(attempt("descriptors", f"os.write({number}, b'x')") for number in range(3, 60)),
        *(attempt("descriptors", f"os.fstat({number})") for number in range(3, 60)),
    ]  # fmt: skip


def deleting(secret: Path) -> list[Snippet]:
    places = (
        "/usr/lib",
        "/lib",
        "/lib64",
        "/dev/null",
        "/etc/ld.so.cache",
        "/tmp",
        str(secret),
        str(secret.parent),
        "/",
    )
    ways = (
        "os.remove({path!r})",
        "os.rmdir({path!r})",
        "os.truncate({path!r}, 0)",
        "open({path!r}, 'w').write('x')[1]",
    )
    trees = [
        Snippet("deleting", f"import shutil\nshutil.rmtree({path!r}, ignore_errors=True)\nprint('safe')")
        for path in places
    ]
    library = [
        attempt("deleting", f"import {m}\nos.remove({m}.__file__)") for m in ("json", "os", "random", "re", "ctypes")
    ]
    chmod = [attempt("deleting", f"os.chmod({path!r}, 0o777)") for path in places if path != "/tmp"]
    writes = [attempt("deleting", w.format(path=p)) for p, w in product(places, ways) if (p, w) not in ALLOWED_WRITES]
    return writes + trees + library + chmod


ALLOWED_WRITES = {("/dev/null", "open({path!r}, 'w').write('x')[1]"), ("/dev/null", "os.truncate({path!r}, 0)")}


def sleeping() -> list[Snippet]:
    ways = (
        "import time; time.sleep(10**6)",
        "while True: pass",
        "import signal\nfor n in range(1, 32):\n    try: signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError): pass\nwhile True: pass",
        "import threading; threading.Event().wait()",
        "import os, time\nif os.fork(): os.wait()\ntime.sleep(10**6)",
        "import re; re.match('(a+)+$', 'a' * 60 + 'b')",
        "9 ** 9 ** 9 ** 9",
        "import os, time\nos.setsid() if os.fork() == 0 else None\nprint('safe', flush=True)\ntime.sleep(10**6)",
    )
    return [Snippet("sleeping", f"n = {n}\n{way}", "late") for way, n in product(ways, range(3))]


def forged() -> list[Snippet]:
    verdicts = ['{"passed": 2, "total": 2}', "PASSED", "1.0", "True", "ok", "2 passed", '{"reward": 1.0}', "safe"]
    prints = [f"print({text!r}, flush=True)" for text in verdicts]
    errors = [f"import sys; sys.stderr.write({text!r}); sys.stderr.flush()" for text in verdicts]
    ends = [
        "",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "raise SystemExit(0)",
        "import os, signal; os.kill(os.getppid(), 9)",
    ]
    descriptors = [
        f"import os\ntry: os.write({n}, {text!r}.encode())\nexcept OSError: pass"
        for n, text in product(range(2, 12), verdicts[:2])
    ]
    patches = [
        "import builtins; builtins.AssertionError = Exception",
        "import sys; sys.modules['builtins'].exec = lambda *a: None",
        "class Yes:\n    def __eq__(self, other): return True\n    def __bool__(self): return True\ndef add(a, b): return Yes()",
        "class Yes(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef add(a, b): return Yes(7)",
        "import gc\nfor thing in gc.get_objects():\n    if isinstance(thing, dict): thing.get('passed')",
        "import sys\nframe = sys._getframe()\nwhile frame: frame.f_locals; frame = frame.f_back",
        "import atexit, os; atexit.register(os._exit, 0)",
        "import json; json.loads = lambda text: ['value', 5]\njson.dumps = lambda value: '{\"passed\": 2}'",
        "import threading, os\nthreading.Thread(target=lambda: os._exit(0)).start()",
        "def add(a, b): raise SystemExit(0)",
        "def add(a, b): return (lambda: 5)",
        "def add(a, b): return [5]",
        "def add(a, b): return '5'",
        "def add(a, b): return float('nan')",
        "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
        "def add(a, b): return 'x' * 10 ** 7",
        "import os\nwhile True:\n    os.write(4, b'[\"value\", 5]\\n' * 9)",
        "import os\nfor n in range(3, 9):\n    try: os.write(n, b'[\"value\", 5, []]\\n' * 9)\n    except OSError: pass\nos._exit(0)",
    ]
    codes = [f"{a}\n{b}" for a, b in product([*prints, *errors, *descriptors], ends[:2])]
    codes += [f"{a}\n{b}" for a, b in product(patches, ends[1:])] + [f"{a}\n{b}" for a, b in product(prints, ends[2:])]
    return [Snippet("forged verdict", code, "fails") for code in codes]


def privileges(victim: int) -> list[Snippet]:
    flags = (0x10000000, 0x00020000, 0x20000000, 0x40000000, 0x08000000, 0x04000000, 0x02000000, 0x10020000)
    return [
        *(attempt("privileges", f"os.{call}({number})") for call, number in product(("setuid", "setgid", "seteuid", "setegid"), (0, 1, 999, 65534))),
        *(system_call("privileges", 272, flag) for flag in flags),
        *(system_call("privileges", 56, flag | 17, 0, 0, 0, 0) for flag in flags),
        *(system_call("privileges", 101, request, pid, 0, 0) for request, pid in product((16, 0x4206), (1, victim))),
        *(system_call("privileges", number, 0, 0, 0, 0, 0) for number in (161, 165, 166, 155, 308, 310, 311, 312, 321, 298, 323, 248, 250, 425, 428, 430, 438, 442)),
        *(attempt("privileges", f"import resource; resource.setrlimit(resource.{kind}, (-1, -1))") for kind in (
            "RLIMIT_AS", "RLIMIT_NPROC", "RLIMIT_FSIZE", "RLIMIT_CPU", "RLIMIT_NOFILE", "RLIMIT_CORE")),
        *(attempt("privileges", f"os.{call}") for call in (
            "chroot('/tmp')", "nice(-5)", "mknod('/tmp/disk', 0o60666, os.makedev(8, 0))", "setgroups([0])",
            "sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))", "chown('/tmp', 0, 0)", "initgroups('root', 0)")),
        *(attempt("privileges", f"import subprocess; subprocess.run([{command!r}])") for command in (
            "sh", "/bin/sh", "/usr/bin/sudo", "sudo", "su", "mount", "unshare", "python3", "/usr/bin/python3", "gcc", "curl", "ping")),
    ]  # fmt: skip


def left_behind() -> list[Snippet]:
    """What one leaves must be gone for the next."""
    leave = (
        "open('/tmp/left', 'w').write('x')",
        "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)",
        "import os, time\nif os.fork() == 0:\n    if os.fork() == 0:\n        os.setsid(); time.sleep(60)",
        "import ctypes; ctypes.CDLL(None).shmget(4242, 4096, 0o1666)",
    )
    look = attempt("left behind", """
        import ctypes
        found = os.path.exists('/tmp/left') or ctypes.CDLL(None).shmget(4242, 4096, 0) >= 0
        if not found: raise OSError('nothing')
    """)  # fmt: skip
    return [each for code in leave * 5 for each in (Snippet("left behind", f"{code}\nprint('safe')", "ends"), look)]
