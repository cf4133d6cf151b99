"""What of ours runs inside vLLM's own processes. Written against vLLM 0.32.0."""

import mmap
import multiprocessing
import os
from typing import Any

import msgspec
import torch
from vllm.model_executor.model_loader.reload.layerwise import _place_kernel_tensors, get_layerwise_info
from vllm.platforms import current_platform
from vllm.v1.engine.core import EngineCoreProc

from databus.messages import Manifest
from databus.process import die_with_parent
from rollout.drafting.proposer import DraftSetup, Proposer
from rollout.engine.tensors import first_mismatch, tensors
from rollout.engine.vllm_sampler import mend_sampler, sample_plainly_without_drafts

ROLLED_BACK = "rolled back"

_run_engine_core = EngineCoreProc.run_engine_core


def run_tied_engine_core(*args: Any, **kwargs: Any) -> None:
    """vLLM's entry point of the engine core, which then ends with the rollout worker that started it.

    By itself a core outlives a killed parent: for minutes while it starts, for ever once it serves.
    """
    die_with_parent()
    parent = multiprocessing.parent_process()
    if parent is None or os.getppid() == parent.pid:
        _run_engine_core(*args, **kwargs)


class SnapshotLoader:
    """Mixed into vLLM's worker (`worker_extension_cls`), whose `model_runner` it uses; called by `collective_rpc`.

    vLLM calls no constructor of it, so the snapshot being served is kept in an attribute that appears with the first.
    """

    model_runner: Any

    def echelon_die_with_parent(self) -> None:
        die_with_parent()

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

    def echelon_apply_snapshot(self, encoded: bytes, path: str) -> str:
        """Load the snapshot that lies in the file at `path`, a memfd of the parent's under /proc; `echelon_settle` must
        follow before anything but probes is generated.

        Args: encoded: its `Manifest` in msgpack.
        Returns: "" when it is loaded; else why it is not, after what was served before is served again.
        Raises: whatever stopped the rollback; the weights may then be a mixture.
        """
        manifest = msgspec.msgpack.decode(encoded, type=Manifest)
        try:
            buffer = _map(path, manifest.num_bytes)
            wrong = first_mismatch(manifest, buffer)
            if wrong:
                return f"tensor {wrong!r} does not match its checksum"
        except OSError as error:
            return f"snapshot cannot be read: {error}"
        try:
            self._echelon_reload((manifest, buffer))
        except Exception as error:
            _put_layers_back(self.model_runner.get_model())
            self._echelon_reload(getattr(self, "_echelon_served", None))
            return f"{ROLLED_BACK}: {type(error).__name__}: {error}"
        self._echelon_loaded = (manifest, buffer)
        return ""

    def echelon_settle(self, accepted: bool) -> None:
        """Serve what was loaded last, or else what was served before it, bit for bit.

        Raises: whatever stopped the way back; the weights may then be a mixture.
        """
        if not accepted:
            self._echelon_reload(getattr(self, "_echelon_served", None))
        else:
            self._echelon_served = self._echelon_loaded
            drafter = getattr(self.model_runner, "drafter", None)
            if isinstance(drafter, Proposer):
                drafter.set_version(self._echelon_served[0].version)
        del self._echelon_loaded

    def _echelon_reload(self, source: tuple[Manifest, mmap.mmap] | None) -> None:
        """Load a snapshot; None: what lies on disk, which is what is served before the first one.

        CPU weights are prepacked and cannot be read back, so a snapshot is kept as it came for as long as it is served.
        """
        self.model_runner.reload_weights(weights_iterator=tensors(*source) if source else None)
        _repack_kept_weights(self.model_runner.get_model())
        if current_platform.is_cpu():
            _pack_experts(self.model_runner.get_model())


def _repack_kept_weights(model: torch.nn.Module) -> None:
    """vLLM 0.32.0 on the CPU reloads an embedding but leaves a tied output layer with the old weights.

    oneDNN multiplies by a packed copy, made from the weight that both share; reloading packs only layers that
    appear in the checkpoint, and the output layer does not. Layers whose weight is kept are packed here.
    """
    layer: Any
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if hasattr(layer, "cpu_linear") and weight is not None and weight.ndim == 2 and weight.numel():
            layer.quant_method.process_weights_after_loading(layer)


def _pack_experts(model: torch.nn.Module) -> None:
    """vLLM 0.32.0 on the CPU packs a mixture's experts when its kernel is made, and leaves reloaded ones as they came.

    The kernel takes them for packed ones, and without an error says something else.
    """
    for layer in model.modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def _put_layers_back(model: torch.nn.Module) -> None:
    """Undo what a failed reload of vLLM 0.32.0 left: layers on the meta device, with half of their weights queued.

    Reloading again would go on with that queue. The tensors put back may be old or new: all are loaded next.
    """
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            _place_kernel_tensors(layer, info)
            info.reset()


def _map(path: str, num_bytes: int) -> mmap.mmap:
    fd = os.open(path, os.O_RDONLY)
    try:
        return mmap.mmap(fd, num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)
