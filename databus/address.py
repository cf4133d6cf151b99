"""Where the bus may listen.

Plain sockets only on this machine: ipc files, and loopback addresses that somebody named. Anything else would put
prompts, rewards and weights on a network in the clear, so it is refused.
"""

import os
import re
import tempfile
from pathlib import Path

MAX_IPC_PATH_BYTES = 100  # the kernel's limit is 108, ending included
MAX_PORT = 65535
LOOPBACK = re.compile(r"tcp://(127\.\d+\.\d+\.\d+|localhost|\[::1\]):(\d+|\*)")


def check_address(address: str) -> str:
    """The address, if the bus may use it. Raises: ValueError, one line."""
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        path = os.fsencode(address.removeprefix("ipc://"))
        if len(path) > MAX_IPC_PATH_BYTES:
            raise ValueError(f"bus.address={address}: an ipc path has at most {MAX_IPC_PATH_BYTES} bytes")
        return address
    if loopback := LOOPBACK.fullmatch(address):
        port = loopback[2]
        if port != "*" and not 1 <= int(port) <= MAX_PORT:  # zmq would take it modulo 65536
            raise ValueError(f"bus.address={address}: a port is 1 to {MAX_PORT}, or * for any that is free")
        return address
    raise ValueError(
        f"bus.address={address} is not allowed: the bus is plain text in this version, so it listens on "
        "ipc://PATH or tcp://127.0.0.1:PORT"
    )


def resolve_address(address: str, folder: Path) -> str:
    """`auto` becomes an ipc socket in `folder`, or in a private folder of its own where that path is too long."""
    if address != "auto":
        return check_address(address)
    socket = folder / "bus.sock"
    if len(os.fsencode(socket)) > MAX_IPC_PATH_BYTES:
        socket = Path(tempfile.mkdtemp(prefix="echelon-")) / "bus.sock"
    return f"ipc://{socket}"
