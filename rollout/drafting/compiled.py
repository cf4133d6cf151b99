"""Numba's settings for the compiled part of drafting, and its cache on disk."""

from pathlib import Path
from typing import Any

import numba
import xxhash

FOLDER = Path(__file__).parent

# Without `_nrt` a function counts no references to the arrays that it is given, which takes a third of the time of one
# that does, and can make none.
compiled: Any = numba.njit(nogil=True, cache=True, error_model="numpy", boundscheck=False, _nrt=False)
"""Decorator: machine code, without the interpreter's lock, kept on disk between processes."""


def refresh_cache(folder: Path = FOLDER) -> None:
    """Forget machine code that was made from other sources.

    Numba 0.65 looks only at the file that defines a function, not at those that it calls into: after a change of
    a callee it would load the caller's old code.
    """
    digest = xxhash.xxh3_64_hexdigest(b"".join(path.read_bytes() for path in sorted(folder.glob("*.py"))))
    stamp = folder / "__pycache__" / "drafting.digest"
    try:
        if stamp.exists() and stamp.read_text() == digest:
            return
        stamp.parent.mkdir(exist_ok=True)
        for cached in [*stamp.parent.glob("*.nbi"), *stamp.parent.glob("*.nbc")]:
            cached.unlink(missing_ok=True)
        stamp.write_text(digest)
    except OSError:
        return  # a read-only installation: its sources do not change either
