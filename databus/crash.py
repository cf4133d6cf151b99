"""For tests of recovery: a process that dies at a given point, as if it had lost its power there.

`ECHELON_CRASH_AT=before_sync:7` kills the process with SIGKILL the seventh time that it comes by.
"""

import os
import signal
from collections import Counter
from typing import Literal

CrashPoint = Literal["before_write", "after_write", "before_sync", "after_sync", "before_ack"]
VARIABLE = "ECHELON_CRASH_AT"

_passed: Counter[str] = Counter()


def crash_point(point: CrashPoint) -> None:
    """Die here if that was asked for."""
    wanted, _, times = os.environ.get(VARIABLE, "").partition(":")
    if wanted == point:
        _passed[point] += 1
        if _passed[point] == int(times or 1):
            os.kill(os.getpid(), signal.SIGKILL)
