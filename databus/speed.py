"""How fast a worker is, from the counters in its heartbeats."""

from dataclasses import dataclass

from databus.messages import Heartbeat

RATE_WINDOW_S = 10.0


@dataclass
class Speed:
    """tokens_per_s: over the last whole window, 0 before there is one. busy: it had work all through that window."""

    tokens_per_s: float = 0.0
    busy: bool = False
    _since: float | None = None
    _tokens: int = 0
    _had_work: bool = True

    def take(self, beat: Heartbeat, now: float) -> None:
        """Args: now: on the monotonic clock, seconds."""
        self._had_work &= beat.running_sequences > 0
        started_anew = beat.generated_tokens < self._tokens
        if self._since is not None:
            if now - self._since < RATE_WINDOW_S and not started_anew:
                return
            self.tokens_per_s = max(0, beat.generated_tokens - self._tokens) / (now - self._since)
            self.busy = self._had_work
        self._since, self._tokens, self._had_work = now, beat.generated_tokens, beat.running_sequences > 0
