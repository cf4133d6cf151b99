"""What the broker schedules by: the order of problems, their predicted lengths, and what came of both."""

import zlib
from collections.abc import Callable, Sequence, Set

import numpy as np
from msgspec import MsgspecError, Struct, msgpack

from databus.codec import Array
from databus.groups import Group
from rollout.config import SchedulingConfig
from rollout.scheduling.curriculum import make_curriculum
from rollout.scheduling.difficulty import DifficultyModel, DifficultyState
from rollout.scheduling.mixer import Mixer, MixerState
from rollout.scheduling.report import Dispatched, Report


class SchedulerState(Struct, kw_only=True):
    """What a checkpoint keeps. assigned: problem of each cursor that is not done with. mixer: None: not mixing."""

    difficulty: DifficultyState
    assigned: dict[int, int]
    mixer: MixerState | None
    curriculum: bytes


class DifficultyScheduler:
    """Implements `databus.scheduling.Scheduler`, and says which problem a cursor has.

    A cursor has the same problem whenever it is asked for, until a step finds that it is done with.
    """

    def __init__(
        self,
        config: SchedulingConfig,
        prompt_tokens: Sequence[int],
        *,
        batch_groups: int,
        seed: int,
        fixed_order: Callable[[int], int] | None = None,
    ) -> None:
        """Args: prompt_tokens: prompt length of each problem. fixed_order: problem of a cursor; None: mixed.

        Raises: ValueError, one line, for a setting that cannot work.
        """
        self._config = config
        self._model = DifficultyModel(np.array(prompt_tokens), config.forgetting)
        self._all = np.arange(len(self._model))
        self._curriculum = make_curriculum(config.curriculum, self._model)
        self._mixer = Mixer(batch_groups, config.shares, seed, self._curriculum.pool, self._model.mean_tokens)
        self._fixed_order = fixed_order
        self._assigned: dict[int, int] = {}
        self._open: dict[int, Dispatched] = {}
        self._edges: Array | None = None
        self._report = Report()

    def problem_of(self, cursor: int) -> int:
        """Index of the problem; a cursor that is not known yet gets the next one."""
        if cursor not in self._assigned:
            self._assigned[cursor] = self._mixer.draw() if self._fixed_order is None else self._fixed_order(cursor)
        return self._assigned[cursor]

    def predicted_tokens(self, cursor: int) -> int:
        problem = np.array([self.problem_of(cursor)])
        length, pass_rate = float(self._model.mean_tokens(problem)[0]), float(self._model.pass_rate(problem)[0])
        if cursor not in self._open:
            self._open[cursor] = Dispatched(length, pass_rate, self._length_class(length))
        return round(length)

    def completed(self, cursor: int, group: Group) -> None:
        passed = group.rewards >= self._config.pass_threshold
        problem, actual = self.problem_of(cursor), float(group.lengths.mean())
        dispatched = self._open.get(cursor)
        if dispatched is not None:
            self._report.completed(dispatched.length, actual)
            self._open[cursor] = dispatched._replace(length=actual, pass_rate=float(passed.mean()))
        self._model.observe(problem, group.lengths, passed)
        self._curriculum.observe(problem, float(passed.mean()))

    def stepped(self, trained: Sequence[int], still_open: Set[int]) -> dict[str, float]:
        kept = set(trained)
        for cursor in [cursor for cursor in self._open if cursor not in still_open]:
            self._report.settled(self._open.pop(cursor), cursor in kept)
        self._assigned = {cursor: problem for cursor, problem in self._assigned.items() if cursor in still_open}
        self._edges = None
        return self._report.row()

    def save(self) -> bytes:
        state = SchedulerState(
            difficulty=self._model.save(),
            assigned=self._assigned,
            mixer=self._mixer.save() if self._fixed_order is None else None,
            curriculum=self._curriculum.save(),
        )
        return zlib.compress(msgpack.encode(state))

    def load(self, saved: bytes) -> None:
        """Go on from what `save` gave; nothing to do where it is empty. Raises: ValueError where it does not fit."""
        if not saved:
            return
        try:
            state = msgpack.decode(zlib.decompress(saved), type=SchedulerState)
        except (zlib.error, MsgspecError) as error:
            raise ValueError(f"the scheduling state of the checkpoint cannot be read: {error}") from None
        self._model.load(state.difficulty)
        if self._fixed_order is None:
            self._assigned = dict(state.assigned)
            if state.mixer is not None:
                self._mixer.load(state.mixer)
        if state.curriculum:
            self._curriculum.load(state.curriculum)

    def _length_class(self, length: float) -> int:
        """Which third of the data set; thirds are reckoned once a step."""
        if self._edges is None:
            self._edges = np.quantile(self._model.mean_tokens(self._all), [1 / 3, 2 / 3])
        return int(np.searchsorted(self._edges, length, side="left"))
