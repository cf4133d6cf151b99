"""Files of keys: who may read them, and what is said of those that are none."""

import shutil
import stat
from pathlib import Path

import pytest
import zmq

from databus.keys import KEY_HOLDERS, client_keys, new_keys, server_keys


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    folder = tmp_path / "keys"
    new_keys(folder)
    return folder


def test_secrets_are_for_their_owner_alone(keys: Path) -> None:
    assert stat.S_IMODE(keys.stat().st_mode) == 0o700
    for holder in KEY_HOLDERS:
        assert stat.S_IMODE((keys / f"{holder}.key").stat().st_mode) == 0o600
        secret = (keys / f"{holder}.key").read_bytes().strip()
        assert zmq.curve_public(secret) == (keys / f"{holder}.pub").read_bytes().strip()
    assert len({file.read_bytes() for file in keys.iterdir()}) == 8


def test_keys_are_never_overwritten(keys: Path) -> None:
    before = {file: file.read_bytes() for file in keys.iterdir()}
    with pytest.raises(ValueError, match="never overwritten"):
        new_keys(keys)
    assert before == {file: file.read_bytes() for file in keys.iterdir()}
    with pytest.raises(ValueError, match="never overwritten"):
        new_keys(keys / "broker.pub")


def test_both_ends_fit(keys: Path) -> None:
    server, client = server_keys(keys, "broker"), client_keys(keys, "worker")
    assert client.server == server.own.public
    assert server.allowed[client.own.public] == "worker"
    assert sorted(server.allowed.values()) == ["learner", "observer", "worker"]
    assert list(server_keys(keys, "learner", ["worker"]).allowed.values()) == ["worker"]


def test_secrets_are_not_shown(keys: Path) -> None:
    pair = client_keys(keys, "worker").own
    assert pair.secret.decode() not in repr(pair)


def test_what_other_machines_need_is_enough(keys: Path, tmp_path: Path) -> None:
    from echelon.commands.keys import FOR_A_WORKER

    other = tmp_path / "other"
    other.mkdir()
    for name in FOR_A_WORKER:
        shutil.copy(keys / name, other / name)
    client_keys(other, "observer")
    client_keys(other, "worker")
    client_keys(other, "worker", server="learner")
    with pytest.raises(ValueError, match=r"learner\.key cannot be read"):
        client_keys(other, "learner")


@pytest.mark.parametrize("content", [b"", b"x" * 39, b"~" * 40, b"#" * 40, b"x" * 80, "ä".encode() * 20])
def test_what_is_no_key_is_named(keys: Path, content: bytes) -> None:
    (keys / "worker.pub").write_bytes(content)
    with pytest.raises(ValueError, match=r"worker\.pub is not a key: expected 40 characters"):
        server_keys(keys, "broker")


def test_secret_that_others_can_read_is_refused(keys: Path) -> None:
    (keys / "worker.key").chmod(0o644)
    with pytest.raises(ValueError, match=r"worker\.key can be read by others: chmod 600"):
        client_keys(keys, "worker")


def test_missing_key_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"broker\.key cannot be read: No such file.*echelon keys new"):
        server_keys(tmp_path, "broker")
