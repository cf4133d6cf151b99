"""Which worker the next group goes to."""

from collections.abc import Callable, Sequence

from databus.scheduling import Load, Rank


class LeastRemaining:
    """The worker whose predicted work is done soonest.

    Work is in predicted tokens; where the speeds of all workers are known it counts in seconds, so that a slow one
    gets less.
    """

    def ranking(self, loads: Sequence[Load]) -> Callable[[Load], Rank]:
        by_speed = all(load.tokens_per_s > 0 for load in loads)

        def remaining(load: Load) -> Rank:
            tokens = max(0.0, load.predicted_tokens - load.reported_tokens)
            return tokens / load.tokens_per_s if by_speed else tokens, -load.free_groups

        return remaining
