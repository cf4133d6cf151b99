"""When the learner may compute: always, or in turns with the engines on its device (`placement=colocated`)."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Protocol

from torch.optim import Optimizer

from databus.turns import LearnerTurn
from learner.config import LearnerConfig
from learner.model import PolicyModel
from learner.off_turn import HostState, state_of


class Turn(Protocol):
    """All ranks have one, and call it alike."""

    def holds(self, models: Iterable[PolicyModel], optimizer: Optimizer, finish: Callable[[], None]) -> None:
        """What there is on the device. Args: finish: waits for what is done beside training."""
        ...

    def take(self) -> None:
        """Before anything is computed; harmless where it is the learner's turn already. Raises: TurnError."""
        ...

    def give(self) -> None:
        """Before it waits for what needs an engine; harmless where it is not its turn."""
        ...

    def metrics(self) -> dict[str, float]:
        """Of the last turn."""
        ...


class Always:
    """The learner has a device of its own."""

    def holds(self, models: Iterable[PolicyModel], optimizer: Optimizer, finish: Callable[[], None]) -> None:
        pass

    def take(self) -> None:
        pass

    def give(self) -> None:
        pass

    def metrics(self) -> dict[str, float]:
        return {}


class DeviceTurn:
    """Takes turns with the engines; what `learner.off_turn` names is in host memory in theirs."""

    def __init__(self, config: LearnerConfig, turns: Path, rank: int, patience_s: float) -> None:
        """Args: turns: folder of the run's flags. patience_s: how long engines may take to give up the device."""
        self._config = config
        self._turn = LearnerTurn(turns, rank, patience_s)
        self._state: HostState | None = None
        self._finish: Callable[[], None] | None = None
        self._waited_s = 0.0

    def holds(self, models: Iterable[PolicyModel], optimizer: Optimizer, finish: Callable[[], None]) -> None:
        on_cpu = self._config.device == "cpu"  # its memory is the host's, and what is done beside training takes it
        if not on_cpu and self._config.off_turn != "none":
            self._state = HostState(state_of(self._config.off_turn, list(models), optimizer), self._config.device)
        self._finish = finish if on_cpu else None

    def take(self) -> None:
        if self._turn.is_mine:
            return
        began = time.monotonic()
        self._turn.take()
        if self._state is not None:
            self._state.to_device()
        self._waited_s = time.monotonic() - began

    def give(self) -> None:
        if not self._turn.is_mine:
            return
        if self._finish is not None:
            self._finish()
        if self._state is not None:
            self._state.to_host()
        self._turn.give()

    def metrics(self) -> dict[str, float]:
        waited_s, self._waited_s = self._waited_s, 0.0
        return {"learner/turn_wait_s": waited_s}

    def close(self) -> None:
        self._turn.close()
