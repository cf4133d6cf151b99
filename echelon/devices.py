"""Which GPUs a role sees: the learner the first ones, each worker one of the rest, or of the learner's in turns."""

import os
import re
from pathlib import Path

from echelon.config import RunConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """Names as CUDA_VISIBLE_DEVICES has them. Imports no torch, starts nothing."""
    listed = os.environ.get(VISIBLE)
    if listed is not None:
        return [name.strip() for name in listed.split(",") if name.strip()]
    numbers = [match[1] for path in Path("/dev").glob("nvidia*") if (match := re.fullmatch(r"nvidia(\d+)", path.name))]
    return sorted(numbers, key=int)


def learner_gpus(config: RunConfig, gpus: list[str]) -> dict[str, str]:
    """The variable that the learner's environment gets; none on a CPU."""
    if config.learner.device != "cuda" or not gpus:
        return {}
    return {VISIBLE: ",".join(gpus[: config.learner.ranks])}


def worker_gpus(config: RunConfig, gpus: list[str], index: int) -> dict[str, str]:
    """The variable that the environment of worker `index` gets; none on a CPU."""
    if config.rollout.device != "cuda" or not gpus:
        return {}
    taken = config.learner.ranks if config.learner.device == "cuda" else 0
    free = (gpus[:taken] if config.placement == "colocated" else gpus[taken:]) or gpus
    return {VISIBLE: free[index % len(free)]}
