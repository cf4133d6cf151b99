"""The processes of a run: how each role is started, and which are there."""

import signal
from pathlib import Path

from echelon.config import RunConfig
from echelon.devices import visible_gpus, worker_gpus
from echelon.processes import Child, child_environment, stop_all
from echelon.ranks import start_ranks
from echelon.run_folder import RunFolder

PREPARE, BROKER, LEARNER = "prepare", "broker", "learner"
MODULES = {name: f"echelon.roles.{name}" for name in (PREPARE, BROKER, LEARNER, "worker")}


class Roster:
    """Starts roles and stops them all."""

    def __init__(self, folder: RunFolder, config: RunConfig, root: Path, memory_dir: Path | None = None) -> None:
        """Args: root: the checkout that the packages come from. memory_dir: for copies of the learner's state."""
        self._folder = folder
        self._config = config
        self._root = root
        self._memory_dir = memory_dir
        self._gpus = visible_gpus()
        self.children: dict[str, Child] = {}

    def start_prepare(self) -> Child:
        return self._start(PREPARE, [MODULES[PREPARE], self._run_dir])

    def start_broker(self) -> Child:
        return self._start(BROKER, [MODULES[BROKER], self._run_dir])

    def start_worker(self, index: int) -> Child:
        """Those beyond `rollout.workers` are spares."""
        name = f"worker-{index}"
        arguments = [MODULES["worker"], self._run_dir, "--name", name]
        if index >= self._config.rollout.workers:
            arguments.append("--spare")
        gpus = worker_gpus(self._config, self._gpus, index)
        # vLLM places its threads itself; torch's get in one another's way where cores are few.
        defaults = {"OMP_NUM_THREADS": "1"} if self._config.rollout.engine == "small" else {}
        # SIGTERM would have it finish what nobody will train.
        return self._start(name, arguments, gpus, defaults, stop_signal=signal.SIGINT)

    def restart(self, child: Child) -> Child:
        """What the dead one reported is not what will end the run."""
        child.kill()  # whatever is left of its group
        reports = self._folder.logs.glob(f"{child.name}-rank*.error.json")
        for report in (self._folder.error_file(child.name), *reports):
            report.unlink(missing_ok=True)
        if child.name == BROKER:
            return self.start_broker()
        if child.name == LEARNER:
            return self.start_learner()
        return self.start_worker(int(child.name.rpartition("-")[2]))

    def start_learner(self) -> Child:
        arguments = [MODULES[LEARNER], self._run_dir]
        if self._memory_dir is not None:
            arguments += ["--memory-copies", str(self._memory_dir)]
        log = self._folder.log_file(LEARNER)
        self.children[LEARNER] = start_ranks(LEARNER, arguments, self._config, self._root, self._gpus, log)
        return self.children[LEARNER]

    def stop(self, grace_s: float) -> None:
        """The broker last: the others take its absence for a failure."""
        stop_all([child for child in self.children.values() if child.name != BROKER], grace_s)
        stop_all(self.children.values(), grace_s)

    def kill(self) -> None:
        for child in self.children.values():
            child.kill()

    def role_processes(self) -> list[tuple[str, int]]:
        """(role, process id) of all that run: torchrun's ranks count, its agent does not."""
        roles = [(child, MODULES[child.name.partition("-")[0]]) for child in self._running()]
        return [(child.name, pid) for child, module in roles for pid in child.role_processes(module)]

    def stack_processes(self) -> list[int]:
        """Ids of all processes that answer SIGUSR1 with their stacks."""
        scoring = [pid for child in self._running() for pid in child.scoring_processes()]
        return [pid for _, pid in self.role_processes()] + scoring

    def _running(self) -> list[Child]:
        return [child for child in self.children.values() if child.exit_code() is None]

    def _start(
        self,
        name: str,
        arguments: list[str],
        settings: dict[str, str] | None = None,
        defaults: dict[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> Child:
        """Args: settings: variables that must hold. defaults: those that the user's environment overrides."""
        environment = child_environment(self._root, defaults or {}) | (settings or {})
        child = Child(name, arguments, environment, self._folder.log_file(name), stop_signal)
        self.children[name] = child
        return child

    @property
    def _run_dir(self) -> str:
        return str(self._folder.path)
