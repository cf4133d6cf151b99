"""The processes of a run: how each role is started, and which are there."""

from echelon.launch.base import Launcher, RunningRole, Site
from echelon.launch.modules import BROKER, BROKER_MODULE, LEARNER, PREPARE, PREPARE_MODULE, module_of
from echelon.processes import Child, RoleProcess, child_environment, stop_all


class Roster:
    """Starts roles and stops them all; workers and learner where the launcher does."""

    def __init__(self, site: Site, launcher: Launcher) -> None:
        self._site = site
        self._launcher = launcher
        self.children: dict[str, RunningRole] = {}

    def start_prepare(self) -> RunningRole:
        elsewhere = ["--elsewhere"] if self._launcher.elsewhere else []
        return self._start_here(PREPARE, [PREPARE_MODULE, self._run_dir, *elsewhere])

    def start_broker(self) -> RunningRole:
        return self._start_here(BROKER, [BROKER_MODULE, self._run_dir])

    def start_worker(self, index: int) -> RunningRole:
        """Those beyond `rollout.workers` are spares."""
        name = f"worker-{index}"
        spare = index >= self._site.config.rollout.workers
        self.children[name] = self._launcher.start_worker(self._site, name, index, spare)
        return self.children[name]

    def restart(self, child: RunningRole) -> RunningRole:
        """What the dead one reported is not what will end the run."""
        child.kill()  # whatever is left of its group
        folder = self._site.folder
        reports = folder.logs.glob(f"{child.name}-rank*.error.json")
        for report in (folder.error_file(child.name), *reports):
            report.unlink(missing_ok=True)
        if child.name == BROKER:
            return self.start_broker()
        if child.name == LEARNER:
            return self.start_learner()
        return self.start_worker(int(child.name.rpartition("-")[2]))

    def trouble(self) -> str:
        """Why what is elsewhere cannot be looked after any more; "" while it can."""
        return self._launcher.trouble()

    def start_learner(self) -> RunningRole:
        self.children[LEARNER] = self._launcher.start_learner(self._site, LEARNER)
        return self.children[LEARNER]

    def stop(self, grace_s: float) -> None:
        """The broker last: the others take its absence for a failure."""
        stop_all([child for child in self.children.values() if child.name != BROKER], grace_s)
        stop_all(self.children.values(), grace_s)

    def kill(self) -> None:
        for child in self.children.values():
            child.kill()

    def look(self) -> list[RoleProcess]:
        """All processes that run a role: torchrun's ranks count, its agent does not."""
        return [process for child in self._running() for process in child.look(module_of(child.name))]

    def ask_for_stacks(self) -> None:
        for child in self._running():
            child.ask_for_stacks(module_of(child.name))

    def _running(self) -> list[RunningRole]:
        return [child for child in self.children.values() if child.exit_code() is None]

    def _start_here(self, name: str, arguments: list[str]) -> RunningRole:
        environment = child_environment(self._site.root, {})
        self.children[name] = Child(name, arguments, environment, self._site.folder.log_file(name))
        return self.children[name]

    @property
    def _run_dir(self) -> str:
        return str(self._site.folder.path)
