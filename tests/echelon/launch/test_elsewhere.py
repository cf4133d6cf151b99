"""Settings of runs on several machines."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from databus.address import address_towards
from databus.config import BusConfig
from echelon.config import DataConfig, RunConfig
from echelon.launch.choose import check_installed
from echelon.launch.elsewhere import placed_elsewhere
from echelon.ranks import Rendezvous, ranks_arguments
from learner.checks import check_learner
from learner.config import LearnerConfig


def config(**changes: Any) -> RunConfig:
    return RunConfig(model="org/name", data=DataConfig(train="org/data"), **changes)


def test_the_bus_listens_where_others_reach_it_and_has_keys() -> None:
    placed = placed_elsewhere(config(), "10.0.0.1")
    assert placed.bus.address == "tcp://10.0.0.1:*"
    assert placed.bus.encrypted
    assert placed_elsewhere(config(), "fe80::1").bus.address == "tcp://[fe80::1]:*"


def test_an_address_of_ones_own_stays() -> None:
    own = config(bus=BusConfig(address="tcp://10.0.0.9:5555"))
    assert placed_elsewhere(own, "10.0.0.1") == own


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bus": BusConfig(address="ipc:///tmp/bus")}, r"bus\.address=ipc:///tmp/bus is of this machine"),
        ({"bus": BusConfig(plain=True)}, r"bus\.address=tcp://10\.0\.0\.1:\* is not allowed without keys"),
        (
            {"learner": LearnerConfig(memory_copy_every=1)},
            r"learner\.memory_copy_every needs a learner on this",
        ),
        ({"placement": "colocated"}, "placement is colocated, for one machine: set it to separate with --on"),
    ],
)
def test_what_one_machine_alone_can_have_is_refused(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        placed_elsewhere(config(**changes), "10.0.0.1")


def test_ranks_are_spread_evenly() -> None:
    with pytest.raises(ValueError, match=r"learner\.ranks is 3 and learner\.nodes 2: each node has as many ranks"):
        check_learner(LearnerConfig(ranks=3, nodes=2), batch_groups=4)


def test_ranks_of_several_nodes_meet() -> None:
    two = config(learner=LearnerConfig(ranks=4, nodes=2))
    meet = Rendezvous("10.0.0.1:29500", "run", "false", "10.0.0.2")
    words = " ".join(ranks_arguments(two, ["module", "DIR"], meet))
    assert words.startswith("echelon.roles.launch torch.distributed.run --nnodes 2 --rdzv-backend c10d")
    assert "--rdzv-endpoint 10.0.0.1:29500 --rdzv-id run --rdzv-conf is_host=false --local-addr 10.0.0.2" in words
    assert words.endswith("--nproc-per-node 2 -m module DIR")
    assert ranks_arguments(config(), ["module", "DIR"]) == ["module", "DIR"]


def test_the_way_to_this_machine_is_its_own() -> None:
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(ValueError, match=r"no\.such\.host\.invalid cannot be reached"):
        address_towards("no.such.host.invalid")


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(ValueError, match=r"--on slurm needs the package no_such: pip install -e '\.\[slurm\]'"):
        check_installed("no_such", "slurm")


def test_settings_survive_the_run_folder(tmp_path: Path) -> None:
    assert msgspec.json.decode(msgspec.json.encode(config()), type=RunConfig) == config()
