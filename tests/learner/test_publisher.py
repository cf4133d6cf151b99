"""Versions that travel as deltas are, bit for bit, those that would have travelled in whole; by every way there is."""

import errno
import os
import signal
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from architectures import CONFIGS, write_model
from relay import relay

from databus.config import WeightsConfig
from databus.messages import Chunk, ChunkRequest, VersionPublished
from learner.files_out import FilesOut
from learner.model import ModelOptions, build_model
from learner.outlet import Outlet, make_outlet
from learner.publisher import DeltaPublisher
from learner.run import process_group
from learner.snapshot import Snapshotter
from learner.weights_out import WeightServer
from rollout import weights_in
from rollout.engine.base import Snapshot
from rollout.weight_source import DamagedError, PullError, PullLimits, VersionGoneError
from rollout.weights_in import Puller

VERSIONS = 50
BACKENDS: tuple[Literal["bus", "file", "shm"], ...] = ("bus", "file", "shm")
QUICK = PullLimits(resend_s=0.5, silence_s=30.0)


class Stage:
    """A learner's model, what it publishes, and what it told the broker."""

    def __init__(self, model: Path, config: WeightsConfig, outlet: Outlet | None, keep: int = 2) -> None:
        self.policy = build_model(model, ModelOptions())
        self.said: list[VersionPublished] = []
        self.outlet = outlet
        snapshotter = Snapshotter(self.policy.causal_lm, "bfloat16", torch.distributed.get_rank(), chunk_bytes=10_000)
        self.publisher = DeltaPublisher(snapshotter, config, outlet, self.said.append, timeout_s=60.0)
        self.dense = Snapshotter(self.policy.causal_lm, "bfloat16", torch.distributed.get_rank())

    def publish(self, version: int) -> None:
        self.publisher.publish(version, None)
        self.publisher.wait()

    @torch.no_grad()
    def train(self, seed: int, share: float = 0.02, names: str = "") -> None:
        """Some elements change, in the parameters whose name has `names` in it; on all ranks alike."""
        torch.manual_seed(seed)
        for name, parameter in self.policy.causal_lm.named_parameters():
            if names in name:
                local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
                local.mul_(torch.where(torch.rand(local.shape) < share, 1.01, 1.0))

    def pull(self, puller: Puller, version: int | None = None) -> Snapshot:
        said = self.said[-1] if version is None else self.said[version]
        return puller(said.address, said.version, said.num_bytes, threading.Event())


def assert_dense(stage: Stage, pulled: Snapshot) -> None:
    """What was pulled, which is closed, is what is trained now, taken in whole."""
    dense = stage.dense.take(pulled.version)
    assert dense is not None and dense.data is not None
    assert pulled.manifest.tensors == dense.manifest.tensors
    assert bytes(pulled.map()) == bytes(dense.data)
    pulled.close()


@contextmanager
def staged(model: Path, folder: Path, config: WeightsConfig, keep: int = 2) -> Iterator[Stage]:
    with ExitStack() as stack:
        outlet = make_outlet(config, "ipc:///unused", keep, None, folder)
        stack.callback(outlet.close)
        stage = Stage(model, config, outlet)
        stack.callback(stage.publisher.close)
        yield stage


@pytest.fixture
def puller() -> Iterator[Puller]:
    puller = Puller(QUICK)
    yield puller
    puller.close()


@pytest.fixture
def shared_folder(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Where a backend's files may lie: for shared memory, below /dev/shm."""
    if "shm" not in request.node.name:
        yield tmp_path / "weights"
        return
    from tempfile import TemporaryDirectory

    with TemporaryDirectory(prefix="echelon-test-", dir="/dev/shm") as folder:
        yield Path(folder) / "weights"


# ---------------------------------------------------------------- bit for bit


def follow_all(rank: int, folder: str) -> None:
    """50 versions of every architecture, on all ranks of a job; rank 0 pulls each and compares."""
    with process_group("cpu", timeout_s=60.0):
        for index in range(len(CONFIGS)):
            follow(rank, Path(folder) / str(index), WeightsConfig(full_every=8))


def follow(rank: int, model: Path, config: WeightsConfig) -> None:
    outlet = WeightServer("ipc:///unused", keep=2) if rank == 0 else None
    stage, puller = Stage(model, config, outlet), Puller(QUICK)
    received: list[int] = []
    for version in range(VERSIONS + 1):
        stage.publish(version)
        dense = stage.dense.take(version) if version % 5 == 0 else None
        if rank == 0:
            pulled = stage.pull(puller)
            if dense is not None:  # what an earlier version got wrong stays wrong until it changes again
                assert pulled.manifest.tensors == dense.manifest.tensors, (model, version)  # checksums, too
            received.append(pulled.received_bytes or 0)
            pulled.close()
        stage.train(seed=100 * version + rank)
    if outlet is not None:
        outlet.close()
        assert max(received[1:]) < received[0] / 4, "all but the first came as deltas"
    stage.publisher.close()
    puller.close()


@pytest.fixture(scope="module")
def architectures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("architectures")
    for index, name in enumerate(CONFIGS):
        write_model(name, folder / str(index))
    return folder


@pytest.mark.parametrize("ranks", [1, 2])
def test_fifty_versions_by_deltas_are_the_dense_ones(
    ranks: int, run_ranks: Callable[..., None], architectures: Path
) -> None:
    run_ranks(ranks, [str(architectures)], follow_all, timeout_s=280.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("encoding", ["delta", "dense"])
def test_every_way_gives_the_same(
    backend: Literal["bus", "file", "shm"],
    encoding: Literal["delta", "dense"],
    single_rank: None,
    tiny_model: Path,
    shared_folder: Path,
    puller: Puller,
) -> None:
    config = WeightsConfig(backend=backend, encoding=encoding, full_every=3)
    with staged(tiny_model, shared_folder, config) as stage:
        assert stage.publisher._outlet is not None
        size = 0
        for version in range(8):
            stage.publish(version)
            pulled = stage.pull(puller)
            size = size or pulled.manifest.num_bytes
            assert pulled.received_bytes is not None
            if version:
                assert pulled.base_version == version - 1
                assert pulled.changed == {spec.name for spec in pulled.manifest.tensors if "q_proj" in spec.name}
                assert (pulled.received_bytes < size / 4) == (encoding == "delta")
            assert_dense(stage, pulled)
            stage.train(seed=version, names="q_proj")


def test_whole_versions_stay_what_they_are(single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller) -> None:
    """What was handed out is never written to, not even when the next version is put together from it."""
    with staged(tiny_model, tmp_path, WeightsConfig()) as stage:
        pulled = []
        for version in range(4):
            stage.publish(version)
            pulled.append((stage.pull(puller), stage.dense.take(version)))
            stage.train(seed=version)
        for snapshot, dense in pulled:
            assert dense is not None and bytes(snapshot.map()) == bytes(dense.data)  # type: ignore[arg-type]
            snapshot.close()


def open_copies() -> int:
    """Versions in memory that this process has open."""
    count = 0
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the one that listing them took
            count += "memfd:weights-" in os.readlink(f"/proc/self/fd/{fd}")
    return count


def test_the_copy_that_the_next_delta_goes_into_is_made_ahead(
    single_rank: None, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying = []
    copied = weights_in._copied

    def counted(*args: Any) -> int:
        copying.append(threading.current_thread() is threading.main_thread())
        return copied(*args)

    monkeypatch.setattr(weights_in, "_copied", counted)
    puller = Puller(QUICK)
    with staged(tiny_model, tmp_path, WeightsConfig(full_every=100)) as stage:
        for version in range(5):
            stage.publish(version)
            assert_dense(stage, stage.pull(puller))
            stage.train(seed=version, names="q_proj")
        assert copying[:1] == [True] and copying.count(True) == 1, "only the first delta had to wait for a copy"
        assert len(copying) >= 4
    puller.close()
    assert open_copies() == 0


def test_without_room_for_a_copy_ahead_the_pull_makes_its_own(
    single_rank: None,
    tiny_model: Path,
    tmp_path: Path,
    puller: Puller,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    create = os.memfd_create

    def no_room(*args: Any) -> int:
        if threading.current_thread().name == "weights-spare":
            raise OSError(errno.ENOMEM, "no room")
        return create(*args)

    monkeypatch.setattr(os, "memfd_create", no_room)
    with staged(tiny_model, tmp_path, WeightsConfig(full_every=100)) as stage:
        for version in range(4):
            stage.publish(version)
            pulled = stage.pull(puller)
            assert (pulled.received_bytes or 0) < pulled.manifest.num_bytes / 4 or version == 0
            assert_dense(stage, pulled)
            stage.train(seed=version, names="q_proj")
    assert any("no copy of version" in message for message in caplog.messages)


# ---------------------------------------------------------------- who comes late, or stays behind


@pytest.mark.parametrize("backend", ["bus", "file", "shm"])
def test_who_joins_late_takes_a_whole_version_and_the_deltas_since(
    backend: Literal["bus", "file", "shm"], single_rank: None, tiny_model: Path, shared_folder: Path, puller: Puller
) -> None:
    config = WeightsConfig(backend=backend, encoding="delta", full_every=5)
    with staged(tiny_model, shared_folder, config) as stage:
        for version in range(9):
            stage.publish(version)
            stage.train(seed=version)
        pulled = stage.pull(puller)
        assert pulled.manifest.whole_version == 5
        assert (pulled.base_version, pulled.changed) == (None, None)
        size = pulled.manifest.num_bytes
        assert size < (pulled.received_bytes or 0) < 1.5 * size
        pulled.close()


def test_who_stays_behind_takes_several_deltas(
    single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller
) -> None:
    with staged(tiny_model, tmp_path, WeightsConfig(full_every=100), keep=4) as stage:
        for version, names in enumerate(["", "q_proj", "k_proj", "v_proj"]):
            if version:
                stage.train(seed=version, names=names)
            stage.publish(version)
            if version == 1:
                stage.pull(puller).close()
        pulled = stage.pull(puller)
        assert pulled.base_version == 1
        assert {name.split(".")[-2] for name in pulled.changed or ()} == {"k_proj", "v_proj"}
        assert (pulled.received_bytes or 0) < pulled.manifest.num_bytes / 4
        assert_dense(stage, pulled)


def test_old_versions_go_and_chains_stay_whole(single_rank: None, tiny_model: Path, tmp_path: Path) -> None:
    config = WeightsConfig(backend="file", full_every=4)
    with staged(tiny_model, tmp_path / "w", config, keep=3) as stage:
        for version in range(11):
            stage.publish(version)
            stage.train(seed=version)
            for kept in range(max(0, version - 2), version + 1):
                fresh = Puller(QUICK)
                stage.pull(fresh, kept).close()
                fresh.close()
        files = sorted(path.name for path in (tmp_path / "w").glob("*/*"))
        assert len([name for name in files if name.endswith("safetensors")]) <= 2
        assert files[0].startswith("000000008"), "the whole one that the oldest of three versions needs"


def test_more_than_half_of_it_goes_in_whole(
    single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller
) -> None:
    with staged(tiny_model, tmp_path, WeightsConfig(full_every=100)) as stage:
        for version in range(3):
            stage.publish(version)
            pulled = stage.pull(puller)
            assert pulled.manifest.whole_version == (version if version < 2 else 1)
            assert_dense(stage, pulled)
            stage.train(seed=version, share=1.0 if version == 0 else 0.01)


# ---------------------------------------------------------------- faults


def between(stage: Stage, change: Callable[[Any, list[bytes]], list[bytes] | None]) -> Any:
    """A relay to the weight server; `change` gets what the server sends."""
    assert stage.outlet is not None
    return relay(stage.outlet.address, change)


def pull_through(address: str, stage: Stage, puller: Puller) -> Snapshot:
    said = stage.said[-1]
    return puller(address, said.version, said.num_bytes, threading.Event())


@pytest.mark.parametrize("fault", ["flipped", "swapped", "cut", "empty"])
def test_a_damaged_delta_is_followed_by_the_whole(
    fault: str, single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller, caplog: pytest.LogCaptureFixture
) -> None:
    damaged: list[int] = []

    def damage(message: Any, frames: list[bytes]) -> list[bytes]:
        if not (isinstance(message, Chunk) and message.delta and not damaged):
            return frames
        damaged.append(message.index)
        data = bytearray(frames[0])
        data[len(data) // 2] ^= 1
        return [{"flipped": bytes(data), "swapped": b"\0" * len(data), "cut": frames[0][:-1], "empty": b""}[fault]]

    with staged(tiny_model, tmp_path, WeightsConfig(full_every=100)) as stage:
        stage.publish(0)
        stage.pull(puller).close()
        stage.train(seed=1)
        stage.publish(1)
        with between(stage, damage) as address:
            pulled = pull_through(address, stage, puller)
        assert damaged == [0]
        assert "pulling it in whole" in caplog.text
        assert (pulled.base_version, pulled.changed) == (None, None)
        assert_dense(stage, pulled)


def test_a_chunk_that_is_lost_is_asked_for_again(
    single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller
) -> None:
    lost: list[int] = []

    def lose(message: Any, frames: list[bytes]) -> list[bytes] | None:
        if isinstance(message, Chunk) and message.delta and not lost:
            lost.append(message.index)
            return None
        return frames

    with staged(tiny_model, tmp_path, WeightsConfig()) as stage:
        stage.publish(0)
        stage.pull(puller).close()
        stage.train(seed=1)
        stage.publish(1)
        with between(stage, lose) as address:
            pulled = pull_through(address, stage, puller)
        assert lost and pulled.base_version == 0
        assert_dense(stage, pulled)


def test_a_base_that_was_damaged_in_memory_is_noticed(
    single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller
) -> None:
    with staged(tiny_model, tmp_path, WeightsConfig()) as stage:
        stage.publish(0)
        held = stage.pull(puller)
        os.pwrite(held.fd, b"\x55" * 64, held.manifest.tensors[3].offset)
        held.close()
        stage.train(seed=1, names="norm")
        stage.publish(1)
        assert_dense(stage, stage.pull(puller))


def test_two_learners_with_one_version_number(
    single_rank: None, tiny_model: Path, other_model: Path, tmp_path: Path, puller: Puller
) -> None:
    """One came back in place of the other: a delta of the one never goes on the other's weights."""
    with (
        staged(tiny_model, tmp_path / "a", WeightsConfig()) as ours,
        staged(other_model, tmp_path / "b", WeightsConfig()) as theirs,
    ):
        for version in range(3):
            for stage in (ours, theirs):
                stage.publish(version)
                if version < 2:
                    stage.train(seed=version)
        ours.pull(puller, 1).close()
        pulled = theirs.pull(puller, 2)
        assert (pulled.received_bytes or 0) > pulled.manifest.num_bytes, "in whole: the number alone is no base"
        assert_dense(theirs, pulled)
        assert_dense(ours, ours.pull(puller, 2))


def test_a_version_that_is_gone_is_said(single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller) -> None:
    for backend in ("bus", "file"):
        config = WeightsConfig(backend=backend, full_every=1)
        with staged(tiny_model, tmp_path / backend, config) as stage:
            for version in range(4):
                stage.publish(version)
                stage.train(seed=version)
            with pytest.raises(VersionGoneError, match="version 0 is not kept"):
                stage.pull(puller, 0)


def test_damage_on_disk_is_not_served(single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller) -> None:
    with staged(tiny_model, tmp_path / "w", WeightsConfig(backend="file", full_every=100)) as stage:
        stage.publish(0)
        (whole,) = (tmp_path / "w").glob("*/*.safetensors")
        content = bytearray(whole.read_bytes())
        content[-3] ^= 1
        whole.write_bytes(content)
        descriptors = len(os.listdir("/proc/self/fd"))
        with pytest.raises(DamagedError, match="does not match its checksum"):
            stage.pull(puller)
        (manifest,) = (tmp_path / "w").glob("*/*.manifest")
        manifest.write_bytes(manifest.read_bytes()[:-1])
        with pytest.raises(PullError, match="bad header"):
            stage.pull(puller)
        assert len(os.listdir("/proc/self/fd")) <= descriptors


def die_while_publishing(rank: int, model: str, folder: str) -> None:
    """SIGKILL when all of version 2 is written but its manifest."""
    from databus import weight_files

    rename = os.rename

    def die(source: Path, target: Path) -> None:
        if target.name == "000000002.manifest":
            os.kill(os.getpid(), signal.SIGKILL)
        rename(source, target)

    weight_files.os.rename = die  # type: ignore[assignment]
    with process_group("cpu", timeout_s=60.0):
        outlet = FilesOut(Path(folder), keep=2)
        stage = Stage(Path(model), WeightsConfig(backend="file"), outlet)
        for version in range(3):
            stage.publish(version)
            stage.train(seed=version)


def test_a_learner_killed_while_it_publishes_leaves_whole_versions_only(
    run_ranks: Callable[..., None], single_rank: None, tiny_model: Path, tmp_path: Path, puller: Puller
) -> None:
    run_ranks(1, [str(tiny_model), str(tmp_path / "w")], die_while_publishing, exit_code=-signal.SIGKILL)
    (left,) = (tmp_path / "w").iterdir()
    assert (left / "000000002.delta").exists()
    with pytest.raises(VersionGoneError):
        puller(f"file://{left}", 2, 1, threading.Event())
    puller(f"file://{left}", 1, manifest_of(left).num_bytes, threading.Event()).close()
    with staged(tiny_model, tmp_path / "w", WeightsConfig(backend="file")) as stage:
        assert not left.exists(), "the next learner of the run removes it"
        stage.publish(0)
        assert_dense(stage, stage.pull(puller))


def manifest_of(folder: Path) -> Any:
    from rollout.files_source import FilesSource

    return FilesSource(folder, threading.Event()).manifest(1)


def test_files_are_private_and_go_away(single_rank: None, tiny_model: Path, tmp_path: Path) -> None:
    with staged(tiny_model, tmp_path / "w", WeightsConfig(backend="file")) as stage:
        stage.publish(0)
        (own,) = (tmp_path / "w").iterdir()
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in own.iterdir()} == {0o600}
    assert not own.exists()


@pytest.mark.parametrize("address", ["file://relative", "shm:///tmp/elsewhere", "shm:///dev/shm/../tmp"])
def test_only_folders_where_versions_may_lie(address: str, puller: Puller) -> None:
    with pytest.raises(ValueError, match="is not allowed"):
        puller(address, 1, 1, threading.Event())


def test_publishing_waits_for_the_version_before_and_fails_aloud(
    single_rank: None, tiny_model: Path, tmp_path: Path
) -> None:
    with staged(tiny_model, tmp_path / "w", WeightsConfig(backend="file")) as stage:
        stage.publish(0)
        (own,) = (tmp_path / "w").iterdir()
        own.rename(tmp_path / "away")
        stage.train(seed=0)
        stage.publisher.publish(1, None)  # in a thread
        with pytest.raises(RuntimeError, match=r"version 1 cannot be published: .*: No such file"):
            stage.publisher.publish(2, None)
        assert [said.version for said in stage.said] == [0]


def test_requests_for_chunks_that_are_not_there(single_rank: None, tiny_model: Path, tmp_path: Path) -> None:
    server = WeightServer("ipc:///unused", keep=2)
    try:
        stage = Stage(tiny_model, WeightsConfig(), server)
        stage.publish(0)
        for request in (
            ChunkRequest(version=0, index=0, delta=True),
            ChunkRequest(version=0, index=-1),
            ChunkRequest(version=0, index=10**6),
        ):
            assert server._reply(request) == (None, None)
        stage.publisher.close()
    finally:
        server.close()
