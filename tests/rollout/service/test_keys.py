from pathlib import Path

import pytest

from rollout.service.config import ServiceConfig, check_exposure
from rollout.service.keys import read_key

SECRET = b"sixteen-or-more-characters"


def write(folder: Path, text: bytes, mode: int = 0o600) -> Path:
    file = folder / "service.key"
    file.write_bytes(text)
    file.chmod(mode)
    return file


def test_a_key_is_what_the_file_says(tmp_path: Path) -> None:
    key = read_key(write(tmp_path, SECRET + b"\n"))
    assert key.is_in(b"Bearer " + SECRET)
    assert key.is_in(b"bearer  " + SECRET)
    assert not key.is_in(b"Bearer " + SECRET[:-1])
    assert SECRET.decode() not in repr(vars(key))


@pytest.mark.parametrize(
    ("text", "mode", "reason"),
    [
        (SECRET, 0o640, "can be read by others: chmod 600 it"),
        (SECRET, 0o604, "can be read by others: chmod 600 it"),
        (b"short", 0o600, "expected one word of at least 16 characters"),
        (b"", 0o600, "expected one word"),
        (SECRET + b"\n" + SECRET, 0o600, "expected one word"),
        ("schlüsselschlüssel".encode(), 0o600, "of ASCII"),
    ],
)
def test_what_is_no_key_is_refused(tmp_path: Path, text: bytes, mode: int, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_key(write(tmp_path, text, mode))


def test_a_missing_key_is_said(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.key cannot be read: No such file"):
        read_key(tmp_path / "none.key")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.1.2.3", "example.org", ""])
def test_others_need_a_key(host: str) -> None:
    with pytest.raises(ValueError, match="needs --api-key-file"):
        check_exposure(ServiceConfig(model="m", host=host))
    check_exposure(ServiceConfig(model="m", host=host, api_key_file="key"))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "localhost", "::1"])
def test_this_machine_needs_none(host: str) -> None:
    check_exposure(ServiceConfig(model="m", host=host))
