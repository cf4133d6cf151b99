"""Scripted peers, prompts and groups for tests of the broker."""

import threading
import time
from collections import deque
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

import numpy as np
from msgspec import Struct

from databus.broker import Broker
from databus.client import BusClient
from databus.config import BrokerConfig, BusConfig
from databus.groups import Group, encode_group, run_lengths
from databus.keys import ClientKeys
from databus.messages import (
    Ack,
    Batch,
    BatchRequest,
    Cancel,
    Completed,
    Credits,
    Hello,
    Lease,
    Mismatch,
    Position,
    StepDone,
    Stop,
    VersionAnnounced,
    VersionApplied,
    VersionPublished,
    VersionRefused,
)
from databus.prompts import Prompt, PromptSource, SampledGroup
from databus.transport import Received, Said


def broker_config(address: str, **changes: Any) -> BrokerConfig:
    values: dict[str, Any] = {
        "run_id": "test",
        "address": address,
        "steps": 3,
        "start_step": 0,
        "group_size": 2,
        "batch_groups": 2,
        "max_staleness": 1,
        "stale_policy": "drop",
        "max_tokens": 8,
        "temperature": 1.0,
        "eval_every": 0,
        "eval_max_tokens": 8,
        "eval_timeout_s": 20.0,
        "max_reward_failures": 3,
        "bus": BusConfig(heartbeat_s=0.1, peer_timeout_s=2.0, lease_s=10.0),
    }
    return BrokerConfig(**values | changes)


def make_group(
    prompt_ids: Sequence[int],
    versions: Sequence[Sequence[int]],
    rewards: Sequence[float] | None = None,
    loss_mask: Sequence[int] | None = None,
) -> Group:
    """A group whose completions have the tokens of the given versions, one token a version."""
    lengths = np.array([len(each) for each in versions], np.int32)
    flat = np.array([version for each in versions for version in each], np.int32)
    values, counts = run_lengths(flat)
    scores = np.array(rewards if rewards is not None else np.arange(len(versions)), np.float32)
    return Group(
        prompt_ids=np.array(prompt_ids, np.int32),
        lengths=lengths,
        token_ids=np.arange(len(flat), dtype=np.int32),
        logprobs=np.full(len(flat), -0.5, np.float32),
        loss_mask=np.array(loss_mask if loss_mask is not None else np.ones(len(flat)), np.uint8),
        version_values=values,
        version_lengths=counts,
        rewards=scores,
        reward_parts=scores[:, None],
        truncated=np.zeros(len(versions), np.uint8),
    )


class Prompts:
    """Prompt `n` is the token ids (1, n + 1)."""

    def get(self, cursor: int) -> Prompt:
        return Prompt(f"p{cursor}", (1, cursor + 1), b"{}")


class Sink:
    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.sampled: list[tuple[int, Sequence[SampledGroup]]] = []

    def write(self, row: Mapping[str, float]) -> None:
        self.rows.append(dict(row))

    def rows_from(self, first: int) -> Sequence[str]:
        return ()

    def samples(self, step: int, groups: Sequence[SampledGroup]) -> None:
        self.sampled.append((step, groups))


class RunningBroker:
    """A broker in a thread; `failure` is what ended it."""

    def __init__(
        self, config: BrokerConfig, evals: Sequence[Prompt] = (), prompts: PromptSource | None = None, **more: Any
    ) -> None:
        self.sink = Sink()
        self.broker = Broker(config, prompts or Prompts(), evals, self.sink, **more)
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.broker.run()
        except BaseException as error:
            self.failure = error

    def stop(self) -> None:
        """End the run here, as if its last step had been taken."""
        self.broker._steps.finished = lambda: True  # type: ignore[method-assign]
        self.join()

    def join(self, timeout_s: float = 20.0) -> None:
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), "the broker did not end"


def connect(address: str, name: str, role: Any, keys: ClientKeys | None = None, **more: Any) -> BusClient:
    client = BusClient(address, Hello(role=role, name=name, **more), keys=keys)
    client.connect(5.0)
    return client


def send_group(client: BusClient, group_id: str, group: Group) -> None:
    columns, frames = encode_group(group)
    client.send(Completed(group_id=group_id, columns=columns, reward_names=("reward",)), frames)


def receives_nothing(client: BusClient, kind: type, for_s: float = 0.5) -> bool:
    """No message of that kind comes for so long."""
    try:
        receive(client, kind, for_s)
    except AssertionError:
        return True
    return False


def receive(client: BusClient, kind: type, timeout_s: float = 5.0) -> Any:
    """The next message of a kind; others are passed over."""
    deadline = time.monotonic() + timeout_s
    while (left := deadline - time.monotonic()) > 0:
        arrived = client.recv(left)
        if arrived is not None and isinstance(arrived.message, kind):
            return arrived.message
    raise AssertionError(f"no {kind.__name__} within {timeout_s} s")


PASSED, BEYOND = Mismatch(kl=1e-6, difference=0.01), Mismatch(kl=0.5, difference=3.0)


class ScriptedWorker:
    """Answers every lease at once with tokens of the version that it serves, and applies what is announced, as far as
    its gate lets it pass."""

    def __init__(
        self,
        address: str,
        name: str = "worker-0",
        credit: int = 4,
        max_sequences: int = 4,
        keys: ClientKeys | None = None,
        refuses: Container[int] = (),
    ) -> None:
        self.client = connect(address, name, "worker", keys, max_sequences=max_sequences)
        self.version = 0
        self._refuses = refuses
        self.refused: set[int] = set()
        self.total = credit
        self.leases: list[tuple[int, Lease]] = []
        self.client.send(Credits(total=credit))
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while True:
            arrived = self.client.recv(10.0)
            match arrived and arrived.message:
                case Lease() as lease:
                    self.leases.append((self.version, lease))
                    self._answer(lease)
                case VersionAnnounced(version=version) if version in self._refuses:
                    self.refused.add(version)
                    for _ in range(2):  # a copy changes nothing
                        self.client.send(VersionRefused(version=version, mismatch=BEYOND, reason="KL 0.5"))
                case VersionAnnounced(version=version):
                    self.version = version
                    self.client.send(
                        VersionApplied(version=version, pause_s=0.01, sync_s=0.02, received_bytes=100, mismatch=PASSED)
                    )
                case Stop() | None:
                    self.client.close("stopped")
                    return
                case Ack() | Cancel():
                    pass

    def _answer(self, lease: Lease) -> None:
        send_group(
            self.client,
            lease.group_id,
            make_group(lease.prompt_ids, [[self.version] * 3] * lease.group_size, [1.0] * lease.group_size),
        )
        if lease.purpose == "train":
            self.total += 1
            self.client.send(Credits(total=self.total))

    def join(self) -> None:
        self._thread.join(10.0)
        assert not self._thread.is_alive()


class ScriptedLearner:
    """Asks for every batch, trains nothing, publishes the next version."""

    def __init__(self, address: str, start_step: int = 0, keys: ClientKeys | None = None) -> None:
        self.client = connect(address, "learner", "learner", keys, version=start_step)
        self.batches: list[Batch] = []
        self.positions: list[Position] = []
        self.publish(start_step)

    def publish(self, version: int) -> None:
        self.client.send(VersionPublished(version=version, address="tcp://127.0.0.1:1", num_bytes=100))

    def step(self, step: int, before: Callable[[Batch], None] = lambda batch: None, *, publishes: bool = True) -> Batch:
        self.client.send(BatchRequest(step=step))
        batch = receive(self.client, Batch)
        before(batch)
        self.batches.append(batch)
        if publishes:
            self.publish(step + 1)
        self.client.send(StepDone(step=step, metrics={"loss/policy": 0.5}))
        return batch

    def finish(self) -> None:
        receive(self.client, Stop)
        self.client.close("done")


class NoSocket:
    """In place of the broker's socket: what peers send is put in, what they get is taken out."""

    address = "nowhere"

    def __init__(self, *_: Any) -> None:
        self.arrived: deque[Received] = deque()
        self.sent: deque[tuple[str, Struct]] = deque()

    def put(self, peer: str, message: Any, frames: Sequence[Any] = ()) -> None:
        self.arrived.append(Received(peer, message, list(frames), peer.encode()))

    def receive(self, timeout_s: float) -> Received | None:
        return self.arrived.popleft() if self.arrived else None

    def send(self, peer: str, message: Struct, frames: Sequence[Any] = ()) -> bool:
        self.sent.append((peer, message))
        return True

    def send_all(self, peer: str, all_said: Sequence[Said]) -> None:
        for message, frames in all_said:
            self.send(peer, message, frames)

    def answer(self, route: bytes, message: Struct) -> bool:
        return True

    def has_seat(self, peer: str) -> bool:
        return True

    def seat(self, peer: str, route: bytes) -> None: ...

    def forget(self, peer: str) -> None: ...

    def close(self) -> None: ...
