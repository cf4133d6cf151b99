"""Settings of `echelon run --on ray` and `--on slurm`; a run on one machine has no use for them."""

from typing import Annotated

from msgspec import Meta, Struct

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]


class RayConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run's roles as actors on a Ray cluster.

    address: of its head, HOST:PORT; "auto": the one that this machine is a node of; "local": starts one here.
    worker_cpus, worker_gpus: what Ray keeps for a worker; GPUs only where rollout.device is cuda.
    learner_cpus: for the learner, on each of learner.nodes; where learner.device is cuda, a GPU for each of its ranks.
    min_workers: the run begins with so many, and the others join when Ray has found them a place, on nodes that are
        added later, perhaps; 0: with all of rollout.workers.
    """

    address: Annotated[str, Meta(min_length=1)] = "auto"
    worker_cpus: PositiveInt = 1
    worker_gpus: Annotated[float, Meta(gt=0)] = 1.0
    learner_cpus: PositiveInt = 1
    min_workers: NonNegativeInt = 0


class SlurmConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A run as one Slurm job, with learner.nodes for the learner and others for the workers.

    partition, account, qos, constraint: as sbatch has them; "": not given.
    time_min: the job's limit; before it ends the run is stopped in good order and the job queued again, at most
        `requeues` times. gpus_per_node, mem_gb: of each node; 0: not given.
    workers_per_node: they share a node's GPUs and memory. cpus_per_task: of a worker; the learner has a whole node.
    setup: a line of shell that runs first, such as `module load cuda`.
    """

    partition: str = ""
    account: str = ""
    qos: str = ""
    constraint: str = ""
    time_min: PositiveInt = 60
    requeues: NonNegativeInt = 3
    gpus_per_node: NonNegativeInt = 0
    mem_gb: NonNegativeInt = 0
    workers_per_node: PositiveInt = 1
    cpus_per_task: PositiveInt = 1
    setup: str = ""
