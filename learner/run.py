"""Entry of the learner: one call a rank, from settings to the end of the run."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, Protocol

import torch
import torch.distributed as dist

from databus.config import WeightsConfig
from databus.keys import ServerKeys
from databus.messages import VersionPublished
from learner.adapter_snapshot import AdapterSnapshotter
from learner.advantage_function import AdvantageFunction
from learner.batch import BatchFeed
from learner.bus import POLL_S, BrokerLink, Bus, RunStoppedError
from learner.checkpoint import load_checkpoint
from learner.checkpoint_folder import read_trainer_state
from learner.checkpoint_saver import CheckpointSaver
from learner.config import LearnerConfig
from learner.memory_copies import MemoryCopies
from learner.model import ModelOptions, PolicyModel, build_model, hidden_matrices
from learner.optimizer import build_optimizer, resume_schedule
from learner.outlet import make_outlet
from learner.publisher import Publisher, WholePublisher, make_publisher
from learner.reference import build_reference
from learner.train_step import TrainStep
from learner.trainer import FirstRank, Trainer
from learner.turn import Always, DeviceTurn, Turn

logger = logging.getLogger(__name__)

MIN_KEPT_VERSIONS = 2
GRACE_S = 0.1
"""How long a learner with a turn waits for the next batch: what is there already needs no turn of the engines."""


class ClosableBus(Bus, Protocol):
    def close(self) -> None: ...


@dataclass(frozen=True, kw_only=True)
class LearnerRun:
    """What the learner needs to know of a run beside its own settings.

    model: folder or hub id. serving_dtype, temperature: of the rollout workers. bus_address: where the broker
    listens; it decides where the weight server listens. weight_keys: of that server; None for plain text. resume_from:
    a checkpoint folder. memory_dir: where copies of the state go, in shared memory; None for none. batch_timeout_s: how
    long to wait for one batch. end_timeout_s: how long after the last step the broker may take to end the run.
    collective_timeout_s: how long a rank waits for the others. advantage_function: the one that `advantage.estimator`
    names, if it names one. probe: token ids of fixed texts, at least two each, whose log-probabilities go with every
    version; empty where engines have no mismatch gate. weights_dir: where versions go that are published as files; no
    other run may use it. turns: folder of the flags by which learner and engines take turns on one device; None where
    they have devices of their own.
    """

    model: str
    serving_dtype: Literal["float32", "bfloat16"]
    temperature: float
    max_staleness: int
    seed: int
    checkpoints_dir: Path
    bus_address: str
    weight_keys: ServerKeys | None = None
    resume_from: Path | None = None
    memory_dir: Path | None = None
    batch_timeout_s: float = 3600.0
    end_timeout_s: float = 3600.0
    collective_timeout_s: float = 600.0
    advantage_function: AdvantageFunction | None = None
    probe: tuple[tuple[int, ...], ...] = ()
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    weights_dir: Path | None = None
    turns: Path | None = None


def run_learner(config: LearnerConfig, run: LearnerRun, bus_factory: Callable[[int], ClosableBus]) -> None:
    """Train until the last step and serve weights until the broker ends the run. Returns when it ended well.

    Rank and world size come from torchrun's environment; without it there is one rank.
    Args: bus_factory: connects to the broker; its argument is the version that the learner starts from. Called on
        rank 0 only.
    Raises: ValueError for what a user wrote (model, checkpoint, number of steps); RuntimeError for the rest.
    """
    start_step = start_step_of(config, run)
    set_up_torch(config, run.seed)
    try:
        with process_group(config.device, run.collective_timeout_s), ExitStack() as stack:
            first_rank = None
            if dist.get_rank() == 0:
                first_rank = _connect(run, bus_factory, start_step, stack)
            turn = _turn(config, run, stack)
            turn.take()
            trainer = _build(config, run, start_step, first_rank, turn, stack)
            gc.freeze()  # or all of torch and transformers is looked through for garbage again and again
            trainer.run()
            trainer.serve_until_stopped(run.end_timeout_s)
    except RunStoppedError as stop:
        if not stop.ok:
            raise RuntimeError(f"the run failed: {stop.reason}") from None
        logger.info("stopped: %s", stop.reason)


@contextmanager
def process_group(device: str, timeout_s: float) -> Iterator[None]:
    """gloo on CPU; beside it nccl where the model is on GPUs."""
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    timeout = timedelta(seconds=timeout_s)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def start_step_of(config: LearnerConfig, run: LearnerRun) -> int:
    if run.resume_from is None:
        return 0
    state = read_trainer_state(run.resume_from)
    if state.step > config.steps:
        raise ValueError(
            f"learner.steps is {config.steps}, but {run.resume_from} has taken {state.step}: allowed is {state.step} "
            "or more"
        )
    if state.lora != config.lora and (state.lora.is_on or config.lora.is_on):
        raise ValueError(
            f"checkpoint {run.resume_from} has {state.lora}, this run {config.lora}: go on with "
            "the settings of the checkpoint"
        )
    return state.step


def set_up_torch(config: LearnerConfig, seed: int) -> None:
    torch.manual_seed(seed)
    if config.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    elif "OMP_NUM_THREADS" not in os.environ:
        # The engine has cores of its own; a second thread here would take time from it and give none.
        torch.set_num_threads(1)


def _connect(
    run: LearnerRun, bus_factory: Callable[[int], ClosableBus], start_step: int, stack: ExitStack
) -> FirstRank:
    bus = bus_factory(start_step)
    stack.callback(bus.close)
    keep = max(MIN_KEPT_VERSIONS, run.max_staleness + 2)
    outlet = make_outlet(run.weights, run.bus_address, keep, run.weight_keys, run.weights_dir)
    stack.callback(outlet.close)
    return FirstRank(broker=BrokerLink(bus), outlet=outlet)


def _turn(config: LearnerConfig, run: LearnerRun, stack: ExitStack) -> Turn:
    if run.turns is None:
        return Always()
    turn = DeviceTurn(config, run.turns, dist.get_rank(), run.batch_timeout_s)
    stack.callback(turn.close)
    return turn


def _build(
    config: LearnerConfig,
    run: LearnerRun,
    start_step: int,
    first_rank: FirstRank | None,
    turn: Turn,
    stack: ExitStack,
) -> Trainer:
    policy, train_step = build_train_step(config, run, start_step)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    publisher = _publisher(policy, run, first_rank)
    stack.callback(publisher.close)
    models = [policy, *train_step.frozen_models]
    turn.holds(models, train_step.optimizer, publisher.wait)
    broker = None if first_rank is None else first_rank.broker
    return Trainer(
        config=config,
        model=run.model,
        start_step=start_step,
        checkpoints_dir=run.checkpoints_dir,
        world_size=world_size,
        policy=policy,
        train_step=train_step,
        feed=_feed(run, broker, turn, rank, world_size),
        publisher=publisher,
        saver=_saver(config, run, stack),
        copies=_copies(config, run, start_step, stack),
        first_rank=first_rank,
        probe=run.probe,
        turn=turn,
    )


def _feed(run: LearnerRun, broker: BrokerLink | None, turn: Turn, rank: int, world_size: int) -> BatchFeed:
    # On-policy no batch can be there before the engines have had a turn with the new version.
    grace_s = POLL_S if run.turns is None else GRACE_S * (run.max_staleness > 0)
    return BatchFeed(broker, rank, world_size, run.max_staleness, run.batch_timeout_s, turn.give, grace_s)


def _publisher(policy: PolicyModel, run: LearnerRun, first_rank: FirstRank | None) -> Publisher:
    def say(message: VersionPublished) -> None:
        if first_rank is not None:
            first_rank.broker.send(message)

    outlet = None if first_rank is None else first_rank.outlet
    if policy.lora is not None:
        return WholePublisher(AdapterSnapshotter(policy.lora, dist.get_rank()), outlet, say)
    return make_publisher(policy.causal_lm, run.serving_dtype, run.weights, outlet, say, run.collective_timeout_s)


def _saver(config: LearnerConfig, run: LearnerRun, stack: ExitStack) -> CheckpointSaver:
    saver = CheckpointSaver(
        run.checkpoints_dir,
        config.keep_checkpoints,
        config.keep_best,
        background=config.async_checkpoints,
        timeout_s=run.collective_timeout_s,
    )
    stack.callback(saver.close)
    return saver


def _copies(config: LearnerConfig, run: LearnerRun, start_step: int, stack: ExitStack) -> MemoryCopies | None:
    if run.memory_dir is None:
        return None
    saver = CheckpointSaver(run.memory_dir, keep=1, background=True, timeout_s=run.collective_timeout_s)
    stack.callback(saver.close)
    return MemoryCopies(run.memory_dir, saver, config.memory_copy_every, start_step)


def build_train_step(config: LearnerConfig, run: LearnerRun, start_step: int) -> tuple[PolicyModel, TrainStep]:
    """Model, optimizer and schedule as they are before step `start_step`; within a process group."""
    options = ModelOptions(
        device=config.device,
        dtype=config.dtype,
        temperature=run.temperature,
        logprob_chunk_tokens=config.logprob_chunk_tokens,
        gradient_checkpointing=config.gradient_checkpointing,
        attention=config.attention,
        compile=config.compile,
        offload=config.offload,
        lora=config.lora,
    )
    policy = build_model(run.model, options)
    optimizer, scheduler = build_optimizer(policy.parameters(), config, hidden_matrices(policy))
    if run.resume_from is not None:
        load_checkpoint(run.resume_from, policy.causal_lm, optimizer)
        resume_schedule(scheduler, start_step)
    reference = None
    if config.loss.kl_coef > 0:
        reference = policy if config.lora.is_on else build_reference(run.model, options)
    return policy, TrainStep(policy, optimizer, scheduler, config, reference, run.advantage_function)
