"""Versions in bfloat16 from the learner's GPU to a worker's: mapped on one GPU, by NCCL between two."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import pytest
import torch

from databus.config import WeightsConfig
from databus.messages import VersionPublished
from learner.model import ModelOptions, build_model
from learner.outlet import make_outlet
from learner.publisher import DeltaPublisher
from learner.run import process_group
from learner.snapshot import Snapshotter
from rollout.cuda_memory import mapped, word_sum
from rollout.engine.base import Snapshot
from rollout.receiver import VISIBLE, Receiver
from rollout.weights_in import Puller

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]

VERSIONS = 4


class Learner:
    def __init__(self, model: Path, backend: Literal["nccl", "ipc"], folder: Path) -> None:
        config = WeightsConfig(backend=backend)
        assert not config.has_deltas
        self.outlet = make_outlet(config, "ipc:///unused", 2, None, folder)
        self.policy = build_model(model, ModelOptions(device="cuda"))
        self.said: list[VersionPublished] = []
        self.dense = Snapshotter(self.policy.causal_lm, "bfloat16", 0)
        self.publisher = DeltaPublisher(self.dense, config, self.outlet, self.said.append, timeout_s=60.0)

    @torch.no_grad()
    def publish(self, version: int) -> None:
        for parameter in self.policy.parameters():
            parameter.mul_(1.01)
        self.publisher.publish(version, None)
        self.publisher.wait()


@contextmanager
def learning(model: Path, backend: Literal["nccl", "ipc"], folder: Path) -> Iterator[Learner]:
    with process_group("cuda", timeout_s=60.0):
        learner = Learner(model, backend, folder)
        try:
            yield learner
        finally:
            learner.publisher.close()
            learner.outlet.close()


@contextmanager
def pulling(environment: dict[str, str] | None = None) -> Iterator[Puller]:
    puller = Puller(receiver=Receiver(environment=environment))
    try:
        yield puller
    finally:
        puller.close()


def pull(puller: Puller, learner: Learner) -> Snapshot:
    said = learner.said[-1]
    return puller(said.address, said.version, said.num_bytes, threading.Event())


def assert_newest(learner: Learner, pulled: Snapshot, came_by_transfer: bool) -> None:
    """In host memory, and where an engine maps it."""
    dense = learner.dense.take(pulled.version)
    assert dense is not None and dense.data is not None
    assert pulled.manifest.tensors == dense.manifest.tensors
    assert bytes(pulled.map()) == bytes(dense.data)
    assert (pulled.device_copy is not None) == came_by_transfer
    if pulled.device_copy is not None:
        there = mapped(pulled.device_copy.memory)
        assert there.is_cuda and word_sum(there) == pulled.device_copy.word_sum
        assert torch.equal(there.cpu(), torch.from_numpy(dense.data))
    pulled.close()


def test_versions_are_mapped_on_one_gpu(tiny_model: Path, tmp_path: Path) -> None:
    with learning(tiny_model, "ipc", tmp_path) as learner, pulling() as one, pulling() as other:
        for version in range(VERSIONS):
            learner.publish(version)
            for puller in (one, other):
                assert_newest(learner, pull(puller, learner), came_by_transfer=True)


def test_a_receiver_that_is_killed_is_started_anew(tiny_model: Path, tmp_path: Path) -> None:
    with learning(tiny_model, "ipc", tmp_path) as learner, pulling() as puller:
        learner.publish(0)
        assert_newest(learner, pull(puller, learner), came_by_transfer=True)
        helper = puller._receiver._helper
        assert helper is not None
        helper._process.kill()
        learner.publish(1)
        assert_newest(learner, pull(puller, learner), came_by_transfer=False)
        learner.publish(2)
        assert_newest(learner, pull(puller, learner), came_by_transfer=True)


def test_versions_are_sent_between_two_gpus(tiny_model: Path, tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("NCCL takes no two ranks on one GPU, and there is one")
    with learning(tiny_model, "nccl", tmp_path) as learner, pulling({VISIBLE: "1"}) as puller:
        for version in range(VERSIONS):
            learner.publish(version)
            assert_newest(learner, pull(puller, learner), came_by_transfer=True)


def test_nccl_on_one_gpu_ends_at_the_bus(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """NCCL refuses it; whatever it does then, versions come."""
    with (
        learning(tiny_model, "nccl", tmp_path) as learner,
        pulling({VISIBLE: "0"}) as puller,
        caplog.at_level(logging.WARNING),
    ):
        learner.publish(0)
        assert_newest(learner, pull(puller, learner), came_by_transfer=False)
    assert "over the bus" in caplog.text
