"""The work of one lease: generate, score, and make the message that says what came of it."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from msgspec import Struct

from databus.codec import Frame
from databus.messages import Failed, Lease, Released
from rewards.errors import RewardError
from rewards.pool import to_parts
from rewards.sample import Sample
from rollout.engine.base import Completion, Engine, EngineDead, EngineError, GenerateRequest
from rollout.episodes import Episode, Episodes
from rollout.groups_out import completed_message
from rollout.history_in import HistoryReader

logger = logging.getLogger(__name__)

Outcome = tuple[Struct, Sequence[Frame]]
Detokenize = Callable[[Sequence[int]], str]


class Scorer(Protocol):
    """Scores the completions of a group; `rewards.pool.RewardPool` is one."""

    async def score(self, samples: list[Sample]) -> list[dict[str, float]]:
        """Raises: RewardError."""
        ...


@dataclass(frozen=True)
class LeaseWork:
    """What every lease needs. detokenize: token ids to text without special tokens.

    episodes: None where completions are of one turn.
    """

    engine: Engine
    scorer: Scorer
    detokenize: Detokenize
    history: HistoryReader = field(default_factory=HistoryReader)
    episodes: Episodes | None = None

    async def run(self, lease: Lease, generated: Callable[[], None], frames: Sequence[Frame] = ()) -> Outcome:
        """`Completed`, `Failed`, or `Released` where the lease's time has run out.

        Raises: EngineDead, also for an engine that gives log-probabilities that are not finite.

        Args: generated: called when the engine has room again, scored or not. frames: the lease's, of its history.
        """
        try:
            async with asyncio.timeout(lease.lease_s):
                return await self._complete(lease, generated, frames)
        except TimeoutError:
            logger.warning("group %s took longer than its lease of %g s", lease.group_id, lease.lease_s)
            return Released(group_ids=(lease.group_id,)), ()
        except EngineDead:
            raise
        except EngineError as error:
            return Failed(group_id=lease.group_id, cause="engine", error=str(error)), ()
        except RewardError as error:
            return Failed(group_id=lease.group_id, cause="reward", error=str(error)), ()

    async def _complete(self, lease: Lease, generated: Callable[[], None], frames: Sequence[Frame]) -> Outcome:
        started = time.monotonic()
        past = self.history.read(lease, frames)
        problem = json.loads(lease.problem)
        request = GenerateRequest(
            group_id=lease.group_id,
            prompt_ids=lease.prompt_ids,
            group_size=lease.group_size,
            sampling=lease.sampling,
            cursor=lease.cursor,
            predicted_tokens=lease.predicted_tokens,
            problem=lease.problem_key,
            history=tuple((each.version, each.token_ids) for each in past),
            history_ids=tuple(each.identity for each in past),
        )
        try:
            episodes = await self._generate(request, problem)
        finally:
            generated()
        generated_at = time.monotonic()
        completions = [episode.completion for episode in episodes]
        check_logprobs(lease.group_id, completions)
        parts = await self.scorer.score([self._sample(lease, problem, episode) for episode in episodes])
        return completed_message(
            lease.group_id,
            lease.prompt_ids,
            completions,
            [add_parts(each, episode.parts) for each, episode in zip(parts, episodes, strict=True)],
            generate_s=generated_at - started,
            score_s=time.monotonic() - generated_at,
        )

    async def _generate(self, request: GenerateRequest, problem: dict[str, Any]) -> list[Episode]:
        if self.episodes is not None:
            return await self.episodes.play(request, problem)
        return [Episode(completion=completion) for completion in await self.engine.generate(request)]

    def _sample(self, lease: Lease, problem: dict[str, Any], episode: Episode) -> Sample:
        token_ids, transcript = episode.completion.token_ids, episode.transcript
        return Sample(
            prompt=lease.prompt,
            completion=transcript[-1].text if transcript else self.detokenize(token_ids.tolist()),
            problem=problem,
            num_tokens=len(token_ids),
            truncated=episode.completion.truncated,
            transcript=transcript,
            environment=episode.parts,
        )


def add_parts(scored: dict[str, float], environment: dict[str, float]) -> dict[str, float]:
    """The reward's parts and the environment's, which are added up under a name that both have.

    Raises: RewardError where that is no finite number.
    """
    if not environment:
        return scored
    names = dict.fromkeys((*scored, *environment))
    try:
        return to_parts({name: scored.get(name, 0.0) + environment.get(name, 0.0) for name in names})
    except ValueError as error:
        raise RewardError(f"the reward and the environment's parts together: {error}") from None


def check_logprobs(group_id: str, completions: Sequence[Completion]) -> None:
    """Raises: EngineDead for one that is not finite: whatever the engine serves, it is not the policy."""
    for completion in completions:
        wrong = np.flatnonzero(~np.isfinite(completion.logprobs))
        if len(wrong):
            place = int(wrong[0])
            raise EngineDead(
                f"the engine gave the log-probability {completion.logprobs[place]} (token {place} of a completion of "
                f"group {group_id}, version {completion.versions[place]}): its weights or its kernels are broken"
            )
