"""`echelon run --on slurm`: writes and submits the job in which `echelon run --on allocation` does the rest."""

import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from echelon.config import RunConfig
from echelon.launch.choose import check_installed
from echelon.launch.elsewhere import placed_elsewhere
from echelon.processes import POLL_S
from echelon.recipe import Recipe
from echelon.run_folder import RunFolder

PROGRAMS = ("sbatch", "srun", "scontrol")
JOB_FOLDER = "slurm"
WARNING_S = 120
"""Between the signal that the time is nearly over and the end."""
LEAVE_S = 90.0


def submit(recipe: Recipe, folder: RunFolder, path: str, overrides: Sequence[str], resume: bool) -> list[str]:
    """Lines that say what was submitted. Args: path: of the recipe's script, which the job reads again.

    Raises: ValueError, in one line, where there is no Slurm here, or Slurm refuses the job.
    """
    check_programs(PROGRAMS)
    check_installed("submitit", "slurm")
    placed_elsewhere(recipe.config, "127.0.0.1")
    from submitit import SlurmExecutor
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    executor = SlurmExecutor(
        folder=folder.path.parent / f"{folder.path.name}-{JOB_FOLDER}",
        max_num_timeout=recipe.config.slurm.requeues,
        # The shell becomes it: the signal before the end, which Slurm sends to the batch step's first process, arrives.
        python=f"exec {shlex.quote(sys.executable)}",
    )
    executor.update_parameters(**job_parameters(recipe.config, recipe.name))
    words = [str(Path(path).resolve()), "--run-dir", str(folder.path), *overrides]
    try:
        job = executor.submit(AllocatedRun(words, str(folder.path), resume))
    except (FailedSubmissionError, FailedJobError, subprocess.CalledProcessError) as error:
        raise ValueError(f"Slurm refuses the job: {' '.join(str(error).split())}") from None
    return [
        f"job {job.job_id} is queued: `squeue --job {job.job_id}`, and `scancel --full {job.job_id}` to stop it",
        f"run folder {folder.path}: `echelon watch {folder.path}` once it runs; the job's output: {job.paths.folder}",
    ]


def job_parameters(config: RunConfig, name: str) -> dict[str, Any]:
    """As submitit takes them; what is not set is left to the cluster."""
    slurm = config.slurm
    given = {
        "partition": slurm.partition,
        "account": slurm.account,
        "qos": slurm.qos,
        "constraint": slurm.constraint,
        "gpus_per_node": slurm.gpus_per_node,
        "mem": f"{slurm.mem_gb}GB" if slurm.mem_gb else "",
        "setup": [slurm.setup] if slurm.setup else [],
    }
    return {key: value for key, value in given.items() if value} | {
        "job_name": f"echelon-{name}",
        "time": slurm.time_min,
        "nodes": num_nodes(config),
        "ntasks_per_node": slurm.workers_per_node,
        "cpus_per_task": slurm.cpus_per_task,
        "stderr_to_stdout": True,
        "use_srun": False,  # one `echelon run`, on the first node, starts the steps
        # A node that is lost takes the job with it, which Slurm then queues again; the run goes on from its journal.
        "additional_parameters": {"requeue": True, "signal": f"B:USR2@{WARNING_S}"},
    }


def num_nodes(config: RunConfig) -> int:
    """The learner's, and those of the workers."""
    workers = config.rollout.workers + config.rollout.spares
    return config.learner.nodes + math.ceil(workers / config.slurm.workers_per_node)


def check_programs(names: Sequence[str]) -> None:
    """Raises: ValueError for the first that is not on this machine."""
    for name in names:
        if shutil.which(name) is None:
            raise ValueError(f"--on slurm needs {name}, which is not on this machine: run it on a node of the cluster")


class AllocatedRun:
    """What the job does, on its first node; submitit asks for a checkpoint before the time is over."""

    def __init__(self, words: Sequence[str], run_dir: str, resume: bool) -> None:
        self._words = list(words)
        self._run_dir = run_dir
        self._resume = resume
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> None:
        """Raises: RuntimeError where the run fails."""
        self._process = subprocess.Popen(self._command())
        code = self._process.wait()
        if code != 0:
            raise RuntimeError(f"echelon run ended with exit code {code}")

    def checkpoint(self) -> Any:
        """Stops the run in good order; the same job goes on with it."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:
            end(self._process.pid, LEAVE_S)
        return DelayedSubmission(AllocatedRun(self._words, self._run_dir, True))

    def _command(self) -> list[str]:
        resume = self._resume or "SLURM_RESTART_COUNT" in os.environ
        can_resume = RunFolder(self._run_dir).record_file.exists()
        command = [sys.executable, "-m", "echelon", "run", *self._words, "--on", "allocation"]
        return [*command, *(["--resume"] if resume and can_resume else [])]


def end(pid: int, within_s: float) -> None:
    """SIGTERM to a child, and SIGKILL to one that stays. For a signal's handler: what that has interrupted may hold the
    lock of a `Popen`, whose own methods would wait for it."""
    deadline = time.monotonic() + within_s
    if not _has_ended(pid):
        os.kill(pid, signal.SIGTERM)
    while not _has_ended(pid):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(POLL_S)


def _has_ended(pid: int) -> bool:
    """Leaves it to its `Popen` to reap it."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True
