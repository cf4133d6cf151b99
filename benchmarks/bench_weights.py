"""How long do new weights take from the learner to a worker's host memory, and in how many bytes?

    python benchmarks/bench_weights.py --sizes 1 10 100 --json benchmarks/results/bench_weights.json

Models of several sizes take real AdamW steps, on random tokens, at several learning rates. After each step their
weights are published, pulled and checked by every way in turn: deltas and whole versions over the learner's socket
(ipc, and through a link of 1 Gbit/s), whole ones in shared memory; with CUDA from GPU to GPU, too, mapped on one and by
NCCL where there are two; beside safetensors through a file, and pickled tensors over ZeroMQ. What does not fit beside
the training goes `--apart`: the versions are trained first, and written to files (4 bytes a parameter and version).
"""

import argparse
import pickle
import statistics
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import zmq
from common import Bar, hardware, write_result
from paced_link import paced_link
from safetensors.torch import load_file, save_file
from torch import nn
from weights_training import TrainedApart, Training, train_apart

from databus.config import WeightsConfig
from databus.messages import VersionPublished
from learner.outlet import make_outlet
from learner.publisher import DeltaPublisher
from learner.run import process_group
from learner.snapshot import Snapshotter
from rollout.receiver import VISIBLE, Receiver
from rollout.weights_in import Puller

LINK_GBIT_S = 1.0
Times = dict[str, list[float]]


@dataclass
class Way:
    """One way from the learner to a worker. figures: seconds of each part, an entry a version."""

    publisher: DeltaPublisher
    said: list[VersionPublished]
    puller: Puller
    through: Callable[[str], str] = lambda address: address
    figures: Times = field(default_factory=lambda: defaultdict(list))

    def carry(self, version: int) -> None:
        began = time.perf_counter()
        self.publisher.publish(version, None)
        copied = time.perf_counter()
        self.publisher.wait()
        published = time.perf_counter()
        said = self.said[-1]
        snapshot = self.puller(self.through(said.address), version, said.num_bytes, threading.Event())
        pulled = time.perf_counter()
        snapshot.close()
        self.puller.settle()  # made ahead, while a version is trained: it must not meet what is measured next
        settled = time.perf_counter()
        for name, value in {
            "step_waits_s": copied - began,
            "encode_s": published - copied,
            "pull_s": pulled - published,
            "end_to_end_s": pulled - began,
            "made_ahead_s": settled - pulled,
            "from_gpu": float(snapshot.device_copy is not None),
            "bytes": snapshot.received_bytes or 0,
        }.items():
            self.figures[name].append(value)


@contextmanager
def way(model: nn.Module, config: WeightsConfig, bus_address: str, gbit_s: float = 0.0) -> Iterator[Way]:
    """Args: gbit_s: of the link between the two; 0: none. By NCCL the worker has the second GPU."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm")))
        outlet = make_outlet(config, bus_address, keep=2, keys=None, folder=folder)
        stack.callback(outlet.close)
        said: list[VersionPublished] = []
        publisher = DeltaPublisher(Snapshotter(model, "bfloat16", 0), config, outlet, said.append, timeout_s=600.0)
        stack.callback(publisher.close)
        puller = Puller(receiver=Receiver(environment={VISIBLE: "1"} if config.backend == "nccl" else None))
        stack.callback(puller.close)
        if gbit_s:
            link = stack.enter_context(paced_link(outlet.address, gbit_s))
            yield Way(publisher, said, puller, lambda _: link)
        else:
            yield Way(publisher, said, puller)


WAYS: dict[str, tuple[WeightsConfig, str, float]] = {
    "delta, ipc": (WeightsConfig(encoding="delta", full_every=1000), "ipc:///unused", 0.0),
    "dense, ipc": (WeightsConfig(encoding="dense"), "ipc:///unused", 0.0),
    "dense, shm": (WeightsConfig(backend="shm"), "ipc:///unused", 0.0),
    "delta, 1 Gbit/s": (WeightsConfig(encoding="delta", full_every=1000), "tcp://127.0.0.1:0", LINK_GBIT_S),
    "dense, 1 Gbit/s": (WeightsConfig(encoding="dense"), "tcp://127.0.0.1:0", LINK_GBIT_S),
    "GPU to GPU, mapped": (WeightsConfig(backend="ipc"), "ipc:///unused", 0.0),
    "GPU to GPU, NCCL": (WeightsConfig(backend="nccl"), "ipc:///unused", 0.0),
}


def possible_ways() -> list[str]:
    """On this machine."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    needed = {"ipc": 1, "nccl": 2}
    return [name for name, (config, *_) in WAYS.items() if gpus >= needed.get(config.backend, 0)]


def serving(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().to(torch.bfloat16) for name, parameter in model.named_parameters()}


def through_a_file(model: nn.Module) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        path = Path(folder) / "model.safetensors"
        save_file(serving(model), path)
        for tensor in load_file(path).values():
            tensor.clone()  # until then it is only mapped
        return time.perf_counter() - began


def pickled(model: nn.Module) -> float:
    with (
        tempfile.TemporaryDirectory() as folder,
        zmq.Context() as context,
        context.socket(zmq.PUSH) as push,
        context.socket(zmq.PULL) as pull,
    ):
        push.bind(f"ipc://{folder}/weights")
        pull.connect(f"ipc://{folder}/weights")
        began = time.perf_counter()
        push.send(pickle.dumps(serving(model), protocol=5), copy=False)
        pickle.loads(pull.recv())
        return time.perf_counter() - began


PEERS = {"safetensors through a file": through_a_file, "pickled tensors, ZeroMQ ipc": pickled}


def measure(training: Training | TrainedApart, rates: list[float], repeats: int, chosen: list[str]) -> dict[str, Any]:
    results: dict[str, Any] = {"parameters": sum(parameter.numel() for parameter in training.model.parameters())}
    with ExitStack() as stack:
        ways = {name: stack.enter_context(way(training.model, *WAYS[name])) for name in chosen}
        version = 0
        for each in ways.values():  # the first one is whole, and compiles what is to be compiled
            each.carry(version)
        for rate in rates:
            peers: Times = defaultdict(list)
            for each in ways.values():
                each.figures.clear()
            training.warm_up(rate)
            for each in ways.values():  # what those steps changed is no measurement
                each.carry(version := version + 1)
                each.figures.clear()
            for _ in range(repeats):
                peers["step_s"].append(training.step(rate))
                version += 1
                for each in ways.values():
                    each.carry(version)
                for name, run in PEERS.items():
                    peers[name].append(run(training.model))
            results[f"lr {rate:g}"] = {
                "ways": {name: summary(each.figures) for name, each in ways.items()},
                "peers": summary(peers),
            }
    return results


def measure_apart(millions: float, rates: list[float], repeats: int, chosen: list[str]) -> dict[str, Any]:
    """One way after another, each with the memory to itself; the versions are trained before."""
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        train_apart(Path(folder), millions, rates, repeats)
        for name in chosen:
            found = measure(TrainedApart(Path(folder), millions), rates, repeats, [name])
            for rate in rates:
                key = f"lr {rate:g}"
                found[key]["ways"] |= results.get(key, {}).get("ways", {})
            results = found
    return results


def summary(figures: Times) -> dict[str, dict[str, float]]:
    return {
        name: {"median": statistics.median(values), "min": min(values), "max": max(values)}
        for name, values in figures.items()
    }


def bars(figures: dict[str, Any], rates: list[float]) -> list[Bar]:
    """Of the largest model at the smallest rate."""
    largest = figures[max(figures, key=lambda size: figures[size]["parameters"])]
    ways = largest[f"lr {min(rates):g}"]["ways"]
    size = 2 * largest["parameters"]

    def median(name: str, what: str) -> float:
        return ways[name][what]["median"]

    found: list[Bar] = []
    if "delta, ipc" in ways:
        found.append(Bar("times fewer bytes than dense", size / median("delta, ipc", "bytes"), 15, "at least"))
        found.append(Bar("encode, GB/s of weights", size / median("delta, ipc", "encode_s") / 1e9, 1, "at least"))
        taken_up = median("delta, ipc", "pull_s") + median("delta, ipc", "made_ahead_s")
        found.append(Bar("pull and apply, with what is made ahead, GB/s", size / taken_up / 1e9, 1, "at least"))
    for link, bound, turned in (("1 Gbit/s", 8.0, True), ("ipc", 1.2, False)):
        if {f"delta, {link}", f"dense, {link}"} <= ways.keys():
            ratio = median(f"dense, {link}", "end_to_end_s") / median(f"delta, {link}", "end_to_end_s")
            name = f"{link}: times faster than dense" if turned else f"{link}: time beside dense"
            found.append(Bar(name, ratio if turned else 1 / ratio, bound, "at least" if turned else "at most"))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=float, nargs="+", default=[1, 10, 100], help="million parameters")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-6, 3e-6, 1e-5])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=possible_ways())
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="that is trained on")
    parser.add_argument(
        "--apart", action="store_true", help="train first, and measure the ways one by one: less memory"
    )
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/bench_weights.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {}
    with process_group("cpu", timeout_s=600.0):
        for size in args.sizes:
            if args.apart:
                figures[f"{size:g} M"] = measure_apart(size, args.rates, args.repeats, args.ways)
            else:
                figures[f"{size:g} M"] = measure(Training(size, args.device), args.rates, args.repeats, args.ways)
            for rate in args.rates:
                report(f"{size:g} M", rate, figures[f"{size:g} M"])
    write_result(
        args.json,
        question="How long do new weights take from the learner to a worker's host memory, and in how many bytes?",
        figures=figures,
        peers={size: {rate: each["peers"] for rate, each in of.items() if rate != "parameters"} for size, of in
               figures.items()},
        bars=bars(figures, args.rates),
        device=hardware(),
    )  # fmt: skip


def report(size: str, rate: float, results: dict[str, Any]) -> None:
    of = results[f"lr {rate:g}"]
    print(f"{size}, {results['parameters']:,} parameters, lr {rate:g}:")
    for name, figures in of["ways"].items():
        parts = ", ".join(f"{what[:-2]} {figures[what]['median']:.3f}" for what in figures if what.endswith("_s"))
        print(f"  {name}: {figures['bytes']['median'] / 1e6:.2f} MB; seconds: {parts}")
    for name, values in of["peers"].items():
        print(f"  {name}: {values['median']:.3f} s")


if __name__ == "__main__":
    main()
