"""Turns on a device that learner and engines share (`placement=colocated`), by locked files in the run's folder.

    learner/0   learner/1 ...        a rank's flag: up from when it wants the device until it is done with it
    engines/worker-0 ...             an engine's flag: up while it may compute

A flag is a file that its owner has locked. Each side raises its own flag before it looks at the other's, and computes
only where those are down; where both are up, the engines lower theirs. The kernel lowers the flags of a process that
ends, however it ends: a turn is never lost with whoever had it. See docs/decisions/031.
"""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Literal

from databus.locks import is_locked

Side = Literal["learner", "engines"]
RECORD = "record.jsonl"
POLL_S = 0.005


class TurnError(RuntimeError):
    """The other side did not give up the device in time; in one line."""


class Flag:
    """A flag of this process, down at first; what it does is written to the record."""

    def __init__(self, turns: Path, side: Side, name: str, recorded: bool = True) -> None:
        """Args: turns: the folder, which is made where there is none. recorded: are its turns written down?"""
        folder = turns / side
        folder.mkdir(parents=True, exist_ok=True)
        self._turns = turns
        self._name = f"{side}/{name}"
        self._file = os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._recorded = recorded
        self._had_turn = False
        self.is_up = False

    def hoist(self, patience_s: float) -> None:
        """Waits only while another looks at it, or a process that had it before has not quite ended.

        Raises: TurnError.
        """
        deadline = time.monotonic() + patience_s
        while not self.try_hoist():
            if time.monotonic() > deadline:
                raise TurnError(f"another process has held {self._turns / self._name} for {patience_s:g} s")
            time.sleep(POLL_S)

    def try_hoist(self) -> bool:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        self.is_up = True
        return True

    def begin_turn(self) -> None:
        """Call it once the other side's flags are down, before anything is computed."""
        assert self.is_up
        self._had_turn = True
        self._write("takes")

    def lower(self) -> None:
        """Call it once nothing is computed any more."""
        if not self.is_up:
            return
        if self._had_turn:
            self._write("gives")
        self._had_turn = self.is_up = False
        fcntl.flock(self._file, fcntl.LOCK_UN)

    def close(self) -> None:
        self.lower()
        os.close(self._file)

    def _write(self, event: str) -> None:
        """One write a line, so that lines of several processes do not mix. CLOCK_MONOTONIC is the machine's."""
        if not self._recorded:
            return
        line = json.dumps({"at_s": time.monotonic(), "who": self._name, "pid": os.getpid(), "event": event})
        with (self._turns / RECORD).open("ab", buffering=0) as record:
            record.write(line.encode() + b"\n")


class LearnerTurn:
    """The device for a rank of the learner, which goes first: engines give it up when they see its flag."""

    def __init__(self, turns: Path, rank: int, patience_s: float) -> None:
        """Args: patience_s: how long engines may take to give up the device."""
        self._turns = turns
        self._flag = Flag(turns, "learner", str(rank))
        self._patience_s = patience_s

    @property
    def is_mine(self) -> bool:
        return self._flag.is_up

    def take(self) -> None:
        """Raises: TurnError naming who has not given up the device."""
        began = time.monotonic()
        self._flag.hoist(self._patience_s)
        while holders := who_has(self._turns, "engines"):
            if time.monotonic() - began > self._patience_s:
                self._flag.lower()
                raise TurnError(f"{', '.join(holders)} did not give up the device within {self._patience_s:g} s")
            time.sleep(POLL_S)
        self._flag.begin_turn()

    def give(self) -> None:
        self._flag.lower()

    def close(self) -> None:
        self._flag.close()


class EngineTurn:
    """The device for one engine, together with all others, as long as the learner does not want it."""

    def __init__(self, turns: Path, name: str) -> None:
        self._turns = turns
        self._flag = Flag(turns, "engines", name)

    @property
    def is_wanted(self) -> bool:
        """Does the learner want the device, or have it?"""
        return bool(who_has(self._turns, "learner"))

    def try_take(self) -> bool:
        """Never waits."""
        if self.is_wanted or not self._flag.try_hoist():
            return False
        if self.is_wanted:  # it came while the flag went up
            self._flag.lower()
            return False
        self._flag.begin_turn()
        return True

    def give(self) -> None:
        self._flag.lower()

    def close(self) -> None:
        self._flag.close()


def who_has(turns: Path, side: Side) -> list[str]:
    """Whose flags are up on that side, by name."""
    folder = turns / side
    return [name for name in sorted(os.listdir(folder)) if is_locked(folder / name)] if folder.is_dir() else []


def explain(turns: Path) -> str:
    """Where the learner waits for the device, or has it, in words for a person; "" where it does neither."""
    learner, engines = who_has(turns, "learner"), who_has(turns, "engines")
    if not learner:
        return ""
    if engines:
        return f"the learner wants the device, and {', '.join(engines)} did not give it up"
    return "the learner has the device"
