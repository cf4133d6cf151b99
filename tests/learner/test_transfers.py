"""Versions from GPU to GPU, with host memory and gloo in place of GPUs and NCCL: what is agreed, what is checked, and
what becomes of a peer that hangs, dies or never comes."""

import logging
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from host_memory import map_memory, share
from torch.distributed import PrefixStore, TCPStore

from databus.config import WeightsConfig
from databus.messages import VersionPublished
from databus.transfers import JOINED, CollectiveOffer, DeviceMemory, MappedOffer, NoTransfer, split_scheme
from learner.collective_transfers import CollectiveTransfers, SendLimits
from learner.model import ModelOptions, build_model
from learner.outlet import make_outlet
from learner.publisher import DeltaPublisher
from learner.snapshot import Snapshot, Snapshotter
from learner.staged_version import StagedVersion
from learner.transfers import MappedTransfers, Transfers
from learner.weights_out import WeightServer
from rollout.bus_source import bus_source
from rollout.cuda_memory import word_sum
from rollout.engine.base import Snapshot as Pulled
from rollout.receiver import FetchLimits, Receiver, seeing
from rollout.weight_source import PullError, PullLimits
from rollout.weights_in import Puller

PARTS = str(Path(__file__).with_name("host_memory.py"))
QUICK = FetchLimits(start_s=60.0, fetch_s=5.0, busy_s=60.0)
SEND_LIMITS = SendLimits(start_s=60.0, join_s=2.0, send_s=4.0)
CPU = torch.device("cpu")

pytestmark = pytest.mark.timeout(240)


class Learner:
    """A model that changes, what it publishes, and from where."""

    def __init__(self, model: Path, transfers: Transfers) -> None:
        self.transfers = transfers
        self.server = WeightServer("ipc:///unused", keep=3, transfers=transfers)
        self.policy = build_model(model, ModelOptions())
        self.said: list[VersionPublished] = []
        self.dense = Snapshotter(self.policy.causal_lm, "bfloat16", 0)
        config = WeightsConfig(encoding="dense")
        self.publisher = DeltaPublisher(self.dense, config, self.server, self.said.append, timeout_s=60.0)

    @torch.no_grad()
    def publish(self, version: int) -> None:
        for parameter in self.policy.parameters():
            parameter.mul_(1.01)
        self.publisher.publish(version, None)
        self.publisher.wait()

    def close(self) -> None:
        self.publisher.close()
        self.server.close()


@contextmanager
def learning(model: Path, transfers: Transfers) -> Iterator[Learner]:
    learner = Learner(model, transfers)
    try:
        yield learner
    finally:
        learner.close()


@contextmanager
def pulling(part: str, limits: FetchLimits = QUICK) -> Iterator[Puller]:
    puller = Puller(PullLimits(resend_s=1.0, silence_s=20.0), receiver=Receiver((PARTS, part), limits))
    try:
        yield puller
    finally:
        puller.close()


def mapping() -> MappedTransfers:
    return MappedTransfers(StagedVersion(CPU, share))


def broadcasting(part: str = "send", limits: SendLimits = SEND_LIMITS) -> CollectiveTransfers:
    return CollectiveTransfers(StagedVersion(CPU, share), (PARTS, part), limits)


def pull(puller: Puller, learner: Learner, stop: threading.Event | None = None) -> Pulled:
    said = learner.said[-1]
    return puller(said.address, said.version, said.num_bytes, stop or threading.Event())


def assert_newest(learner: Learner, pulled: Pulled, came_by_transfer: bool) -> None:
    dense = learner.dense.take(pulled.version)
    assert dense is not None and dense.data is not None
    assert pulled.manifest.tensors == dense.manifest.tensors
    assert bytes(pulled.map()) == bytes(dense.data)
    assert (pulled.device_copy is not None) == came_by_transfer
    if pulled.device_copy is not None:
        assert pulled.received_bytes == pulled.manifest.num_bytes
        there = map_memory(pulled.device_copy.memory)
        assert there.numpy().tobytes() == bytes(dense.data)
        assert word_sum(there) == pulled.device_copy.word_sum
    pulled.close()


def offered(learner: Learner, within_s: float = 60.0) -> tuple[CollectiveOffer | MappedOffer, NoTransfer]:
    """An offer, as soon as the learner has one, and what it says next, while nobody has taken that up."""
    said = learner.said[-1]
    deadline = time.monotonic() + within_s
    with bus_source(split_scheme(said.address)[1], threading.Event(), PullLimits(silence_s=10.0), None) as source:
        while isinstance(offer := source.offer(said.version), NoTransfer):
            assert offer.is_busy, offer.reason
            assert time.monotonic() < deadline, offer.reason
            time.sleep(0.05)
        second = source.offer(said.version)
    assert isinstance(second, NoTransfer)
    return offer, second


# ---------------------------------------------------------------- as they should


def test_workers_copy_what_the_learner_has_staged(single_rank: None, tiny_model: Path) -> None:
    with learning(tiny_model, mapping()) as learner, pulling("receive") as one, pulling("receive") as other:
        for version in range(3):
            learner.publish(version)
            assert learner.said[-1].address.startswith("ipc+ipc://")
            for puller in (one, other):
                assert_newest(learner, pull(puller, learner), came_by_transfer=True)


def test_workers_are_sent_versions_one_after_another(single_rank: None, tiny_model: Path) -> None:
    """Two at a time: one waits while the sender is busy."""
    with learning(tiny_model, broadcasting()) as learner, pulling("receive") as one, pulling("receive") as other:
        for version in range(2):
            learner.publish(version)
            assert learner.said[-1].address.startswith("nccl+ipc://")
            with ThreadPoolExecutor(2) as threads:
                pulled = list(threads.map(lambda puller: pull(puller, learner), (one, other)))
            for each in pulled:
                assert_newest(learner, each, came_by_transfer=True)


# ---------------------------------------------------------------- over the bus where it fails


@pytest.mark.parametrize("part", ["hang", "die", "damage"])
def test_a_receiver_that_fails_costs_one_transfer(
    part: str, single_rank: None, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same pull goes on over the bus; the third failure is the last."""
    with learning(tiny_model, mapping()) as learner, pulling(part) as puller:
        for version in range(5):
            learner.publish(version)
            began = time.monotonic()
            with caplog.at_level(logging.WARNING):
                assert_newest(learner, pull(puller, learner), came_by_transfer=False)
            assert time.monotonic() - began < 60.0
    lines = [record.message for record in caplog.records]
    assert sum("over the bus" in line and "from here on" not in line for line in lines) == 3
    assert sum("over the bus from here on" in line for line in lines) == 1


def test_a_receiver_that_does_not_start(single_rank: None, tiny_model: Path) -> None:
    limits = FetchLimits(start_s=1.0, fetch_s=1.0)
    with learning(tiny_model, mapping()) as learner, pulling("mute", limits) as puller:
        learner.publish(0)
        assert_newest(learner, pull(puller, learner), came_by_transfer=False)


def test_without_a_gpu_versions_come_over_the_bus(single_rank: None, tiny_model: Path) -> None:
    """The real receiver, on a machine without one."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    puller = Puller()
    try:
        with learning(tiny_model, mapping()) as learner:
            learner.publish(0)
            assert_newest(learner, pull(puller, learner), came_by_transfer=False)
    finally:
        puller.close()


def test_a_pull_that_is_given_up_ends_at_once(single_rank: None, tiny_model: Path) -> None:
    limits = FetchLimits(fetch_s=50.0)
    with learning(tiny_model, mapping()) as learner, pulling("hang", limits) as puller:
        learner.publish(0)
        stop = threading.Event()
        threading.Timer(3.0, stop.set).start()
        began = time.monotonic()
        with pytest.raises(PullError, match="given up"):
            pull(puller, learner, stop)
        assert time.monotonic() - began < 30.0


def test_a_version_that_is_not_staged_comes_over_the_bus(
    single_rank: None, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An older one: the newest alone is on the GPU."""
    with learning(tiny_model, mapping()) as learner, pulling("receive") as puller:
        learner.publish(0)
        learner.publish(1)
        said = learner.said[0]
        with caplog.at_level(logging.WARNING):
            pulled = puller(said.address, 0, said.num_bytes, threading.Event())
        assert pulled.device_copy is None
        pulled.close()
        assert "not on the learner's GPU" in caplog.text
        assert_newest(learner, pull(puller, learner), came_by_transfer=True)


# ---------------------------------------------------------------- the sender


def test_a_worker_that_never_comes_holds_up_nobody(single_rank: None, tiny_model: Path) -> None:
    with learning(tiny_model, broadcasting()) as learner, pulling("receive") as puller:
        learner.publish(0)
        _, second = offered(learner)
        assert second.is_busy
        began = time.monotonic()
        learner.publish(1)
        assert time.monotonic() - began < 2.0, "publishing waits for no worker"
        assert_newest(learner, pull(puller, learner), came_by_transfer=True)


def test_a_worker_that_dies_meanwhile_costs_its_transfer(single_rank: None, tiny_model: Path) -> None:
    """It has come, and takes nothing: the sender's collective is never answered."""
    with learning(tiny_model, broadcasting()) as learner, pulling("receive") as puller:
        learner.publish(0)
        offer, _ = offered(learner)
        assert isinstance(offer, CollectiveOffer)
        store = TCPStore("127.0.0.1", offer.port, is_master=False)
        PrefixStore(offer.name, store).set(JOINED, "1")
        began = time.monotonic()
        learner.publish(1)
        assert time.monotonic() - began < 2.0, "publishing waits for no worker"
        assert_newest(learner, pull(puller, learner), came_by_transfer=True)


def test_a_sender_that_hangs_is_killed(single_rank: None, tiny_model: Path) -> None:
    staged = StagedVersion(CPU, share)
    transfers = CollectiveTransfers(staged, (PARTS, "mute"), SendLimits(start_s=0.5))
    try:
        pids: set[int] = set()
        deadline = time.monotonic() + 30.0
        while transfers._helper is not None and time.monotonic() < deadline:
            pids.add(transfers._helper.pid)
            began = time.monotonic()
            transfers.tick()
            assert time.monotonic() - began < 3.0
            time.sleep(0.02)
        assert len(pids) == 3, "it is tried three times"
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
        staged.put(snapshot_of(tiny_model))
        answer = transfers.offer(0)
        assert isinstance(answer, NoTransfer) and not answer.is_busy
    finally:
        transfers.close()


# ---------------------------------------------------------------- what is staged


def snapshot_of(model: Path) -> Snapshot:
    snapshot = Snapshotter(build_model(model, ModelOptions()).causal_lm, "bfloat16", 0).take(0)
    assert snapshot is not None
    return snapshot


def test_a_version_is_written_over_where_it_lies(single_rank: None, tiny_model: Path) -> None:
    staged = StagedVersion(CPU, share)
    snapshot = snapshot_of(tiny_model)
    assert snapshot.data is not None
    assert staged.memory_of(0) is None
    staged.put(snapshot)
    memory = staged.memory_of(0)
    assert memory is not None
    assert map_memory(memory).numpy().tobytes() == snapshot.data.tobytes()
    assert staged.memory_of(1) is None
    snapshot.data[:] = 7
    staged.put(snapshot)
    assert staged.memory_of(0) == memory
    assert bool((map_memory(memory) == 7).all())


def test_where_there_is_no_room_nothing_is_staged(single_rank: None, tiny_model: Path) -> None:
    def no_room(_: torch.Tensor) -> DeviceMemory:
        raise torch.OutOfMemoryError("no room")

    staged = StagedVersion(CPU, no_room)
    staged.put(snapshot_of(tiny_model))
    assert staged.memory_of(0) is None


@pytest.mark.parametrize("backend", ["nccl", "ipc"])
def test_a_learner_without_a_gpu_says_so(backend, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match=f"weights.backend={backend} needs an NVIDIA GPU"):
        make_outlet(WeightsConfig(backend=backend), "ipc:///unused", 2, None, tmp_path)


@pytest.mark.parametrize(
    ("gpu", "visible", "expected"),
    [
        ("0", "3", "3,0"),
        ("0", "0", None),
        ("0", "", None),
        ("", "3", None),
        ("GPU-a", "GPU-b, GPU-c", "GPU-b,GPU-c,GPU-a"),
    ],
)
def test_a_receiver_sees_the_learners_gpu(gpu: str, visible: str, expected: str | None) -> None:
    assert seeing(gpu, visible) == ({} if expected is None else {"CUDA_VISIBLE_DEVICES": expected})


def test_receivers_end_with_their_puller(single_rank: None, tiny_model: Path) -> None:
    with learning(tiny_model, mapping()) as learner, pulling("receive") as puller:
        learner.publish(0)
        assert_newest(learner, pull(puller, learner), came_by_transfer=True)
        helper = puller._receiver._helper
        assert helper is not None and Path(f"/proc/{helper.pid}").exists()
    assert not Path(f"/proc/{helper.pid}").exists()
