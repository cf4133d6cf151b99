"""Which of the waiting requests an engine begins first."""

BEGUN = -(1 << 40)
"""Before all others: a completion that goes on. Its group waits for it, and the engine may still have its cache."""


class BeginOrder:
    """Longest predicted first, but nobody is overtaken for ever.

    A later arrival has to be longer by its share of a turnover of the engine: after `max_sequences` more requests even
    the longest comes after the shortest of now.
    """

    def __init__(self, max_sequences: int) -> None:
        self._max_sequences = max_sequences
        self._arrivals = 0

    def priority(self, predicted_tokens: int, max_tokens: int) -> int:
        """Of the next request to arrive; the lowest number is begun first.

        A length that is not known (0) counts as the longest it may be. So do evaluations, which hold up new versions.
        """
        age = self._arrivals * max_tokens // self._max_sequences
        self._arrivals += 1
        return age - (min(predicted_tokens, max_tokens) or max_tokens)
