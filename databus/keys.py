"""The keys of a run: a CURVE key pair for every role, as files of one folder.

ROLE.key  the secret key, Z85 text, for its owner's eyes alone (0600)
ROLE.pub  the public key, for whoever connects to that role, or lets it in
"""

import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import zmq
from zmq.utils import z85

from databus.messages import Role

KeyHolder = Literal["broker", "worker", "learner", "observer"]
KEY_HOLDERS: tuple[KeyHolder, ...] = get_args(KeyHolder)
PEERS: tuple[Role, ...] = get_args(Role)
FOLDER_MODE, SECRET_MODE, PUBLIC_MODE = 0o700, 0o600, 0o644
KEY_BYTES = 32


@dataclass(frozen=True)
class KeyPair:
    """Z85 text, 40 characters each."""

    public: bytes
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class ServerKeys:
    """What a socket that listens needs: its own keys, and the role of each public key that it lets in."""

    own: KeyPair
    allowed: dict[bytes, Role]


@dataclass(frozen=True)
class ClientKeys:
    """What a socket that connects needs: its own keys, and the public key that it expects on the other side."""

    own: KeyPair
    server: bytes


def new_keys(folder: Path) -> None:
    """Make a pair for every role. Raises: ValueError, one line, where there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists already: keys are never overwritten, so name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(FOLDER_MODE)
    for holder in KEY_HOLDERS:
        public, secret = zmq.curve_keypair()
        _write(folder / f"{holder}.key", secret, SECRET_MODE)
        _write(folder / f"{holder}.pub", public, PUBLIC_MODE)


def server_keys(folder: Path, holder: KeyHolder, allowed: Iterable[Role] = PEERS) -> ServerKeys:
    """The keys of a socket of `holder`'s, to which the roles `allowed` may connect. Raises: ValueError, one line."""
    return ServerKeys(_pair(folder, holder), {_public(folder, role): role for role in allowed})


def client_keys(folder: Path, role: Role, server: KeyHolder = "broker") -> ClientKeys:
    """The keys with which `role` connects to a socket of `server`'s. Raises: ValueError, one line."""
    return ClientKeys(_pair(folder, role), _public(folder, server))


def _write(file: Path, key: bytes, mode: int) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with os.fdopen(descriptor, "wb") as out:
        out.write(key + b"\n")


def _pair(folder: Path, holder: KeyHolder) -> KeyPair:
    file = folder / f"{holder}.key"
    secret = _read(file)
    if stat.S_IMODE(file.stat().st_mode) & 0o077:
        raise ValueError(f"{file} can be read by others: chmod 600 it, or make new keys")
    return KeyPair(public=zmq.curve_public(secret), secret=secret)


def _public(folder: Path, holder: KeyHolder) -> bytes:
    return _read(folder / f"{holder}.pub")


def _read(file: Path) -> bytes:
    try:
        key = file.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"key {file} cannot be read: {error.strerror} (`echelon keys new` makes keys)") from None
    if not _is_key(key):
        raise ValueError(f"{file} is not a key: expected 40 characters of Z85 text")
    return key


def _is_key(text: bytes) -> bool:
    try:
        return len(z85.decode(text)) == KEY_BYTES
    except (ValueError, KeyError, struct.error):  # what z85 raises, by what is wrong
        return False
