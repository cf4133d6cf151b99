"""What the supervisor asks of a role that it has started, wherever that runs, and of whoever starts it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from echelon.config import RunConfig
    from echelon.processes import RoleProcess
    from echelon.run_folder import RunFolder

On = Literal["local", "ray", "slurm", "allocation"]


class RunningRole(Protocol):
    """One role of a run.

    log: its file in the run folder. started: of `time.monotonic`; a role that waits for a place starts when it has one.
    exited_at: of `time.time`.
    """

    name: str
    log: Path
    started: float
    exited_at: float | None

    def exit_code(self) -> int | None:
        """None while it runs, or waits for a place; negative: the signal that killed it. Never waits."""
        ...

    def killed_by(self) -> int | None:
        """The signal that ended it, or one of its ranks; None where none did."""
        ...

    def how_it_ended(self) -> str:
        """In words that follow its name."""
        ...

    def waits_for(self) -> str:
        """What it wants and what there is, where it has no place yet; "" once it has."""
        ...

    def terminate(self) -> None:
        """Ask it to leave."""
        ...

    def kill(self) -> None:
        """End it and all below it, however busy; harmless when called again."""
        ...

    def look(self, module: str) -> "list[RoleProcess]":
        """Its processes that run `python -m module`, as their kernels see them."""
        ...

    def ask_for_stacks(self, module: str) -> None:
        """Have them write their stacks to its log."""
        ...


@dataclass(frozen=True)
class Site:
    """A run that is about to start. root: the checkout that the packages come from. memory_dir: for copies of the
    learner's state, on this machine."""

    folder: "RunFolder"
    config: "RunConfig"
    root: Path
    memory_dir: Path | None = None


class Launcher(Protocol):
    """Starts workers and the learner; broker and `prepare` stay with the supervisor, beside the run folder."""

    elsewhere: bool
    """Do they run on other machines than this one?"""

    def placed(self, config: "RunConfig") -> "RunConfig":
        """The settings with which it can start them. Raises: ValueError, in one line."""
        ...

    def needed_workers(self, config: "RunConfig") -> int:
        """Without so many the run does not begin."""
        ...

    def start_worker(self, site: Site, name: str, index: int, spare: bool) -> RunningRole: ...

    def start_learner(self, site: Site, name: str) -> RunningRole: ...

    def trouble(self) -> str:
        """Why it can look after its roles no longer; "" while it can."""
        ...

    def close(self) -> None:
        """Lets go of the cluster; the roles have ended by then."""
        ...
