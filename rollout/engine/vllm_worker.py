"""What of ours runs inside vLLM's own processes. Written against vLLM 0.32.0."""

import gc
import mmap
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import msgspec
from vllm.v1.engine.core import EngineCoreProc

from databus.process import die_with_parent, spawned_die_with_parent
from databus.turns import Flag
from rollout.drafting.proposer import DraftSetup, Proposer
from rollout.engine.applying import Applied, Apply
from rollout.engine.on_device import OnDevice
from rollout.engine.tensors import HostSource, Source, first_mismatch
from rollout.engine.vllm_executor import wait_in_naps
from rollout.engine.vllm_loading import WeightLoading
from rollout.engine.vllm_sampler import mend_sampler, sample_plainly_without_drafts

ROLLED_BACK = "rolled back"
FLAG_S = 10.0

_run_engine_core = EngineCoreProc.run_engine_core


def run_tied_engine_core(*args: Any, **kwargs: Any) -> None:
    """vLLM's entry point of the engine core, which then ends with the rollout worker that started it, and its own
    workers with it.

    By itself a core outlives a killed parent: for minutes while it starts, for ever once it serves.
    """
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() == parent.pid:
        with spawned_die_with_parent():
            _run_engine_core(*args, **kwargs)


class SnapshotLoader:
    """Mixed into vLLM's worker (`worker_extension_cls`), whose `model_runner` it uses; called by `collective_rpc`.

    vLLM calls no constructor of it, so the snapshot being served is kept in an attribute that appears with the first.
    """

    model_runner: Any

    def echelon_set_up_process(self) -> None:
        """Once the engine is ready to serve."""
        die_with_parent()
        gc.freeze()  # or all of vLLM and torch is looked through for garbage again and again

    def echelon_wait_in_naps(self) -> None:
        wait_in_naps()

    def echelon_mend_sampler(self) -> bool:
        """Before anything is drafted, by whatever method. Returns and raises: as `mend_sampler`."""
        return mend_sampler()

    def echelon_start_drafting(self, encoded: bytes) -> None:
        """Args: encoded: a `DraftSetup` in msgpack. Raises: whatever keeps the drafter from being made."""
        mend_sampler()
        sample_plainly_without_drafts(self.model_runner.rejection_sampler)
        self.model_runner.drafter.start(self.model_runner, msgspec.msgpack.decode(encoded, type=DraftSetup))

    def echelon_step(self, scheduler_output: Any) -> tuple[Any, Any]:
        """A step of the model, for `OneCallExecutor`. Returns: what was sampled; the drafts, None if there are none."""
        worker: Any = self
        output = worker.execute_model(scheduler_output)
        if output is None:
            output = worker.sample_tokens(None)
        drafts = worker.take_draft_token_ids()
        return output, drafts if drafts is not None and any(drafts.draft_token_ids) else None

    def echelon_apply_snapshot(self, encoded: bytes) -> bytes:
        """Load a snapshot, or what has changed of it, and read it back; `echelon_settle` must follow before anything
        but probes is generated.

        Args: encoded: an `Apply` in msgpack. Returns: an `Applied`; where that is refused, what was served before is
        served again.
        Raises: whatever stopped the rollback; the weights may then be a mixture.
        """
        started = time.monotonic()
        order = msgspec.msgpack.decode(encoded, type=Apply)
        changed = self._echelon_changed(order)
        try:
            source: HostSource = order.manifest, _map(order.path, order.manifest.num_bytes)
            wrong = first_mismatch(*source, names=changed)
        except OSError as error:
            return _refused(f"snapshot cannot be read: {error}")
        if wrong:
            return _refused(f"tensor {wrong!r} does not match its checksum")
        try:
            loaded, read_bytes = self._echelon_load(self._echelon_on_device.of(order) or source, changed)
        except Exception as error:
            self._echelon_loading.put_back()
            self._echelon_load(getattr(self, "_echelon_served", None))
            return _refused(f"{ROLLED_BACK}: {type(error).__name__}: {error}")
        self._echelon_loaded = source, loaded
        sizes = [spec.num_bytes for spec in order.manifest.tensors if loaded is None or spec.name in loaded]
        applied = Applied(
            load_s=time.monotonic() - started, tensors=len(sizes), num_bytes=sum(sizes), read_bytes=read_bytes
        )
        return msgspec.msgpack.encode(applied)

    def echelon_settle(self, accepted: bool) -> None:
        """Serve what was loaded last, or else what was served before it, bit for bit. Nothing loaded: nothing to do.

        Raises: whatever stopped the way back; the weights may then be a mixture.
        """
        source, loaded = getattr(self, "_echelon_loaded", (None, None))
        if source is None:
            return
        if not accepted:
            self._echelon_load(getattr(self, "_echelon_served", None), loaded)
        else:
            self._echelon_served = source
            drafter = getattr(self.model_runner, "drafter", None)
            if isinstance(drafter, Proposer):
                drafter.set_version(source[0].version)
        del self._echelon_loaded

    def echelon_turn(self, turns: str, mine: bool) -> None:
        """Raise or lower this process's own flag, beside the rollout worker's; nobody else has one of its name."""
        flag = getattr(self, "_echelon_flag", None)
        if flag is None:
            self._echelon_flag = flag = Flag(Path(turns), "engines", f"vllm-{os.getpid()}", recorded=False)
        if mine:
            flag.hoist(FLAG_S)
        else:
            flag.lower()

    def echelon_read_back(self) -> list[tuple[str, int, int]]:
        """(tensor, xxh3-64 of it as it is served, elements read) of the version served; none before the first.

        For checks: it takes seconds. See `vllm_reading.read_back`.
        """
        served = getattr(self, "_echelon_served", None)
        return [] if served is None else list(self._echelon_loading.read_back(served))

    @property
    def _echelon_loading(self) -> WeightLoading:
        loading = getattr(self, "_echelon_weight_loading", None)
        if loading is None:
            self._echelon_weight_loading = loading = WeightLoading(self.model_runner)
        return loading

    @property
    def _echelon_on_device(self) -> OnDevice:
        on_device = getattr(self, "_echelon_device_copies", None)
        if on_device is None:
            self._echelon_device_copies = on_device = OnDevice()
        return on_device

    def _echelon_changed(self, order: Apply) -> set[str] | None:
        """What must be loaded; None: all. A checksum that differs counts, whatever the order says."""
        served = getattr(self, "_echelon_served", None)
        if order.changed is None or served is None or served[0].version != order.base_version:
            return None
        before = {spec.name: spec.xxh3 for spec in served[0].tensors}
        return {*order.changed, *(spec.name for spec in order.manifest.tensors if before.get(spec.name) != spec.xxh3)}

    def _echelon_load(self, source: Source | None, changed: set[str] | None = None) -> tuple[set[str] | None, int]:
        """Load, and read back what can be. Args: source: None: what lies on disk, which is served before any other.

        CPU weights are packed, so a snapshot is kept in host memory for as long as it is served: it is the way back.
        Returns: the tensors loaded, None: all; bytes read back.
        """
        loaded = self._echelon_loading.load(source, changed)
        if source is None:
            return loaded, 0
        wrong, read_bytes = self._echelon_loading.first_wrong(source, loaded)
        if wrong:
            raise ValueError(f"tensor {wrong!r} does not lie in the model as it was sent")
        return loaded, read_bytes


def _refused(why: str) -> bytes:
    return msgspec.msgpack.encode(Applied(refused=why))


def _map(path: str, num_bytes: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
