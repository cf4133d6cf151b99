"""The service's process: engine, rewards, vLLM's API server and our own routes, until it is told to stop."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rollout.engine.vllm_app import make_app
from rollout.engine.vllm_served import ServedEngine
from rollout.run import interrupts, load_detokenizer
from rollout.service.config import ServiceConfig, check_exposure
from rollout.service.doors import Doors
from rollout.service.errors import ServiceError
from rollout.service.keys import Key, read_key
from rollout.service.metrics import ServiceMetrics
from rollout.service.prompts import PromptReader
from rollout.service.protocol import FollowRequest
from rollout.service.rollouts import RolloutDesk
from rollout.service.routes import add_routes
from rollout.service.scoring import Rewards
from rollout.service.server import HttpServer, address_of, listen
from rollout.service.weights import WeightDesk, WeightSources

logger = logging.getLogger(__name__)

LOG_TO_STDERR = ("VLLM_LOGGING_STREAM", "ext://sys.stderr")
"""stdout is for the one line that says where."""


def serve(
    config: ServiceConfig,
    sources: WeightSources,
    follow: FollowRequest | None = None,
    ready: Callable[[str], None] = lambda address: None,
) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. Call it in the main thread.

    Args: follow: a run whose versions are served from the start. ready: told the address once requests are answered.
    Raises: ValueError, one line, for what a user wrote; EngineDead.
    """
    import uvloop

    os.environ.setdefault(*LOG_TO_STDERR)
    check_exposure(config)
    api_key, admin_key = _key(config.api_key_file), _key(config.admin_key_file)
    taken = listen(config.host, config.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_serve(config, sources, follow, ready, taken, (api_key, admin_key)))


async def _serve(
    config: ServiceConfig,
    sources: WeightSources,
    follow: FollowRequest | None,
    ready: Callable[[str], None],
    taken: socket.socket,
    keys: tuple[Key | None, Key | None],
) -> int:
    rollout = config.rollout
    rewards = Rewards(config.reward, config.functions, config.base_dir)
    engine = ServedEngine(rollout, config.model, config.seed, version=0, draft=config.draft)
    desk = WeightDesk(engine, config.model, rollout.dtype, sources)
    with interrupts() as on_signal:
        try:
            await engine.start()
            app = await make_app(engine, config.model, config.served_name or config.model)
            detokenize = await asyncio.to_thread(load_detokenizer, config.model)
            prompts = PromptReader(engine.tokenizer, engine.vocab_size, rollout.context_tokens)
            rollouts = RolloutDesk(engine, prompts, rewards, detokenize, rollout.max_sequences)
            doors = Doors(app, *keys)
            add_routes(app, rollouts, desk, doors)
            if follow is not None:
                await _follow(desk, follow)
            server = HttpServer(doors, taken, engine, config.drain_s, lambda: ready(address_of(taken)))
            on_signal.append(server.stop)
            with _registered(ServiceMetrics(engine, doors, rollouts, rewards, desk)):
                return await server.serve(desk.broken)
        finally:
            await desk.close()
            await asyncio.gather(engine.close(), rewards.close(), return_exceptions=True)


async def _follow(desk: WeightDesk, request: FollowRequest) -> None:
    """Raises: ValueError: at the start it is a person who is told."""
    try:
        await desk.follow(request)
    except ServiceError as error:
        raise ValueError(f"--follow {request.run}: {error}") from None


def _key(file: str | None) -> Key | None:
    return None if file is None else read_key(file)


@contextmanager
def _registered(metrics: ServiceMetrics) -> Iterator[None]:
    """Beside vLLM's own."""
    from prometheus_client import REGISTRY

    collector: Any = metrics
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)
