"""What is said of a run that makes no progress: who holds it up, and where each role stands."""

import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from databus.messages import Status, WorkerStatus
from databus.turns import explain
from echelon.launch.base import RunningRole
from echelon.launch.modules import BROKER
from echelon.processes import RoleProcess
from echelon.roster import Roster

STACKS_S = 5.0
"""How long a role may take to write its stacks."""
WRITING_S = 0.5
SILENT_S = 5.0
"""A broker or worker that has not been heard for longer is worth a word, whatever its heartbeat."""
MAX_STACK_BYTES = 64 << 10


class Watchdog:
    """Looks at every role of a roster and writes down what it sees."""

    def __init__(self, roster: Roster, report_file: Path, turns: Path | None = None) -> None:
        """Args: turns: where learner and engines take turns on a device, the folder of their flags."""
        self._roster = roster
        self._file = report_file
        self._turns = turns

    def report(self, status: Status | None, status_age_s: float) -> str:
        """Have every role write its stacks, put all together in the report's file, and say in one line who it is.

        Args: status: the broker's newest, and its age in seconds.
        """
        children = [child for child in self._roster.children.values() if child.exit_code() is None]
        processes = self._roster.look()
        turn = "" if self._turns is None else explain(self._turns)
        cause = diagnose(processes, status, status_age_s, turn)
        sections = [cause, *map(_process_line, processes), _status_text(status, status_age_s)]
        sections += self._stacks(children)
        self._file.write_text("\n\n".join(sections) + "\n")
        return f"{cause} (report: {self._file})"

    def _stacks(self, children: Sequence[RunningRole]) -> list[str]:
        """What each role's log got from being asked."""
        before = {child.name: _size(child.log) for child in children}
        self._roster.ask_for_stacks()
        deadline = time.monotonic() + STACKS_S
        while time.monotonic() < deadline and any(_size(c.log) == before[c.name] for c in children):
            for child in children:
                child.exit_code()  # brings the log of one that is elsewhere
            time.sleep(0.1)
        time.sleep(WRITING_S)  # the last of them may be at it still
        return [f"stacks of {child.name}:\n{_read_from(child.log, before[child.name])}" for child in children]


def diagnose(processes: Sequence[RoleProcess], status: Status | None, status_age_s: float, turn: str = "") -> str:
    """Who holds the run up, in one line: what is certain first, else whoever has something to do and does not.

    Args: turn: `databus.turns.explain`, where the learner wants or has a device that it shares with engines.
    """
    stopped = [each for each in processes if each.state == psutil.STATUS_STOPPED]
    if stopped:
        return ", ".join(f"{each.role} (pid {each.pid}) is stopped (SIGSTOP)" for each in stopped)
    if status is None or status_age_s > SILENT_S:
        return f"the {BROKER} has not answered for {status_age_s:.0f} s"
    if status.disk_full:
        return f"the {BROKER} cannot write its journal: {status.disk_full}"
    if turn:
        return f"{turn}; it {_learner(status)}"
    if status.training_s:  # a cut is progress, so it has had the batch all this time
        return f"the learner has had the batch of step {status.step} for {status.training_s:.0f} s"
    held_up = [line for worker in status.workers if (line := _complaint(worker))]
    if held_up:
        return ", ".join(held_up)
    return _nobody_has_work(status)


def _complaint(worker: WorkerStatus) -> str:
    if worker.silent_s > SILENT_S:
        return f"{worker.name} has not been heard for {worker.silent_s:.0f} s"
    if not worker.leased_groups:
        return ""
    holds = f"{worker.name} holds {worker.leased_groups} group{'s' if worker.leased_groups > 1 else ''}"
    if not worker.running_sequences:
        return f"{holds} and generates nothing: it waits for the reward"
    if not worker.tokens_per_s:
        return f"{holds} and its engine, with {worker.running_sequences} sequences, gives no tokens"
    return f"{holds} and generates {worker.tokens_per_s:.0f} tokens/s"


def _nobody_has_work(status: Status) -> str:
    if not status.workers:
        return "no worker is left"
    refusal = f"; {status.refusal}" if status.refusal else ""
    return f"no worker holds a group, {status.queued_groups} are queued, the learner {_learner(status)}{refusal}"


def _process_line(process: RoleProcess) -> str:
    memory = process.memory_bytes / (1 << 20)
    return f"{process.role}: pid {process.pid}, {process.state}, {process.cpu_s:.1f} s of CPU, {memory:.0f} MiB"


def _status_text(status: Status | None, age_s: float) -> str:
    if status is None:
        return "the broker has said nothing yet"
    lines = [
        f"the broker, {age_s:.1f} s ago: {status.phase}, step {status.step} of {status.steps}, "
        f"version {status.version}",
        f"queues: {status.running_groups} groups leased, {status.queued_groups} complete",
        f"groups so far: {', '.join(f'{count} {state}' for state, count in status.counts.items())}",
        f"learner: {_learner(status)}",
    ]
    lines += [
        f"{worker.name}: {worker.standing}, version {worker.version}, holds {worker.leased_groups} groups, runs "
        f"{worker.running_sequences} sequences, {worker.tokens_per_s:.0f} tokens/s, heard {worker.silent_s:.1f} s ago"
        for worker in status.workers
    ]
    return "\n".join(lines)


def _learner(status: Status) -> str:
    if status.training_s:
        return f"has had the batch of step {status.step} for {status.training_s:.0f} s"
    return "waits for a batch" if status.requested else "asks for no batch"


def _size(log: Path) -> int:
    """0 before there is one: a role that waits for a place has not said anything."""
    return log.stat().st_size if log.exists() else 0


def _read_from(log: Path, offset: int) -> str:
    if not log.exists():
        return "nothing: it has not started"
    with log.open("rb") as file:
        file.seek(offset)
        return file.read(MAX_STACK_BYTES).decode(errors="replace").strip() or "nothing: it does not answer signals"
