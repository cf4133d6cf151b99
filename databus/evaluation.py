"""Evaluations on held-out problems: each is sampled by exactly the version it is of (docs/decisions/001)."""

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from databus.codec import MalformedMessage
from databus.groups import Group

logger = logging.getLogger(__name__)

ID_PREFIX = "eval-"
ACCURACY = "eval/accuracy"


@dataclass
class Evaluation:
    """The evaluation of one version: problems waiting, with workers, and done.

    queued: when its turn came; the time limit counts from then.
    """

    version: int
    num_problems: int
    threshold: float
    timeout_s: float
    waiting: deque[int] = field(default_factory=deque)
    leased: dict[str, tuple[str, int]] = field(default_factory=dict)
    solved: int = 0
    failed: int = 0
    tokens: int = 0
    done: int = 0
    queued: float = 0.0
    _leases: int = 0

    def __post_init__(self) -> None:
        self.waiting.extend(range(self.num_problems))

    def lease(self, worker: str) -> tuple[str, int]:
        """Hand the next problem to a worker. Returns: (group id, index of the problem)."""
        index = self.waiting.popleft()
        group_id = f"{ID_PREFIX}{self.version}-{index}-{self._leases}"
        self._leases += 1
        self.leased[group_id] = (worker, index)
        return group_id, index

    def outstanding(self, worker: str) -> int:
        return sum(holder == worker for holder, _ in self.leased.values())

    def take_back(self, worker: str, group_ids: tuple[str, ...] | None = None) -> None:
        """Problems that a worker gives back, or all it has: they wait again."""
        for group_id, (holder, index) in list(self.leased.items()):
            if holder == worker and (group_ids is None or group_id in group_ids):
                del self.leased[group_id]
                self.waiting.append(index)

    def complete(self, group_id: str, group: Group) -> None:
        """Score one answer; it must be of this version alone.

        Raises: MalformedMessage if another version sampled any of it: then some worker broke the contract.
        """
        if set(group.version_values.tolist()) - {self.version}:
            raise MalformedMessage(f"the evaluation of version {self.version} was sampled by another version")
        del self.leased[group_id]
        self.done += 1
        self.solved += int(group.rewards[0] >= self.threshold)
        self.tokens += group.num_tokens

    def fail(self, group_id: str) -> None:
        """A problem that could not be answered or scored counts as not solved."""
        del self.leased[group_id]
        self.done += 1
        self.failed += 1

    def finished(self) -> bool:
        return self.done == self.num_problems

    def overdue(self, now: float) -> bool:
        return now - self.queued > self.timeout_s

    def metrics(self) -> dict[str, float]:
        """What the row of this version's step gets."""
        answered = max(1, self.done - self.failed)
        return {
            ACCURACY: self.solved / max(1, self.done),
            "eval/length_mean": self.tokens / answered,
            "eval/failed_problems": float(self.failed),
        }


def is_evaluation(group_id: str) -> bool:
    return group_id.startswith(ID_PREFIX)


class Evaluations:
    """Which versions are to be evaluated, and how far that is. One at a time, oldest first."""

    def __init__(
        self,
        num_problems: int,
        every: int,
        last_version: int,
        threshold: float,
        timeout_s: float,
        accuracies: Mapping[int, float] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: accuracies: of versions that a broker before this one has evaluated."""
        self._clock = clock
        self._num_problems = num_problems if every > 0 else 0
        self._every = every
        self._last_version = last_version
        self._threshold = threshold
        self._timeout_s = timeout_s
        self._queue: deque[Evaluation] = deque()
        self._first: int | None = None
        self._last_published = -1
        self._results: dict[int, dict[str, float]] = {}
        self._accuracies = dict(accuracies or {})
        self.abandoned = 0

    @property
    def current(self) -> Evaluation | None:
        return self._queue[0] if self._queue else None

    def published(self, version: int) -> None:
        """A version can be served; queue its evaluation if it is due."""
        self._last_published = max(self._last_published, version)
        if not self._num_problems or self.is_known(version):
            return
        if self._first is None:
            self._first = version
        if version in (self._first, self._last_version) or version % self._every == 0:
            waiting = Evaluation(version, self._num_problems, self._threshold, self._timeout_s, queued=self._clock())
            self._queue.append(waiting)
            if len(self._queue) == 1:
                self._queue[0].queued = self._clock()

    def awaits_last_version(self) -> bool:
        """The last version is to be evaluated, and has not been published yet."""
        return self._num_problems > 0 and self._last_published < self._last_version

    def is_pending(self, version: int) -> bool:
        return any(item.version == version for item in self._queue)

    def is_known(self, version: int) -> bool:
        """Is there, or will there be, a result for this version's row?"""
        return version in self._results or self.is_pending(version)

    def tick(self, now: float) -> Evaluation | None:
        """Close the current evaluation if it is finished or out of time, and return it.

        What is still leased of one that ran out of time is of no use any more.
        """
        current = self.current
        if current is None or not (current.finished() or current.overdue(now)):
            return None
        if current.finished():
            self._results[current.version] = metrics = current.metrics()
            self._accuracies[current.version] = metrics[ACCURACY]
        else:
            self.abandoned += 1
            logger.warning(
                "evaluation of version %d abandoned: %d of %d problems done within %g s",
                current.version, current.done, current.num_problems, current.timeout_s,
            )  # fmt: skip
        self._queue.popleft()
        if self._queue:
            self._queue[0].queued = now
        return current

    def accuracies(self) -> dict[int, float | None]:
        """Of all versions so far; None where the evaluation is not over."""
        return self._accuracies | {item.version: None for item in self._queue}

    def drop(self, version: int) -> None:
        """Nobody will serve the version: its row goes without a result."""
        current = self.current
        self._queue = deque(item for item in self._queue if item.version != version)
        self._results[version] = {}
        if self._queue and self._queue[0] is not current:
            self._queue[0].queued = self._clock()

    def take_result(self, version: int) -> dict[str, float]:
        return self._results.pop(version, {})
