"""Episodes: completions of several turns, with an environment's answers between them.

    prompt │ turn │ answer │ turn │ answer │ … │ turn

What the model sampled is what is trained, token for token; answers are forced, without loss. Every turn is a request
that goes on from the tokens so far, on the same engine, which finds them in its prefix cache unless its weights have
changed. Each episode goes its own way: while one waits for its tool, the others are generated.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import msgspec
import numpy as np

from databus.codec import Array
from rewards.sample import Message
from rollout.config import EnvironmentConfig
from rollout.engine.all_or_none import all_or_none
from rollout.engine.base import Completion, Engine, GenerateRequest
from rollout.engine.reasoning import join
from rollout.environments.base import Step
from rollout.environments.turn_tokens import TurnTokens

COUNTERS = ("episodes", "turns", "truncated", "tool_calls", "tool_errors", "tool_s")


class Environments(Protocol):
    """`rollout.environments.pool.EnvironmentPool`."""

    async def reset(self, problem: dict[str, Any]) -> Any: ...

    async def step(self, state: Any, turn: str) -> Step: ...


@dataclass(frozen=True, kw_only=True)
class Episode:
    """completion: of all its turns, the answers in it without loss. transcript: the same as text, the prompt left out.
    parts: what the environment adds to the reward."""

    completion: Completion
    transcript: tuple[Message, ...] = ()
    parts: dict[str, float] = field(default_factory=dict)


class Episodes:
    """Plays the episodes of a group. counters: since the start, as `databus.environment_metrics` reads them."""

    def __init__(
        self,
        engine: Engine,
        environments: Environments,
        turn_tokens: TurnTokens,
        detokenize: Callable[[Sequence[int]], str],
        config: EnvironmentConfig,
        context_tokens: int,
    ) -> None:
        """Args: detokenize: without special tokens."""
        self._engine = engine
        self._environments = environments
        self._turn_tokens = turn_tokens
        self._detokenize = detokenize
        self._config = config
        self._context_tokens = context_tokens
        self.counters: dict[str, float] = dict.fromkeys(COUNTERS, 0.0)

    async def play(self, request: GenerateRequest, problem: dict[str, Any]) -> list[Episode]:
        """All episodes of the group. Raises: EngineError; RewardError where the environment itself has failed.

        Args: problem: the data set's row. request: whose `max_tokens` is for a whole episode.
        """
        return await all_or_none(self._play(alone(request, index), problem) for index in range(request.group_size))

    async def _play(self, request: GenerateRequest, problem: dict[str, Any]) -> Episode:
        ends_at = time.monotonic() + self._config.episode_s
        limit = min(request.sampling.max_tokens, self._context_tokens - len(request.prompt_ids))
        state = await self._environments.reset(problem)
        so_far: Completion | None = None
        transcript: list[Message] = []
        parts: dict[str, float] = {}
        for turn_number in range(1, self._config.max_turns + 1):
            turn = await self._turn(request, so_far, limit)
            so_far = turn if so_far is None else join(so_far, turn)
            transcript.append(Message(role="assistant", text=self._detokenize(turn.token_ids.tolist())))
            self.counters["turns"] += 1
            if turn.truncated:
                break
            step = await self._step(state, transcript[-1].text)
            parts |= {name: parts.get(name, 0.0) + value for name, value in step.parts.items()}
            if step.done:
                return self._ended(so_far, transcript, parts)
            answer = self._forced(self._turn_tokens.between(int(turn.token_ids[-1]), step.output))
            is_last = turn_number == self._config.max_turns or time.monotonic() > ends_at
            if is_last or len(so_far.token_ids) + len(answer.token_ids) >= limit:
                break  # nobody would go on from the answer, so it is left out
            so_far, state = join(so_far, answer), step.state
            transcript.append(Message(role="tool", text=step.output))
        assert so_far is not None
        self.counters["truncated"] += 1
        return self._ended(replace(so_far, truncated=True), transcript, parts)

    async def _turn(self, request: GenerateRequest, so_far: Completion | None, limit: int) -> Completion:
        said = [] if so_far is None else so_far.token_ids.tolist()
        room = max(1, limit - len(said))  # a prompt that leaves none is the engine's to refuse
        sampling = msgspec.structs.replace(
            request.sampling, max_tokens=min(room, self._config.turn_tokens) if self._config.turn_tokens else room
        )
        expected = max(1, request.predicted_tokens - len(said)) if request.predicted_tokens else 0
        asked = replace(request, sampling=sampling, prefix=(*request.prefix, *said), predicted_tokens=expected)
        (turn,) = await self._engine.generate(asked)
        return turn

    async def _step(self, state: Any, turn: str) -> Step:
        started = time.monotonic()
        try:
            step = await self._environments.step(state, turn)
        finally:
            self.counters["tool_s"] += time.monotonic() - started
        self.counters["tool_calls"] += step.tool_calls
        self.counters["tool_errors"] += step.tool_errors
        return step

    def _forced(self, token_ids: Array) -> Completion:
        return Completion(
            token_ids=token_ids,
            logprobs=np.zeros(len(token_ids), np.float32),
            versions=np.full(len(token_ids), self._engine.version, np.int32),
            truncated=True,
            loss_mask=np.zeros(len(token_ids), np.uint8),
        )

    def _ended(self, completion: Completion, transcript: Sequence[Message], parts: dict[str, float]) -> Episode:
        self.counters["episodes"] += 1
        return Episode(completion=completion, transcript=tuple(transcript), parts=parts)


def alone(request: GenerateRequest, index: int) -> GenerateRequest:
    """A request for one of its completions; the history, which serves them all, goes with the first."""
    one = replace(request, group_size=1, first_sample=request.first_sample + index)
    return one if index == 0 else replace(one, history=(), history_ids=())
