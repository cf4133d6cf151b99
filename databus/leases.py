"""Outstanding leases: who holds which group, and until when."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from databus.prompts import Prompt


@dataclass(frozen=True)
class Held:
    """A lease of a training group. deadline, sent: on the monotonic clock. predicted_tokens: of all its completions."""

    group_id: str
    worker: str
    prompt: Prompt
    deadline: float
    predicted_tokens: int = 0
    sent: float = 0.0


class Leases:
    """Leases by group; expired ones are remembered until their group is settled, for a late result."""

    def __init__(self, lease_s: float) -> None:
        self._lease_s = lease_s
        self._held: dict[str, Held] = {}
        self._late: dict[str, Held] = {}
        self._by_worker: dict[str, dict[str, Held]] = {}
        self._predicted: Counter[str] = Counter()

    def add(self, group_id: str, worker: str, prompt: Prompt, now: float, predicted_tokens: int = 0) -> Held:
        self._take(group_id)
        held = Held(group_id, worker, prompt, now + self._lease_s, predicted_tokens, now)
        self._held[group_id] = held
        self._by_worker.setdefault(worker, {})[group_id] = held
        self._predicted[worker] += predicted_tokens
        return held

    def get(self, group_id: str) -> Held | None:
        """The lease, expired or not."""
        return self._held.get(group_id) or self._late.get(group_id)

    def by_worker(self) -> dict[str, int]:
        return {worker: len(held) for worker, held in self._by_worker.items()}

    def predicted_tokens(self, worker: str) -> int:
        """Of all groups that a worker holds."""
        return self._predicted[worker]

    def of(self, worker: str) -> list[Held]:
        return list(self._by_worker.get(worker, {}).values())

    def count(self, worker: str) -> int:
        return len(self._by_worker.get(worker, ()))

    def has_any(self, worker: str) -> bool:
        return worker in self._by_worker

    def sent_before(self, time: float) -> list[Held]:
        return [held for held in self._held.values() if held.sent < time]

    def oldest_s(self, now: float) -> float:
        """How long the oldest has been out; 0 where there is none."""
        return max((now - held.sent for held in self._held.values()), default=0.0)

    def overdue(self, now: float) -> list[Held]:
        return [held for held in self._held.values() if held.deadline <= now]

    def expire(self, group_id: str) -> None:
        held = self._take(group_id)
        if held is not None:
            self._late[group_id] = held

    def drop(self, group_id: str) -> None:
        """The group is settled, or its result has come."""
        self._take(group_id)
        self._late.pop(group_id, None)

    def _take(self, group_id: str) -> Held | None:
        held = self._held.pop(group_id, None)
        if held is not None:
            self._predicted[held.worker] -= held.predicted_tokens
            del self._by_worker[held.worker][group_id]
            if not self._by_worker[held.worker]:
                del self._by_worker[held.worker], self._predicted[held.worker]
        return held

    def forget_settled(self, is_open: Callable[[str], bool]) -> None:
        """Let go of expired leases whose groups are settled."""
        self._late = {group_id: held for group_id, held in self._late.items() if is_open(group_id)}
