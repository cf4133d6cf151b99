"""Keys of the service: a file each, for its owner's eyes alone, as those of the bus."""

import hashlib
import hmac
import stat
from pathlib import Path

MIN_CHARACTERS = 16
SCHEME = b"bearer "


class Key:
    """One secret. What is compared are digests: the time it takes tells nothing of the secret, nor of its length."""

    def __init__(self, secret: bytes) -> None:
        self._digest = hashlib.sha256(secret).digest()

    def is_in(self, authorization: bytes) -> bool:
        """Args: authorization: the request's header, `Bearer KEY`."""
        scheme, given = authorization[: len(SCHEME)].lower(), authorization[len(SCHEME) :].strip()
        return hmac.compare_digest(hashlib.sha256(given).digest(), self._digest) and scheme == SCHEME


def read_key(file: str | Path) -> Key:
    """Raises: ValueError, one line, for a file that is missing, can be read by others, or holds no key."""
    path = Path(file).expanduser()
    try:
        mode, text = path.stat().st_mode, path.read_bytes().strip()
    except OSError as error:
        raise ValueError(f"key {path} cannot be read: {error.strerror}") from None
    if stat.S_IMODE(mode) & 0o077:
        raise ValueError(f"{path} can be read by others: chmod 600 it")
    if len(text) < MIN_CHARACTERS or any(not 33 <= byte <= 126 for byte in text):
        raise ValueError(f"{path} holds no key: expected one word of at least {MIN_CHARACTERS} characters of ASCII")
    return Key(text)
