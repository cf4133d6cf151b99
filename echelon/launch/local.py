"""Roles as children of the supervisor, on its machine."""

import signal

from echelon.config import RunConfig
from echelon.devices import visible_gpus, worker_gpus
from echelon.launch.base import RunningRole, Site
from echelon.launch.modules import LEARNER_MODULE, worker_defaults, worker_words
from echelon.processes import Child, child_environment
from echelon.ranks import start_ranks


class LocalLauncher:
    """The default."""

    elsewhere = False

    def __init__(self) -> None:
        self._gpus = visible_gpus()

    def placed(self, config: RunConfig) -> RunConfig:
        """Raises: ValueError where the learner is to run on several machines."""
        if config.learner.nodes > 1:
            raise ValueError(
                f"learner.nodes is {config.learner.nodes}: several machines take --on ray or --on slurm, this one is 1"
            )
        return config

    def needed_workers(self, config: RunConfig) -> int:
        return config.rollout.workers + config.rollout.spares

    def start_worker(self, site: Site, name: str, index: int, spare: bool) -> RunningRole:
        arguments = worker_words(str(site.folder.path), name, spare)
        gpus = worker_gpus(site.config, self._gpus, index)
        environment = child_environment(site.root, worker_defaults(site.config)) | gpus
        # SIGTERM would have it finish what nobody will train.
        return Child(name, arguments, environment, site.folder.log_file(name), stop_signal=signal.SIGINT)

    def start_learner(self, site: Site, name: str) -> RunningRole:
        arguments = [LEARNER_MODULE, str(site.folder.path)]
        if site.memory_dir is not None:
            arguments += ["--memory-copies", str(site.memory_dir)]
        return start_ranks(name, arguments, site.config, site.root, self._gpus, site.folder.log_file(name))

    def trouble(self) -> str:
        return ""

    def close(self) -> None:
        pass
