"""`python broker_process.py CONFIG_JSON JOURNAL`: a broker of its own process, for tests that attack or kill it."""

import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import psutil
from scripted import Prompts

from databus.broker import Broker
from databus.config import BrokerConfig
from databus.journal import Journal, read_journal, recover
from databus.process import die_with_parent
from databus.prompts import SampledGroup

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


class NoSink:
    def write(self, row: Mapping[str, float]) -> None:
        pass

    def rows_from(self, first: int) -> Sequence[str]:
        return ()

    def samples(self, step: int, groups: Sequence[SampledGroup]) -> None:
        pass


@contextmanager
def broker_process(config: BrokerConfig, log: Path, journal: Path | None = None) -> Iterator[psutil.Process]:
    """Killed at the end. What it logs goes to `log`; with a journal, it goes on from that."""
    command = [sys.executable, "-P", __file__, msgspec.json.encode(config).decode(), str(journal or "")]
    with log.open("ab") as output:
        process = subprocess.Popen(command, stderr=output, env={"PYTHONPATH": f"{ROOT}:{HERE}"}, cwd=ROOT)
    try:
        yield psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def run(config: BrokerConfig, folder: str) -> None:
    if not folder:
        Broker(config, Prompts(), [], NoSink()).run()
        return
    journal = Journal(Path(folder), recover(Path(folder)))
    Broker(config, Prompts(), [], NoSink(), journal=journal, past=read_journal(Path(folder))).run()


if __name__ == "__main__":
    die_with_parent()
    run(msgspec.json.decode(sys.argv[1], type=BrokerConfig), sys.argv[2])
