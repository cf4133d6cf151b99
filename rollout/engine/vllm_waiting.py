"""vLLM's engine core and its worker, two processes on the CPU, wait for each other in naps.

Written against vLLM 0.32.0.
"""

import time

from vllm.distributed.device_communicators import shm_broadcast

NAP_S = 50e-6
"""Linux adds as much again by itself (timer slack)."""


def wait_in_naps() -> None:
    """From now on, whoever waits on one of vLLM's shared-memory queues in this process sleeps between two looks.

    vLLM looks again and again for a second, each time yielding the core but not the interpreter. Where there are cores
    to spare that saves a nap a step; on two, whoever waits takes the core of whoever is waited for, or of the learner
    (docs/decisions/033-who-waits-sleeps.md).
    """
    shm_broadcast.sched_yield = _nap  # pyright: ignore[reportPrivateImportUsage]


def _nap() -> None:
    time.sleep(NAP_S)
