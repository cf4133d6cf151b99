"""`echelon run --on ray`: workers and learner as actors of a Ray cluster that this machine is a node of."""

import atexit
import contextlib
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Sequence

import ray
from ray.exceptions import RayError
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from echelon.cli import FAILED
from echelon.config import RunConfig
from echelon.errors import message_of
from echelon.launch.base import RunningRole, Site
from echelon.launch.elsewhere import placed_elsewhere
from echelon.launch.modules import LEARNER_MODULE, ranks_defaults, worker_defaults, worker_words
from echelon.launch.ray_actor import KEYS, RoleActor
from echelon.launch.ray_head import RayHead
from echelon.launch.ray_messages import HOME, NodeFacts, RoleOrder
from echelon.launch.ray_role import RayRole
from echelon.ranks import TORCHRUN_VARIABLES, Rendezvous, ranks_arguments

HEAD = re.compile(r"(?P<host>[\w.-]+|\[[0-9A-Fa-f:.]+\]):(?P<port>\d+)")
CONNECT_S = 10.0
WORKER_KEYS = ("worker.key", "broker.pub", "learner.pub")
"""What a worker needs: who it is, and whom to trust."""


class RayLauncher:
    """Lives as long as the run's connection to the cluster."""

    elsewhere = True

    def __init__(self, config: RunConfig) -> None:
        """Connects. Raises: ValueError, in one line, where there is no such cluster."""
        connect(config.ray.address)
        self._actor = ray.remote(RoleActor)
        self._head = RayHead(ray.get_runtime_context().gcs_address)

    def placed(self, config: RunConfig) -> RunConfig:
        return placed_elsewhere(config, ray.util.get_node_ip_address())

    def needed_workers(self, config: RunConfig) -> int:
        return config.ray.min_workers or config.rollout.workers + config.rollout.spares

    def start_worker(self, site: Site, name: str, index: int, spare: bool) -> RunningRole:
        settings = site.config.ray
        wanted = {"CPU": settings.worker_cpus, "GPU": settings.worker_gpus * (site.config.rollout.device == "cuda")}
        actor = self._actor.options(num_cpus=wanted["CPU"], num_gpus=wanted["GPU"]).remote()
        order = worker_order(site, name, spare)
        return RayRole(name, site, self._head, [actor], lambda _: [order], wanted)

    def start_learner(self, site: Site, name: str) -> RunningRole:
        learner = site.config.learner
        gpus = learner.ranks // learner.nodes * (learner.device == "cuda")
        wanted = {"CPU": float(site.config.ray.learner_cpus), "GPU": float(gpus)}
        bundle = {kind: amount for kind, amount in wanted.items() if amount}
        group = placement_group([bundle] * learner.nodes, strategy="STRICT_SPREAD")
        actors = [
            self._actor.options(
                num_cpus=wanted["CPU"],
                num_gpus=wanted["GPU"],
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
            ).remote()
            for index in range(learner.nodes)
        ]
        return RayRole(name, site, self._head, actors, lambda nodes: learner_orders(site, name, nodes), wanted, group)

    def trouble(self) -> str:
        return self._head.trouble()

    def close(self) -> None:
        """Without a head the process just ends, once it has said why: Ray's own end, at exit as well, waits for it."""
        if self._head.lost:
            atexit.unregister(ray.shutdown)
            atexit.register(_leave)
        else:
            ray.shutdown()


def _leave() -> None:
    """Without the destructors of Ray's threads, which still look for the head."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(FAILED)


def connect(address: str) -> None:
    """Raises: ValueError, in one line."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address not in ("auto", "local"):
        _check_head(address)
    try:
        ray.init(address=address, namespace="echelon", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        raise ValueError(
            f"ray.address is {address}, and no Ray cluster is there: {message_of(error)[:200]}; `ray start` on this "
            "machine makes it a node of one, ray.address=local starts one here"
        ) from None


def _check_head(address: str) -> None:
    """Ray itself would try for a minute."""
    head = HEAD.fullmatch(address)
    if head is None:
        raise ValueError(f"ray.address is {address!r}: expected auto, local, or HOST:PORT of the cluster's head")
    try:
        socket.create_connection((head["host"].strip("[]"), int(head["port"])), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"ray.address is {address}, and nothing answers there: {error}") from None


def worker_order(site: Site, name: str, spare: bool) -> RoleOrder:
    """A worker in a run folder of its own, with its key and nobody else's."""
    folder = site.folder
    files = {
        folder.config_file.name: folder.config_file.read_bytes(),
        folder.record_file.name: folder.record_file.read_bytes(),
        folder.recipe_file.name: folder.recipe_file.read_bytes(),
    }
    keys = folder.keys(site.config.bus)
    if keys is not None:
        files |= {f"{KEYS}/{file}": (keys / file).read_bytes() for file in WORKER_KEYS}
    return RoleOrder(
        name=name,
        arguments=(*worker_words(HOME, name, spare), "--alone"),
        files=files,
        defaults=worker_defaults(site.config),
        stop_signal=signal.SIGINT,
    )


def learner_orders(site: Site, name: str, nodes: Sequence[NodeFacts]) -> list[RoleOrder]:
    """One for each node, in the run's folder itself. Raises: ValueError where a node does not see that."""
    for node in nodes:
        if not node.sees_run:
            raise ValueError(
                f"the run folder {site.folder.path} is not on {node.address}, where the learner has its place: "
                "it needs a folder that all nodes share; name one with --run-dir"
            )
    config = site.config
    endpoint = f"{nodes[0].address}:{nodes[0].free_port}"
    run_id = site.folder.record().run_id
    defaults = ranks_defaults(config)
    without = TORCHRUN_VARIABLES if config.learner.ranks == 1 else ()
    orders = []
    for index, node in enumerate(nodes):
        arguments = [LEARNER_MODULE, str(site.folder.path), "--host", node.address]
        meet = Rendezvous(endpoint=endpoint, run_id=run_id, is_first=str(index == 0).lower(), address=node.address)
        words = ranks_arguments(config, arguments, meet if len(nodes) > 1 else None)
        orders.append(RoleOrder(name=name, arguments=tuple(words), files={}, defaults=defaults, without=without))
    return orders
