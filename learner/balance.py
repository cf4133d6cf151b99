"""Shares of about equal cost for ranks that wait for each other."""

from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from learner.sequences import Sequence


def sequence_cost(sequence: Sequence, attention_tokens: float) -> float:
    """Cost of a sequence of n inputs in those of a token without attention: n + n² / attention_tokens.

    Args: attention_tokens: the length at which attention costs as much as all else; infinite where it costs nothing.
    """
    return sequence.num_inputs * (1 + sequence.num_inputs / attention_tokens)


@dataclass(order=True)
class _Partition:
    """Some of the items in shares by falling cost; ordered by how much the shares differ, most first, then by age."""

    rank: tuple[float, int]
    costs: list[float] = field(compare=False)
    items: list[list[int]] = field(compare=False)

    def joined(self, other: "_Partition") -> "_Partition":
        """This one's dearest share with the other's cheapest, and so on."""
        costs = [own + its for own, its in zip(self.costs, reversed(other.costs), strict=True)]
        items = [own + its for own, its in zip(self.items, reversed(other.items), strict=True)]
        order = sorted(range(len(costs)), key=lambda share: (-costs[share], share))
        return _partition([costs[share] for share in order], [items[share] for share in order], self.rank[1])


def _partition(costs: list[float], items: list[list[int]], age: int) -> _Partition:
    return _Partition((costs[-1] - costs[0], age), costs, items)


def balance(costs: Items[float], shares: int) -> list[list[int]]:
    """Indices of the costs, ascending, in `shares` shares whose dearest costs little more than it must.

    Largest differencing: the two partial solutions whose shares differ most are joined, the dearest share of one with
    the cheapest of the other, until one is left. The shares then differ by no more than the largest cost, and the
    dearest is at most 4/3 - 1/(3 · shares) of the least possible. Deterministic: ties keep their order.
    Source: Karmarkar and Karp (UCB/CSD 82/113, 1982); bound: Michiels et al., Performance ratios of the
    Karmarkar-Karp differencing method (J. Comb. Optim. 13, 2007).
    """
    rest = [0.0] * (shares - 1)
    heap = [_partition([cost, *rest], [[item], *([] for _ in rest)], item) for item, cost in enumerate(costs)]
    heapify(heap)
    while len(heap) > 1:
        heappush(heap, heappop(heap).joined(heappop(heap)))
    return [sorted(items) for items in heap[0].items] if heap else [[] for _ in range(shares)]
