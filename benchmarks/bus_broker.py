"""The broker of `bench_bus`, in a process of its own: the real one, on a journal of its own.

    python benchmarks/bus_broker.py FOLDER SETTINGS_JSON

It writes the address that it listens on to FOLDER/address. Where there is FOLDER/keys, its socket uses them.
"""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
from bus_load import PROMPT_IDS

from databus.broker import Broker
from databus.config import BrokerConfig
from databus.journal import Journal
from databus.keys import server_keys
from databus.process import collect_garbage_seldom, die_with_parent
from databus.prompts import Prompt, SampledGroup

ADDRESS_FILE, KEYS = "address", "keys"


class OnePrompt:
    def get(self, cursor: int) -> Prompt:
        return Prompt("", PROMPT_IDS, b"{}")


class NoSink:
    def write(self, row: Mapping[str, float]) -> None:
        pass

    def rows_from(self, first: int) -> Sequence[str]:
        return ()

    def samples(self, step: int, groups: Sequence[SampledGroup]) -> None:
        pass


def main() -> None:
    die_with_parent()
    folder, settings = Path(sys.argv[1]), sys.argv[2]
    config = msgspec.json.decode(settings, type=BrokerConfig)
    keys = server_keys(folder / KEYS, "broker") if (folder / KEYS).exists() else None
    broker = Broker(config, OnePrompt(), [], NoSink(), keys=keys, journal=Journal(folder / "journal"))
    temporary = folder / "address.new"
    temporary.write_text(broker.address)
    temporary.rename(folder / ADDRESS_FILE)
    collect_garbage_seldom()
    broker.run()


if __name__ == "__main__":
    main()
