"""How fast a worker is, from the counters in its heartbeats."""

from dataclasses import dataclass

from databus.messages import Heartbeat

RATE_WINDOW_S = 10.0


@dataclass
class Speed:
    """Tokens a second over the last whole window.

    tokens_per_s: of all its time, 0 before there is a window. working_tokens_per_s: of the time between heartbeats in
    which it had work, so that a worker which waits for others is not taken for a slow one; None where it had none.
    """

    tokens_per_s: float = 0.0
    working_tokens_per_s: float | None = None
    _since: float | None = None
    _since_tokens: int = 0
    _last: float = 0.0
    _last_tokens: int = 0
    _working_s: float = 0.0

    def take(self, beat: Heartbeat, now: float) -> None:
        """Args: now: on the monotonic clock, seconds."""
        if self._since is None or beat.generated_tokens < self._last_tokens:  # its first, or it has started anew
            self._begin_window(beat, now)
            return
        if beat.running_sequences > 0 or beat.generated_tokens > self._last_tokens:
            self._working_s += now - self._last
        self._last, self._last_tokens = now, beat.generated_tokens
        if now - self._since >= RATE_WINDOW_S:
            tokens = beat.generated_tokens - self._since_tokens
            self.tokens_per_s = tokens / (now - self._since)
            self.working_tokens_per_s = tokens / self._working_s if self._working_s else None
            self._begin_window(beat, now)

    def _begin_window(self, beat: Heartbeat, now: float) -> None:
        self._since = self._last = now
        self._since_tokens = self._last_tokens = beat.generated_tokens
        self._working_s = 0.0
