"""`echelon worker`: one more rollout worker for a run, in the foreground, until the run ends or Ctrl-C."""

import argparse
import faulthandler
import os
import signal
import socket
from pathlib import Path


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError, in one line, where there is no run to join, or this machine lacks what its workers need."""
    from echelon.errors import set_up_logging
    from echelon.joining import check_has_all, find_run, with_model, with_recipe
    from echelon.roles.worker import work

    name = args.name or f"worker-{socket.gethostname()}-{os.getpid()}"
    recipe = _existing(args.recipe, "recipe") if args.recipe else None
    run = find_run(args.join, _existing(args.keys, "folder of keys") if args.keys else None)
    if recipe is not None:
        run = with_recipe(run, recipe)
    if args.model:
        run = with_model(run, str(_existing(args.model, "model")))
    check_has_all(run)
    set_up_logging(name)
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    work(run, name)
    return 0


def _existing(text: str, what: str) -> Path:
    path = Path(text).expanduser().resolve()
    if not path.exists():
        raise ValueError(f"no such {what}: {text}")
    return path
