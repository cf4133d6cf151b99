"""The folder of a run: every path in it, its lock, and whether a run may use it.

config.json  recipe.py  run.json  lock  bus.json  keys/  prompts/  tokenizer/
journal/  checkpoints/  metrics.jsonl  samples.jsonl  rollouts.bin  logs/  turns/
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from databus.config import BusConfig
from databus.keys import ClientKeys, KeyHolder, ServerKeys, client_keys, new_keys, server_keys
from databus.locks import is_locked
from databus.messages import Role
from databus.turns import RECORD as TURNS_RECORD
from echelon.config import RunConfig
from echelon.files import read_rows, write_atomically
from echelon.recipe import RECIPE_FILE, Recipe
from echelon.settings import flatten

POLL_S = 0.05
FIXED_SETTINGS = ("model", "data.train", "data.prompt", "data.chat", "data.shuffle", "data.max_train", "seed")
"""Settings that a resumed run must share with the one it goes on from: they decide what a cursor means."""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """run.json: whose folder this is."""

    run_id: str
    recipe: str


class BusRecord(msgspec.Struct, frozen=True, kw_only=True):
    """bus.json: where the broker of the run listens, once it does. keys: folder of the run's keys; "": plain text."""

    address: str
    run_id: str
    keys: str = ""

    def client_keys(self, role: Role, server: KeyHolder = "broker") -> ClientKeys | None:
        """What `role` connects with. Raises: ValueError, one line, where its key is missing or no key."""
        return client_keys(Path(self.keys), role, server) if self.keys else None

    def server_keys(self, holder: KeyHolder, allowed: Sequence[Role]) -> ServerKeys | None:
        """What `holder` listens with. Raises: ValueError, as above."""
        return server_keys(Path(self.keys), holder, allowed) if self.keys else None


class RunFolder:
    """Paths of a run; nothing is created by making one."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser().resolve()
        self.config_file = self.path / "config.json"
        self.recipe_file = self.path / RECIPE_FILE
        self.record_file = self.path / "run.json"
        self.lock_file = self.path / "lock"
        self.bus_file = self.path / "bus.json"
        self.prompts = self.path / "prompts"
        self.train_prompts = self.prompts / "train.jsonl"
        self.eval_prompts = self.prompts / "eval.jsonl"
        self.tokenizer = self.path / "tokenizer"
        self.journal = self.path / "journal"
        self.checkpoints = self.path / "checkpoints"
        self.metrics_file = self.path / "metrics.jsonl"
        self.samples_file = self.path / "samples.jsonl"
        self.rollouts_file = self.path / "rollouts.bin"
        self.logs = self.path / "logs"
        self.own_keys = self.path / "keys"
        self.turns = self.path / "turns"

    def turns_of(self, config: RunConfig) -> Path | None:
        """Where learner and engines take turns; None where they do not."""
        return self.turns if config.placement == "colocated" else None

    def log_file(self, role: str) -> Path:
        return self.logs / f"{role}.log"

    def error_file(self, role: str) -> Path:
        return self.logs / f"{role}.error.json"

    def record(self) -> RunRecord:
        """Raises: ValueError, in one line, where this is no run's folder."""
        return self._read(self.record_file, RunRecord)

    def config(self) -> RunConfig:
        """The resolved configuration. Raises: ValueError, in one line."""
        return self._read(self.config_file, RunConfig)

    def bus(self) -> BusRecord | None:
        """Where the broker listens; None before it does."""
        try:
            return msgspec.json.decode(self.bus_file.read_bytes(), type=BusRecord)
        except (OSError, msgspec.MsgspecError):
            return None

    def wait_for_bus(self, timeout_s: float) -> BusRecord:
        """For roles that are started while model and data are still checked. Raises: RuntimeError."""
        deadline = time.monotonic() + timeout_s
        while (record := self.bus()) is None:
            if time.monotonic() > deadline:
                raise RuntimeError(f"no broker has listened within {timeout_s:g} s: {self.bus_file} is missing")
            time.sleep(POLL_S)
        return record

    def keys(self, bus: BusConfig) -> Path | None:
        """Where the run's keys are; None where its sockets are plain."""
        if not bus.encrypted:
            return None
        return self.own_keys if bus.keys == "auto" else Path(bus.keys)

    def make_keys(self, bus: BusConfig) -> None:
        """The run's own keys, unless it has some, or needs none, or was given others."""
        if self.keys(bus) == self.own_keys and not self.own_keys.exists():
            new_keys(self.own_keys)

    def _read(self, file: Path, kind: type[Any]) -> Any:
        try:
            return msgspec.json.decode(file.read_bytes(), type=kind)
        except FileNotFoundError:
            raise ValueError(f"{self.path} is not a run's folder: it has no {file.name}") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise ValueError(f"{file} cannot be read: {error}") from None

    def has_progress(self) -> bool:
        """Did a run get as far as a step or a checkpoint here?"""
        return bool(read_rows(self.metrics_file)) or (self.checkpoints.is_dir() and any(self.checkpoints.iterdir()))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder for this process; the kernel lets go of it when the process ends, however it ends.

        Raises: ValueError naming the process that holds it.
        """
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise ValueError(f"run folder {self.path} is in use by pid {holder}: name another --run-dir") from None
        try:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def is_in_use(self) -> bool:
        """Does a process hold the folder?"""
        return is_locked(self.lock_file)

    def claim(self, recipe: Recipe, resume: bool) -> RunRecord:
        """Make this the folder of a run of `recipe`, or go on with the run that it holds; call it under the lock.

        Raises: ValueError, in one line, where the folder holds something else, or a run that would be overwritten.
        """
        record = self._claimable(recipe, resume)
        if record is None:
            record = RunRecord(run_id=f"{recipe.name}-{secrets.token_hex(4)}", recipe=recipe.name)
        self.bus_file.unlink(missing_ok=True)
        if not resume:
            self.rollouts_file.unlink(missing_ok=True)
            (self.turns / TURNS_RECORD).unlink(missing_ok=True)
            shutil.rmtree(self.journal, ignore_errors=True)
        shutil.rmtree(self.prompts, ignore_errors=True)
        for folder in (self.prompts, self.checkpoints, self.logs):
            folder.mkdir(exist_ok=True)
        for error_file in self.logs.glob("*.error.json"):
            error_file.unlink()
        write_atomically(self.record_file, msgspec.json.format(msgspec.json.encode(record)))
        write_atomically(self.recipe_file, recipe.path.read_bytes())
        write_atomically(self.config_file, msgspec.json.format(msgspec.json.encode(recipe.config)))
        return record

    def _claimable(self, recipe: Recipe, resume: bool) -> RunRecord | None:
        """The record of the run to go on with; None for a new run."""
        if not self.record_file.exists():
            self._check_unused(resume)
            return None
        record = self.record()
        if record.recipe != recipe.name:
            raise ValueError(
                f"run folder {self.path} belongs to recipe {record.recipe!r}, not {recipe.name!r}: "
                "name another --run-dir"
            )
        if resume:
            self._check_same_run(recipe.config)
            return record
        if self.has_progress():
            raise ValueError(
                f"run folder {self.path} holds a run already: add --resume to go on with it, or name another --run-dir"
            )
        return None

    def _check_unused(self, resume: bool) -> None:
        others = sorted(path.name for path in self.path.iterdir() if path != self.lock_file)
        if others:
            raise ValueError(
                f"{self.path} is not empty and not a run's folder (it has {others[0]}): name another --run-dir"
            )
        if resume:
            raise ValueError(f"nothing to resume: {self.path} holds no run")

    def _check_same_run(self, config: RunConfig) -> None:
        old, new = (flatten(msgspec.to_builtins(each)) for each in (self.config(), config))
        for name in FIXED_SETTINGS:
            if old[name] != new[name]:
                raise ValueError(
                    f"cannot resume {self.path} with {name}={new[name]}: the run was started with {name}={old[name]}"
                )
