"""An engine whose step takes a + b · (running sequences) seconds: who is done when, without an event a token."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from databus.codec import Array
from rollout.engine.begin_order import BeginOrder


@dataclass(frozen=True)
class EngineSpeed:
    """step_s: of a step with nothing in it. sequence_s: that each running sequence adds. tokens_per_step: that a step
    gives each, above 1 where drafts are accepted."""

    step_s: float
    sequence_s: float
    tokens_per_step: float = 1.0

    def rate(self, running: int) -> float:
        """Tokens a second of each running sequence."""
        return self.tokens_per_step / (self.step_s + self.sequence_s * running)


@dataclass
class EngineGroup:
    """A group in the engine. lengths: tokens of each completion. left: sequences not done yet.

    begun, begun_lengths: the depth at which each sequence began, and its length, in the order of their beginning.
    arrived: `spent` at that time.
    """

    group_id: str
    lengths: Sequence[int]
    left: int
    begun: list[int] = field(default_factory=list)
    begun_lengths: list[int] = field(default_factory=list)
    arrived: tuple[float, float] = (0.0, 0.0)


class EngineModel:
    """Running sequences share the engine, and all have decoded the same number of tokens since its start: its depth. A
    sequence that begins at some depth is done its length deeper, so that a heap of these depths is all there is.
    """

    def __init__(self, speed: EngineSpeed, max_sequences: int, max_tokens: int) -> None:
        self._speed = speed
        self._max_sequences = max_sequences
        self._max_tokens = max_tokens
        self._order = BeginOrder(max_sequences)
        self._running: list[tuple[float, int, int, EngineGroup]] = []
        self._waiting: list[tuple[int, int, int, EngineGroup]] = []
        self._arrivals = 0
        self._now = 0.0
        self._depth = 0.0
        self._factor = 1.0
        self._marks: list[tuple[float, int]] = [(0.0, 0)]
        self._steps = self._sequence_steps = 0.0
        self._done_tokens = 0

    @property
    def running(self) -> int:
        """Sequences."""
        return len(self._running)

    @property
    def is_busy(self) -> bool:
        return bool(self._running)

    @property
    def generated_tokens(self) -> int:
        """Of completions that are done, as an engine counts them."""
        return self._done_tokens

    @property
    def spent(self) -> tuple[float, float]:
        """Steps taken so far, and the sum over them of the sequences that ran."""
        return self._steps, self._sequence_steps

    def set_factor(self, now: float, factor: float) -> None:
        """How much of its speed it has: 0 while paused, less than 1 where it has to share cores."""
        self._advance(now)
        self._factor = factor

    def switch(self, now: float, version: int) -> None:
        """What is sampled from here on is of this version."""
        self._advance(now)
        self._marks.append((self._depth, version))

    def add(self, now: float, group_id: str, lengths: Sequence[int], predicted_tokens: int) -> EngineGroup:
        self._advance(now)
        group = EngineGroup(group_id, lengths, len(lengths), arrived=self.spent)
        for index in range(len(lengths)):
            priority = self._order.priority(predicted_tokens, self._max_tokens)
            heapq.heappush(self._waiting, (priority, self._arrivals, index, group))
            self._arrivals += 1
        self._begin()
        return group

    def drop(self, now: float, group: EngineGroup) -> None:
        """Nobody wants it any more."""
        self._advance(now)
        self._running = [each for each in self._running if each[3] is not group]
        self._waiting = [each for each in self._waiting if each[3] is not group]
        heapq.heapify(self._running)
        heapq.heapify(self._waiting)
        self._begin()

    def next_end(self) -> float:
        """When the next sequence is done, if nothing else happens; infinity where none runs."""
        if not self._running or self._factor <= 0:
            return math.inf
        rate = self._speed.rate(len(self._running)) * self._factor
        return self._now + max(0.0, self._running[0][0] - self._depth) / rate

    def take_ended(self, now: float) -> list[EngineGroup]:
        """End the sequences that are done at `now`, begin others. Returns: groups that have no sequence left."""
        self._advance(now)
        ended: list[EngineGroup] = []
        if self._running:  # floats: what was due at this time is done, whatever the last bit says
            self._depth = max(self._depth, self._running[0][0])
        while self._running and self._running[0][0] <= self._depth + 1e-6:
            _, _, length, group = heapq.heappop(self._running)
            self._done_tokens += length
            group.left -= 1
            if not group.left:
                ended.append(group)
        self._begin()
        return ended

    def versions_of(self, group: EngineGroup) -> tuple[Array, Array]:
        """(versions [S], tokens of each [S]) of a group that is done, oldest first; none has no tokens."""
        marks = self._marks
        first = min(group.begun)
        if first >= marks[-1][0]:
            return np.array([marks[-1][1]], np.int32), np.array([sum(group.lengths)], np.int32)
        lengths, begun = np.array(group.begun_lengths), np.array(group.begun)
        last = (begun + lengths).max()
        depths = np.array([depth for depth, _ in marks if depth < last] + [math.inf])
        versions = np.array([version for depth, version in marks if depth < last], np.int32)
        # Tokens of each sequence before each mark; what is being decoded when weights change is of the new ones.
        before = np.floor(depths[None, :] - begun[:, None] + 1e-6)
        before = np.clip(before, 0, lengths[:, None])
        tokens = np.diff(before, axis=1).sum(0).astype(np.int32)
        return versions[tokens > 0], tokens[tokens > 0]

    def _advance(self, now: float) -> None:
        elapsed, self._now = (now - self._now) * self._factor, now
        running = len(self._running)
        if running and elapsed > 0:
            deeper = elapsed * self._speed.rate(running)
            self._depth += deeper
            steps = deeper / self._speed.tokens_per_step
            self._steps += steps
            self._sequence_steps += steps * running

    def _begin(self) -> None:
        while self._waiting and len(self._running) < self._max_sequences:
            _, order, index, group = heapq.heappop(self._waiting)
            begun = math.ceil(self._depth - 1e-6)
            length = group.lengths[index]
            group.begun.append(begun)
            group.begun_lengths.append(length)
            heapq.heappush(self._running, (float(begun + length), order, length, group))
