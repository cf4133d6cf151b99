"""What the service serves, and how that is changed: from a folder, or by following a run."""

import asyncio
import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from databus.errors import BusError
from databus.messages import VersionApplied, VersionRefused
from rollout.engine.base import Engine, EngineDead, Snapshot, UpdateFailed
from rollout.folder_weights import snapshot_of
from rollout.merging import MergingPull
from rollout.service.errors import ServiceError
from rollout.service.following import Following, RunSource
from rollout.service.protocol import FollowRequest, LoadRequest, Weights

logger = logging.getLogger(__name__)

OpenFolder = Callable[[str], AbstractContextManager[tuple[Path, int | None]]]
Join = Callable[[str, str | None], RunSource]


@dataclass(frozen=True, kw_only=True)
class WeightSources:
    """What only whoever puts a service together knows; both block, and raise ValueError or BusError in one line.

    open_folder: of a path, a model's folder while inside, and the version that it is by itself, if it is one.
    join: of a run's folder or address, and its keys, the run.
    """

    open_folder: OpenFolder
    join: Join


class WeightDesk:
    """One engine's; one change at a time."""

    def __init__(self, engine: Engine, model: str, dtype: str, sources: WeightSources) -> None:
        self._engine = engine
        self._model = model
        self._dtype = dtype
        self._sources = sources
        self._changing = asyncio.Lock()
        self._following: Following | None = None
        self._source = model
        self._updates = self._refused = 0
        self._pause_s = 0.0
        self._problem = ""
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Fails once the engine can serve nothing any more."""

    def weights(self) -> Weights:
        following = self._following
        return Weights(
            version=self._engine.version,
            source=self._source,
            following=following.source.name if following else None,
            newest=following.newest if following else None,
            updates=self._updates,
            refused=self._refused,
            pause_s=self._pause_s,
            problem=self._problem,
        )

    async def load(self, request: LoadRequest) -> Weights:
        """Serve a folder's weights. Raises: ServiceError; what was served before serves on then."""
        async with self._changing:
            if self._following is not None:
                raise ServiceError(409, f"{self._following.source.name} is being followed: unfollow it first")
            await self._load(request)
            return self.weights()

    async def follow(self, request: FollowRequest) -> Weights:
        """Take up a run's versions from now on, instead of those of another. Raises: ServiceError."""
        async with self._changing:
            try:
                source = await asyncio.to_thread(self._sources.join, request.run, request.keys)
            except (ValueError, BusError) as error:
                raise ServiceError(400, str(error), "run") from None
            if source.dtype != self._dtype:
                await asyncio.to_thread(source.close)
                raise ServiceError(
                    409, f"{source.name} publishes {source.dtype}, and {self._dtype} is served: start with --dtype"
                )
            await self._unfollow()
            self._problem = ""
            pull = MergingPull(source.pull, self._model, self._dtype)
            self._following = following = Following(self._engine, source, pull, self._told)
            following.start().add_done_callback(lambda task: self._ended(following, task))
            return self.weights()

    async def unfollow(self) -> Weights:
        """What was served last serves on."""
        async with self._changing:
            await self._unfollow()
            return self.weights()

    async def close(self) -> None:
        await self.unfollow()

    async def _unfollow(self) -> None:
        following, self._following = self._following, None
        if following is not None:
            await following.stop()

    async def _load(self, request: LoadRequest) -> None:
        try:
            snapshot = await asyncio.to_thread(self._read, request)
        except (ValueError, OSError) as error:
            raise ServiceError(400, str(error), "path") from None
        try:
            report = await self._engine.update(snapshot)
        except EngineDead as error:
            self._fail(error)
            raise ServiceError(500, str(error)) from None
        except UpdateFailed as error:
            self._refused += 1
            self._problem = str(error)
            raise ServiceError(409, str(error), "path") from None
        finally:
            snapshot.close()
        self._applied(request.path, report.pause_s)

    def _read(self, request: LoadRequest) -> Snapshot:
        with self._sources.open_folder(request.path) as (folder, step):
            version = request.version
            if version is None:
                version = self._engine.version + 1 if step is None else step
            return snapshot_of(folder, version, self._dtype)

    def _told(self, message: VersionApplied | VersionRefused) -> None:
        if isinstance(message, VersionRefused):
            self._refused += 1
            self._problem = f"version {message.version} refused: {message.reason}"
        elif self._following is not None:
            self._applied(self._following.source.name, message.pause_s)

    def _applied(self, source: str, pause_s: float) -> None:
        self._source = source
        self._updates += 1
        self._pause_s += pause_s
        self._problem = ""

    def _ended(self, following: Following, task: "asyncio.Task[str]") -> None:
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            self._fail(error)
            return
        self._problem = f"{following.source.name} is followed no longer: {task.result()}"
        logger.warning("%s; version %d serves on", self._problem, self._engine.version)
        if self._following is following:
            self._following = None

    def _fail(self, error: BaseException) -> None:
        if not self.broken.done():
            self.broken.set_exception(error)
