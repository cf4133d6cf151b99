"""Weights & Biases, in a thread of its own: nothing that it does or fails to do holds up or ends a run."""

import logging
import os
import queue
import threading
from collections.abc import Callable, Sequence
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import msgspec

from echelon.config import RunConfig, WandbConfig
from echelon.files import RowFollower
from echelon.git_state import git_state
from echelon.packages import package_root
from echelon.progress import Row
from echelon.run_folder import RunFolder

logger = logging.getLogger(__name__)

CLOSE_S = 30.0
SAMPLES_PER_TABLE = 8
COLUMNS: list[Any] = ["step", "prompt", "completion", "reward", "truncated", "versions"]


class WandbSink:
    """Gets the rows of metrics.jsonl as they come; `wandb.mode=disabled` imports nothing.

    A run is one run of wandb's, under its own id: resumed, it goes on there. A row and its samples go out in one call,
    for wandb takes nothing about a step once it has heard of the next one.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, run_id: str) -> None:
        self._config = config
        self._folder = folder
        self._run_id = run_id
        self._samples = RowFollower(folder.samples_file)
        self._samples_of: dict[int, list[Row]] = {}
        self._queue: queue.SimpleQueue[Sequence[Row] | None] = queue.SimpleQueue()
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        if self._config.wandb.mode != "disabled":
            self._thread = threading.Thread(target=self._serve, name="wandb", daemon=True)
            self._thread.start()

    def log(self, rows: Sequence[Row]) -> None:
        if self._thread is not None:
            self._queue.put(rows)

    def warnings(self) -> list[str]:
        """Lines for the user, each once."""
        lines = []
        while not self._warnings.empty():
            lines.append(self._warnings.get())
        return lines

    def close(self) -> None:
        """Waits for what is on its way, but not for ever."""
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._warnings.put(f"wandb did not finish within {CLOSE_S:.0f} s: left alone")
        self._thread = None

    # ------------------------------------------------------------ the thread

    def _serve(self) -> None:
        try:
            run = self._init()
            known = run.step if run.resumed else 0
            while (rows := self._queue.get()) is not None:
                for sample in self._samples.new_rows():  # they were written before their row
                    self._samples_of.setdefault(sample["step"], []).append(sample)
                for row in rows:
                    if row["step"] >= known:
                        run.log(self._values(row), step=row["step"])
            run.finish()
        except BaseException as error:  # whatever wandb raises, SystemExit included, the run goes on
            logger.debug("wandb failed", exc_info=True)
            text = " ".join(str(error).split()) or type(error).__name__
            self._warnings.put(f"wandb stopped: {text} (the run goes on; metrics.jsonl has everything)")

    def _init(self) -> Any:
        mode = self._config.wandb.mode
        if mode == "online" and not has_api_key():
            mode = "offline"
            self._warnings.put(f"wandb: no API key, so offline: `wandb sync` uploads {self._folder.path / 'wandb'}")
        import wandb

        return wandb.init(
            mode=mode,
            project=self._config.wandb.project,
            name=run_name(self._config.wandb, self._folder.path),
            id=self._run_id,
            resume="allow",
            dir=str(self._folder.path),
            config=msgspec.to_builtins(self._config) | {"git": git_state(package_root())},
            settings=wandb.Settings(silent=True, console="off", init_timeout=60, git_root=str(package_root())),
        )

    def _values(self, row: Row) -> Row:
        """A step's figures, and a table of its samples every so many steps."""
        every = self._config.wandb.samples_every
        for step in [step for step in self._samples_of if step < row["step"]]:
            del self._samples_of[step]
        samples = self._samples_of.get(row["step"], [])[:SAMPLES_PER_TABLE]
        values = {name: value for name, value in row.items() if name != "step"}
        if not samples or every == 0 or row["step"] % every:
            return values
        import wandb

        decode = text_decoder(self._folder)
        return values | {"samples": wandb.Table(columns=COLUMNS, data=[_cells(each, decode) for each in samples])}


def has_api_key() -> bool:
    """Is there a key in the environment or in .netrc? Never asks."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, NetrcParseError):
        return False


def run_name(config: WandbConfig, run_dir: Path) -> str:
    return config.name or run_dir.name


def text_decoder(folder: RunFolder) -> Callable[[Sequence[int]], str]:
    """From tokens to text, with what `prepare` has left in the run folder; without torch and transformers."""
    from tokenizers import Tokenizer

    file = folder.tokenizer / "tokenizer.json"
    if not file.is_file():  # a tokenizer that is not a fast one
        return lambda token_ids: " ".join(map(str, token_ids))
    tokenizer = Tokenizer.from_file(str(file))
    return lambda token_ids: tokenizer.decode(list(token_ids), skip_special_tokens=False)


def _cells(row: Row, decode: Callable[[Sequence[int]], str]) -> list[Any]:
    versions = ", ".join(map(str, row["versions"]))
    return [row["step"], row["prompt"], decode(row["token_ids"]), row["reward"], row["truncated"], versions]
