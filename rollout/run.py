"""A rollout worker's process: start the engine and the scoring pool, join the run, work until told to stop."""

import asyncio
import contextlib
import logging
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from databus.client import BusClient
from databus.messages import Heartbeat, Stop
from databus.process import collect_garbage_seldom
from databus.turns import EngineTurn
from rewards.config import RewardConfig
from rewards.pool import RewardPool
from rollout.config import DraftConfig, RolloutConfig
from rollout.engine.base import Engine
from rollout.engine.factory import make_engine
from rollout.engine.turns import TurnEngine
from rollout.environments.pool import EnvironmentPool
from rollout.environments.turn_tokens import load_turn_tokens
from rollout.episodes import Episodes
from rollout.history_in import HistoryReader
from rollout.lease_work import LeaseWork
from rollout.merging import MergingPull
from rollout.scoring_process import prepare_scoring
from rollout.versions import Pull
from rollout.weights_in import pull_snapshot
from rollout.worker import Worker

logger = logging.getLogger(__name__)

CONNECT_S = 60.0

OnSignal = Callable[[int], None]
MakeClient = Callable[[int, Callable[[], Heartbeat]], BusClient]


class RunFailedError(Exception):
    """The broker ended the run because something had failed elsewhere."""


@dataclass(frozen=True, kw_only=True)
class WorkerRun:
    """model: folder or hub id; the initial policy, version 0. reward_dir: what a reward's path is relative to.

    pull: fetches a version from where it was announced. max_staleness: of the run. turns: folder of the flags by which
    engines and learner take turns on one device, and the name of this worker's; None: the engine has one of its own.
    """

    model: str
    seed: int
    group_size: int
    reward_dir: Path
    draft: DraftConfig = field(default_factory=DraftConfig)
    pull: Pull = pull_snapshot
    max_staleness: int = 0
    turns: tuple[Path, str] | None = None


async def run_worker(config: RolloutConfig, reward: RewardConfig, run: WorkerRun, make_client: MakeClient) -> None:
    """Work until the broker says stop, or this process is told to leave (SIGTERM) or to stop (SIGINT).

    Args: make_client: from the version that the engine serves and a source of heartbeats, a client not connected yet.
    Raises: ValueError for what a user wrote; RunFailedError where the run failed elsewhere; else what broke: BusError,
        EngineDead, PullError, UpdateFailed, WorkerRefusedError.
    """
    engine = _engine(config, run)
    pool = RewardPool(reward, run.reward_dir, initializer=prepare_scoring)
    environments = make_environments(config, reward, run.reward_dir)
    with interrupts() as on_signal:
        try:
            await pool.start()
            if environments is not None:
                await environments.start()
            await engine.start()
            logger.info("engine ready, version %d", engine.version)
            detokenize = await asyncio.to_thread(load_detokenizer, run.model)
            histories = HistoryReader()
            episodes = None
            if environments is not None:
                turns = await asyncio.to_thread(load_turn_tokens, run.model, config.environment)
                episodes = Episodes(engine, environments, turns, detokenize, config.environment, config.context_tokens)
            client = make_client(engine.version, lambda: heartbeat(engine, histories, pool, episodes))
            work = LeaseWork(engine, pool, detokenize, histories, episodes)
            collect_garbage_seldom()
            stop = await _serve(client, work, config, run, on_signal)
        finally:
            pools = [each for each in (pool, environments) if each is not None]
            await asyncio.gather(engine.close(), *(each.close() for each in pools), return_exceptions=True)
    if not stop.ok:
        raise RunFailedError(stop.reason)


def _engine(config: RolloutConfig, run: WorkerRun) -> Engine:
    if run.turns is None:
        return make_engine(config, run.model, run.seed, version=0, draft=run.draft)
    turns, name = run.turns
    engine = make_engine(config, run.model, run.seed, version=0, draft=run.draft, turns=turns)
    return TurnEngine(engine, EngineTurn(turns, name), config.start_timeout_s)


async def _serve(
    client: BusClient,
    work: LeaseWork,
    config: RolloutConfig,
    run: WorkerRun,
    on_signal: "list[OnSignal]",
) -> Stop:
    await asyncio.to_thread(client.connect, CONNECT_S)
    goodbye = "failed"
    try:
        worker = Worker(
            client,
            work,
            group_size=run.group_size,
            max_sequences=config.max_sequences,
            ahead=config.ahead,
            pull=MergingPull(run.pull, run.model, config.dtype),
            drain_s=config.drain_s,
            beside=[work.engine.take_turns] if isinstance(work.engine, TurnEngine) else [],
            update=config.update,
            max_staleness=run.max_staleness,
        )
        on_signal.append(lambda number: _told(worker, number))
        stop = await worker.run()
        goodbye = stop.reason
        return stop
    finally:
        await asyncio.to_thread(client.close, goodbye)


def _told(worker: Worker, number: int) -> None:
    """A scheduler's SIGTERM leaves time to finish; a person's Ctrl-C, and a supervisor that ends the run, do not."""
    if number == signal.SIGTERM:
        worker.leave("told to leave")
    else:
        worker.stop("told to stop")


def make_environments(config: RolloutConfig, reward: RewardConfig, base_dir: Path) -> EnvironmentPool | None:
    """None where completions are of one turn."""
    if not config.environment.name:
        return None
    return EnvironmentPool(config.environment, reward, base_dir, initializer=prepare_scoring)


def heartbeat(
    engine: Engine, histories: HistoryReader, pool: RewardPool, episodes: Episodes | None = None
) -> Heartbeat:
    stats = engine.stats()
    drafting = {**stats.drafting, "malformed_histories": histories.malformed} if stats.drafting else {}
    return Heartbeat(
        running_sequences=stats.running_sequences,
        generated_tokens=stats.generated_tokens,
        drafting=drafting,
        scoring=pool.counters(),
        episodes={} if episodes is None else dict(episodes.counters),
    )


def load_detokenizer(model: str) -> Callable[[Sequence[int]], str]:
    """Token ids to text, special tokens left out."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


@contextlib.contextmanager
def interrupts() -> "Iterator[list[OnSignal]]":
    """While inside, SIGTERM and SIGINT call what was last put on the list, with their number.

    While it is empty the process ends at once: it holds no lease, and its children are tied to its life. Waiting for
    a model to be loaded before leaving would take a minute.
    """
    actions: list[OnSignal] = []

    def interrupted(number: int) -> None:
        if not actions:
            os._exit(128 + number)
        actions[-1](number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, interrupted, number)
    try:
        yield actions
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)
