"""`echelon worker`: one more rollout worker for a run, in the foreground, until the run ends or Ctrl-C."""

import argparse
import os
import socket
from pathlib import Path


def execute(args: argparse.Namespace) -> int:
    """Raises: ValueError, in one line, where there is no run to join."""
    from echelon.roles.worker import join

    name = args.name or f"worker-{socket.gethostname()}-{os.getpid()}"
    recipe = Path(args.recipe).resolve() if args.recipe else None
    if recipe is not None and not recipe.is_file():
        raise ValueError(f"no such recipe: {args.recipe}")
    return join(args.join, name, recipe)
