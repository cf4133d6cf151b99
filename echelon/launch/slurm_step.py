"""A role as a step of a Slurm job: srun is the supervisor's child, and the role is below `echelon.roles.step` on its
node, which takes srun's signals."""

import contextlib
import os
import shutil
import signal
from collections.abc import Mapping, Sequence
from pathlib import Path

from echelon.processes import Child, RoleProcess

NODE, IS_FIRST = "{node}", "{is_first}"
"""In a role's arguments: the address of the node that it runs on, and whether it is the first of its step."""
END_NOW, STACKS = signal.SIGUSR2, signal.SIGUSR1
FATAL = frozenset({signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGFPE, signal.SIGILL})


class SrunStep(Child):
    """srun reports a task that a signal ended as 128 + its number, and its own end is not the role's."""

    def __init__(
        self,
        name: str,
        options: Sequence[str],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        log: Path,
        stop_signal: signal.Signals,
    ) -> None:
        """Args: options: srun's. arguments: of `python -m` on the node. stop_signal: ends the role."""
        srun = shutil.which("srun") or "srun"
        step = ["echelon.roles.step", stop_signal.name, *arguments]
        words = ["echelon.roles.launch", "--program", srun, "--job-name", name, *options, *python_words(step)]
        super().__init__(name, words, environment, log)

    def killed_by(self) -> int | None:
        code = self.exit_code() or 0
        return code - 128 if code - 128 in FATAL else super().killed_by()

    def kill(self) -> None:
        """First by way of the node, where the role is; a srun that does not end of that is ended itself."""
        if self.exit_code() is None and not self._told_to_end:
            self._told_to_end = True
            self._signal(END_NOW)
        else:
            super().kill()

    def look(self, module: str) -> list[RoleProcess]:
        """Nothing is known of processes on other nodes."""
        return []

    def ask_for_stacks(self, module: str) -> None:
        self._signal(STACKS)

    _told_to_end = False

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def python_words(words: Sequence[str]) -> list[str]:
    """On a node, where Python is at the same place: the disk is shared."""
    import sys

    return [sys.executable, "-m", *words]
