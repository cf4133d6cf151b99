"""Where the bus may listen.

Plain sockets only on this machine: ipc files, and loopback addresses that somebody asked for by name. Anywhere else
prompts, rewards and weights would be on a network in the clear, so there the bus has keys.
"""

import os
import re
import socket
import tempfile
from pathlib import Path

from databus.transfers import split_scheme

MAX_IPC_PATH_BYTES = 100  # the kernel's limit is 108, ending included
MAX_PORT = 65535
TCP = re.compile(r"tcp://(?P<host>\*|[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\]):(?P<port>\d+|\*)")
LOOPBACK_HOST = re.compile(r"127\.\d+\.\d+\.\d+|localhost|\[::1\]")
EVERY_INTERFACE = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}


def check_address(address: str, encrypted: bool = False) -> str:
    """The address, if the bus may use it. Raises: ValueError, one line."""
    if address.startswith("ipc://") and len(address) > len("ipc://"):
        path = os.fsencode(address.removeprefix("ipc://"))
        if len(path) > MAX_IPC_PATH_BYTES:
            raise ValueError(f"bus.address={address}: an ipc path has at most {MAX_IPC_PATH_BYTES} bytes")
        return address
    tcp = TCP.fullmatch(address)
    if tcp is None:
        raise ValueError(f"bus.address={address} is not allowed: expected ipc://PATH or tcp://HOST:PORT")
    if not encrypted and not LOOPBACK_HOST.fullmatch(tcp["host"]):
        raise ValueError(
            f"bus.address={address} is not allowed without keys: plain text stays on this machine, at ipc://PATH or "
            "tcp://127.0.0.1:PORT; elsewhere set bus.keys, and bus.plain=false"
        )
    port = tcp["port"]
    if port != "*" and not 1 <= int(port) <= MAX_PORT:  # zmq would take it modulo 65536
        raise ValueError(f"bus.address={address}: a port is 1 to {MAX_PORT}, or * for any that is free")
    return address


def resolve_address(address: str, folder: Path, encrypted: bool = False) -> str:
    """`auto` becomes an ipc socket in `folder`, or in a private folder of its own where that path is too long."""
    if address != "auto":
        return check_address(address, encrypted)
    socket = folder / "bus.sock"
    if len(os.fsencode(socket)) > MAX_IPC_PATH_BYTES:
        socket = Path(tempfile.mkdtemp(prefix="echelon-")) / "bus.sock"
    return f"ipc://{socket}"


def reachable(address: str, broker: str = "") -> str:
    """An address to connect to: one on every interface is reached where `broker` is, or else on this machine."""
    scheme, plain = split_scheme(address)
    tcp, through = TCP.fullmatch(plain), TCP.fullmatch(broker)
    if tcp is None or tcp["host"] not in EVERY_INTERFACE:
        return address
    host = EVERY_INTERFACE[tcp["host"]] if through is None else through["host"]
    return f"{scheme}tcp://{host}:{tcp['port']}"


def address_towards(host: str) -> str:
    """This machine's own address on the way to `host`, as the kernel would choose it; nothing is sent.

    Raises: ValueError, one line, where there is no way.
    """
    try:
        family, kind, protocol, _, there = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as towards:
            towards.connect(there)
            return towards.getsockname()[0]
    except OSError as error:
        raise ValueError(f"{host} cannot be reached from this machine: {error}") from None
