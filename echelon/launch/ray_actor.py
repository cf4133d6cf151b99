"""A role's process on a node of a Ray cluster, and the actor that looks after it there."""

import signal
import socket
from pathlib import Path

import msgspec
import ray

from echelon.files import write_atomically
from echelon.launch.private_folder import PrivateFolder
from echelon.launch.ray_messages import HOME, NodeFacts, RoleEnd, RoleNews, RoleOrder
from echelon.packages import package_root
from echelon.processes import Child, RoleProcess, child_environment
from echelon.run_folder import BusRecord, RunFolder

LOG_BYTES = 1 << 20
KEYS = "keys"


class RoleActor:
    """Ray calls its methods one after the other, in its main thread: the role asks the kernel to die with that one.

    No method waits for anything. A worker's private folder is a small run folder, in which it finds what it looks for.
    """

    def __init__(self) -> None:
        self._folder = PrivateFolder()
        self._child: Child | None = None
        self._log = self._folder.path / "role.log"

    def look_around(self, run_dir: str, run_id: str) -> NodeFacts:
        """Where it is. Args: run_id: of the run that `run_dir` must be the folder of."""
        with socket.socket() as free:
            free.bind(("", 0))
            port = free.getsockname()[1]
        address = ray.util.get_node_ip_address()
        return NodeFacts(address=address, free_port=port, sees_run=_holds_run(RunFolder(run_dir), run_id))

    def start(self, order: RoleOrder) -> None:
        self._folder.write(order.files)
        home = str(self._folder.path)
        environment = child_environment(package_root(), order.defaults)
        self._child = Child(
            order.name,
            [word.replace(HOME, home) for word in order.arguments],
            {name: value for name, value in environment.items() if name not in order.without},
            self._log,
            signal.Signals(order.stop_signal),
        )

    def connect(self, address: str, run_id: str) -> None:
        """The broker listens at `address`."""
        folder = RunFolder(self._folder.path)
        keys = self._folder.path / KEYS
        record = BusRecord(address=address, run_id=run_id, keys=str(keys) if keys.is_dir() else "")
        write_atomically(folder.bus_file, msgspec.json.encode(record))

    def news(self, offset: int) -> RoleNews:
        """Args: offset: bytes of the log that have been fetched."""
        end = self._end()  # before the log: what it said last is in there
        log = _read(self._log, offset)
        return RoleNews(log=log, end=end if len(log) < LOG_BYTES else None)

    def terminate(self) -> None:
        if self._child is not None:
            self._child.terminate()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def look(self, module: str) -> list[RoleProcess]:
        return [] if self._child is None else self._child.look(module)

    def ask_for_stacks(self, module: str) -> None:
        if self._child is not None:
            self._child.ask_for_stacks(module)

    def close(self) -> None:
        """The role has ended; whatever it left goes, too."""
        self.kill()
        self._folder.remove()

    def _end(self) -> RoleEnd | None:
        child = self._child
        code = None if child is None else child.exit_code()
        if child is None or code is None:
            return None
        report = _read(RunFolder(self._folder.path).error_file(child.name), 0)
        return RoleEnd(code=code, killed_by=child.killed_by(), words=child.how_it_ended(), report=report)


def _holds_run(folder: RunFolder, run_id: str) -> bool:
    try:
        return folder.record().run_id == run_id
    except ValueError:
        return False


def _read(file: Path, offset: int) -> bytes:
    """At most LOG_BYTES; b"" where there is no such file."""
    try:
        with file.open("rb") as opened:
            opened.seek(offset)
            return opened.read(LOG_BYTES)
    except FileNotFoundError:
        return b""
