"""Simulates a rollout worker step by step: groups come in under credit, an engine runs so many requests at once."""

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from engine_steps import StepLatency

from databus.codec import Array


@dataclass(frozen=True)
class Order:
    """How a batch is worked off.

    groups: indices of all groups, as they are leased. credit: groups that the worker holds at once. priorities: [N]
    of each group; the engine begins waiting requests of the highest, and equal ones first come, first served.
    """

    groups: Sequence[int]
    credit: int
    priorities: Array


def makespan_s(lengths: Array, order: Order, slots: int, latency: StepLatency, prompt_tokens: int) -> float:
    """Seconds from the first step to the last token.

    A request yields a token in every step from the one that begins it, which computes its prompt as well. A group's
    place is taken by the next one when its last request has ended.
    Args: lengths: int [N, G] tokens of each request.
    """
    running: list[tuple[int, int]] = []  # (first step it is not part of, group)
    waiting: list[tuple[float, int, int, int]] = []  # (-priority, arrival, sibling, group)
    unfinished = {group: lengths.shape[1] for group in order.groups}
    leased = held = step = 0
    total_s = 0.0
    while True:
        while running and running[0][0] <= step:
            _, group = heapq.heappop(running)
            unfinished[group] -= 1
            held -= unfinished[group] == 0
        while held < order.credit and leased < len(order.groups):
            group = order.groups[leased]
            for sibling in range(lengths.shape[1]):
                heapq.heappush(waiting, (-float(order.priorities[group]), leased, sibling, group))
            leased, held = leased + 1, held + 1
        begun = min(slots - len(running), len(waiting))
        for _ in range(begun):
            _, _, sibling, group = heapq.heappop(waiting)
            heapq.heappush(running, (step + int(lengths[group, sibling]), group))
        if not running:
            return total_s
        alike = running[0][0] - step - 1  # until the next request ends, steps are all the same
        total_s += latency.step_s(len(running), begun * prompt_tokens) + alike * latency.step_s(len(running), 0)
        step += alike + 1


def lower_bound_s(lengths: Array, slots: int, latency: StepLatency, prompt_tokens: int) -> float:
    """No order is faster: as many steps as the longest request has, or as all tokens need in full steps, whichever is
    more; and in any order the same tokens are computed.
    """
    steps = max(int(lengths.max()), math.ceil(lengths.sum() / slots))
    work_s = float(lengths.sum()) * latency.request_s + lengths.size * prompt_tokens * latency.token_s
    return steps * latency.base_s + work_s
