"""The learner's ranks, for a run and for a replay of it."""

from collections.abc import Sequence
from pathlib import Path

from echelon.config import RunConfig
from echelon.devices import learner_gpus
from echelon.processes import Child, child_environment

# What torchrun tells its ranks; a run that is itself started below a torchrun has that one's values.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def start_ranks(
    name: str, arguments: Sequence[str], config: RunConfig, root: Path, gpus: list[str], log: Path
) -> Child:
    """`learner.ranks` processes of `python -m ARGUMENTS`: several under torchrun, one by itself.

    torchrun imports torch before its ranks do, which a single rank would wait for at each start (decision 014). Its
    agent does not tie its life to ours, so `launch` does it first.

    Args: root: the checkout that the packages come from. gpus: those of the machine.
    """
    # One thread on a CPU: the engine has cores of its own.
    defaults = {"OMP_NUM_THREADS": "1"} if config.learner.device == "cpu" else {}
    environment = child_environment(root, defaults) | learner_gpus(config, gpus)
    if config.learner.ranks == 1:
        alone = {variable: value for variable, value in environment.items() if variable not in TORCHRUN_VARIABLES}
        return Child(name, arguments, alone, log)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(config.learner.ranks), "-m"]
    return Child(name, ["echelon.roles.launch", *torchrun, *arguments], environment, log)
