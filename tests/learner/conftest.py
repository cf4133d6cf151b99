"""Fixtures of the learner's tests."""

import multiprocessing
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from learner_script import rank_main

RANK_TIMEOUT_S = 120


@pytest.fixture
def single_rank() -> Iterator[None]:
    """A process group of one rank, in this process."""
    from learner.run import process_group

    with process_group("cpu", timeout_s=30.0):
        yield


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def run_ranks() -> Callable[..., None]:
    """Runs learner_script.py as torchrun would, one process a rank; fails the test if one does not end as it should."""
    context = multiprocessing.get_context("forkserver")  # one import of torch and transformers for all of them
    context.set_forkserver_preload(["learner.run"])

    def run(
        world_size: int,
        arguments: list[str],
        main: Callable[..., None] | None = None,
        exit_code: int = 0,
        timeout_s: float = RANK_TIMEOUT_S,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryDirectory() as folder:
            logs = [Path(folder) / f"rank{rank}.log" for rank in range(world_size)]
            ranks = [
                context.Process(target=rank_main, args=(rank, world_size, port, log, arguments, main))
                for rank, log in enumerate(logs)
            ]
            _run(ranks, timeout_s)
            for rank, log in zip(ranks, logs, strict=True):
                assert rank.exitcode == exit_code, log.read_text()[-3000:]

    return run


def _run(processes: list[Any], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
    finally:
        for process in processes:
            process.kill()
            process.join()
