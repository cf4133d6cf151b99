"""The learner's ranks, for a run and for a replay of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from echelon.config import RunConfig
from echelon.devices import learner_gpus
from echelon.launch.modules import ranks_defaults
from echelon.processes import Child, child_environment

# What torchrun tells its ranks; a run that is itself started below a torchrun has that one's values.
TORCHRUN_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TORCHRUN = "torch.distributed.run"
LAUNCH = "echelon.roles.launch"


@dataclass(frozen=True)
class Rendezvous:
    """Where the torchruns of several machines meet. endpoint: HOST:PORT on the first. run_id: theirs alone.
    is_first: "true" or "false", of this machine. address: of this machine, for the others."""

    endpoint: str
    run_id: str
    is_first: str
    address: str


def start_ranks(
    name: str, arguments: Sequence[str], config: RunConfig, root: Path, gpus: list[str], log: Path
) -> Child:
    """`learner.ranks` processes of `python -m ARGUMENTS`, on this machine.

    Args: root: the checkout that the packages come from. gpus: those of the machine.
    """
    environment = ranks_environment(config, root) | learner_gpus(config, gpus)
    return Child(name, ranks_arguments(config, arguments), environment, log)


def ranks_arguments(config: RunConfig, arguments: Sequence[str], meet: Rendezvous | None = None) -> list[str]:
    """What follows `python -m`: several ranks are under torchrun, one is by itself.

    torchrun imports torch before its ranks do, which a single rank would wait for at each start (decision 014). Its
    agent does not tie its life to ours, so `launch` does it first.
    """
    if config.learner.ranks == 1:
        return list(arguments)
    here = str(config.learner.ranks // config.learner.nodes)
    where = ["--standalone"] if meet is None else _where_to_meet(config, meet)
    return [LAUNCH, TORCHRUN, *where, "--nproc-per-node", here, "-m", *arguments]


def ranks_environment(config: RunConfig, root: Path) -> dict[str, str]:
    environment = child_environment(root, ranks_defaults(config))
    if config.learner.ranks > 1:
        return environment
    return {variable: value for variable, value in environment.items() if variable not in TORCHRUN_VARIABLES}


def _where_to_meet(config: RunConfig, meet: Rendezvous) -> list[str]:
    """torch 2.13 would look for itself behind the endpoint's name, and does not find itself on every machine."""
    return [
        *("--nnodes", str(config.learner.nodes)),
        *("--rdzv-backend", "c10d"),
        *("--rdzv-endpoint", meet.endpoint),
        *("--rdzv-id", meet.run_id),
        *("--rdzv-conf", f"is_host={meet.is_first}"),
        *("--local-addr", meet.address),
    ]
