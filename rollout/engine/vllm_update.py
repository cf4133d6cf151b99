"""From one version to the next in a pause of vLLM's scheduler. Written against vLLM 0.32.0."""

import asyncio
import os
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import msgspec

from rollout.engine.applying import Applied, Apply
from rollout.engine.base import Snapshot, UpdateFailed, UpdateReport
from rollout.engine.expected import ExpectedTensors
from rollout.engine.tensors import first_mismatch
from rollout.engine.vllm_gate import VllmGate

T = TypeVar("T")

LAST_OUTPUTS_S = 0.02
"""After vLLM stands still, in which it hands out what the last step gave: its own figure. Weights are loaded meanwhile.
"""


class Call(Protocol):
    """Awaits what must succeed, for so long. Raises: EngineDead."""

    async def __call__(self, call: Awaitable[T]) -> T: ...


class VllmUpdate:
    """Of one AsyncLLM, which nobody hands a request to meanwhile.

    Whatever is raised but UpdateFailed: nobody knows which weights there are, and generation stays paused.
    """

    def __init__(self, llm: Any, expected: ExpectedTensors, gate: VllmGate, call: Call) -> None:
        self._llm = llm
        self._expected = expected
        self._gate = gate
        self._call = call

    async def check(self, snapshot: Snapshot) -> None:
        """All that can be found out without a pause. Raises: UpdateFailed."""
        try:
            self._expected.check(snapshot.manifest)
            wrong = await asyncio.to_thread(first_mismatch, snapshot.manifest, snapshot.map())
        except (ValueError, OSError) as error:
            raise UpdateFailed(f"version {snapshot.version} refused: {error}") from None
        if wrong:
            raise UpdateFailed(f"version {snapshot.version} refused: tensor {wrong!r} does not match its checksum")

    async def apply(
        self,
        snapshot: Snapshot,
        served: int,
        *,
        begin_anew: Iterable[str],
        recompute: bool,
        switched: Callable[[], None],
    ) -> UpdateReport:
        """Args: served: the version before. begin_anew: requests to abort, looked at once the outputs of the last step
        have been handed out. recompute: drop the KV cache of all others, and every prefix. switched: told when the
        version is served, before any token is of it.

        Raises: UpdateFailed, after which all is as before; EngineDead.
        """
        # AsyncLLM's own method does this, and then sleeps for LAST_OUTPUTS_S.
        await self._call(self._llm.engine_core.pause_scheduler_async(mode="keep", clear_cache=False))
        started = time.monotonic()
        try:
            report, _ = await asyncio.gather(self._load(snapshot, served), asyncio.sleep(LAST_OUTPUTS_S))
        except UpdateFailed:
            await self._call(self._llm.resume_generation())
            raise
        if without_token := sorted(begin_anew):
            await self._call(self._llm.abort(without_token))
        if recompute:  # they begin again with all their tokens
            await self._call(self._llm.reset_prefix_cache(reset_running_requests=True))
        switched()
        await self._resume_as(snapshot.version)
        return replace(report, pause_s=time.monotonic() - started)

    async def _resume_as(self, version: int) -> None:
        """In one go: vLLM takes calls in the order in which they were made."""
        await asyncio.gather(
            self._call(self._llm.update_weight_version(str(version))), self._call(self._llm.resume_generation())
        )

    async def _load(self, snapshot: Snapshot, served: int) -> UpdateReport:
        applied = await self._apply_in_workers(snapshot, served)
        try:
            mismatch = await self._gate.admit(snapshot.version, snapshot.manifest.probe)
        except UpdateFailed:
            await self._settle(False)
            raise
        await self._settle(True)
        return UpdateReport(
            pause_s=0.0,
            mismatch=mismatch,
            load_s=max(each.load_s for each in applied),
            loaded_bytes=applied[0].num_bytes,
            loaded_tensors=applied[0].tensors,
        )

    async def _apply_in_workers(self, snapshot: Snapshot, served: int) -> list[Applied]:
        """Raises: UpdateFailed, once every worker has what it served before."""
        knows = snapshot.changed is not None and snapshot.base_version == served
        order = Apply(
            manifest=snapshot.manifest,
            path=f"/proc/{os.getpid()}/fd/{snapshot.fd}",
            base_version=served if knows else None,
            changed=tuple(sorted(snapshot.changed or ())) if knows else None,
            device_copy=snapshot.device_copy,
        )
        call = self._llm.collective_rpc("echelon_apply_snapshot", args=(msgspec.msgpack.encode(order),))
        applied = [msgspec.msgpack.decode(answer, type=Applied) for answer in await self._call(call)]
        refused = next((each.refused for each in applied if each.refused), "")
        if refused:
            await self._settle(False)
            raise UpdateFailed(f"version {snapshot.version} refused: {refused}")
        return applied

    async def _settle(self, accepted: bool) -> None:
        await self._call(self._llm.collective_rpc("echelon_settle", args=(accepted,)))
