"""The learner's ranks under torchrun, for a run and for a replay of it."""

from collections.abc import Sequence
from pathlib import Path

from echelon.config import RunConfig
from echelon.devices import learner_gpus
from echelon.processes import Child, child_environment


def start_ranks(
    name: str, arguments: Sequence[str], config: RunConfig, root: Path, gpus: list[str], log: Path
) -> Child:
    """`learner.ranks` processes of `python -m ARGUMENTS`. torchrun's agent does not tie its life to ours, so `launch`
    does it first.

    Args: root: the checkout that the packages come from. gpus: those of the machine.
    """
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(config.learner.ranks), "-m"]
    # One thread on a CPU: the engine has cores of its own.
    defaults = {"OMP_NUM_THREADS": "1"} if config.learner.device == "cpu" else {}
    environment = child_environment(root, defaults) | learner_gpus(config, gpus)
    return Child(name, ["echelon.roles.launch", *torchrun, *arguments], environment, log)
