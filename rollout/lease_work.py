"""The work of one lease: generate, score, and make the message that says what came of it."""

import asyncio
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from msgspec import Struct

from databus.codec import Frame
from databus.messages import Failed, Lease, Released
from rewards.errors import RewardError
from rewards.sample import Sample
from rollout.engine.base import Completion, Engine, EngineDead, EngineError, GenerateRequest
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
    """What every lease needs. detokenize: token ids to text without special tokens."""

    engine: Engine
    scorer: Scorer
    detokenize: Detokenize
    history: HistoryReader = field(default_factory=HistoryReader)

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
        try:
            completions = await self.engine.generate(
                GenerateRequest(
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
            )
        finally:
            generated()
        generated_at = time.monotonic()
        check_logprobs(lease.group_id, completions)
        parts = await self.scorer.score(self._samples(lease, completions))
        return completed_message(
            lease.group_id,
            lease.prompt_ids,
            completions,
            parts,
            generate_s=generated_at - started,
            score_s=time.monotonic() - generated_at,
        )

    def _samples(self, lease: Lease, completions: list[Completion]) -> list[Sample]:
        problem = json.loads(lease.problem)
        return [
            Sample(
                prompt=lease.prompt,
                completion=self.detokenize(completion.token_ids.tolist()),
                problem=problem,
                num_tokens=len(completion.token_ids),
                truncated=completion.truncated,
            )
            for completion in completions
        ]


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
