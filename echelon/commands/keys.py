"""`echelon keys new DIR`: a CURVE key pair for every role of a run."""

import argparse
import sys
from pathlib import Path

from databus.keys import KEY_HOLDERS, new_keys

FOR_A_WORKER = ("worker.key", "observer.key", "broker.pub", "learner.pub")
"""What another machine needs to join: an observer's question what the run is, a worker's work, and whom to trust."""


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError where DIR holds something already."""
    folder = Path(args.dir).expanduser()
    new_keys(folder)
    sys.stdout.write(
        f"{folder} holds keys for {', '.join(KEY_HOLDERS)}: use them with bus.keys={folder}\n"
        f"a machine that joins with `echelon worker` needs {', '.join(FOR_A_WORKER)}, and nobody else any *.key\n"
    )
    return 0
