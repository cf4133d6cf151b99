"""POST /v1/rollouts: groups that are generated and scored, sent in the order in which they are done."""

import asyncio
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import numpy as np

from databus.groups import run_lengths
from databus.messages import Sampling
from rewards.errors import RewardError
from rewards.pool import RewardPool
from rewards.sample import Sample
from rollout.config import why_not_sampling
from rollout.engine.base import Completion, Engine, EngineError, GenerateRequest
from rollout.lease_work import Detokenize, check_logprobs
from rollout.service.errors import ServiceError
from rollout.service.prompts import PromptReader, ReadPrompt
from rollout.service.protocol import (
    FailedGroup,
    Finished,
    RolloutLine,
    RolloutRequest,
    ScoredCompletion,
    ScoredGroup,
    VersionSpan,
)
from rollout.service.scoring import Rewards

MAX_SEQUENCES = 1 << 16
"""That one request may ask for."""

T = TypeVar("T")


@dataclass(frozen=True)
class Job:
    """A request that was found to be in order."""

    name: str
    prompts: Sequence[ReadPrompt]
    request: RolloutRequest
    pool: RewardPool | None


class RolloutDesk:
    """One engine's. Groups of all requests share it; a request holds as many at once as the engine runs, twice over."""

    def __init__(
        self, engine: Engine, prompts: PromptReader, rewards: Rewards, detokenize: Detokenize, max_sequences: int
    ) -> None:
        self._engine = engine
        self._prompts = prompts
        self._rewards = rewards
        self._detokenize = detokenize
        self._max_sequences = max_sequences
        self.counters: Counter[str] = Counter()

    async def accept(self, body: bytes) -> Job:
        """Args: body: a `RolloutRequest` as JSON. Raises: ServiceError for whatever is wrong with it."""
        request = read_json(body, RolloutRequest)
        sequences = len(request.prompts) * request.group_size
        if sequences > MAX_SEQUENCES:
            raise ServiceError(400, f"{sequences} completions in one request: at most {MAX_SEQUENCES}", "group_size")
        if request.reward is not None:
            self._rewards.check(request.reward)
        prompts = await asyncio.to_thread(self._prompts.read, request.prompts)
        pool = None if request.reward is None else await self._rewards.pool(request.reward)
        return Job(f"serve-{uuid.uuid4().hex}", prompts, request, pool)

    async def run(self, job: Job) -> AsyncGenerator[RolloutLine, None]:
        """Every group, as it is done, then `Finished`. Whoever stops listening ends what is under way."""
        room = asyncio.Semaphore(max(1, 2 * self._max_sequences // job.request.group_size))
        tasks = [asyncio.ensure_future(self._within(room, job, index)) for index in range(len(job.prompts))]
        failed = 0
        try:
            for done in asyncio.as_completed(tasks):
                line = await done
                failed += isinstance(line, FailedGroup)
                yield line
            yield Finished(groups=len(tasks), failed=failed)
        finally:
            for task in tasks:
                task.cancel()

    async def _within(self, room: asyncio.Semaphore, job: Job, index: int) -> ScoredGroup | FailedGroup:
        async with room:
            try:
                async with asyncio.timeout(job.request.timeout_s):
                    line = await self._group(job, index)
            except TimeoutError:
                message = f"prompts[{index}] took longer than {job.request.timeout_s:g} s"
                line = _failed(index, 504, message, "timeout_s")
            except RewardError as error:
                line = _failed(index, 422, str(error), "reward")
            except EngineError as error:
                line = _failed(index, 500, str(error))
        self.counters["failed_groups" if isinstance(line, FailedGroup) else "groups"] += 1
        return line

    async def _group(self, job: Job, index: int) -> ScoredGroup:
        started = time.monotonic()
        prompt, sampling = job.prompts[index], job.request.sampling
        request = GenerateRequest(
            group_id=f"{job.name}-{index}",
            prompt_ids=prompt.token_ids,
            group_size=job.request.group_size,
            sampling=Sampling(max_tokens=sampling.max_tokens, temperature=sampling.temperature),
        )
        completions = await self._engine.generate(request)
        check_logprobs(request.group_id, completions)
        generated = time.monotonic()
        texts = [self._detokenize(completion.token_ids.tolist()) for completion in completions]
        self.counters["tokens"] += sum(len(completion.token_ids) for completion in completions)
        parts = await self._score(job.pool, prompt, texts, completions)
        return ScoredGroup(
            index=index,
            prompt_ids=list(prompt.token_ids),
            completions=[_scored(*each) for each in zip(texts, completions, parts, strict=True)],
            generate_s=generated - started,
            score_s=time.monotonic() - generated,
        )

    async def _score(
        self, pool: RewardPool | None, prompt: ReadPrompt, texts: Sequence[str], completions: Sequence[Completion]
    ) -> "Sequence[dict[str, float] | None]":
        if pool is None:
            return [None] * len(texts)
        samples = [
            Sample(
                prompt=prompt.text,
                completion=text,
                problem=prompt.problem,
                num_tokens=len(completion.token_ids),
                truncated=completion.truncated,
            )
            for text, completion in zip(texts, completions, strict=True)
        ]
        return await pool.score(samples)


def read_json(body: bytes, kind: type[T]) -> T:
    """Raises: ServiceError, 400, saying what is wrong and where."""
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        message, _, path = str(error).partition(" - at `$")
        param = path.rstrip("`").removeprefix(".") or None
        where = f"{param}: " if param else ""
        raise ServiceError(400, f"{where}{message}{why_not_sampling(message)}", param) from None
    except (msgspec.DecodeError, RecursionError) as error:
        raise ServiceError(400, f"the body is no JSON: {error}") from None


def _failed(index: int, status: int, message: str, param: str | None = None) -> FailedGroup:
    return FailedGroup(index=index, error=ServiceError(status, message, param).fields)


def _scored(text: str, completion: Completion, parts: "dict[str, float] | None") -> ScoredCompletion:
    values, lengths = run_lengths(completion.versions)
    stops = np.cumsum(lengths)
    return ScoredCompletion(
        text=text,
        token_ids=completion.token_ids.tolist(),
        logprobs=completion.logprobs.tolist(),
        versions=[
            VersionSpan(version=int(version), start=int(stop - length), stop=int(stop))
            for version, length, stop in zip(values, lengths, stops, strict=True)
        ],
        truncated=completion.truncated,
        reward=None if parts is None else sum(parts.values()),
        parts=parts or {},
    )
