"""`echelon run --on allocation`: inside a Slurm job, with roles as steps on its nodes, which share a disk."""

import os
import signal
import socket
import subprocess
from collections.abc import Sequence

from databus.address import address_towards
from echelon.config import RunConfig
from echelon.launch.base import RunningRole, Site
from echelon.launch.elsewhere import placed_elsewhere
from echelon.launch.modules import LEARNER_MODULE, worker_defaults, worker_words
from echelon.launch.slurm_job import check_programs, num_nodes
from echelon.launch.slurm_step import IS_FIRST, NODE, SrunStep
from echelon.processes import child_environment
from echelon.ranks import Rendezvous, ranks_arguments, ranks_environment

SCONTROL_S = 30.0


class AllocationLauncher:
    """The learner has the first `learner.nodes` nodes, and each worker a share of one of the others."""

    elsewhere = True

    def __init__(self, config: RunConfig) -> None:
        """Raises: ValueError, in one line, outside of a job, or in one with too few nodes."""
        if "SLURM_JOB_ID" not in os.environ:
            raise ValueError("--on allocation is for the inside of a Slurm job; --on slurm submits one")
        check_programs(("srun", "scontrol"))
        nodes = node_names(os.environ.get("SLURM_JOB_NODELIST", ""))
        wanted = num_nodes(config)
        if len(nodes) < wanted:
            raise ValueError(
                f"the run wants {wanted} nodes, and Slurm job {os.environ['SLURM_JOB_ID']} has {len(nodes)}: lower "
                "rollout.workers or learner.nodes, or raise slurm.workers_per_node"
            )
        self._learners, self._workers = nodes[: config.learner.nodes], nodes[config.learner.nodes :]

    def placed(self, config: RunConfig) -> RunConfig:
        return placed_elsewhere(config, address_towards(self._workers[0]))

    def needed_workers(self, config: RunConfig) -> int:
        return config.rollout.workers + config.rollout.spares

    def start_worker(self, site: Site, name: str, index: int, spare: bool) -> RunningRole:
        slurm = site.config.slurm
        node = self._workers[index // slurm.workers_per_node]
        share = slurm.workers_per_node
        gpus = (
            max(1, slurm.gpus_per_node // share) if slurm.gpus_per_node and site.config.rollout.device == "cuda" else 0
        )
        options = step_options([node], slurm.cpus_per_task, gpus, slurm.mem_gb * 1024 // share)
        arguments = worker_words(str(site.folder.path), name, spare)
        environment = child_environment(site.root, worker_defaults(site.config))
        return SrunStep(name, options, arguments, environment, site.folder.log_file(name), signal.SIGINT)

    def start_learner(self, site: Site, name: str) -> RunningRole:
        config, slurm = site.config, site.config.slurm
        gpus = config.learner.ranks // config.learner.nodes if config.learner.device == "cuda" else 0
        cpus = slurm.cpus_per_task * slurm.workers_per_node
        options = step_options(self._learners, cpus, gpus, slurm.mem_gb * 1024)
        run_id = f"{site.folder.record().run_id}-{os.urandom(4).hex()}"
        meet = Rendezvous(f"{self._learners[0]}:{_free_port()}", run_id, IS_FIRST, NODE)
        arguments = [LEARNER_MODULE, str(site.folder.path), "--host", NODE]
        words = ranks_arguments(config, arguments, meet if config.learner.nodes > 1 else None)
        environment = ranks_environment(config, site.root)
        return SrunStep(name, options, words, environment, site.folder.log_file(name), signal.SIGTERM)

    def trouble(self) -> str:
        return ""

    def close(self) -> None:
        pass


def node_names(listed: str) -> list[str]:
    """Of `node[1-3,7]`. Raises: ValueError."""
    try:
        command = ["scontrol", "show", "hostnames", listed]
        found = subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_S, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"`scontrol show hostnames {listed}` failed: {error}") from None
    return found.stdout.split()


def step_options(nodes: Sequence[str], cpus: int, gpus: int, memory_mb: int) -> list[str]:
    """One task on each node. Without a share of the memory, the first step on a node would have all of it, and the
    second wait for its end. A signal comes to the task at once, and is not srun's own affair."""
    count = str(len(nodes))
    return [
        *("--exact", "--nodes", count, "--ntasks", count, "--ntasks-per-node", "1", "--nodelist", ",".join(nodes)),
        *("--cpus-per-task", str(cpus), "--kill-on-bad-exit=1", "--unbuffered", "--disable-status", "--input=none"),
        *(("--gpus-per-node", str(gpus)) if gpus else ()),
        *((f"--mem={memory_mb}M",) if memory_mb else ()),
    ]


def _free_port() -> int:
    """Of the first node, which this is."""
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
